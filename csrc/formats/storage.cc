// How formats are stored: names, sizes, places, and what a stored row says.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "formats/four_bit.h"
#include "formats/quantise.h"

namespace kt {
namespace {

// Scales in a row of them.
int64_t Groups(const Storage& storage, int64_t columns) {
  return storage.scale_type == ScaleType::kNone ? 0 : storage.group == 0 ? 1 : CeilDiv(columns, storage.group);
}
int64_t ScalesAt(const Storage& storage, int64_t rows, int64_t columns) {
  return RoundUp(rows * storage.row_bytes(columns), 64);
}
int64_t ScalesEnd(const Storage& storage, int64_t rows, int64_t columns) {
  return ScalesAt(storage, rows, columns) +
         CeilDiv(rows, storage.group_rows) * Groups(storage, columns) * ScaleBytes(storage.scale_type);
}

constexpr const char* kNames[kFormatCount] = {"bf16", "int8", "int4", "nf4", "fp8", "mxfp4"};

}  // namespace

const char* FormatName(Format format) { return kNames[static_cast<int>(format)]; }

Format FormatFromName(const char* name) {
  for (int i = 0; i < kFormatCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Format>(i);
  }
  throw std::invalid_argument(std::string("unknown weight format '") + name +
                              "'; it is one of bf16, int8, int4, nf4, fp8, mxfp4");
}

int64_t Storage::row_bytes(int64_t columns) const {
  switch (format) {
    case Format::kBf16:
      return 2 * columns;
    case Format::kInt8:
    case Format::kFp8:
      return columns;
    case Format::kInt4:
    case Format::kNf4:
    case Format::kMxfp4:
      break;
  }
  return CeilDiv(columns, 2);
}

int64_t Storage::bytes(int64_t rows, int64_t columns) const {
  if (scale_type == ScaleType::kNone) return rows * row_bytes(columns);
  const int64_t end = ScalesEnd(*this, rows, columns);
  return zero_point ? RoundUp(end, 64) + CeilDiv(rows, group_rows) * Groups(*this, columns) : end;
}

MatrixView Storage::view(const uint8_t* base, int64_t rows, int64_t columns) const {
  MatrixView view;
  view.rows = base;
  view.row_stride = row_bytes(columns);
  view.bits = row_bytes(2) * 4;  // of two columns' bytes
  view.group = group == 0 ? std::max<int64_t>(columns, 1) : group;
  view.group_rows = group_rows;
  if (scale_type == ScaleType::kNone) return view;
  view.scale_type = scale_type;
  view.scales = base + ScalesAt(*this, rows, columns);
  view.scale_stride = Groups(*this, columns) * ScaleBytes(scale_type);
  if (!zero_point) return view;
  view.zeros = base + RoundUp(ScalesEnd(*this, rows, columns), 64);
  view.zero_stride = Groups(*this, columns);
  return view;
}

Storage StorageOf(Format format, int64_t group, bool zero_point) {
  const std::string name = FormatName(format);
  if (zero_point && format != Format::kInt4)
    throw std::invalid_argument("a zero point belongs to int4; " + name + " has none");
  const auto require = [&](bool holds, const char* possible) {
    if (holds) return;
    throw std::invalid_argument("a group size of " + std::to_string(group) + " is not possible with " + name + ": " +
                                possible);
  };
  constexpr const char* kPowers = "it is 0 (whole rows) or a power of two from 32 to 65536";
  const bool power = group == 0 || (group >= kLeastGroup && group <= 65536 && (group & (group - 1)) == 0);
  switch (format) {
    case Format::kBf16:
      require(group == -1 || group == 0, "it has no scales");
      return {format, ScaleType::kNone, 0, 1, false};
    case Format::kInt8:
      require(group == -1 || power, kPowers);
      return {format, ScaleType::kF32, group == -1 ? 0 : group, 1, false};
    case Format::kInt4:
      require(group == -1 || power, kPowers);
      return {format, ScaleType::kBf16, group == -1 ? 32 : group, 1, zero_point};
    case Format::kNf4:
      require(group == -1 || power, kPowers);
      return {format, ScaleType::kBf16, group == -1 ? 64 : group, 1, false};
    case Format::kFp8:
      require(group == -1 || group == 0 || group == 128, "it is 128 (blocks of 128 x 128) or 0 (whole rows)");
      return {format, ScaleType::kF32, group == -1 ? 128 : group, group == 0 ? 1 : 128, false};
    case Format::kMxfp4:
      break;
  }
  require(group == -1 || group == 32, "it is 32");
  return {format, ScaleType::kE8M0, 32, 1, false};
}

void DequantiseRow(Format format, const MatrixView& view, int64_t row, int64_t columns, float* values) {
  const uint8_t* const codes = view.rows + row * view.row_stride;
  for (int64_t c = 0; c < columns; ++c) {
    const int nibble = codes[format == Format::kBf16 ? 0 : c / 2] >> (c % 2 * 4) & 15;
    const int64_t group = view.group == 0 ? 0 : c / view.group;
    float code = 0.0F, scale = 1.0F;
    switch (format) {
      case Format::kBf16:
        code = LoadAsFloat(codes, DType::kBf16, c);
        break;
      case Format::kInt8:
        code = static_cast<float>(static_cast<int8_t>(codes[c]));
        break;
      case Format::kInt4:
        code = static_cast<float>(
            nibble - (view.zeros == nullptr ? 8 : view.zeros[row / view.group_rows * view.zero_stride + group]));
        break;
      case Format::kNf4:
        code = kNf4Values[nibble];
        break;
      case Format::kFp8:
        code = FloatFromFp8(codes[c]);
        break;
      case Format::kMxfp4:
        code = kMxfp4Values[nibble];
        break;
    }
    if (view.scale_type != ScaleType::kNone) LoadScales(view, row, group, 1, &scale);
    values[c] = code * scale;
  }
}

}  // namespace kt
