// Which tier is used, and what it multiplies integers with.

#include "moe/fastest_tier.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "testing.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

TEST(HighestTierIsTheFastestUnlessALowerOneIsMuchFaster) {
  const double rising[] = {95, 190, 450};
  CHECK(FastestOf(rising, 3) == 2);
  const double alike[] = {95, 190, 170};  // less than kWorthLowering apart
  CHECK(FastestOf(alike, 3) == 2);
  const double slow_dot_products[] = {95, 178, 86};  // AVX512-BF16 of an Intel CPU
  CHECK(FastestOf(slow_dot_products, 3) == 1);
  const double with_tiles[] = {95, 178, 86, 1500};
  CHECK(FastestOf(with_tiles, 4) == 3);
  const double lowest[] = {300, 178, 86};
  CHECK(FastestOf(lowest, 3) == 0);
  CHECK(FastestOf(rising, 1) == 0);
}

TEST(RatesAreThoseOfACpuThatIsAwake) {
  // As measured after a rest: 512-bit products are no faster than others for 0.9 ms, in which each tier had 30 trials.
  const double asleep[] = {88, 87, 86}, awake[] = {88, 176, 87};
  int trials[3] = {};
  const std::vector<double> rates = BestRates(3, [&](int i) { return (trials[i]++ < 30 ? asleep : awake)[i]; });
  CHECK(rates == std::vector<double>({88, 176, 87}));
  CHECK(trials[0] == trials[1] && trials[1] == trials[2]);
}

TEST(FastestTierIsOneOfTheCpusAndTheSameEveryTime) {
  const TierKernels& kernels = *KernelsOf(FastestTiers());
  CHECK(&kernels == KernelsOf(FastestTiers()));
  CHECK(CpuSupports(kernels.tier));
  const TierKernels& own = *KernelsOf(kernels.tier);
  CHECK(kernels.multiply == own.multiply);
  CHECK(kernels.element_bytes == own.element_bytes);
}

TEST(AChoiceIsOneTierWithIntegerProductsOfAnother) {
  for (const testing::TestedTier& one : testing::CpuTiers()) {
    for (const testing::TestedTier& other : testing::CpuTiers()) {
      const TierKernels &a = *one.kernels, &b = *other.kernels;
      if (&a != KernelsOf(a.tier) || &b != KernelsOf(b.tier)) continue;  // on emulated tiles
      const TierChoice choice{a.tier, b.tier};
      const bool fit =
          a.tier == b.tier || (a.lanes == b.lanes && a.tile_vectors == b.tile_vectors && b.end_products == nullptr);
      if (!fit) {
        CHECK_THROWS(KernelsOf(choice), std::invalid_argument);
        continue;
      }
      const TierKernels& kernels = *KernelsOf(choice);
      CHECK(&kernels == KernelsOf(choice));
      CHECK(kernels.tier == a.tier && kernels.multiply == a.multiply);
      CHECK(kernels.multiply_int8 == b.multiply_int8 && kernels.pack_int8_panel == b.pack_int8_panel);
    }
  }
  for (int i = 0; i < kTierCount; ++i) {
    const Tier tier = static_cast<Tier>(i);
    if (KernelsOf(tier) == nullptr || !CpuSupports(tier))
      CHECK_THROWS(KernelsOf(TierChoice{tier, tier}), std::invalid_argument);
  }
}

// The integer products of any two tiers with panels of one width take the same operands and give the same bits, so that
// the fastest tier may have another's.
TEST(IntegerProductsOfTiersAsWideAreInterchangeable) {
  std::mt19937 random(5);
  const int64_t depth = 96, rows = 13, group = 32;
  for (const testing::TestedTier& one : testing::CpuTiers()) {
    for (const testing::TestedTier& other : testing::CpuTiers()) {
      const TierKernels &a = *one.kernels, &b = *other.kernels;
      if (a.lanes != b.lanes || a.tile_vectors != b.tile_vectors || b.end_products != nullptr) continue;
      const int width = a.lanes * a.tile_vectors;
      const std::vector<float> tokens = testing::RandomFloats(width * depth, 1.0F, random);
      std::vector<const void*> token_rows;
      token_rows.reserve(static_cast<size_t>(width));
      for (int t = 0; t < width; ++t) token_rows.push_back(tokens.data() + t * depth);
      const std::vector<float> scales = testing::RandomFloats(rows * depth / group, 1.0F, random);
      std::vector<uint8_t> codes;
      codes.reserve(static_cast<size_t>(rows * depth));
      for (int64_t i = 0; i < rows * depth; ++i) codes.push_back(static_cast<uint8_t>(1 + random() % 255));
      std::vector<char> panel(static_cast<size_t>(width * (depth + depth / group * kTokenHeader)));
      const auto product = [&](const TierKernels& packs, const TierKernels& multiplies) {
        packs.pack_int8_panel(token_rows.data(), DType::kF32, width, width, depth, group, panel.data());
        std::vector<float> c(static_cast<size_t>(rows * width));
        Ahead ahead;
        multiplies.multiply_int8(codes.data(), depth, rows, panel.data(), width, depth, group,
                                 {scales.data(), depth / group, group}, c.data(), width, false, ahead);
        return c;
      };
      const std::vector<float> expected = product(a, a);
      CHECK_MESSAGE(product(a, b) == expected, one.name + "'s tokens with " + other.name + "'s products");
      CHECK_MESSAGE(product(b, a) == expected, other.name + "'s tokens with " + one.name + "'s products");
      CHECK(std::any_of(expected.begin(), expected.end(), [](float value) { return value != 0.0F; }));
    }
  }
}

}  // namespace
}  // namespace kt
