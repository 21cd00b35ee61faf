// The emulated tiles against cases worked out by hand from the manual, and the product on tiles, emulated and (where
// the CPU has them) real, against double precision.
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "testing.h"
#include "tiers/amx_emulated.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kSmallestNormal = std::numeric_limits<float>::min();

// C += A * B for one row of A, one column of B and as many pairs as given.
float DotOfPairs(float c, const std::vector<float>& a, const std::vector<float>& b) {
  const std::vector<Bf16> a_row = testing::ToBf16(a), b_column = testing::ToBf16(b);
  const int pairs = static_cast<int>(a.size()) / 2;
  TileConfig config;
  config.Set(0, 1, 4);
  config.Set(1, 1, 4 * pairs);
  config.Set(2, pairs, 4);
  EmulatedTiles::Configure(config);
  EmulatedTiles::Load(0, &c, 4);
  EmulatedTiles::Load(1, a_row.data(), 4 * pairs);
  EmulatedTiles::Load(2, b_column.data(), 4);
  EmulatedTiles::MultiplyBf16(0, 1, 2);
  EmulatedTiles::Store(0, &c, 4);
  EmulatedTiles::Release();
  return c;
}

TEST(PairsAreMultipliedRowByColumn) {
  // A is 2 x (2 pairs), B is (2 pairs) x 3 with each pair's halves side by side.
  const std::vector<Bf16> a = testing::ToBf16({1, 2, 3, 4, /**/ 5, 6, 7, 8});
  const std::vector<Bf16> b = testing::ToBf16({1, 10, 2, 20, 4, 40, /**/ 100, 1000, 200, 2000, 400, 4000});
  std::vector<float> c{1, 2, 3, -1, /**/ 4, 5, 6, -1};  // rows are four values apart
  TileConfig config;
  config.Set(5, 2, 12);
  config.Set(6, 2, 8);
  config.Set(7, 2, 12);
  EmulatedTiles::Configure(config);
  EmulatedTiles::Load(5, c.data(), 16);
  EmulatedTiles::Load(6, a.data(), 8);
  EmulatedTiles::Load(7, b.data(), 12);
  EmulatedTiles::MultiplyBf16(5, 6, 7);
  EmulatedTiles::Store(5, c.data(), 16);
  EmulatedTiles::Release();
  // Row 0, column 0: 1 + 1*1 + 2*10 + 3*100 + 4*1000.
  CHECK((c == std::vector<float>{4322, 8644, 17287, -1, 8769, 17535, 35066, -1}));
}

TEST(HalvesAreSummedApartAndRoundedEachTime) {
  const float big = 0x1p24F;
  // Even halves: 2^24 + 1, which rounds to even and loses the one; odd halves: 1 + 1; in all 2^24 + 2.
  CHECK(DotOfPairs(0, {big, 1, 1, 1}, {1, 1, 1, 1}) == big + 2);
  // C is added last, to the sum of both halves: 2^24 + (1 + 1). Added first it would swallow one after the other.
  CHECK(DotOfPairs(big, {1, 1}, {1, 1}) == big + 2);
  // A product and its sum are rounded once: (1 + 2^-7)^2 - (1 + 2^-6) is 2^-14, though the product has 15 bits.
  CHECK(DotOfPairs(0, {1 + 0x1p-6F, 0, 1 + 0x1p-7F, 0}, {-1, 0, 1 + 0x1p-7F, 0}) == 0x1p-14F);
  // Ties to even: 2^24 + 3 is halfway between 2^24 + 2 and 2^24 + 4.
  CHECK(DotOfPairs(big, {3, 0}, {1, 0}) == big + 4);
}

TEST(DenormalsAreZeros) {
  const float denormal = kSmallestNormal / 2;
  CHECK(DotOfPairs(0, {denormal, 0}, {1, 0}) == 0);                       // of A
  CHECK(DotOfPairs(0, {1, 0}, {denormal, 0}) == 0);                       // of B
  CHECK(DotOfPairs(denormal, {0, 0}, {0, 0}) == 0);                       // of C
  CHECK(DotOfPairs(0, {kSmallestNormal, 0}, {0.5F, 0}) == 0);             // as a product
  CHECK(DotOfPairs(kSmallestNormal, {0, 0}, {0, 0}) == kSmallestNormal);  // the smallest normal is none
  // A sum of normal numbers that is a denormal one: 1.5 and -1 times the smallest normal.
  CHECK(DotOfPairs(0, {1.5F * kSmallestNormal, -kSmallestNormal}, {1, 1}) == 0);
  // A sum that only passes through denormals ends in zero: the flushed 0.5 does not come back.
  CHECK(DotOfPairs(0, {1.5F * kSmallestNormal, 0, -kSmallestNormal, 0, kSmallestNormal, 0}, {1, 0, 1, 0, 1, 0}) ==
        kSmallestNormal);
  CHECK(!std::signbit(DotOfPairs(-0.0F, {-denormal, 0}, {1, 1})));  // sums begin at +0
}

