// Quantisers against their definition, with scalar arithmetic in double precision.
#include "formats/quantise.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "formats/four_bit.h"
#include "testing.h"

namespace kt {
namespace {

struct Kind {
  Format format;
  int group;
  bool zero_point;
};
constexpr Kind kKinds[] = {
    {Format::kBf16, -1, false}, {Format::kInt8, -1, false},  {Format::kInt8, 32, false}, {Format::kInt8, 128, false},
    {Format::kInt4, -1, false}, {Format::kInt4, 128, false}, {Format::kInt4, 0, false},  {Format::kInt4, -1, true},
    {Format::kInt4, 64, true},  {Format::kNf4, -1, false},   {Format::kNf4, 0, false},   {Format::kFp8, -1, false},
    {Format::kFp8, 0, false},   {Format::kMxfp4, -1, false},
};

std::string Describe(const Kind& kind) {
  return std::string(FormatName(kind.format)) + " group " + std::to_string(kind.group) +
         (kind.zero_point ? " with zero points" : "");
}

// The values of all codes, but for a zero point.
std::vector<double> CodeValues(Format format) {
  std::vector<double> values;
  for (int code = 0; code < 256; ++code) {
    if (format == Format::kInt8 && code != 128) values.push_back(static_cast<int8_t>(code));
    if (format == Format::kFp8 && (code & 127) != 127) values.push_back(FloatFromFp8(static_cast<uint8_t>(code)));
    if (format == Format::kInt4 && code < 16) values.push_back(kInt4Values[code]);
    if (format == Format::kNf4 && code < 16) values.push_back(kNf4Values[code]);
    if (format == Format::kMxfp4 && code < 16) values.push_back(kMxfp4Values[code]);
  }
  std::sort(values.begin(), values.end());
  return values;
}

// The smallest |value - code x scale|.
double LeastDistance(const std::vector<double>& codes, double value, double scale, double zero) {
  const double x = value / scale + zero;
  const auto above = std::lower_bound(codes.begin(), codes.end(), x);
  double least = HUGE_VAL;
  if (above != codes.end()) least = *above - x;
  if (above != codes.begin()) least = std::min(least, x - *(above - 1));
  return least * std::fabs(scale);
}

struct Quantised {
  Kind kind;
  Storage storage;
  int64_t rows, columns;
  std::vector<uint8_t> bytes;
  std::vector<float> values;  // dequantised
  QuantisationError error;

