// What the formats with scales share: runs of codes, group by group. A format's `Codes` says
//   static constexpr int kBits;           // of a code: 4 or 8
//   static constexpr bool kInterleaved;   // what Decode gives: even and odd columns, or the first and second half
//   template <class Ops> static void Decode(const uint8_t* codes, typename Ops::F* a, typename Ops::F* b);
//   template <class Ops> static void Store(const uint8_t* codes, typename Ops::Element* out);  // Decode, as elements
// where Decode and Store read the codes of 2 * kLanes neighbouring columns.
#pragma once

#include "formats/format.h"

namespace kt {

template <class Codes>
struct ScaledFormat {
  static constexpr bool kScales = true;
  // Scales of so many columns are turned to FP32 at a time.
  static constexpr int64_t kColumnsAtOnce = 1024;

  static const uint8_t* Address(const MatrixView& w, int64_t row, int64_t column) {
    return w.rows + row * w.row_stride + column * Codes::kBits / 8;
  }

  template <class Ops>
  static const typename Ops::Element* Elements(const MatrixView&, int64_t) {
    return nullptr;
  }

  template <class Ops, bool kScaled>
  static void DecodeRow(const MatrixView& w, int64_t row, int64_t column, int64_t count, typename Ops::Element* out) {
    if (!kScaled && w.zeros == nullptr) return Run<Ops, false, false>(w, row, column, count, out);
    for (const int64_t end = column + count; column < end; column += kColumnsAtOnce, out += kColumnsAtOnce) {
      const int64_t some = Smaller(kColumnsAtOnce, end - column);
      if (w.zeros == nullptr) {
        Run<Ops, kScaled, false>(w, row, column, some, out);
      } else {
        Run<Ops, kScaled, true>(w, row, column, some, out);
      }
    }
  }

 private:
  template <class Ops, bool kScaled, bool kZero>
  static void Run(const MatrixView& w, int64_t row, int64_t column, int64_t count, typename Ops::Element* out) {
    using F = typename Ops::F;
    constexpr int kStep = 2 * Ops::kLanes, kBytes = kStep * Codes::kBits / 8;
    static_assert(kLeastGroup % kStep == 0, "a step must lie within one group");
    const int shift = GroupShift(w);
    const int64_t first = column >> shift;
    float scales[kColumnsAtOnce / kLeastGroup + 1];
    if (kScaled) LoadScales(w, row, first, ((column + count - 1) >> shift) - first + 1, scales);
    const uint8_t* const zeros = kZero ? w.zeros + row / w.group_rows * w.zero_stride + first : nullptr;
    const uint8_t* codes = Address(w, row, column);
    const auto step = [&](int64_t i, const uint8_t* from, typename Ops::Element* to) {
      if constexpr (!kScaled && !kZero) return Codes::template Store<Ops>(from, to);
      const int64_t group = ((column + i) >> shift) - first;
      F a, b;
      Codes::template Decode<Ops>(from, &a, &b);
      if constexpr (kZero) {
        const F zero = Ops::Set(static_cast<float>(zeros[group] - 8));
        a = Ops::Sub(a, zero), b = Ops::Sub(b, zero);
      }
      if constexpr (kScaled) {
        const F scale = Ops::Set(scales[group]);
        a = Ops::Mul(a, scale), b = Ops::Mul(b, scale);
      }
      if constexpr (Codes::kInterleaved) {
        Ops::StoreInterleaved(a, b, to);
      } else {
        Ops::StoreHalves(a, b, to);
      }
    };
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep, codes += kBytes) step(i, codes, out + i);
    if (i == count) return;
    uint8_t last[kBytes] = {};
    std::memcpy(last, codes, static_cast<size_t>((count - i) * Codes::kBits + 7) / 8);
    typename Ops::Element decoded[kStep];
    step(i, last, decoded);
    std::memcpy(out + i, decoded, static_cast<size_t>(count - i) * sizeof(*out));
  }
};

}  // namespace kt