TEST(InfinityAndNanPropagate) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(DotOfPairs(1, {kInfinity, 0}, {2, 0}) == kInfinity);
  CHECK(DotOfPairs(0, {0x1p127F, 0, 0x1p127F, 0}, {1, 0, 1, 0}) == kInfinity);  // overflow
  CHECK(std::isnan(DotOfPairs(1, {kInfinity, 0}, {0, 0})));
  CHECK(std::isnan(DotOfPairs(1, {kInfinity, -kInfinity}, {1, 1})));
  CHECK(std::isnan(DotOfPairs(1, {nan, 0}, {1, 0})));
  CHECK(std::isnan(DotOfPairs(nan, {1, 0}, {1, 0})));
}

TEST(QuadsAreUnsignedTimesSignedBytes) {
  const std::vector<uint8_t> a{255, 128, 1, 0, /**/ 2, 3, 0, 7};
  const std::vector<int8_t> b{-128, 127, 1, 5, /**/ 1, 1, 1, 1};  // one quad of each of two columns
  std::vector<int32_t> c{1, 2, /**/ 3, std::numeric_limits<int32_t>::max()};
  TileConfig config;
  config.Set(1, 2, 8);
  config.Set(2, 2, 4);
  config.Set(3, 1, 8);
  EmulatedTiles::Configure(config);
  EmulatedTiles::Load(1, c.data(), 8);
  EmulatedTiles::Load(2, a.data(), 4);
  EmulatedTiles::Load(3, b.data(), 8);
  EmulatedTiles::MultiplyInt8(1, 2, 3);
  EmulatedTiles::Store(1, c.data(), 8);
  EmulatedTiles::Release();
  CHECK(c[0] == 1 - 255 * 128 + 128 * 127 + 1);
  CHECK(c[1] == 2 + 255 + 128 + 1);
  CHECK(c[2] == 3 - 2 * 128 + 3 * 127 + 7 * 5);
  CHECK(c[3] == std::numeric_limits<int32_t>::min() + 11);  // wraps around, where VPDPBUSDS would saturate
}

TEST(WhatWouldFaultIsNamed) {
  const auto fault = [](const auto& change) {
    TileConfig config;
    config.Set(0, 16, 64);
    config.Set(1, 16, 64);
    config.Set(2, 16, 64);
    change(config);
    if (const char* const of_config = EmulatedTiles::ConfigFault(config)) return std::string(of_config);
    const char* const of_product = EmulatedTiles::MultiplyFault(config, 0, 1, 2);
    return std::string(of_product == nullptr ? "" : of_product);
  };
  CHECK(fault([](TileConfig&) {}).empty());
  CHECK(fault([](TileConfig& c) { c.palette = 0; }) == "the palette is not 1");
  CHECK(fault([](TileConfig& c) { c.palette = 2; }) == "the palette is not 1");
  CHECK(fault([](TileConfig& c) { c.reserved[13] = 1; }) == "a reserved byte is set");
  CHECK(fault([](TileConfig& c) { c.Set(8, 1, 4); }) == "there are 8 tiles");
  CHECK(fault([](TileConfig& c) { c.Set(3, 17, 4); }) == "a tile has more than 16 rows");
  CHECK(fault([](TileConfig& c) { c.Set(3, 1, 68); }) == "a tile's row has more than 64 bytes");
  CHECK(fault([](TileConfig& c) { c.Set(3, 1, 0); }) == "a tile has rows without bytes, or bytes without rows");
  CHECK(fault([](TileConfig& c) { c.Set(2, 0, 0); }) == "a tile is used that is not configured");
  CHECK(fault([](TileConfig& c) { c.Set(1, 16, 62); }) == "a tile's row ends within a pair or quad");
  CHECK(fault([](TileConfig& c) { c.Set(0, 15, 64); }) == "C and A differ in rows");
  CHECK(fault([](TileConfig& c) { c.Set(0, 16, 60); }) == "C and B differ in columns");
  CHECK(fault([](TileConfig& c) { c.Set(2, 15, 64); }) == "A and B differ in depth");
  CHECK(EmulatedTiles::MultiplyFault(TileConfig(), 1, 1, 2) == std::string("a tile is used twice"));
}