  MatrixView view() const { return storage.view(bytes.data(), rows, columns); }
  void Dequantise() {
    values.resize(static_cast<size_t>(rows * columns));
    for (int64_t r = 0; r < rows; ++r) DequantiseRow(kind.format, view(), r, columns, values.data() + r * columns);
  }
  float scale(int64_t row, int64_t group) const {
    float scale = 1.0F;
    if (storage.scale_type != ScaleType::kNone) LoadScales(view(), row, group, 1, &scale);
    return scale;
  }
  // What the zero point adds to a code's value in CodeValues.
  double zero(int64_t row, int64_t group) const {
    const MatrixView matrix = view();
    return matrix.zeros == nullptr ? 0.0 : matrix.zeros[row * matrix.zero_stride + group] - 8.0;
  }
};

Quantised Empty(const Kind& kind, int64_t rows, int64_t columns) {
  Quantised result{kind, StorageOf(kind.format, kind.group, kind.zero_point), rows, columns, {}, {}, {}};
  result.bytes.assign(static_cast<size_t>(result.storage.bytes(rows, columns)), 0x5a);
  return result;
}

// Quantises a band of rows at a time, as loading does.
Quantised RoundTrip(const Kind& kind, const std::vector<float>& values, int64_t rows, int64_t columns) {
  Quantised result = Empty(kind, rows, columns);
  const int64_t band = result.storage.group_rows;
  for (int64_t r = 0; r < rows; r += band) {
    const QuantisationError error = Quantise(result.storage, values.data() + r * columns, r, std::min(band, rows - r),
                                             rows, columns, result.bytes.data());
    result.error.squared_error += error.squared_error;
    result.error.squared_values += error.squared_values;
  }
  result.Dequantise();
  return result;
}

double SquaredError(const std::vector<float>& values, const std::vector<float>& stored) {
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double off = static_cast<double>(values[i]) - stored[i];
    sum += off * off;
  }
  return sum;
}

// Calls visit(first row, rows, first column, columns, group) for all that share a scale.
template <class Visit>
void ForEachGroup(const Quantised& q, const Visit& visit) {
  const MatrixView view = q.view();
  for (int64_t r = 0; r < q.rows; r += view.group_rows) {
    for (int64_t c = 0; c < q.columns; c += view.group)
      visit(r, std::min(view.group_rows, q.rows - r), c, std::min(view.group, q.columns - c), c / view.group);
  }
}

enum class Data { kNormal, kUniform, kHeavyTails, kOutliers, kNegative };
std::vector<float> Make(Data data, int64_t count, std::mt19937& random) {
  std::student_t_distribution<float> heavy(3);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values = testing::RandomFloats(count, 0.02F, random);
  for (float& value : values) {
    if (data == Data::kUniform) value = uniform(random);
    if (data == Data::kHeavyTails) value = heavy(random);
    if (data == Data::kOutliers && random() % 100 == 0) value *= 40;
    if (data == Data::kNegative) value = -std::fabs(value) - 0.01F;
  }
  return values;
}
constexpr Data kData[] = {Data::kNormal, Data::kUniform, Data::kHeavyTails, Data::kOutliers, Data::kNegative};

// The scale of the plain definition: the largest magnitude onto the code of largest magnitude, as it is stored.
std::pair<double, double> PlainScaleAndZero(const Kind& kind, float smallest, float largest) {
  const auto bf16 = [](float scale) { return FloatFromBf16(Bf16FromFloat(scale)); };
  const float magnitude = std::max(-smallest, largest);
  switch (kind.format) {
    case Format::kInt8:
      return {magnitude / 127, 0};
    case Format::kInt4: {
      if (!kind.zero_point) return {bf16((magnitude == largest ? largest : smallest) / -8), 0};
      const float range = std::max(largest, 0.0F) - std::min(smallest, 0.0F);
      return {bf16(range / 15), std::nearbyint(-std::min(smallest, 0.0F) * 15.0F / range) - 8};
    }
    case Format::kNf4:
      return {bf16(magnitude), 0};
    case Format::kFp8:
      return {magnitude / 448, 0};
    case Format::kMxfp4:
      return {std::exp2(std::floor(std::log2(magnitude)) - 2), 0};
    case Format::kBf16:
      break;
  }
  return {1, 0};
}

// Scales of few bits make code x scale exact. The code of largest magnitude is in every group, as it is in what comes
// from the plain definition; for int4 it may also be 7, from quantisers that leave -8 out.
TEST(WhatIsRepresentableSurvives) {
  std::mt19937 random(1);
  for (const Kind& kind : kKinds) {
    for (int turn = 0; turn < 2; ++turn) {
      Quantised matrix = Empty(kind, 130, 161);
      const std::vector<double> codes = CodeValues(kind.format);
      std::vector<float> values = testing::RandomFloats(130 * 161, 1.0F, random);
      if (kind.format == Format::kBf16) {
        for (float& value : values) value = FloatFromBf16(Bf16FromFloat(value));
      } else {
        ForEachGroup(matrix, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t) {
          const bool power = kind.format == Format::kMxfp4;
          const double scale = std::ldexp(power ? 1 : 128 + random() % 128, -20 + static_cast<int>(random() % 40)) *
                               (kind.format == Format::kInt4 && !kind.zero_point && random() % 2 == 0 ? -1 : 1);
          const double zero = kind.zero_point ? random() % 16 - 8.0 : 0;
          const size_t lowest = turn == 1 && kind.format == Format::kInt4 && !kind.zero_point ? 1 : 0;
          for (int64_t r = row; r < row + rows; ++r) {
            for (int64_t c = column; c < column + columns; ++c) {
              const bool end = r == row && c <= column + 1 && columns > 1;
              const double code = end && c == column ? codes[lowest]
                                  : end              ? codes.back()
                                                     : codes[lowest + random() % (codes.size() - lowest)];
              values[static_cast<size_t>(r * 161 + c)] = static_cast<float>((code - zero) * scale);
            }
            if (columns == 1) values[static_cast<size_t>(r * 161 + column)] = 0.0F;
          }
        });
      }
      matrix = RoundTrip(kind, values, 130, 161);
      CHECK_MESSAGE(matrix.values == values, Describe(kind) + " changes what it can hold");
      CHECK_MESSAGE(matrix.error.squared_error == 0, Describe(kind) + " reports an error where there is none");
    }
  }
}

