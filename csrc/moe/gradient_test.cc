// Backward is forward's derivative. Tiers multiply and retain in FP32 and BF16, where finite differences say little; so
// the activations' formulas are instantiated in double precision, and the layer's are those of the reference, which
// every tier is held to in both passes.
#include <cmath>

#include "moe/reference.h"
#include "tiers/tested_tiers.h"

namespace {

// What activations.inl needs of a tier, on one double.
struct DoubleOps {
  using F = double;
  static F Set(double x) { return x; }
  static F Zero() { return 0; }
  static F Add(F a, F b) { return a + b; }
  static F Sub(F a, F b) { return a - b; }
  static F Mul(F a, F b) { return a * b; }
  static F Div(F a, F b) { return a / b; }
  static F Fma(F a, F b, F c) { return a * b + c; }
  static F Min(F a, F b) { return a < b ? a : b; }
  static F Max(F a, F b) { return a > b ? a : b; }
  static F Abs(F a) { return std::fabs(a); }
  static F SelectNegative(F x, F negative, F otherwise) { return x < 0 ? negative : otherwise; }
};

}  // namespace

#include "tiers/activations.inl"

namespace kt {

// The functions that tiers approximate to FP32.
template <>
struct Math<DoubleOps> {
  static double Exp(double x) { return std::exp(x); }
  static double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double NormalCdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
};

namespace {

// Off the kinks, central differences are within step^2 / 6 times the third derivative, of which 30 (1 + |up|) is more
// than any activation has here; constants of the formulas are FP32, relative 2^-24.
template <class Act>
void CheckActivation(const char* name) {
  constexpr double kStep = 0x1p-12, kGrad = 0.625;
  for (double gate = -9.03; gate < 9; gate += 0.171) {
    for (double up = -9.01; up < 9; up += 0.93) {
      double d_gate = 0, d_up = 0;
      const double act = Act::Backward(gate, up, kGrad, &d_gate, &d_up);
      const double by_gate = kGrad * (Act::Forward(gate + kStep, up) - Act::Forward(gate - kStep, up)) / (2 * kStep);
      const double by_up = kGrad * (Act::Forward(gate, up + kStep) - Act::Forward(gate, up - kStep)) / (2 * kStep);
      const double scale = (1 + std::fabs(gate)) * (1 + std::fabs(up));
      const double tolerance = (kStep * kStep * 5 + 0x1p-23) * scale;
      CHECK_MESSAGE(std::fabs(d_gate - by_gate) <= tolerance && std::fabs(d_up - by_up) <= tolerance &&
                        act == Act::Forward(gate, up),
                    std::string(name) + " at " + std::to_string(gate) + ", " + std::to_string(up) + ": " +
                        std::to_string(d_gate) + " is not " + std::to_string(by_gate) + ", or " + std::to_string(d_up) +
                        " not " + std::to_string(by_up));
    }
  }
}

TEST(ActivationsGradientsAreTheirDerivatives) {
  CheckActivation<Gated<DoubleOps, Silu>>("silu");
  CheckActivation<Gated<DoubleOps, Gelu>>("gelu");
  CheckActivation<Gated<DoubleOps, GeluTanh>>("gelu_tanh");
  CheckActivation<Gated<DoubleOps, Relu2>>("relu2");
  CheckActivation<SwigluOai<DoubleOps>>("swiglu_oai");
  CheckActivation<Ungated<DoubleOps, Silu>>("ungated silu");
  CheckActivation<Ungated<DoubleOps, Gelu>>("ungated gelu");
  CheckActivation<Ungated<DoubleOps, GeluTanh>>("ungated gelu_tanh");
  CheckActivation<Ungated<DoubleOps, Relu2>>("ungated relu2");
}

// <dy, y>.
double Loss(const testing::Problem& p) {
  const testing::Expected expected = Reference(p, *KernelsOf(Tier::kPortable));
  double sum = 0;
  for (size_t i = 0; i < expected.y.size(); ++i) sum += p.Dy(static_cast<int64_t>(i)) * expected.y[i].value;
  return sum;
}

// The central difference of the loss over one FP32 value. Steps of 2^-12 from values below 16 are exact, as is a
// power of two.
double Difference(testing::Problem& p, float* value) {
  constexpr float kStep = 0x1p-12F;
  const float at = std::round(*value / kStep) * kStep;
  *value = at + kStep;
  const double above = Loss(p);
  *value = at - kStep;
  const double below = Loss(p);
  *value = at;
  return (above - below) / (2 * static_cast<double>(kStep));
}

TEST(TheReferencesGradientsAreItsDerivatives) {
  std::mt19937 random(8);
  for (int a = 0; a < kActivationCount; ++a) {
    for (const bool gated : {true, false}) {
      const Activation activation = static_cast<Activation>(a);
      if (!gated && activation == Activation::kSwigluOai) continue;
      testing::Problem p = testing::MakeProblem({5, 2, 3, 6, 4}, {DType::kF32, true, {}, activation, gated}, random);
      float* const x = reinterpret_cast<float*>(p.x.data());
      // Values that steps are exact from; far enough out for clamps to matter.
      for (int64_t i = 0; i < 5 * 6; ++i) x[i] = std::round(x[i] * 0x1p10F * 4) * 0x1p-10F;
      for (float& weight : p.routing) weight = std::round(weight * 0x1p10F) * 0x1p-10F;
      const testing::Expected expected = Reference(p, *KernelsOf(Tier::kPortable));
      double largest = 0;
      for (const auto* values : {&expected.dx, &expected.dw}) {
        for (const testing::Bounded& b : *values) largest = std::max(largest, std::fabs(b.value));
      }
      // Third derivatives are of the size of the gradients times a few hundred: steps^2 / 6 of that are 2^-20.
      const double tolerance = largest * 0x1p-20;
      const auto check = [&](const testing::Bounded& gradient, float* value) {
        const double difference = Difference(p, value);
        CHECK_MESSAGE(std::fabs(gradient.value - difference) <= tolerance, "activation " + std::to_string(a) + ": " +
                                                                               std::to_string(gradient.value) +
                                                                               " is not " + std::to_string(difference));
      };
      for (size_t i = 0; i < expected.dx.size(); ++i) check(expected.dx[i], x + i);
      for (size_t i = 0; i < expected.dw.size(); ++i) check(expected.dw[i], &p.routing[i]);
    }
  }
}

}  // namespace
}  // namespace kt
