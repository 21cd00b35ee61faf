// Operands of integer products against their definition, code by code, and the products against integer arithmetic, on
// every tier.
#include <algorithm>
#include <cmath>
#include <limits>

#include "formats/quantise.h"
#include "testing.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t PanelBytes(int64_t count, int64_t group) {
  return RoundUp(count, kQuad) + CeilDiv(count, group) * kTokenHeader;  // of each column
}

// A token's values of one group, as an operand says them.
struct TokenGroupView {
  float scale;
  int32_t start;
  std::vector<int> codes;
};

TokenGroupView Read(const std::vector<char>& panel, int width, int64_t count, int64_t group, int64_t k, int token) {
  const char* const at = panel.data() + PanelBytes(k, group) * width;
  TokenGroupView view;
  std::memcpy(&view.scale, at + token * 4, 4);
  std::memcpy(&view.start, at + (width + token) * 4, 4);
  const int64_t padded = RoundUp(Smaller(group, count - k), kQuad);
  for (int64_t d = 0; d < padded; ++d) {
    const char code = at[(kTokenHeader + d / kQuad * kQuad) * width + token * kQuad + d % kQuad];
    view.codes.push_back(static_cast<int8_t>(code));
  }
  return view;
}

struct Panel {
  std::vector<char> bytes;
  std::vector<std::vector<float>> rows;  // as given, rounded to `type`
};

Panel Pack(const TierKernels& kernels, std::vector<std::vector<float>> rows, DType type, int width, int64_t count,
           int64_t group) {
  Panel panel;
  std::vector<std::vector<char>> stored;
  stored.reserve(rows.size());
  std::vector<const void*> sources;
  for (std::vector<float>& row : rows) {
    std::vector<char> bytes(static_cast<size_t>(count * DTypeBytes(type)));
    for (int64_t i = 0; i < count; ++i) {
      StoreFromFloat(bytes.data(), type, i, row[static_cast<size_t>(i)]);
      row[static_cast<size_t>(i)] = LoadAsFloat(bytes.data(), type, i);
    }
    stored.push_back(std::move(bytes));
  }
  sources.reserve(stored.size());
  for (const std::vector<char>& bytes : stored) sources.push_back(bytes.data());
  // What is never written would show as this.
  panel.bytes.assign(static_cast<size_t>(PanelBytes(count, group) * width), 0x55);
  kernels.pack_int8_panel(sources.data(), type, static_cast<int>(rows.size()), width, count, group, panel.bytes.data());
  panel.rows = std::move(rows);
  return panel;
}

void CheckPanel(const std::string& where, const Panel& panel, int width, int64_t count, int64_t group) {
  for (int t = 0; t < width; ++t) {
    for (int64_t k = 0; k < count; k += group) {
      const TokenGroupView view = Read(panel.bytes, width, count, group, k, t);
      const int64_t depth = Smaller(group, count - k);
      float largest = 0;
      bool finite = true;
      const auto value = [&](int64_t i) {
        return t < static_cast<int>(panel.rows.size()) ? panel.rows[static_cast<size_t>(t)][static_cast<size_t>(k + i)]
                                                       : 0.0F;
      };
      for (int64_t i = 0; i < depth; ++i) {
        finite = finite && std::isfinite(value(i));
        largest = std::max(largest, std::fabs(value(i)));
      }
      if (!finite) {
        CHECK_MESSAGE(std::isnan(view.scale), where + " hides what is not finite");
        continue;
      }
      CHECK_MESSAGE(view.scale == largest * (1.0F / 127), where + " scale");
      const float inverse = largest < 1e-36F ? 0.0F : 127.0F / largest;
      int sum = 0, wrong = 0;
      for (int64_t i = 0; i < static_cast<int64_t>(view.codes.size()); ++i) {
        const int expected = i < depth ? static_cast<int>(std::nearbyint(value(i) * inverse)) : 0;
        wrong += view.codes[static_cast<size_t>(i)] != expected;
        sum += expected;
      }
      CHECK_MESSAGE(wrong == 0, where + " has " + std::to_string(wrong) + " wrong codes");
      CHECK_MESSAGE(view.start == -kWeightOffset * sum, where + " start");
    }
  }
}

