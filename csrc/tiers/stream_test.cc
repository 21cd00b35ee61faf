// Products for few tokens, one matrix at a time, against double precision: every format on every tier, at depths and
// numbers of rows that fill no block.
#include <cmath>

#include "formats/quantise.h"
#include "moe/reference.h"
#include "testing.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

struct StoredMatrix {
  Storage storage;
  std::vector<uint8_t> bytes;
  MatrixView view;
  std::vector<float> values;      // code x scale
  std::vector<double> magnitude;  // |code| x scale, and |zero point| x scale beside it
};

StoredMatrix Store(const testing::Stored& stored, int64_t rows, int64_t columns, std::mt19937& random) {
  StoredMatrix matrix;
  matrix.storage = StorageOf(stored.format, stored.group, stored.zero_point);
  // Bytes beyond the matrix are never looked at by a product, but for being asked for ahead.
  matrix.bytes.resize(static_cast<size_t>(matrix.storage.bytes(rows, columns)));
  const std::vector<float> weights = testing::RandomFloats(rows * columns, 1.0F, random);
  Quantise(matrix.storage, weights.data(), 0, rows, rows, columns, matrix.bytes.data());
  matrix.view = matrix.storage.view(matrix.bytes.data(), rows, columns);
  matrix.values.resize(weights.size());
  for (int64_t r = 0; r < rows; ++r) {
    DequantiseRow(stored.format, matrix.view, r, columns, matrix.values.data() + r * columns);
    for (int64_t k = 0; k < columns; ++k) {
      double magnitude = std::abs(matrix.values[static_cast<size_t>(r * columns + k)]);
      if (stored.zero_point) {  // code - 8 and 8 - zero point are at most 8 each, and their sum is what is meant
        float scale = 0.0F;
        LoadScales(matrix.view, r, k >> GroupShift(matrix.view), 1, &scale);
        magnitude = 16.0 * std::abs(scale);
      }
      matrix.magnitude.push_back(magnitude);
    }
  }
  return matrix;
}

// Rows of elements, of values that every tier's elements hold exactly.
struct Tokens {
  std::vector<float> values;
  std::vector<char> elements;
  int64_t stride = 0;  // elements
};

Tokens Pack(const TierKernels& kernels, int tokens, int64_t columns, std::mt19937& random) {
  Tokens packed;
  packed.stride = RoundUp(columns, kernels.pair) + 2;
  packed.elements.resize(static_cast<size_t>(tokens * packed.stride * kernels.element_bytes));
  for (int t = 0; t < tokens; ++t) {
    const std::vector<Bf16> row = testing::ToBf16(testing::RandomFloats(columns, 1.0F, random));
    for (const Bf16 value : row) packed.values.push_back(FloatFromBf16(value));
    kernels.pack_row(row.data(), DType::kBf16, columns,
                     packed.elements.data() + t * packed.stride * kernels.element_bytes);
  }
  return packed;
}

std::vector<float> Multiply(const TierKernels& kernels, Format format, const MatrixView& w, int64_t row, int rows,
                            int64_t columns, const Tokens& x, int first, int tokens, int64_t expert_rows) {
  std::vector<float> c(static_cast<size_t>(rows) * tokens, NAN);
  kernels.dot_rows[static_cast<int>(format)](w, row, rows, columns,
                                             x.elements.data() + first * x.stride * kernels.element_bytes, x.stride,
                                             tokens, expert_rows, c.data(), rows);
  return c;
}

// A sum of n products, in whatever order, is within n roundings of FP32 of the sum of their magnitudes; scales, zero
// points and the sums of pieces take eight more. BF16 products flush what is smaller than 2^-126.
void CheckSums(const StoredMatrix& w, int64_t columns, const Tokens& x, const std::vector<float>& c, int rows,
               int64_t first_row, int tokens, const std::string& what) {
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < rows; ++r) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const size_t at = static_cast<size_t>((first_row + r) * columns + k);
        const double value = x.values[static_cast<size_t>(t * columns + k)];
        sum += w.values[at] * value;
        magnitude += w.magnitude[at] * std::abs(value);
      }
      const double bound = static_cast<double>(columns + 8) * testing::kFloatRounding * magnitude +
                           static_cast<double>(columns) * 0x1p-126;
      const double error = std::abs(c[static_cast<size_t>(t) * rows + r] - sum);
      CHECK_MESSAGE(error <= bound, what + ": off by " + std::to_string(error / bound) + " of the bound");
    }
  }
}

TEST(FewTokensAreWithinTheBoundAtEveryDepth) {
  std::mt19937 random(21);
  // Around blocks of every width, and around what is spread at a time: 16384 columns, and fewer for several tokens.
  std::vector<int64_t> depths = {1, 31, 32, 33, 63, 65, 127, 128, 129, 255, 770, 3201};
  if (!testing::Quick()) depths.insert(depths.end(), {4097, 16384, 16385, 20001});
  for (const testing::Stored& stored : testing::kStored) {
    for (const int64_t columns : depths) {
      const int rows = columns > 1000 ? 3 : 21;
      const StoredMatrix w = Store(stored, rows, columns, random);
      for (const testing::TestedTier& tier : testing::TestedTiers()) {
        const int most = MostFewRows(tier.kernels->lanes);
        const Tokens x = Pack(*tier.kernels, most, columns, random);
        for (int tokens = 1; tokens <= most; ++tokens) {
          const std::string what = tier.name + " " + testing::NameOf(stored) + ", " + std::to_string(columns) +
                                   " columns, " + std::to_string(tokens) + " tokens";
          const std::vector<float> c =
              Multiply(*tier.kernels, stored.format, w.view, 1, rows - 1, columns, x, 0, tokens, tokens);
          CheckSums(w, columns, x, c, rows - 1, 1, tokens, what);
        }
      }
    }
  }
}

TEST(BitsDependNeitherOnTheRowsNorOnTheTokensOfACall) {
  std::mt19937 random(22);
  for (const testing::Stored& stored : testing::kStored) {
    const int64_t columns = testing::Quick() ? 300 : 4100;
    constexpr int kRows = 37;
    const StoredMatrix w = Store(stored, kRows, columns, random);
    for (const testing::TestedTier& tier : testing::TestedTiers()) {
      const int most = MostFewRows(tier.kernels->lanes);
      const Tokens x = Pack(*tier.kernels, most, columns, random);
      const std::vector<float> whole =
          Multiply(*tier.kernels, stored.format, w.view, 0, kRows, columns, x, 0, most, most);
      for (int t = 0; t < most; ++t) {
        for (const int row : {0, 1, 16, 36}) {
          const std::vector<float> one = Multiply(*tier.kernels, stored.format, w.view, row, 1, columns, x, t, 1, most);
          CHECK_MESSAGE(one[0] == whole[static_cast<size_t>(t) * kRows + row],
                        tier.name + " " + testing::NameOf(stored) + " differs");
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt
