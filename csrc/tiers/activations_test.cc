// Every tier's activations and derivatives against double precision, over the range where FP32 matters.
#include <cmath>
#include <limits>
#include <utility>

#include "testing.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

struct Result {
  double act, d_gate, d_up;
};

std::pair<double, double> Unary(Activation activation, double x) {
  const double sigmoid = 1 / (1 + std::exp(-x));
  switch (activation) {
    case Activation::kSilu:
      return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
    case Activation::kGelu: {
      const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
      return {x * cdf, cdf + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI)};
    }
    case Activation::kGeluTanh: {
      const double c = std::sqrt(2 / M_PI), v = c * (x + 0.044715 * x * x * x), t = std::tanh(v);
      return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)};
    }
    case Activation::kRelu2:
      return x > 0 ? std::make_pair(x * x, 2 * x) : std::make_pair(0.0, 0.0);
    case Activation::kSwigluOai: {
      const double s = 1 / (1 + std::exp(-1.702 * x));
      return {x * s, s * (1 + 1.702 * x * (1 - s))};
    }
  }
  return {0, 0};
}

Result Expected(Activation activation, bool gated, double gate, double up, double grad) {
  if (activation == Activation::kSwigluOai) {
    const double g = std::min(gate, 7.0), u = std::max(-7.0, std::min(up, 7.0));
    const auto [value, slope] = Unary(activation, g);
    return {value * (u + 1), gate > 7 ? 0 : grad * (u + 1) * slope, std::fabs(up) > 7 ? 0 : grad * value};
  }
  const auto [value, slope] = Unary(activation, gated ? gate : up);
  if (!gated) return {value, 0, grad * slope};
  return {value * up, grad * up * slope, grad * value};
}

// Element i of the tier's operands.
double ElementAt(const TierKernels& kernels, const void* elements, int64_t i) {
  return LoadAsFloat(elements, kernels.element_bytes == 2 ? DType::kBf16 : DType::kF32, i);
}

// The error that the evaluation in FP32 may have: a few roundings (2^-24) of every intermediate result, the largest of
// which is about 1 + |x|, and an exponential within 2^-22; then the rounding to the tier's element type.
double Tolerance(const TierKernels& kernels, double expected, double scale) {
  return 0x1p-20 * scale + (kernels.element_bytes == 2 ? 0x1p-8 * std::fabs(expected) : 0);
}

TEST(ForwardAgreesWithDoublePrecision) {
  for (const testing::TestedTier& tier : testing::TestedTiers()) {
    const TierKernels* const kernels = tier.kernels;
    const int width = kernels->lanes * kernels->tile_vectors, rows = 5;
    std::vector<float> gate(static_cast<size_t>(rows * width)), up(gate.size());
    for (int gated = 0; gated < 2; ++gated) {
      for (int a = 0; a < kActivationCount; ++a) {
        const ActivateFn activate = kernels->activate[gated][a];
        if (activate == nullptr) continue;
        for (double start = -20; start < 20; start += 0.37) {
          for (size_t i = 0; i < gate.size(); ++i) {
            gate[i] = static_cast<float>(start + static_cast<double>(i) * 0.01);
            up[i] = gated != 0 ? static_cast<float>(std::sin(static_cast<double>(i)) * 9) : gate[i];
          }
          std::vector<char> panel(static_cast<size_t>((rows + 1) * width * 4), 0x7f);
          activate(gated != 0 ? gate.data() : nullptr, up.data(), rows, width, panel.data());
          for (int r = 0; r < rows; ++r) {
            for (int t = 0; t < width; ++t) {
              const size_t at = static_cast<size_t>(r * width + t);
              const Result expected = Expected(static_cast<Activation>(a), gated != 0, gate[at], up[at], 0);
              const int64_t place = (r / kernels->pair * width + t) * kernels->pair + r % kernels->pair;
              const double scale = (1 + std::fabs(gate[at])) * (1 + std::fabs(gate[at])) * (1 + std::fabs(up[at]));
              const double error = std::fabs(ElementAt(*kernels, panel.data(), place) - expected.act);
              CHECK_MESSAGE(error <= Tolerance(*kernels, expected.act, scale),
                            tier.name + " activation " + std::to_string(a) + " at " + std::to_string(gate[at]) +
                                " is off by " + std::to_string(error));
            }
          }
          if (kernels->pair == 2) {  // the odd last row is paired with zeros
            CHECK(ElementAt(*kernels, panel.data(), ((rows - 1) / 2 * width) * 2 + 1) == 0);
          }
        }
      }
    }
  }
}