TEST(TokensAreQuantisedByTheirDefinition) {
  std::mt19937 random(1);
  for (const testing::TestedTier& tier : testing::TestedTiers()) {
    for (const DType type : {DType::kF32, DType::kBf16, DType::kF16}) {
      for (const int64_t count : {1, 4, 31, 33, 64, 130, 300, 513}) {
        for (const int64_t group : {32, 64, 256}) {
          const int width = tier.kernels->lanes * (count % 2 == 0 ? tier.kernels->tile_vectors : 1);
          std::vector<std::vector<float>> rows;
          for (int t = 0; t < width - 1; ++t) {
            rows.push_back(testing::RandomFloats(count, std::ldexp(1.0F, t % 9 - 4), random));
            for (float& value : rows.back()) value = t == 1 ? 0.0F : t == 2 ? 0x1p-130F : value;
          }
          rows[0][static_cast<size_t>(count / 2)] = -3e4F;  // far from the others
          CheckPanel(tier.name + " " + std::to_string(count) + " in " + std::to_string(group),
                     Pack(*tier.kernels, rows, type, width, count, group), width, count, group);
        }
      }
    }
  }
}

TEST(WhatIsNotFiniteShowsInItsGroupAlone) {
  std::mt19937 random(2);
  for (const testing::TestedTier& tier : testing::TestedTiers()) {
    for (const float broken : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
      for (const DType type : {DType::kF32, DType::kBf16, DType::kF16}) {
        for (const size_t place : {size_t{0}, size_t{30}, size_t{70}}) {
          std::vector<std::vector<float>> rows(3, testing::RandomFloats(71, 1, random));
          rows[1][place] = broken;
          CheckPanel(tier.name, Pack(*tier.kernels, rows, type, tier.kernels->lanes, 71, 32), tier.kernels->lanes, 71,
                     32);
        }
      }
    }
  }
}

struct Weights {
  Storage storage;
  std::vector<uint8_t> bytes;
  MatrixView view;
};

// With `extreme`, all codes of a row are its largest or its smallest.
Weights MakeWeights(Format format, int64_t group, bool zero_point, int64_t rows, int64_t columns, bool extreme,
                    std::mt19937& random) {
  Weights w{StorageOf(format, group, zero_point), {}, {}};
  std::vector<float> values = testing::RandomFloats(rows * columns, 1, random);
  for (int64_t i = 0; extreme && i < rows * columns; ++i) values[static_cast<size_t>(i)] = i / columns % 2 ? -1 : 1;
  w.bytes.resize(static_cast<size_t>(w.storage.bytes(rows, columns)));
  Quantise(w.storage, values.data(), 0, rows, rows, columns, w.bytes.data());
  w.view = w.storage.view(w.bytes.data(), rows, columns);
  return w;
}

