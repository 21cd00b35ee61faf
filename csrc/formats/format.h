// Weight formats: what the rows of a matrix hold, and the list of decoders.
//
// A decoder is a struct with
//   static constexpr const char* kName;
//   static constexpr int64_t RowBytes(int64_t columns);
//   static const uint8_t* Address(const MatrixView&, int64_t row, int64_t column);  // where a weight is stored
//   template <class Ops> static const typename Ops::Element* Elements(const MatrixView&, int64_t row);
//   template <class Ops> static void DecodeRow(const MatrixView&, int64_t row, int64_t column, int64_t count,
//                                              typename Ops::Element* out);
// Elements is the stored row itself where it needs no decoding on this tier, else null. DecodeRow turns `count` weights
// of one row, from `column` on, into the tier's element type. It is instantiated once per tier, with that tier's `Ops`,
// so it may use the tier's vector operations.
#pragma once

#include <cstdint>

namespace kt {

enum class Format { kBf16 };
constexpr int kFormatCount = 1;

// One expert's matrix: rows in the checkpoint's own order, at any alignment, nothing assumed adjacent.
struct MatrixView {
  const uint8_t* rows = nullptr;
  int64_t row_stride = 0;  // bytes
};

}  // namespace kt
