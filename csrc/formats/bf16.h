// bf16: one BF16 value per weight, no scales.
#pragma once

#include "cpu/numeric.h"
#include "formats/format.h"

namespace kt {

struct Bf16Format {
  static constexpr bool kScales = false, kSpread = false;

  // Where the weight at (row, column) is stored.
  static const uint8_t* Address(const MatrixView& w, int64_t row, int64_t column) {
    return w.rows + row * w.row_stride + column * 2;
  }

  // Two vectors' worth of values as elements.
  template <class Ops>
  static typename Ops::Step Step(const uint8_t* values) {
    return Ops::StepOfBf16(reinterpret_cast<const Bf16*>(values));
  }
  static constexpr int64_t CodeBytes(int64_t columns) { return 2 * columns; }

  template <class Ops>
  static constexpr bool InPlace() {
    return sizeof(typename Ops::Element) == sizeof(Bf16);
  }

  template <class Ops, bool>
  static void DecodeRow(const MatrixView& w, int64_t row, int64_t column, int64_t count, typename Ops::Element* out) {
    Ops::ElementsFromBf16(Address(w, row, column), count, out);
  }
};

}  // namespace kt
