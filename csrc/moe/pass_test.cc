// The whole layer on every tier, against double precision with a bound derived term by term, and bit for bit over
// thread counts.
#include "moe/pass.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "testing.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

constexpr double kBf16Rounding = 0x1p-8;  // half the spacing of BF16 at 1
constexpr double kFloatRounding = 0x1p-24;

struct Problem {
  int64_t tokens, slots, experts, hidden, intermediate;
  DType type;
  std::unique_ptr<ExpertLayer> layer;
  std::vector<double> weights_of[kMatrixCount];  // [E, rows, columns]
  std::vector<float> gate_up_bias, down_bias;
  std::vector<char> x, dy;  // in `type`
  std::vector<int64_t> index;
  std::vector<float> routing;

  double X(int64_t i) const { return LoadAsFloat(x.data(), type, i); }
  double Dy(int64_t i) const { return LoadAsFloat(dy.data(), type, i); }
};

std::vector<char> RandomTensor(int64_t count, DType type, std::mt19937& random) {
  const std::vector<float> values = testing::RandomFloats(count, 1.0F, random);
  std::vector<char> bytes(static_cast<size_t>(count * DTypeBytes(type)));
  for (int64_t i = 0; i < count; ++i) StoreFromFloat(bytes.data(), type, i, values[static_cast<size_t>(i)]);
  return bytes;
}

// A format with all its options: the format's own group (-1) or another.
struct Stored {
  Format format = Format::kBf16;
  int64_t group = -1;
  bool zero_point = false;
};

const Stored kStored[] = {
    {Format::kBf16},      {Format::kInt8},           {Format::kInt8, 64}, {Format::kInt4}, {Format::kInt4, 64},
    {Format::kInt4, 128}, {Format::kInt4, 32, true}, {Format::kInt4, 0},  {Format::kNf4},  {Format::kNf4, 256},
    {Format::kFp8},       {Format::kFp8, 0},         {Format::kMxfp4},
};

Problem MakeProblem(int64_t tokens, int64_t slots, int64_t experts, int64_t hidden, int64_t intermediate, DType type,
                    bool biased, std::mt19937& random, const Stored& stored_as = {}) {
  Problem p{tokens, slots, experts, hidden, intermediate, type, nullptr, {}, {}, {}, {}, {}, {}, {}};
  p.layer = std::make_unique<ExpertLayer>(LayerShape{experts, hidden, intermediate, Activation::kSilu, true,
                                                     stored_as.format, stored_as.group, stored_as.zero_point});
  for (int m = 0; m < kMatrixCount; ++m) {
    const Matrix matrix = static_cast<Matrix>(m);
    const int64_t rows = p.layer->rows(matrix), columns = p.layer->columns(matrix);
    for (int64_t e = 0; e < experts; ++e) {
      const std::vector<float> values =
          testing::RandomFloats(rows * columns, 1.0F / std::sqrt(static_cast<float>(columns)), random);
      p.layer->Write(matrix, e, {values.data(), DType::kF32, columns, 1});
      std::vector<float> stored(values.size());
      p.layer->Dequantize(matrix, e, stored.data());
      p.weights_of[m].insert(p.weights_of[m].end(), stored.begin(), stored.end());
    }
  }
  if (biased) {
    p.gate_up_bias = testing::RandomFloats(experts * 2 * intermediate, 0.5F, random);
    p.down_bias = testing::RandomFloats(experts * hidden, 0.5F, random);
    p.layer->SetBiases(p.gate_up_bias, p.down_bias);
  }
  p.x = RandomTensor(tokens * hidden, type, random);
  p.dy = RandomTensor(tokens * hidden, type, random);
  for (int64_t i = 0; i < tokens * slots; ++i) {
    // Skewed: low numbers are much more frequent, the sentinel occurs, and some experts get nothing.
    const double u = std::uniform_real_distribution<double>(0, 1)(random);
    p.index.push_back(static_cast<int64_t>(u * u * u * static_cast<double>(experts + 1)));
    p.routing.push_back(std::uniform_real_distribution<float>(-1, 1)(random));
  }
  return p;
}

