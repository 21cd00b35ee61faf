// From FP32 weights to a format's codes and scales, and back.
#pragma once

#include <cstdint>

#include "formats/format.h"

namespace kt {

// How a format is stored here: where a matrix's codes, scales and zero points lie, relative to its first byte.
struct Storage {
  Format format = Format::kBf16;
  ScaleType scale_type = ScaleType::kNone;
  int64_t group = 0;       // columns that share a scale; 0: the whole row
  int64_t group_rows = 1;  // rows that share a scale
  bool zero_point = false;

  int64_t row_bytes(int64_t columns) const;
  // Of a matrix of that size, in all.
  int64_t bytes(int64_t rows, int64_t columns) const;
  // The matrix at `base`.
  MatrixView view(const uint8_t* base, int64_t rows, int64_t columns) const;
};

// The storage of a format: `group` columns to a scale (-1: the format's own default; 0: whole rows). Throws
// std::invalid_argument, naming what is possible, for a group or a zero point that the format does not have.
Storage StorageOf(Format format, int64_t group, bool zero_point);

const char* FormatName(Format format);
// Throws std::invalid_argument for any other name.
Format FormatFromName(const char* name);

// What quantising did: sums over weights of (value - stored value)^2 and value^2.
struct QuantisationError {
  double squared_error = 0.0;
  double squared_values = 0.0;
};

// Quantises rows [row, row + rows) of the matrix at `base`, `rows` x `columns` finite FP32 values one after the other;
// `row` is a multiple of group_rows, and so is `rows` unless the matrix ends there. Scales (and zero points) are those
// with the least squared error of the ones that are tried, never more than the plain definition (largest magnitude onto
// the largest code) gives. Thread-safe for different rows.
QuantisationError Quantise(const Storage& storage, const float* values, int64_t row, int64_t rows, int64_t matrix_rows,
                           int64_t columns, uint8_t* base);

// The units that `Quantise` chooses from, besides one for every CPU (see quantise.inl).
using QuantiseFn = QuantisationError (*)(const Storage& storage, const float* values, int64_t row, int64_t rows,
                                         int64_t matrix_rows, int64_t columns, uint8_t* base, float* room);
extern const QuantiseFn kQuantiseAvx2, kQuantiseAvx512;

// FP32 code x scale of row `row`.
void DequantiseRow(Format format, const MatrixView& view, int64_t row, int64_t columns, float* values);

}  // namespace kt
