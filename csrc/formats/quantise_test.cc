// Quantisers against their definition, with scalar arithmetic in double precision.
#include "formats/quantise.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/four_bit.h"
#include "testing.h"

namespace kt {
namespace {

struct Kind {
  Format format;
  int64_t group;
  bool zero_point;
};
constexpr Kind kKinds[] = {
    {Format::kBf16, -1, false}, {Format::kInt8, -1, false},  {Format::kInt8, 32, false}, {Format::kInt8, 128, false},
    {Format::kInt4, -1, false}, {Format::kInt4, 128, false}, {Format::kInt4, 0, false},  {Format::kInt4, -1, true},
    {Format::kInt4, 64, true},  {Format::kNf4, -1, false},   {Format::kNf4, 0, false},   {Format::kFp8, -1, false},
    {Format::kFp8, 0, false},   {Format::kMxfp4, -1, false},
};

struct Quantised {
  Storage storage;
  int64_t rows, columns;
  std::vector<uint8_t> bytes;
  std::vector<float> values;  // dequantised
  QuantisationError error;

  MatrixView view() const { return storage.view(bytes.data(), rows, columns); }
};

// Quantises a band of rows at a time, as loading does.
Quantised RoundTrip(const Kind& kind, const std::vector<float>& values, int64_t rows, int64_t columns) {
  Quantised result{StorageOf(kind.format, kind.group, kind.zero_point), rows, columns, {}, values, {}};
  result.bytes.resize(static_cast<size_t>(result.storage.bytes(rows, columns)));
  for (int64_t r = 0; r < rows; r += result.storage.group_rows) {
    const QuantisationError error =
        Quantise(result.storage, values.data() + r * columns, r, std::min(result.storage.group_rows, rows - r), rows,
                 columns, result.bytes.data());
    result.error.squared_error += error.squared_error;
    result.error.squared_values += error.squared_values;
  }
  for (int64_t r = 0; r < rows; ++r)
    DequantiseRow(kind.format, result.view(), r, columns, result.values.data() + r * columns);
  return result;
}

std::string Describe(const Kind& kind) {
  return std::string(FormatName(kind.format)) + " group " + std::to_string(kind.group) +
         (kind.zero_point ? " with zero points" : "");
}

TEST(WhatIsRepresentableSurvives) {
  std::mt19937 random(1);
  for (const Kind& kind : kKinds) {
    if (kind.zero_point) continue;
    const Quantised first = RoundTrip(kind, testing::RandomFloats(130 * 161, 1.0F, random), 130, 161);
    const Quantised second = RoundTrip(kind, first.values, 130, 161);
    CHECK_MESSAGE(second.values == first.values, Describe(kind));
    CHECK_MESSAGE(second.error.squared_error == 0, Describe(kind));
  }
}

}  // namespace
}  // namespace kt