// A value in double precision and how far the engine's may be from it.
struct Bounded {
  double value = 0, error = 0;
  void Add(double v, double e) {
    value += v;
    error += e;
  }
};

struct Expected {
  std::vector<Bounded> y, dx, dw;
};

double RoundingOf(DType type) {
  if (type == DType::kF32) return kFloatRounding;
  return type == DType::kBf16 ? kBf16Rounding : 0x1p-11;
}

// First-order error analysis, term by term. `element` is the rounding of the tier's operands (zero for FP32 operands
// beyond their own rounding, which the summation term covers), `sum` bounds a whole summation of n terms by n
// roundings. Products of two errors are covered by the factor 1.1 in the end.
Expected Reference(const Problem& p, const TierKernels& kernels) {
  const double element = kernels.pair == 2 ? kBf16Rounding : 0;
  const double input = p.type == DType::kBf16 ? 0 : element;
  // Where operands are BF16, forward multiplies exact codes and scales the sums (two roundings more, here and in the
  // reference's own weights); backward rounds code x scale once, unless the scale is a power of two.
  const Format format = p.layer->shape().format;
  const double weight = format == Format::kBf16 || format == Format::kMxfp4 ? 0 : element;
  const double h_sum = static_cast<double>(p.hidden + 4) * kFloatRounding;
  const double i_sum = static_cast<double>(2 * p.intermediate + 4) * kFloatRounding;
  Expected result;
  result.y.resize(static_cast<size_t>(p.tokens * p.hidden));
  result.dx.resize(result.y.size());
  result.dw.resize(static_cast<size_t>(p.tokens * p.slots));
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t j = 0; j < p.slots; ++j) {
      const int64_t e = p.index[static_cast<size_t>(t * p.slots + j)];
      if (e == p.experts) continue;
      const double w = p.routing[static_cast<size_t>(t * p.slots + j)];
      const double* const gate_w = p.weights_of[0].data() + e * p.intermediate * p.hidden;
      const double* const up_w = p.weights_of[1].data() + e * p.intermediate * p.hidden;
      const double* const down_w = p.weights_of[2].data() + e * p.intermediate * p.hidden;
      Bounded& dw = result.dw[static_cast<size_t>(t * p.slots + j)];
      for (int64_t i = 0; i < p.intermediate; ++i) {
        Bounded gate, up, u;
        if (!p.gate_up_bias.empty()) {
          gate.Add(p.gate_up_bias[static_cast<size_t>(e * 2 * p.intermediate + i)], 0);
          up.Add(p.gate_up_bias[static_cast<size_t>((e * 2 + 1) * p.intermediate + i)], 0);
        }
        for (int64_t h = 0; h < p.hidden; ++h) {
          const double x = p.X(t * p.hidden + h), dy = p.Dy(t * p.hidden + h);
          const double g = x * gate_w[i * p.hidden + h], v = x * up_w[i * p.hidden + h];
          const double d = dy * down_w[h * p.intermediate + i];
          gate.Add(g, std::fabs(g) * (input + h_sum));
          up.Add(v, std::fabs(v) * (input + h_sum));
          u.Add(d, std::fabs(d) * (input + weight + h_sum));
        }
        const double s = 1 / (1 + std::exp(-gate.value)), f = gate.value * s, slope = s * (1 + gate.value * (1 - s));
        // |silu'| <= 1.1 and |silu''| <= 0.5; 2^-20 bounds the evaluation itself.
        const double f_error = 1.1 * gate.error + 0x1p-20 * (1 + std::fabs(f));
        const double act = f * up.value;
        const double act_error = std::fabs(up.value) * f_error + std::fabs(f) * up.error + f_error * up.error;
        for (int64_t h = 0; h < p.hidden; ++h) {
          const double term = w * down_w[h * p.intermediate + i];
          result.y[static_cast<size_t>(t * p.hidden + h)].Add(
              term * act, std::fabs(term) * (act_error + std::fabs(act) * (element + i_sum)));
        }
        // Backward reads gate and up rounded to BF16.
        const double g_error = gate.error + kBf16Rounding * std::fabs(gate.value);
        const double up_error = up.error + kBf16Rounding * std::fabs(up.value);
        const double f_back = 1.1 * g_error + 0x1p-20 * (1 + std::fabs(f));
        const double slope_error = 0.5 * g_error + 0x1p-20 * (1 + std::fabs(gate.value));
        const double act_back = std::fabs(up.value) * f_back + std::fabs(f) * up_error + f_back * up_error;
        dw.Add(u.value * act,
               std::fabs(u.value) * (act_back + i_sum * std::fabs(act)) + u.error * (std::fabs(act) + act_back));
        const double d_gate = w * u.value * up.value * slope, d_up = w * u.value * f;
        const double d_gate_error =
            std::fabs(w) * (u.error * std::fabs(up.value * slope) + std::fabs(u.value * slope) * up_error +
                            std::fabs(u.value * up.value) * slope_error + u.error * up_error +
                            (std::fabs(u.value) * up_error + std::fabs(up.value) * u.error) * slope_error) +
            element * std::fabs(d_gate);
        const double d_up_error =
            std::fabs(w) * (u.error * std::fabs(f) + std::fabs(u.value) * f_back + u.error * f_back) +
            element * std::fabs(d_up);
        for (int64_t h = 0; h < p.hidden; ++h) {
          const double g = gate_w[i * p.hidden + h], v = up_w[i * p.hidden + h];
          result.dx[static_cast<size_t>(t * p.hidden + h)].Add(
              d_gate * g + d_up * v, (d_gate_error + (weight + i_sum) * std::fabs(d_gate)) * std::fabs(g) +
                                         (d_up_error + (weight + i_sum) * std::fabs(d_up)) * std::fabs(v));
        }
      }
      for (int64_t h = 0; h < p.hidden && !p.down_bias.empty(); ++h) {
        const double bias = p.down_bias[static_cast<size_t>(e * p.hidden + h)], dy = p.Dy(t * p.hidden + h);
        result.y[static_cast<size_t>(t * p.hidden + h)].Add(w * bias, std::fabs(w * bias) * i_sum);
        dw.Add(bias * dy, std::fabs(bias * dy) * h_sum);
      }
    }
  }
  return result;
}

