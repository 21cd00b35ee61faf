// Dropout on what adapters read (Srivastava et al. 2014): values are left out at random. Which ones is a function of a
// seed and of their place alone, so that every pass finds the same, in any order and with any number of threads.
#pragma once

#include <cstdint>

namespace kt {

struct Dropout {
  uint64_t seed = 0;
  uint32_t below = 0;  // of 2^32 equally likely numbers, how many leave a value out; 0: none is
};

// What is left out of one row of values: the hidden states of a routed slot, or its activations.
class DropoutRow {
 public:
  static constexpr int kHidden = 0, kActivations = 1;

  // `slot` is a place in the call's [T, K].
  DropoutRow(const Dropout& dropout, int of, int64_t slot)
      : key_(Mix(dropout.seed + Mix(2 * static_cast<uint64_t>(slot) + static_cast<uint64_t>(of)))),
        below_(dropout.below) {}

  // Calls function(column) for every column of [first, end) that is left out.
  template <class Function>
  void ForEachDropped(int64_t first, int64_t end, const Function& function) const {
    for (int64_t pair = first / 2; 2 * pair < end; ++pair) {  // one number serves two columns
      const uint64_t bits = Mix(key_ + static_cast<uint64_t>(pair) * kStep);
      if (static_cast<uint32_t>(bits) < below_ && 2 * pair >= first) function(2 * pair);
      if (static_cast<uint32_t>(bits >> 32) < below_ && 2 * pair + 1 < end) function(2 * pair + 1);
    }
  }

 private:
  static constexpr uint64_t kStep = 0x9E3779B97F4A7C15;

  // SplitMix64 (Steele, Lea, Flood 2014): numbers kStep apart give random ones.
  static uint64_t Mix(uint64_t x) {
    x += kStep;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
  }

  uint64_t key_;
  uint32_t below_;
};

}  // namespace kt
