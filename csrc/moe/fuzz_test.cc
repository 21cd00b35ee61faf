// Random layers, formats and batches on every tier, each held to the double-precision reference; and what zeros,
// denormals, infinities and NaN in the inputs do to results.
#include <cmath>
#include <limits>

#include "moe/reference.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

using testing::LayerOptions;
using testing::LayerSizes;
using testing::Outputs;
using testing::Problem;

struct Random {
  explicit Random(uint32_t seed) : bits(seed) {}
  // In [least, most].
  int64_t Between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(bits() % static_cast<uint64_t>(most - least + 1));
  }
  bool OneIn(int64_t n) { return Between(1, n) == 1; }
  template <class T, size_t kCount>
  const T& Of(const T (&values)[kCount]) {
    return values[Between(0, kCount - 1)];
  }
  std::mt19937 bits;
};

Problem RandomProblem(Random& random) {
  LayerSizes sizes;
  // The reference multiplies all of this with one another.
  const int64_t most_products = testing::Quick() ? 60'000 : 600'000;
  do {
    sizes.tokens = random.OneIn(4) ? random.Between(60, 400) : random.Between(1, 60);
    sizes.slots = random.Between(1, 5);
    sizes.experts = random.Between(1, 9);
    sizes.hidden = random.OneIn(4) ? random.Between(200, 1200) : random.Between(1, 160);
    sizes.intermediate = random.OneIn(4) ? random.Between(200, 1200) : random.Between(1, 160);
  } while (sizes.tokens * sizes.slots * sizes.hidden * sizes.intermediate > most_products);
  LayerOptions options;
  constexpr DType kTypes[] = {DType::kF32, DType::kBf16, DType::kF16};
  options.type = random.Of(kTypes);
  options.biased = random.OneIn(2);
  options.stored = random.Of(testing::kStored);
  options.activation = static_cast<Activation>(random.Between(0, kActivationCount - 1));
  options.gated = options.activation == Activation::kSwigluOai || !random.OneIn(3);
  Problem p = testing::MakeProblem(sizes, options, random.bits);
  const int64_t slots = sizes.tokens * sizes.slots, only = random.Between(0, sizes.experts);
  switch (random.Between(0, 3)) {
    case 0:  // even
      for (int64_t i = 0; i < slots; ++i) p.index[static_cast<size_t>(i)] = random.Between(0, sizes.experts - 1);
      break;
    case 1:  // all to one, or to none
      p.index.assign(static_cast<size_t>(slots), only);
      break;
    default:  // skewed, as it is
      break;
  }
  if (random.OneIn(4)) p.routing[static_cast<size_t>(random.Between(0, slots - 1))] = 0;
  return p;
}

std::string Describe(const Problem& p) {
  const LayerSizes& s = p.sizes;
  return "T=" + std::to_string(s.tokens) + " K=" + std::to_string(s.slots) + " E=" + std::to_string(s.experts) +
         " H=" + std::to_string(s.hidden) + " I=" + std::to_string(s.intermediate) + " " + NameOf(p.options.stored) +
         " type " + std::to_string(static_cast<int>(p.options.type)) + " activation " +
         std::to_string(static_cast<int>(p.options.activation)) + (p.options.gated ? "" : " ungated") +
         (p.options.biased ? " biased" : "");
}

void CheckWithin(const testing::Expected& expected, const Outputs& out, DType type, const std::string& where) {
  const double y = Excess(expected.y, out.y.data(), type), dx = Excess(expected.dx, out.dx.data(), type);
  const double dw = Excess(expected.dw, out.dw.data(), DType::kF32);
  CHECK_MESSAGE(y <= 1 && dx <= 1 && dw <= 1, where + ": y, dx, dw are " + std::to_string(y) + ", " +
                                                  std::to_string(dx) + ", " + std::to_string(dw) + " of their bounds");
}

TEST(RandomLayersAreWithinTheBound) {
  const uint32_t cases = testing::Quick() ? 60 : 150;
  for (uint32_t seed = 0; seed < cases; ++seed) {
    Random random(seed);
    const Problem p = RandomProblem(random);
    testing::References references(p);
    for (const testing::TestedTier& tier : testing::TestedTiers()) {
      const bool retain = random.OneIn(2);
      const int threads = static_cast<int>(random.Between(1, 4));
      const Outputs out = Run(p, *tier.kernels, threads, retain, random.OneIn(3) ? 1 << 16 : 1 << 30);
      CheckWithin(references.For(*tier.kernels), out, p.options.type,
                  "seed " + std::to_string(seed) + " " + tier.name + " " + Describe(p));
    }
  }
}

// The bytes of one token's results must be equal.
void CheckSameToken(const Outputs& a, const Outputs& b, const Problem& p, int64_t token, const std::string& where) {
  const auto same = [&](const auto& x, const auto& y) {
    const int64_t count = static_cast<int64_t>(x.size()) / p.sizes.tokens;
    return std::equal(x.begin() + token * count, x.begin() + (token + 1) * count, y.begin() + token * count);
  };
  CHECK_MESSAGE(same(a.y, b.y) && same(a.dx, b.dx) && same(a.dw, b.dw), where);
}

TEST(SpecialValuesStayWithTheirTokens) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const float specials[] = {0.0F, -0.0F, 1e-39F, -1e-40F, 0x1p-24F, infinity, -infinity, nan};
  const uint32_t cases = testing::Quick() ? 60 : 150;
  for (uint32_t seed = 1000; seed < 1000 + cases; ++seed) {
    Random random(seed);
    const Problem ordinary = RandomProblem(random);
    Problem special = ordinary;
    const int64_t hidden = ordinary.sizes.hidden;
    std::vector<bool> touched(static_cast<size_t>(ordinary.sizes.tokens));
    for (int64_t n = random.Between(1, 3); n > 0; --n) {
      const int64_t token = random.Between(0, ordinary.sizes.tokens - 1);
      touched[static_cast<size_t>(token)] = true;
      const float value = random.Of(specials);
      std::vector<char>& tensor = random.OneIn(2) ? special.x : special.dy;
      const bool all = random.OneIn(3);  // of the row, or one of it
      const int64_t at = random.Between(0, hidden - 1);
      for (int64_t h = 0; h < hidden; ++h) {
        if (all || h == at) StoreFromFloat(tensor.data(), special.options.type, token * hidden + h, value);
      }
    }
    testing::References references(special);
    for (const testing::TestedTier& tier : testing::TestedTiers()) {
      const std::string where = "seed " + std::to_string(seed) + " " + tier.name + " " + Describe(special);
      const Outputs out = Run(special, *tier.kernels, 2, true), without = Run(ordinary, *tier.kernels, 2, true);
      CheckWithin(references.For(*tier.kernels), out, special.options.type, where);
      for (int64_t token = 0; token < special.sizes.tokens; ++token) {
        if (!touched[static_cast<size_t>(token)]) {
          CheckSameToken(out, without, special, token, where + ": token " + std::to_string(token) + " is disturbed");
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt
