// What the formats with scales share: runs of codes, group by group. A format's `Codes` says
//   static constexpr int kBits;           // of a code: 4 or 8
//   static constexpr bool kInterleaved;   // what Decode gives: even and odd columns, or the first and second half
//   template <class Ops> static void Decode(const uint8_t* codes, typename Ops::F* a, typename Ops::F* b);
// where Decode reads the codes of 2 * kLanes neighbouring columns.
#pragma once

#include "formats/format.h"

namespace kt {

template <class Codes>
struct ScaledFormat {
  static constexpr bool kScales = true;
  // So many groups' scales are turned to FP32 at a time.
  static constexpr int64_t kScalesAtOnce = 16;

  static const uint8_t* Address(const MatrixView& w, int64_t row, int64_t column) {
    return w.rows + row * w.row_stride + column * Codes::kBits / 8;
  }

  template <class Ops>
  static const typename Ops::Element* Elements(const MatrixView&, int64_t) {
    return nullptr;
  }

  template <class Ops, bool kScaled>
  static void DecodeRow(const MatrixView& w, int64_t row, int64_t column, int64_t count, typename Ops::Element* out) {
    const int64_t end = column + count;
    float scales[kScalesAtOnce] = {};
    for (int64_t group = column / w.group; column < end; group += kScalesAtOnce) {
      const int64_t groups = Smaller(kScalesAtOnce, (end - 1) / w.group - group + 1);
      if (kScaled) LoadScales(w, row, group, groups, scales);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t run = Smaller(end, (group + g + 1) * w.group) - column;
        const float zero = w.zeros == nullptr ? 0.0F : static_cast<float>(Zero(w, row, group + g) - 8);
        const uint8_t* const codes = Address(w, row, column);
        if (w.zeros == nullptr) {
          Run<Ops, kScaled, false>(codes, run, zero, scales[g], out);
        } else {
          Run<Ops, kScaled, true>(codes, run, zero, scales[g], out);
        }
        column += run;
        out += run;
      }
    }
  }

 private:
  static int Zero(const MatrixView& w, int64_t row, int64_t group) {
    return w.zeros[row / w.group_rows * w.zero_stride + group];
  }

  // `count` columns that share a scale.
  template <class Ops, bool kScaled, bool kZero>
  static void Run(const uint8_t* codes, int64_t count, float zero, float scale, typename Ops::Element* out) {
    using F = typename Ops::F;
    constexpr int kStep = 2 * Ops::kLanes, kBytes = kStep * Codes::kBits / 8;
    const F scale_F = Ops::Set(scale), zero_F = Ops::Set(zero);
    const auto step = [&](const uint8_t* from, typename Ops::Element* to) {
      F a, b;
      Codes::template Decode<Ops>(from, &a, &b);
      if (kZero) a = Ops::Sub(a, zero_F), b = Ops::Sub(b, zero_F);
      if (kScaled) a = Ops::Mul(a, scale_F), b = Ops::Mul(b, scale_F);
      if (Codes::kInterleaved) {
        Ops::StoreInterleaved(a, b, to);
      } else {
        Ops::StoreHalves(a, b, to);
      }
    };
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep, codes += kBytes) step(codes, out + i);
    if (i == count) return;
    uint8_t last[kBytes] = {};
    std::memcpy(last, codes, static_cast<size_t>((count - i) * Codes::kBits + 7) / 8);
    typename Ops::Element decoded[kStep];
    step(last, decoded);
    std::memcpy(out + i, decoded, static_cast<size_t>(count - i) * sizeof(*out));
  }
};

}  // namespace kt