// ---- the product ----

struct Product {
  int64_t rows, depth;
  int width;
  int64_t group;  // of the scales; 0: none
  bool accumulate;
};

// Checks one product: every value within its bound, and nothing written or needed beyond the operands. The depth is cut
// in as many pieces as tiles and groups ask for, but each product is rounded at most once and each sum of n terms by at
// most n + 2 roundings (the last two for the scale and for C); products of roundings are covered by the factor 1.01.
void CheckProduct(const testing::TestedTier& tier, const Product& p, std::mt19937& random) {
  const TierKernels& kernels = *tier.kernels;
  const int64_t padded = RoundUp(p.depth, 2), a_stride = padded + 6, c_stride = p.width + 5;
  const int64_t groups = p.group == 0 ? 0 : CeilDiv(p.depth, p.group), scale_stride = groups + 3;
  // Guards are NaN: used by mistake, they show in the result.
  const Bf16 nan = Bf16FromFloat(std::numeric_limits<float>::quiet_NaN());
  std::vector<Bf16> a(static_cast<size_t>((p.rows - 1) * a_stride + padded));  // ends where the last row does
  std::fill(a.begin(), a.end(), nan);
  std::vector<Bf16> panel(static_cast<size_t>(padded * p.width));
  const auto element = [&] { return Bf16FromFloat(std::normal_distribution<float>()(random)); };
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t d = 0; d < padded; ++d) a[static_cast<size_t>(r * a_stride + d)] = d < p.depth ? element() : Bf16{0};
  }
  const auto panel_at = [&](int64_t d, int n) { return static_cast<size_t>((d / 2 * p.width + n) * 2 + d % 2); };
  for (int64_t d = 0; d < p.depth; ++d) {
    for (int n = 0; n < p.width; ++n) panel[panel_at(d, n)] = element();
  }
  std::vector<float> scales(static_cast<size_t>(p.rows * scale_stride), std::numeric_limits<float>::quiet_NaN());
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t g = 0; g < groups; ++g)
      scales[static_cast<size_t>(r * scale_stride + g)] = std::uniform_real_distribution<float>(0.1F, 2)(random);
  }
  const float guard = 12345;
  std::vector<float> c(static_cast<size_t>(p.rows * c_stride), guard);
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int n = 0; n < p.width; ++n) c[static_cast<size_t>(r * c_stride + n)] = FloatFromBf16(element());
  }
  const std::vector<float> before = c;
  const RowScales row_scales{p.group == 0 ? nullptr : scales.data(), scale_stride, p.group};

  Ahead none;
  kernels.multiply(a.data(), a_stride, p.rows, panel.data(), p.width, p.depth, row_scales, c.data(), c_stride,
                   p.accumulate, none);
  // Not always: the next product must find out what the tiles are configured for.
  if (p.rows % 2 == 0) kernels.end_products();

  double worst = 0;
  bool guards_kept = true;
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int n = 0; n < p.width; ++n) {
      double sum = p.accumulate ? before[static_cast<size_t>(r * c_stride + n)] : 0, size = std::fabs(sum);
      for (int64_t d = 0; d < p.depth; ++d) {
        const double scale = p.group == 0 ? 1 : scales[static_cast<size_t>(r * scale_stride + d / p.group)];
        const double term =
            scale * FloatFromBf16(a[static_cast<size_t>(r * a_stride + d)]) * FloatFromBf16(panel[panel_at(d, n)]);
        sum += term;
        size += std::fabs(term);
      }
      const double bound = 1.01 * static_cast<double>(p.depth + 2) * 0x1p-24 * size + kSmallestNormal;
      const double error = std::fabs(c[static_cast<size_t>(r * c_stride + n)] - sum);
      worst = std::isnan(error) ? kInfinity : std::max(worst, error / bound);
    }
    for (int64_t n = p.width; n < c_stride; ++n) {
      guards_kept = guards_kept && c[static_cast<size_t>(r * c_stride + n)] == guard;
    }
  }
  const std::string what = tier.name + " rows " + std::to_string(p.rows) + " depth " + std::to_string(p.depth) +
                           " width " + std::to_string(p.width) + " group " + std::to_string(p.group);
  CHECK_MESSAGE(worst <= 1, what + " is " + std::to_string(worst) + " times its bound");
  CHECK_MESSAGE(guards_kept, what + " writes beyond C");
}