// A code may miss the nearest one only where the rounding of weight / scale, twice 2^-24 of it, matters.
void CheckNearest(const Quantised& q, const std::vector<float>& values, const std::string& what) {
  const std::vector<double> codes = CodeValues(q.kind.format);
  ForEachGroup(q, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t group) {
    const double scale = q.scale(row, group), zero = q.zero(row, group);
    CHECK_MESSAGE(scale != 0 && std::isfinite(scale), Describe(q.kind) + " has a bad scale for " + what);
    for (int64_t r = row; r < row + rows; ++r) {
      for (int64_t c = column; c < column + columns; ++c) {
        const auto at = static_cast<size_t>(r * q.columns + c);
        const double off = std::fabs(static_cast<double>(values[at]) - q.values[at]);
        const double least = LeastDistance(codes, values[at], scale, zero);
        // In FP32 code x scale itself is rounded, to 2^-24 of it or to the last denormal bit.
        const double slack = 0x1p-21 * (std::fabs(static_cast<double>(values[at])) + std::fabs(scale)) + 0x1p-149;
        CHECK_MESSAGE(off <= least + slack, Describe(q.kind) + " is not nearest for " + what);
        CHECK_MESSAGE(std::isfinite(q.values[at]), Describe(q.kind) + " is not finite for " + what);
      }
    }
  });
}

TEST(CodesAreTheNearestToWeightByStoredScale) {
  std::mt19937 random(2);
  for (const Kind& kind : kKinds) {
    if (kind.format == Format::kBf16) continue;
    for (const Data data : kData) {
      const std::vector<float> values = Make(data, 130 * 161, random);
      CheckNearest(RoundTrip(kind, values, 130, 161), values, "random weights");
    }
  }
}

TEST(NoGroupIsWorseThanByThePlainDefinition) {
  std::mt19937 random(3);
  for (const Kind& kind : kKinds) {
    if (kind.format == Format::kBf16) continue;
    const std::vector<double> codes = CodeValues(kind.format);
    for (const Data data : kData) {
      const int64_t height = 130, width = 300;
      const std::vector<float> values = Make(data, height * width, random);
      const Quantised q = RoundTrip(kind, values, height, width);
      double all = 0, all_plain = 0;
      ForEachGroup(q, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t) {
        float smallest = FLT_MAX, largest = -FLT_MAX;
        const auto each = [&](const auto& visit) {
          for (int64_t r = row; r < row + rows; ++r)
            for (int64_t c = column; c < column + columns; ++c) visit(static_cast<size_t>(r * width + c));
        };
        each([&](size_t at) {
          smallest = std::min(smallest, values[at]);
          largest = std::max(largest, values[at]);
        });
        const auto [scale, zero] = PlainScaleAndZero(kind, smallest, largest);
        double error = 0, plain = 0;
        each([&, scale = scale, zero = zero](size_t at) {
          const double off = static_cast<double>(values[at]) - q.values[at];
          const double plain_off = LeastDistance(codes, values[at], scale, zero);
          error += off * off, plain += plain_off * plain_off;
        });
        // Errors are compared in FP32: sums of up to 1024 squares, each to a few times 2^-24, and 2^-24 for each step.
        CHECK_MESSAGE(error <= plain * (1 + 0x1p-13), Describe(kind) + " is worse than the plain definition");
        all += error, all_plain += plain;
      });
      // Searching gains something everywhere, and no miracle: half the plain error is what no search reaches here,
      // but for mxfp4, whose plain definition cuts a quarter of a range off.
      CHECK_MESSAGE(all < all_plain, Describe(kind) + " gains nothing");
      CHECK_MESSAGE(all > 0.4 * all_plain, Describe(kind) + " is too good to be true");
    }
  }
}

