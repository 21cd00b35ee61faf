// bf16: one BF16 value per weight, no scales.
#pragma once

#include "cpu/numeric.h"
#include "formats/format.h"

namespace kt {

struct Bf16Format {
  static constexpr bool kScales = false;

  // Where the weight at (row, column) is stored.
  static const uint8_t* Address(const MatrixView& w, int64_t row, int64_t column) {
    return w.rows + row * w.row_stride + column * 2;
  }

  // The stored row itself where it already holds the tier's elements, else null.
  template <class Ops>
  static const typename Ops::Element* Elements([[maybe_unused]] const MatrixView& w, [[maybe_unused]] int64_t row) {
    if constexpr (sizeof(typename Ops::Element) == sizeof(Bf16)) {
      return reinterpret_cast<const typename Ops::Element*>(Address(w, row, 0));
    }
    return nullptr;
  }

  template <class Ops, bool>
  static void DecodeRow(const MatrixView& w, int64_t row, int64_t column, int64_t count, typename Ops::Element* out) {
    Ops::ElementsFromBf16(Address(w, row, column), count, out);
  }
};

}  // namespace kt