TEST(ProductsOfEveryShapeAreWithinTheBound) {
  std::mt19937 random(1);
  for (const testing::TestedTier& tier : testing::AmxTiers()) {
    for (const int64_t rows : {1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 71}) {
      for (const int64_t depth : {1, 2, 31, 32, 33, 64, 95, 256}) {
        for (int width = 32; width > 0; width -= 16) {
          CheckProduct(tier, {rows, depth, width, 0, (rows + depth) % 2 == 0}, random);
          for (const int64_t group : {int64_t{32}, int64_t{64}, int64_t{1024}, depth}) {
            CheckProduct(tier, {rows, depth, width, group, (rows + depth + group) % 2 == 0}, random);
          }
        }
      }
    }
  }
}

TEST(NarrowPanelsOfTheEmulationAreWithinTheBound) {
  // Four lanes make panels of any multiple of four.
  std::mt19937 random(2);
  const testing::TestedTier tier{"amx emulated on portable vectors", &kEmulatedAmxPortableKernels};
  for (int width = 4; width <= 32; width += 4) {
    CheckProduct(tier, {37, 70, width, 0, true}, random);
    CheckProduct(tier, {37, 70, width, 32, false}, random);
  }
}

TEST(EmulatedAndRealTilesGiveTheSameBits) {
  // Without scales vectors do no arithmetic here but add a sum to nothing.
  std::mt19937 random(3);
  const std::vector<testing::TestedTier> tiers = testing::AmxTiers();
  const int64_t rows = 45, depth = 150;
  const int width = 32;
  const std::vector<Bf16> a = testing::ToBf16(testing::RandomFloats(rows * depth, 1, random));
  const std::vector<Bf16> panel = testing::ToBf16(testing::RandomFloats(depth * width, 1, random));
  std::vector<std::vector<float>> results;
  for (const testing::TestedTier& tier : tiers) {
    std::vector<float> c(static_cast<size_t>(rows * width));
    Ahead none;
    tier.kernels->multiply(a.data(), depth, rows, panel.data(), width, depth, RowScales(), c.data(), width, false,
                           none);
    tier.kernels->end_products();
    CHECK_MESSAGE(results.empty() || c == results.front(), tier.name + " differs from " + tiers.front().name);
    results.push_back(c);
  }
}

TEST(WhatComesNextIsAskedForAsTheDepthGoesBy) {
  const std::vector<uint8_t> next(20 * 64);
  for (const testing::TestedTier& tier : testing::AmxTiers()) {
    const int64_t rows = 48, depth = 64;
    const int width = 32;
    // 96 steps, of two values of the depth and 16 rows: a line at every fourth makes 24, of which 20 are needed.
    const auto lines_left = [&](int64_t some_depth) {
      Ahead ahead;
      ahead.row = next.data();
      ahead.row_stride = 5 * 64;
      ahead.lines_per_row = 5;
      ahead.lines = 20;
      ahead.rate = Ahead::kSteps / 4;
      const std::vector<Bf16> a(static_cast<size_t>(rows * depth)), panel(static_cast<size_t>(depth * width));
      std::vector<float> c(static_cast<size_t>(rows * width));
      tier.kernels->multiply(a.data(), depth, rows, panel.data(), width, some_depth, RowScales(), c.data(), width,
                             false, ahead);
      tier.kernels->end_products();
      return ahead.lines;
    };
    CHECK(lines_left(depth) == 0);
    CHECK(lines_left(depth / 2) == 20 - 12);
  }
}

TEST(RegisterProductsCountTheirWork) {
  for (const testing::TestedTier& tier : testing::AmxTiers()) {
    CHECK(tier.kernels->register_products(3) == 3 * 2.0 * 32 * 32 * 32);
    CHECK(tier.kernels->register_int8_products(3) == 3 * 2.0 * 32 * 32 * 64);
  }
}

}  // namespace
}  // namespace kt
