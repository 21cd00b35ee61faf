// What the formats with scales share: runs of codes, group by group. A step is 2 * kLanes neighbouring columns. A
// format's `Codes` says
//   static constexpr int kBits;  // of a code: 4 or 8
//   template <class Ops> static void Decode(const uint8_t* codes, typename Ops::F* a, typename Ops::F* b);
//   template <class Ops> static typename Ops::Step Join(typename Ops::F a, typename Ops::F b);
//   template <class Ops> static typename Ops::Step Bare(const uint8_t* codes);
// Decode gives a step's codes as FP32, in whatever order is cheapest; Join makes the tier's elements of them, in order;
// Bare does both at once.
//   template <class Ops> static void StorePair(typename Ops::F a, typename Ops::F b, float* out);
// stores what Decode gave as 2 * kLanes values in order, for values that are pairs of elements of two rows.
#pragma once

#include "formats/format.h"

namespace kt {

template <class Codes>
struct ScaledFormat {
  static constexpr bool kScales = true;
  // Whether tokens are spread to meet the codes of a row (see tiers/stream.inl).
  static constexpr bool kSpread = Codes::kBits == 4;
  // Scales of so many columns are turned to FP32 at a time.
  static constexpr int64_t kColumnsAtOnce = 1024;

  static const uint8_t* Address(const MatrixView& w, int64_t row, int64_t column) {
    return w.rows + row * w.row_stride + column * Codes::kBits / 8;
  }

  // The bare codes of a step, as multiples of kUnit.
  static constexpr float kUnit = Codes::kUnit;
  template <class Ops>
  static typename Ops::Step Step(const uint8_t* codes) {
    return Codes::template InUnits<Ops>(codes);
  }
  // The code in the lowest bits of every element.
  template <class Ops>
  static typename Ops::Panel Lowest(typename Ops::I codes) {
    return Codes::template Lowest<Ops>(codes);
  }
  static constexpr int64_t CodeBytes(int64_t columns) { return (columns * Codes::kBits + 7) / 8; }

  template <class Ops>
  static constexpr bool InPlace() {
    return false;
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

  // Decodes two neighbouring rows, `count` columns (a multiple of a panel's width), scaled, as one pair of each panel.
  template <class Ops>
  static void DecodePair(const MatrixView& w, int64_t row, int64_t column, int64_t count, typename Ops::Element* out,
                         int64_t panel_stride) {
    for (const int64_t end = column + count; column < end; column += kColumnsAtOnce) {
      const int64_t some = Smaller(kColumnsAtOnce, end - column);
      if (w.zeros == nullptr) {
        RunPair<Ops, false>(w, row, column, some, out, panel_stride);
      } else {
        RunPair<Ops, true>(w, row, column, some, out, panel_stride);
      }
      out += kColumnsAtOnce / (Ops::kLanes * Ops::kTileVectors) * panel_stride;
    }
  }

 private:
  // The scales and zero points of a run of columns of one row.
  template <class Ops>
  struct Groups {
    Groups(const MatrixView& w, int64_t row, int64_t column, int64_t count, bool scaled)
        : shift(GroupShift(w)), column(column), first(column >> shift) {
      if (scaled) LoadScales(w, row, first, ((column + count - 1) >> shift) - first + 1, scales);
      zeros = w.zeros == nullptr ? nullptr : w.zeros + row / w.group_rows * w.zero_stride + first;
    }

    // Decodes the step `i` columns further on.
    template <bool kScaled, bool kZero>
    void Decode(int64_t i, const uint8_t* codes, typename Ops::F* a, typename Ops::F* b) const {
      const int64_t group = ((column + i) >> shift) - first;
      Codes::template Decode<Ops>(codes, a, b);
      if constexpr (kZero) {
        const typename Ops::F zero = Ops::Set(static_cast<float>(zeros[group] - 8));
        *a = Ops::Sub(*a, zero), *b = Ops::Sub(*b, zero);
      }
      if constexpr (kScaled) {
        const typename Ops::F scale = Ops::Set(scales[group]);
        *a = Ops::Mul(*a, scale), *b = Ops::Mul(*b, scale);
      }
    }

    const int shift;
    const int64_t column, first;
    const uint8_t* zeros;
    float scales[kColumnsAtOnce / kLeastGroup + 1];
  };

  template <class Ops, bool kScaled, bool kZero>
  static void Run(const MatrixView& w, int64_t row, int64_t column, int64_t count, typename Ops::Element* out) {
    constexpr int kStep = 2 * Ops::kLanes, kBytes = CodeBytes(kStep);
    static_assert(kLeastGroup % kStep == 0, "a step must lie within one group");
    const Groups<Ops> groups(w, row, column, count, kScaled);
    const uint8_t* codes = Address(w, row, column);
    const auto step = [&](int64_t i, const uint8_t* from, typename Ops::Element* to) {
      if constexpr (!kScaled && !kZero) return Ops::StoreStep(Codes::template Bare<Ops>(from), to);
      typename Ops::F a, b;
      groups.template Decode<kScaled, kZero>(i, from, &a, &b);
      Ops::StoreStep(Codes::template Join<Ops>(a, b), to);
    };
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep, codes += kBytes) step(i, codes, out + i);
    if (i == count) return;
    uint8_t last[kBytes] = {};
    std::memcpy(last, codes, static_cast<size_t>(CodeBytes(count - i)));
    typename Ops::Element decoded[kStep];
    step(i, last, decoded);
    std::memcpy(out + i, decoded, static_cast<size_t>(count - i) * sizeof(*out));
  }

  template <class Ops, bool kZero>
  static void RunPair(const MatrixView& w, int64_t row, int64_t column, int64_t count, typename Ops::Element* out,
                      int64_t panel_stride) {
    constexpr int kStep = 2 * Ops::kLanes, kWidth = Ops::kLanes * Ops::kTileVectors;
    const Groups<Ops> low(w, row, column, count, true), high(w, row + 1, column, count, true);
    const uint8_t* codes = Address(w, row, column);
    for (int64_t c = 0; c < count; c += kWidth, out += panel_stride) {
      for (int i = 0; i < kWidth; i += kStep, codes += CodeBytes(kStep)) {
        typename Ops::F a0, b0, a1, b1;
        low.template Decode<true, kZero>(c + i, codes, &a0, &b0);
        high.template Decode<true, kZero>(c + i, codes + w.row_stride, &a1, &b1);
        Codes::template StorePair<Ops>(Ops::PackBf16(a0, a1), Ops::PackBf16(b0, b1),
                                       reinterpret_cast<float*>(out + i * Ops::kPair));
      }
    }
  }
};

}  // namespace kt