TEST(TheErrorIsThatOfTheStoredWeights) {
  std::mt19937 random(4);
  for (const Kind& kind : kKinds) {
    for (const float factor : {1.0F, 0x1p-100F, 0x1p100F}) {
      std::vector<float> values = Make(factor == 1.0F ? Data::kHeavyTails : Data::kNormal, 130 * 161, random);
      for (float& value : values) value *= factor;
      const Quantised q = RoundTrip(kind, values, 130, 161);
      const double error = SquaredError(values, q.values),
                   squares = SquaredError(values, std::vector<float>(130 * 161));
      // FP32 sums as above; and a stored weight is rounded to 2^-24 of it, which matters where codes are fine.
      const double rounding = 2 * 0x1p-24 * std::sqrt(squares * error);
      CHECK_MESSAGE(std::fabs(q.error.squared_error - error) <= 0x1p-13 * error + rounding, Describe(kind));
      CHECK_MESSAGE(std::fabs(q.error.squared_values - squares) <= 0x1p-13 * squares, Describe(kind));
    }
  }
}

// Errors relative to the weights' own root mean square, on normal weights.
TEST(ErrorsOnNormalWeightsAreThoseOfTheTheory) {
  std::mt19937 random(5);
  const int64_t rows = 128, columns = 2048;
  const std::vector<float> values = testing::RandomFloats(rows * columns, 0.02F, random);
  const auto relative = [&](const Kind& kind) {
    const QuantisationError error = RoundTrip(kind, values, rows, columns).error;
    return std::sqrt(error.squared_error / error.squared_values);
  };
  // Integers: steps of the largest magnitude / `levels` have an error of step / sqrt(12), uniformly distributed.
  const auto uniform = [&](int64_t group, double levels) {
    double squares = 0, sum = 0;
    for (int64_t first = 0; first < rows * columns; first += group) {
      double largest = 0;
      for (int64_t i = first; i < first + group; ++i) {
        const double value = values[static_cast<size_t>(i)];
        largest = std::max(largest, std::fabs(value)), squares += value * value;
      }
      sum += largest * largest * static_cast<double>(group);
    }
    return std::sqrt(sum / squares / 12) / levels;
  };
  const auto within = [](double value, double low, double high, const char* what) {
    CHECK_MESSAGE(low <= value && value <= high, std::string(what) + ": " + std::to_string(value));
  };
  // The search finds a few percent less: the fewer weights to a scale, the luckier some scale is for all of them.
  within(relative({Format::kInt8, -1, false}) / uniform(columns, 127), 0.97, 1.0, "int8 by rows");
  within(relative({Format::kInt8, 128, false}) / uniform(128, 127), 0.93, 1.0, "int8 by 128");
  within(relative({Format::kInt8, 32, false}) / uniform(32, 127), 0.88, 1.0, "int8 by 32");
  within(relative({Format::kInt4, 32, false}) / uniform(32, 8), 0.90, 1.0, "int4 by 32");
  within(relative({Format::kInt4, 128, false}) / uniform(128, 8), 0.90, 1.0, "int4 by 128");
  // A zero point fits the 15 steps to the range, which is shorter than twice the largest magnitude.
  within(relative({Format::kInt4, 32, true}) / relative({Format::kInt4, 32, false}), 0.90, 0.97, "zero points by 32");
  // Floating-point codes with b bits of mantissa are steps of 2^-b x 2^e for magnitudes in 2^e x [1, 2): an error of
  // 2^-b / sqrt(12), divided by something between 1 and 2. E2M1 has the steps of [1, 2) below 1 too, hence no more.
  const double step = 1 / std::sqrt(12.0);
  within(relative({Format::kFp8, -1, false}), step / 16, step / 8, "fp8 by blocks");
  within(relative({Format::kFp8, 0, false}), step / 16, step / 8, "fp8 by rows");
  within(relative({Format::kMxfp4, -1, false}), step / 4, step / 2, "mxfp4");
  // Nf4 has the quantiles of normal weights: better than int4 in groups of the same size.
  within(relative({Format::kNf4, -1, false}) / relative({Format::kInt4, 64, false}), 0.85, 0.98, "nf4 to int4 by 64");
}

TEST(SpecialWeightsAreNormal) {
  std::mt19937 random(6);
  std::vector<std::pair<std::string, std::vector<float>>> cases;
  const int64_t rows = 3, columns = 67, count = rows * columns;
  const std::vector<float> normal = testing::RandomFloats(count, 1.0F, random);
  const auto scaled = [&](const std::string& name, float factor) {
    std::vector<float> values = normal;
    for (float& value : values) value *= factor;
    cases.emplace_back(name, values);
  };
  scaled("small weights", 0x1p-60F);
  scaled("tiny weights", 0x1p-120F);
  scaled("denormal weights", 0x1p-140F);
  scaled("a few denormal bits", 0x1p-148F);
  scaled("large weights", 0x1p60F);
  scaled("huge weights", 0x1p124F);
  cases.emplace_back("zeros", std::vector<float>(static_cast<size_t>(count), 0.0F));
  cases.emplace_back("negative zeros", std::vector<float>(static_cast<size_t>(count), -0.0F));
  cases.emplace_back("the largest", std::vector<float>(static_cast<size_t>(count), FLT_MAX));
  cases.emplace_back("the lowest", std::vector<float>(static_cast<size_t>(count), -FLT_MAX));
  cases.emplace_back("both ends", std::vector<float>(static_cast<size_t>(count), FLT_MAX));
  cases.back().second[1] = -FLT_MAX;
  cases.emplace_back("everything at once", normal);
  cases.back().second[3] = FLT_MAX, cases.back().second[4] = FLT_TRUE_MIN, cases.back().second[5] = 0.0F;
  for (const Kind& kind : kKinds) {
    for (const auto& [name, values] : cases) {
      for (const int64_t width : {columns, int64_t{1}}) {
        const int64_t height = count / width;
        const Quantised q = RoundTrip(kind, values, height, width);
        if (kind.format != Format::kBf16) CheckNearest(q, values, name);
        for (int64_t i = 0; i < count; ++i) {
          const auto at = static_cast<size_t>(i);
          CHECK_MESSAGE(std::isfinite(q.values[at]), Describe(kind) + " is not finite for " + name);
          if (values[at] == 0) CHECK_MESSAGE(q.values[at] == 0, Describe(kind) + " loses zeros in " + name);
          if (kind.format == Format::kFp8) CHECK((q.bytes[at] & 0x7f) != 0x7f);
        }
        if (kind.format == Format::kMxfp4) {
          const MatrixView view = q.view();
          for (int64_t i = 0; i < view.scale_stride * height; ++i) CHECK(view.scales[i] != 255);
        }
      }
    }
  }
}

TEST(RowsCanBeWrittenInAnyPieces) {
  std::mt19937 random(7);
  for (const Kind& kind : kKinds) {
    const int64_t rows = 300, columns = 131;
    const std::vector<float> values = testing::RandomFloats(rows * columns, 1.0F, random);
    const Quantised by_bands = RoundTrip(kind, values, rows, columns);
    Quantised at_once = Empty(kind, rows, columns);
    Quantise(at_once.storage, values.data(), 0, rows, rows, columns, at_once.bytes.data());
    CHECK_MESSAGE(at_once.bytes == by_bands.bytes, Describe(kind));
    // The half byte after an odd last column is zero.
    const MatrixView view = at_once.view();
    if (view.row_stride < columns) CHECK(view.rows[view.row_stride - 1] >> 4 == 0);
  }
}

}  // namespace
}  // namespace kt