// The sums are exact: what remains is a rounding for each of the two factors of every group's sum, and one for adding
// it to the others, each at most 2^-24 of the terms' magnitudes; the reference's own weights (code x scale) and tokens
// have one each, too.
void CheckProducts(const testing::TestedTier& tier, const Weights& w, int64_t rows, int64_t columns, int tokens,
                   int64_t group, bool extreme, std::mt19937& random) {
  const TierKernels& kernels = *tier.kernels;
  const int width = static_cast<int>(RoundUp(tokens, kernels.lanes));
  std::vector<std::vector<float>> x;
  for (int t = 0; t < tokens; ++t) {
    x.push_back(testing::RandomFloats(columns, 1, random));
    for (float& value : x.back()) value = extreme ? (t % 2 == 0 ? 1.0F : -1.0F) : value;
  }
  const Panel panel = Pack(kernels, x, DType::kF32, width, columns, group);
  const int64_t stride = RoundUp(columns, kQuad) + 64, scale_count = CeilDiv(columns, w.view.group);
  std::vector<uint8_t> a(static_cast<size_t>(rows * stride), 0x55);
  kernels.decode_int8_rows[static_cast<int>(w.storage.format)](w.view, 0, static_cast<int>(rows), 0, columns, a.data(),
                                                               stride);
  std::vector<float> scales(static_cast<size_t>(rows * scale_count));
  for (int64_t r = 0; r < rows; ++r) LoadScales(w.view, r, 0, scale_count, scales.data() + r * scale_count);
  std::vector<float> row(static_cast<size_t>(columns));
  for (const bool accumulate : {false, true}) {
    std::vector<float> c(static_cast<size_t>(rows * width), 1.0F);
    Ahead ahead;
    kernels.multiply_int8(a.data(), stride, rows, panel.bytes.data(), width, columns, group,
                          {scales.data(), scale_count, w.view.group}, c.data(), width, accumulate, ahead);
    double worst = 0;
    for (int64_t r = 0; r < rows; ++r) {
      DequantiseRow(w.storage.format, w.view, r, columns, row.data());
      for (int t = 0; t < width; ++t) {
        double expected = accumulate ? 1 : 0, magnitude = expected;
        for (int64_t k = 0; k < columns; k += group) {
          const TokenGroupView view = Read(panel.bytes, width, columns, group, k, t);
          for (int64_t i = 0; i < Smaller(group, columns - k); ++i) {
            const double term =
                double{view.scale} * view.codes[static_cast<size_t>(i)] * double{row[static_cast<size_t>(k + i)]};
            expected += term;
            magnitude += std::fabs(term);
          }
        }
        const double bound = static_cast<double>(CeilDiv(columns, group) + 4) * 0x1p-24 * magnitude + 1e-37;
        worst =
            std::max(worst, std::fabs(static_cast<double>(c[static_cast<size_t>(r * width + t)]) - expected) / bound);
      }
    }
    CHECK_MESSAGE(worst <= 1, tier.name + " " + FormatName(w.storage.format) + " " + std::to_string(w.view.group) +
                                  ": " + std::to_string(rows) + " x " + std::to_string(columns) + " x " +
                                  std::to_string(tokens) + " is " + std::to_string(worst) + " times its bound");
  }
}

const struct {
  Format format;
  int group;
  bool zero_point;
} kStored[] = {{Format::kInt8, 0, false},  {Format::kInt8, 32, false},  {Format::kInt8, 512, false},
               {Format::kInt4, 32, false}, {Format::kInt4, 128, false}, {Format::kInt4, 0, false},
               {Format::kInt4, 32, true},  {Format::kInt4, 64, true},   {Format::kInt4, 0, true}};

TEST(ProductsAreThoseOfTheCodes) {
  std::mt19937 random(3);
  for (const testing::TestedTier& tier : testing::TestedTiers()) {
    const int lanes = tier.kernels->lanes, widest = lanes * tier.kernels->tile_vectors;
    for (const auto& stored : kStored) {
      for (const int64_t columns : {3, 32, 61, 200, 1030}) {
        for (const bool extreme : {false, true}) {
          const int64_t rows = columns == 61 ? 27 : columns == 200 ? 77 : 13;
          const Weights w = MakeWeights(stored.format, stored.group, stored.zero_point, rows, columns, extreme, random);
          const bool power = (w.view.group & (w.view.group - 1)) == 0;
          const int64_t group = power ? Smaller(w.view.group, kMostTokenGroup) : kMostTokenGroup;
          if (group % kQuad != 0) continue;
          CheckProducts(tier, w, rows, columns, columns % 2 == 0 ? widest : lanes - 1, group, extreme, random);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt
