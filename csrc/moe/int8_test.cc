// The layer with integer products on every tier: against double precision with a bound derived term by term, bit for
// bit over thread counts, and with values that are not finite.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>

#include "moe/pass.h"
#include "testing.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

struct Problem {
  int64_t tokens, slots, experts, hidden, intermediate;
  std::unique_ptr<ExpertLayer> layer;
  std::vector<float> weights[kMatrixCount];  // [E, rows, columns], as stored
  std::vector<float> bias, x, dy, routing;   // bias: [E, 2I]
  std::vector<int64_t> index;
};

struct Stored {
  Format format = Format::kInt8;
  int group = -1;
  bool zero_point = false, gated = true;
};

Problem MakeProblem(int64_t tokens, int64_t slots, int64_t experts, int64_t hidden, int64_t intermediate,
                    const Stored& stored, std::mt19937& random) {
  Problem p{tokens, slots, experts, hidden, intermediate, nullptr, {}, {}, {}, {}, {}, {}};
  p.layer = std::make_unique<ExpertLayer>(LayerShape{experts, hidden, intermediate, Activation::kSilu, stored.gated,
                                                     stored.format, stored.group, stored.zero_point});
  for (int m = stored.gated ? 0 : 1; m < kMatrixCount; ++m) {
    const Matrix matrix = static_cast<Matrix>(m);
    const int64_t rows = p.layer->rows(matrix), columns = p.layer->columns(matrix);
    for (int64_t e = 0; e < experts; ++e) {
      const std::vector<float> values =
          testing::RandomFloats(rows * columns, 1.0F / std::sqrt(static_cast<float>(columns)), random);
      p.layer->Write(matrix, e, {values.data(), DType::kF32, columns, 1});
      std::vector<float> kept(values.size());
      p.layer->Dequantize(matrix, e, kept.data());
      p.weights[m].insert(p.weights[m].end(), kept.begin(), kept.end());
    }
  }
  p.bias = testing::RandomFloats(experts * (stored.gated ? 2 : 1) * intermediate, 0.5F, random);
  p.layer->SetBiases(p.bias, {});
  p.x = testing::RandomFloats(tokens * hidden, 1, random);
  p.dy = testing::RandomFloats(tokens * hidden, 1, random);
  p.routing = testing::RandomFloats(tokens * slots, 1, random);
  for (int64_t i = 0; i < tokens * slots; ++i) {
    // Skewed: some experts have few rows, some slots are the sentinel's.
    const double u = std::uniform_real_distribution<double>(0, 1)(random);
    p.index.push_back(static_cast<int64_t>(u * u * u * static_cast<double>(experts + 1)));
  }
  return p;
}

struct Outputs {
  std::vector<float> y, dx, dw;
  std::vector<Bf16> retained;
};

Outputs Run(const Problem& p, const TierKernels& kernels, int threads, bool retain,
            int64_t scratch_bytes = int64_t{1} << 30) {
  ThreadPool pool(threads, {});
  Pass pass(kernels, pool);
  Outputs out;
  out.y.resize(p.x.size());
  out.dx.resize(p.x.size());
  out.dw.resize(p.routing.size());
  out.retained.resize(static_cast<size_t>(p.tokens * p.slots * 2 * p.intermediate));
  LayerCall call;
  call.layer = p.layer.get();
  call.compute = Compute::kInt8;
  call.tokens = p.tokens;
  call.slots = p.slots;
  call.hidden = p.x.data();
  call.experts = p.index.data();
  call.weights = p.routing.data();
  call.scratch_bytes = scratch_bytes;
  call.retained = retain ? out.retained.data() : nullptr;
  call.output = out.y.data();
  call.output_grad = p.dy.data();
  call.hidden_grad = out.dx.data();
  call.weights_grad = out.dw.data();
  pass.Forward(call);
  pass.Backward(call);
  return out;
}