void CheckWithin(const std::vector<Bounded>& expected, const void* actual, DType type, const std::string& what) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double got = LoadAsFloat(actual, type, static_cast<int64_t>(i));
    const double bound = 1.1 * expected[i].error + RoundingOf(type) * std::fabs(expected[i].value) + 1e-30 +
                         (type == DType::kF16 ? 0x1p-25 : 0);
    worst = std::max(worst, std::fabs(got - expected[i].value) / bound);
  }
  CHECK_MESSAGE(worst <= 1, what + " is " + std::to_string(worst) + " times its bound");
}

struct Outputs {
  std::vector<char> y, dx;
  std::vector<float> dw;
  std::vector<Bf16> retained;
};

Outputs Run(const Problem& p, const TierKernels& kernels, int threads, bool retain) {
  ThreadPool pool(threads, {});
  Pass pass(kernels, pool);
  Outputs out;
  out.y.resize(p.x.size());
  out.dx.resize(p.x.size());
  out.dw.resize(p.routing.size());
  out.retained.resize(static_cast<size_t>(p.tokens * p.slots * 2 * p.intermediate));
  LayerCall call;
  call.layer = p.layer.get();
  call.tokens = p.tokens;
  call.slots = p.slots;
  call.type = p.type;
  call.hidden = p.x.data();
  call.experts = p.index.data();
  call.weights = p.routing.data();
  call.retained = retain ? out.retained.data() : nullptr;
  call.output = out.y.data();
  call.output_grad = p.dy.data();
  call.hidden_grad = out.dx.data();
  call.weights_grad = out.dw.data();
  pass.Forward(call);
  if (retain) call.hidden = nullptr;  // not needed any more
  pass.Backward(call);
  return out;
}

