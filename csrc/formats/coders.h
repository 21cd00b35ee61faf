// Coders: which code is nearest to a weight / scale, four weights at a time. A coder has
//   F4 Nearest(F4 x) const;  // the nearest value that a code stands for; ties go to even codes, but for nf4
//   F4 Nearest(F4 x, I4* code) const;  // and its code
//   static constexpr bool kFourBit;    // two codes to a byte
// No branches, and nothing above the instructions that every CPU of the architecture has.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "formats/four_bit.h"

namespace kt {

constexpr int64_t kLanes = 4;
using F4 = float __attribute__((vector_size(16)));
using I4 = int32_t __attribute__((vector_size(16)));

static inline F4 Load(const float* from) {
  F4 value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
static inline F4 Broadcast(float value) { return F4{value, value, value, value}; }
// Compilers do not always see a minimum in a < b ? a : b.
#ifdef __SSE2__
static inline F4 Smaller(F4 a, F4 b) { return _mm_min_ps(a, b); }
static inline F4 Larger(F4 a, F4 b) { return _mm_max_ps(a, b); }
#else
static inline F4 Smaller(F4 a, F4 b) { return a < b ? a : b; }
static inline F4 Larger(F4 a, F4 b) { return a > b ? a : b; }
#endif
static inline F4 Clamp(F4 x, float low, float high) { return Smaller(Larger(x, Broadcast(low)), Broadcast(high)); }
static inline I4 Bits(F4 x) { return reinterpret_cast<I4>(x); }
static inline F4 FromBits(I4 x) { return reinterpret_cast<F4>(x); }

// Integers from `low` to `high`, stored with `offset` added.
template <bool kIsFourBit>
struct IntegerCoder {
  static constexpr bool kFourBit = kIsFourBit;
  float low, high;
  int32_t offset;

  F4 Nearest(F4 x) const {
    const F4 unit = Broadcast(0x1.8p23F);  // FP32 numbers of this size are integers: adding it rounds
    return (Clamp(x, low, high) + unit) - unit;
  }
  F4 Nearest(F4 x, I4* code) const {
    const F4 q = Nearest(x);
    *code = __builtin_convertvector(q, I4) + offset;
    return q;
  }
};

// Floating-point numbers of kBits: a sign, kMantissa bits of mantissa, exponents from kExponent (2^kExponent is the
// smallest normal number), and the largest number kLargest.
template <int kBits, int kMantissa, int kExponent, int kLargest>
struct FloatCoder {
  static constexpr bool kFourBit = kBits == 4;
  static constexpr uint32_t kSmallestBits = static_cast<uint32_t>(127 + kExponent) << 23;

  F4 Nearest(F4 x) const {
    x = Clamp(x, -kLargest, kLargest);
    // Numbers of the size of 1.5 x 2^(23 - kMantissa) x the power of two below |x| are multiples of the code's last
    // bit: adding such a one rounds.
    const F4 power = Larger(FromBits(Bits(x) & 0x7f800000), Broadcast(FloatFromBits(kSmallestBits)));
    const F4 unit = power * (1.5F * static_cast<float>(1 << (23 - kMantissa)));
    return (x + unit) - unit;
  }
  F4 Nearest(F4 x, I4* code) const {
    const F4 q = Nearest(x);
    const float smallest = FloatFromBits(kSmallestBits);
    const I4 sign = (Bits(q) >> 31) & (1 << (kBits - 1)), magnitude = Bits(q) & 0x7fffffff;
    const I4 normal = (magnitude >> (23 - kMantissa)) - ((126 + kExponent) << kMantissa);
    const float last_bits = static_cast<float>(1 << kMantissa) / smallest;
    const I4 denormal = __builtin_convertvector(FromBits(magnitude) * last_bits, I4);
    *code = (FromBits(magnitude) < smallest ? denormal : normal) | sign;
    return q;
  }
};
using Fp8Coder = FloatCoder<8, 3, -6, 448>;
using Mxfp4Coder = FloatCoder<4, 1, 0, 6>;

// The thresholds between the table's values are multiples of 2^-12: x x 4096, cut to an integer, tells the code.
struct Nf4Coder {
  static constexpr bool kFourBit = true;
  static constexpr int kUnits = 4096;
  struct Table {
    uint8_t code[2 * kUnits + 1] = {};
  };

  static constexpr Table MakeTable() {
    Table table;
    int code = 0;
    for (int i = -kUnits; i <= kUnits; ++i) {
      // Integer 0 stands for all of (-1, 1), a negative one for what is below it down to the next.
      const float inside = static_cast<float>(i) + (i < 0 ? -0.5F : i > 0 ? 0.5F : 0.0F);
      while (code < 15 && inside > (kNf4Values[code] + kNf4Values[code + 1]) / 2 * kUnits) ++code;
      table.code[i + kUnits] = static_cast<uint8_t>(code);
    }
    return table;
  }

  static I4 Code(F4 x) {
    static constexpr Table kTable = MakeTable();
    const I4 units = __builtin_convertvector(Clamp(x, -1, 1) * kUnits, I4);
    const uint8_t* const middle = kTable.code + kUnits;
    return I4{middle[units[0]], middle[units[1]], middle[units[2]], middle[units[3]]};
  }
  static F4 Value(I4 code) {
    return F4{kNf4Values[code[0]], kNf4Values[code[1]], kNf4Values[code[2]], kNf4Values[code[3]]};
  }
  F4 Nearest(F4 x) const { return Value(Code(x)); }
  F4 Nearest(F4 x, I4* code) const {
    *code = Code(x);
    return Value(*code);
  }
};

}  // namespace kt