// Half a step of a value's code, and the step's own rounding: `values` hold the row, each within `error` of the one
// that is quantised.
double HalfStep(const std::vector<double>& values, const std::vector<double>& error, int64_t at, int64_t group) {
  const int64_t count = static_cast<int64_t>(values.size()), first = at / group * group;
  double largest = 0;
  for (int64_t i = first; i < Smaller(first + group, count); ++i) {
    largest = std::max(largest, std::fabs(values[static_cast<size_t>(i)]) + error[static_cast<size_t>(i)]);
  }
  return largest * (0.5 / 127 + 0x1p-22) + 1e-36;
}

int64_t TokenGroup(const Problem& p, Matrix matrix) {
  const int64_t group = p.layer->view(matrix, 0).group;
  return (group & (group - 1)) == 0 ? Smaller(group, kMostTokenGroup) : kMostTokenGroup;
}

// How far y is from double precision, as a multiple of its bound: tokens are off by half a step (rounding them to
// BF16, as blocks of few rows do, is less), sums of n terms by n roundings, activations by a BF16 rounding and half a
// step. The slope of silu is at most 1.1; products of two errors are covered by the factor 1.1 in the end.
double Excess(const Problem& p, const std::vector<float>& y) {
  const LayerShape& shape = p.layer->shape();
  const double h_sum = static_cast<double>(p.hidden + 4) * 0x1p-24,
               i_sum = static_cast<double>(p.intermediate + 4) * 0x1p-24;
  double worst = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const std::vector<double> x(p.x.begin() + t * p.hidden, p.x.begin() + (t + 1) * p.hidden);
    const std::vector<double> exact(x.size(), 0.0);
    std::vector<double> half;
    half.reserve(x.size());
    for (int64_t h = 0; h < p.hidden; ++h) half.push_back(HalfStep(x, exact, h, TokenGroup(p, Matrix::kUp)));
    std::vector<double> value(x.size()), bound(x.size());
    for (int64_t j = 0; j < p.slots; ++j) {
      const int64_t e = p.index[static_cast<size_t>(t * p.slots + j)];
      if (e == p.experts) continue;
      std::vector<double> act(static_cast<size_t>(p.intermediate)), act_error(act.size());
      for (int64_t i = 0; i < p.intermediate; ++i) {
        double pre[2] = {0, 0}, error[2] = {0, 0};
        const int64_t parts = shape.gated ? 2 : 1;
        for (int64_t part = 0; part < parts; ++part) {
          const std::vector<float>& w = p.weights[part + (shape.gated ? 0 : 1)];
          pre[part] = p.bias[static_cast<size_t>((e * parts + part) * p.intermediate + i)];
          for (int64_t h = 0; h < p.hidden; ++h) {
            const double weight = w[static_cast<size_t>((e * p.intermediate + i) * p.hidden + h)];
            pre[part] += weight * x[static_cast<size_t>(h)];
            error[part] +=
                std::fabs(weight) * (half[static_cast<size_t>(h)] + h_sum * std::fabs(x[static_cast<size_t>(h)]));
          }
        }
        const double f = pre[0] / (1 + std::exp(-pre[0])), f_error = 1.1 * error[0] + 0x1p-20 * (1 + std::fabs(f));
        const double up = shape.gated ? pre[1] : 1, up_error = shape.gated ? error[1] : 0;
        act[static_cast<size_t>(i)] = f * up;
        act_error[static_cast<size_t>(i)] = std::fabs(up) * f_error + std::fabs(f) * up_error + f_error * up_error +
                                            0x1p-8 * (std::fabs(f * up) + f_error * up_error);
      }
      const double weight = p.routing[static_cast<size_t>(t * p.slots + j)];
      for (int64_t i = 0; i < p.intermediate; ++i) {
        const double error = act_error[static_cast<size_t>(i)] +
                             HalfStep(act, act_error, i, TokenGroup(p, Matrix::kDown)) +
                             i_sum * std::fabs(act[static_cast<size_t>(i)]);
        for (int64_t h = 0; h < p.hidden; ++h) {
          const double down = weight * p.weights[2][static_cast<size_t>((e * p.hidden + h) * p.intermediate + i)];
          value[static_cast<size_t>(h)] += down * act[static_cast<size_t>(i)];
          bound[static_cast<size_t>(h)] += std::fabs(down) * error;
        }
      }
    }
    for (int64_t h = 0; h < p.hidden; ++h) {
      const double off =
          std::fabs(static_cast<double>(y[static_cast<size_t>(t * p.hidden + h)]) - value[static_cast<size_t>(h)]);
      worst = std::max(worst, off / (1.1 * bound[static_cast<size_t>(h)] +
                                     0x1p-22 * std::fabs(value[static_cast<size_t>(h)]) + 1e-30));
    }
  }
  return worst;
}