const struct {
  int64_t tokens, slots, experts, hidden, intermediate;
} kShapes[] = {{1, 1, 1, 1, 1},    {3, 2, 4, 5, 3},     {2, 4, 3, 33, 18},   {40, 2, 5, 64, 32},
               {70, 3, 2, 37, 29}, {9, 2, 2, 300, 270}, {300, 2, 3, 20, 50}, {600, 1, 1, 8, 9}};

void CheckEveryTier(const Problem& p, const std::string& what) {
  for (const testing::TestedTier& tier : testing::TestedTiers()) {
    const Expected expected = Reference(p, *tier.kernels);
    const Outputs out = Run(p, *tier.kernels, 2, true);
    const std::string where = tier.name + " " + what + " H=" + std::to_string(p.hidden) +
                              " I=" + std::to_string(p.intermediate) + " type " +
                              std::to_string(static_cast<int>(p.type));
    CheckWithin(expected.y, out.y.data(), p.type, where + " y");
    CheckWithin(expected.dx, out.dx.data(), p.type, where + " dx");
    CheckWithin(expected.dw, out.dw.data(), DType::kF32, where + " dw");
  }
}

TEST(EveryTierIsWithinTheBound) {
  std::mt19937 random(3);
  for (const auto& s : kShapes) {
    for (const DType type : {DType::kF32, DType::kBf16, DType::kF16}) {
      CheckEveryTier(
          MakeProblem(s.tokens, s.slots, s.experts, s.hidden, s.intermediate, type, s.tokens % 2 == 1, random), "bf16");
    }
  }
}

TEST(EveryFormatIsWithinTheBound) {
  std::mt19937 random(6);
  for (const auto& s : kShapes) {
    for (const Stored& stored : kStored) {
      const Problem p = MakeProblem(s.tokens, s.slots, s.experts, s.hidden, s.intermediate, DType::kBf16,
                                    s.tokens % 2 == 1, random, stored);
      CheckEveryTier(p, std::string(FormatName(stored.format)) + " " + std::to_string(stored.group));
    }
  }
}

void CheckBits(const Problem& p, const testing::TestedTier& tier) {
  const Outputs one = Run(p, *tier.kernels, 1, true);
  for (const int threads : {1, 2, 5}) {
    for (const bool retain : {true, false}) {
      const Outputs other = Run(p, *tier.kernels, threads, retain);
      CHECK_MESSAGE(other.y == one.y && other.dx == one.dx && other.dw == one.dw, tier.name + " differs");
      if (retain) CHECK_MESSAGE(other.retained == one.retained, tier.name + " retains other bits");
    }
  }
}

TEST(BitsDoNotDependOnThreadsOrActivationPolicy) {
  std::mt19937 random(4);
  for (const Stored& stored : {Stored{}, Stored{Format::kInt8}, Stored{Format::kInt4}, Stored{Format::kFp8}}) {
    const Problem p = MakeProblem(333, 3, 6, 150, 290, DType::kBf16, true, random, stored);
    for (const testing::TestedTier& tier : testing::CpuTiers()) CheckBits(p, tier);
  }
  // Emulated tiles are slow.
  const Problem p = MakeProblem(50, 3, 4, 70, 290, DType::kBf16, true, random, {Format::kInt4});
  for (const testing::TestedTier& tier : testing::EmulatedTiers()) CheckBits(p, tier);
}

TEST(LongBatchesAreCutWithoutASeam) {
  // More routed rows than are worked on at once; the result of a token does not depend on the others.
  std::mt19937 random(5);
  const Problem p = MakeProblem(17000, 2, 2, 6, 4, DType::kF32, false, random);
  const TierKernels& kernels = *BestKernels(Tier::kAmx);
  const Expected expected = Reference(p, kernels);
  for (const bool retain : {true, false}) {
    const Outputs out = Run(p, kernels, 2, retain);
    CheckWithin(expected.y, out.y.data(), p.type, "y");
    CheckWithin(expected.dx, out.dx.data(), p.type, "dx");
    CheckWithin(expected.dw, out.dw.data(), DType::kF32, "dw");
  }
}

}  // namespace
}  // namespace kt
