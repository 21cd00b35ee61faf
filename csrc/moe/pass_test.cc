// The whole layer on every tier, against double precision with a bound derived term by term, and bit for bit over
// thread counts.
#include "moe/pass.h"

#include "moe/reference.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

using testing::LayerSizes;
using testing::Outputs;
using testing::Problem;

constexpr DType kTypes[] = {DType::kF32, DType::kBf16, DType::kF16};
constexpr LayerSizes kSizes[] = {{1, 1, 1, 1, 1},    {3, 2, 4, 5, 3},     {2, 4, 3, 33, 18},   {40, 2, 5, 64, 32},
                                 {70, 3, 2, 37, 29}, {9, 2, 2, 300, 270}, {300, 2, 3, 20, 50}, {600, 1, 1, 8, 9}};
// Depths that products are cut into pieces of: several pieces, and whole rows of scales longer than one.
constexpr LayerSizes kDeepSizes[] = {{12, 2, 2, 1300, 12}, {12, 2, 2, 12, 1100}};

void CheckTier(const Problem& p, const testing::TestedTier& tier, const testing::Expected& expected,
               const std::string& what) {
  const Outputs out = Run(p, *tier.kernels, 2, true);
  const auto check = [&](const std::vector<testing::Bounded>& bounded, const void* actual, DType type,
                         const char* name) {
    const double excess = testing::Excess(bounded, actual, type);
    CHECK_MESSAGE(excess <= 1, tier.name + " " + what + " H=" + std::to_string(p.sizes.hidden) +
                                   " I=" + std::to_string(p.sizes.intermediate) + " type " +
                                   std::to_string(static_cast<int>(p.options.type)) + ": " + name + " is " +
                                   std::to_string(excess) + " times its bound");
  };
  check(expected.y, out.y.data(), p.options.type, "y");
  check(expected.dx, out.dx.data(), p.options.type, "dx");
  check(expected.dw, out.dw.data(), DType::kF32, "dw");
}

void CheckEveryTier(const Problem& p, const std::string& what) {
  testing::References references(p);
  for (const testing::TestedTier& tier : testing::TestedTiers())
    CheckTier(p, tier, references.For(*tier.kernels), what);
}

TEST(EveryTierIsWithinTheBound) {
  std::mt19937 random(3);
  for (const LayerSizes& sizes : kSizes) {
    for (const DType type : kTypes) {
      const Problem p = testing::MakeProblem(sizes, {type, sizes.tokens % 2 == 1}, random);
      CheckEveryTier(p, "bf16");
    }
  }
}

TEST(EveryFormatIsWithinTheBound) {
  std::mt19937 random(6);
  for (const testing::Stored& stored : testing::kStored) {
    for (const LayerSizes& sizes : kSizes) {
      if (testing::Quick() && sizes.tokens * sizes.hidden > 2600) continue;
      const Problem p = testing::MakeProblem(sizes, {DType::kBf16, sizes.tokens % 2 == 1, stored}, random);
      CheckEveryTier(p, NameOf(stored));
    }
  }
}

TEST(EveryFormatIsWithinTheBoundAtDepthsThatAreCut) {
  std::mt19937 random(7);
  for (const testing::Stored& stored : testing::kStored) {
    for (const LayerSizes& sizes : kDeepSizes) {
      const Problem p = testing::MakeProblem(sizes, {DType::kF32, false, stored}, random);
      CheckEveryTier(p, NameOf(stored));
    }
  }
}

void CheckBits(const Problem& p, const testing::TestedTier& tier) {
  const Outputs one = Run(p, *tier.kernels, 1, true);
  for (const int threads : {1, 2, 5}) {
    if (testing::Quick() && threads != 5) continue;
    for (const bool retain : {true, false}) {
      const Outputs other = Run(p, *tier.kernels, threads, retain);
      CHECK_MESSAGE(other.y == one.y && other.dx == one.dx && other.dw == one.dw, tier.name + " differs");
      if (retain) CHECK_MESSAGE(other.retained == one.retained, tier.name + " retains other bits");
    }
  }
}

TEST(BitsDoNotDependOnThreadsOrActivationPolicy) {
  std::mt19937 random(4);
  for (const testing::Stored& stored : testing::kStored) {
    // Emulated tiles are slow, and so are emulated CPUs.
    const Problem small = testing::MakeProblem({24, 2, 3, 40, 270}, {DType::kBf16, true, stored}, random);
    for (const testing::TestedTier& tier : testing::EmulatedTiers()) CheckBits(small, tier);
    const Problem large =
        testing::Quick() ? small : testing::MakeProblem({333, 3, 6, 150, 290}, {DType::kBf16, true, stored}, random);
    for (const testing::TestedTier& tier : testing::CpuTiers()) CheckBits(large, tier);
  }
}

TEST(LongBatchesAreCutWithoutASeam) {
  // More routed rows than are worked on at once; the result of a token does not depend on the others.
  std::mt19937 random(5);
  const Problem p = testing::MakeProblem({testing::Quick() ? 3000 : 17000, 2, 2, 6, 4}, {DType::kF32}, random);
  const testing::TestedTier best = testing::CpuTiers().back();
  CheckTier(p, best, Reference(p, *best.kernels), "a long batch");
  const Outputs whole = Run(p, *best.kernels, 2, true);
  for (const bool retain : {true, false}) {
    const Outputs cut = Run(p, *best.kernels, 2, retain, int64_t{1} << 16);
    CHECK(cut.y == whole.y && cut.dx == whole.dx && cut.dw == whole.dw);
  }
}

}  // namespace
}  // namespace kt