const Stored kStored[] = {{},
                          {Format::kInt8, 64},
                          {Format::kInt8, -1, false, false},
                          {Format::kInt4},
                          {Format::kInt4, 128},
                          {Format::kInt4, 32, true},
                          {Format::kInt4, 0, true}};

const struct {
  int64_t tokens, slots, experts, hidden, intermediate;
} kShapes[] = {{1, 1, 1, 1, 1},    {2, 4, 3, 33, 18},    {40, 2, 3, 64, 32},
               {70, 3, 2, 37, 29}, {30, 2, 1, 600, 270}, {300, 2, 2, 20, 50}};

TEST(EveryTierIsWithinTheBound) {
  std::mt19937 random(1);
  for (const auto& s : kShapes) {
    for (const Stored& stored : kStored) {
      if (testing::Quick() && s.tokens * s.hidden > 6000) continue;
      const Problem p = MakeProblem(s.tokens, s.slots, s.experts, s.hidden, s.intermediate, stored, random);
      for (const testing::TestedTier& tier : testing::TestedTiers()) {
        const double excess = Excess(p, Run(p, *tier.kernels, 2, true).y);
        CHECK_MESSAGE(excess <= 1, tier.name + " " + FormatName(stored.format) + " " + std::to_string(stored.group) +
                                       " H=" + std::to_string(s.hidden) + " I=" + std::to_string(s.intermediate) +
                                       " is " + std::to_string(excess) + " times its bound");
      }
    }
  }
}

TEST(BitsDoNotDependOnThreadsPolicyOrScratch) {
  std::mt19937 random(2);
  for (const Stored& stored : {Stored{}, Stored{Format::kInt4, 32, true}}) {
    const Problem p = MakeProblem(testing::Quick() ? 60 : 333, 3, 6, 150, 290, stored, random);
    for (const testing::TestedTier& tier : testing::CpuTiers()) {
      const Outputs one = Run(p, *tier.kernels, 1, true);
      for (const int threads : {1, 3}) {
        for (const bool retain : {true, false}) {
          for (const int64_t scratch : {int64_t{1} << 30, int64_t{1} << 20}) {
            const Outputs other = Run(p, *tier.kernels, threads, retain, scratch);
            CHECK_MESSAGE(other.y == one.y && other.dx == one.dx && other.dw == one.dw, tier.name + " differs");
          }
        }
      }
    }
  }
}

TEST(WhatIsNotFiniteReachesItsTokenAlone) {
  std::mt19937 random(3);
  for (const float broken : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    Problem p = MakeProblem(64, 1, 1, 70, 40, {}, random);
    std::fill(p.index.begin(), p.index.end(), 0);
    for (const testing::TestedTier& tier : testing::TestedTiers()) {
      const std::vector<float> whole = Run(p, *tier.kernels, 1, true).y;
      const float kept = std::exchange(p.x[5 * 70 + 69], broken);
      const std::vector<float> y = Run(p, *tier.kernels, 1, true).y;
      p.x[5 * 70 + 69] = kept;
      for (int64_t i = 0; i < 64 * 70; ++i) {
        const float got = y[static_cast<size_t>(i)];
        CHECK_MESSAGE(i / 70 == 5 ? std::isnan(got) : got == whole[static_cast<size_t>(i)], tier.name);
      }
    }
  }
}

TEST(OtherFormatsAreRefused) {
  std::mt19937 random(4);
  const Problem p = MakeProblem(3, 1, 1, 8, 8, {Format::kFp8}, random);
  CHECK_THROWS(Run(p, *BestKernels(Tier::kAmx), 1, true), std::invalid_argument);
}

}  // namespace
}  // namespace kt