TEST(BackwardAgreesWithDoublePrecision) {
  for (const testing::TestedTier& tier : testing::TestedTiers()) {
    const TierKernels* const kernels = tier.kernels;
    for (int gated = 0; gated < 2; ++gated) {
      for (int a = 0; a < kActivationCount; ++a) {
        const ActivateBackwardFn backward = kernels->activate_backward[gated][a];
        if (backward == nullptr) continue;
        for (const int64_t count : {1, 7, 16, 37, 256}) {
          std::vector<float> u;
          std::vector<Bf16> gate, up;
          for (int64_t i = 0; i < count; ++i) {
            gate.push_back(Bf16FromFloat(static_cast<float>(-18 + 36.0 * static_cast<double>(i) / 255)));
            up.push_back(gated != 0 ? Bf16FromFloat(static_cast<float>(std::cos(static_cast<double>(i)) * 9))
                                    : gate.back());
            u.push_back(static_cast<float>(std::sin(3.0 * static_cast<double>(i))));
          }
          constexpr float kWeight = 0.75F;
          std::vector<char> d_gate(static_cast<size_t>(count * 4 + 8), 0x55), d_up(d_gate);
          const float inner = backward(gated != 0 ? gate.data() : nullptr, up.data(), u.data(), kWeight, count,
                                       gated != 0 ? d_gate.data() : nullptr, d_up.data());
          double expected_inner = 0, inner_scale = 0;
          for (int64_t i = 0; i < count; ++i) {
            const size_t at = static_cast<size_t>(i);
            const double g = FloatFromBf16(gate[at]), v = FloatFromBf16(up[at]);
            const Result expected = Expected(static_cast<Activation>(a), gated != 0, g, v, u[at] * kWeight);
            const double scale = (1 + std::fabs(g)) * (1 + std::fabs(g)) * (1 + std::fabs(v));
            if (gated != 0) {
              CHECK(std::fabs(ElementAt(*kernels, d_gate.data(), i) - expected.d_gate) <=
                    Tolerance(*kernels, expected.d_gate, scale));
            }
            CHECK(std::fabs(ElementAt(*kernels, d_up.data(), i) - expected.d_up) <=
                  Tolerance(*kernels, expected.d_up, scale));
            expected_inner += u[at] * expected.act;
            inner_scale += scale;
          }
          CHECK(std::fabs(inner - expected_inner) <= 0x1p-20 * inner_scale);
          // Nothing is written beyond the row.
          CHECK(d_up[static_cast<size_t>(count * kernels->element_bytes)] == 0x55);
        }
      }
    }
  }
}

TEST(NanAndInfinityAreNotSwallowed) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (const testing::TestedTier& tier : testing::TestedTiers()) {
    const TierKernels* const kernels = tier.kernels;
    const int width = kernels->lanes;
    const std::vector<float> ones(static_cast<size_t>(2 * width), 1.0F);
    const ActivateFn silu = kernels->activate[1][static_cast<int>(Activation::kSilu)];
    std::vector<char> panel(static_cast<size_t>(2 * width * 4));
    const std::vector<float> nans(ones.size(), nan), infinities(ones.size(), infinity);
    silu(nans.data(), ones.data(), 2, width, panel.data());
    CHECK(std::isnan(ElementAt(*kernels, panel.data(), 0)));
    silu(infinities.data(), ones.data(), 2, width, panel.data());
    CHECK(std::isinf(ElementAt(*kernels, panel.data(), 0)));
    silu(ones.data(), nans.data(), 2, width, panel.data());
    CHECK(std::isnan(ElementAt(*kernels, panel.data(), 0)));
  }
}

}  // namespace
}  // namespace kt
