#include "moe/reference.h"

#include <algorithm>
#include <cmath>

namespace kt::testing {

std::string NameOf(const Stored& stored) {
  return std::string(FormatName(stored.format)) + (stored.group < 0 ? "" : " by " + std::to_string(stored.group)) +
         (stored.zero_point ? " with zero points" : "");
}

std::vector<char> RandomTensor(int64_t count, DType type, std::mt19937& random) {
  const std::vector<float> values = RandomFloats(count, 1.0F, random);
  std::vector<char> bytes(static_cast<size_t>(count * DTypeBytes(type)));
  for (int64_t i = 0; i < count; ++i) StoreFromFloat(bytes.data(), type, i, values[static_cast<size_t>(i)]);
  return bytes;
}

Problem MakeProblem(const LayerSizes& sizes, const LayerOptions& options, std::mt19937& random) {
  Problem p{sizes, options, nullptr, {}, {}, {}, {}, {}, {}, {}};
  p.layer = std::make_shared<ExpertLayer>(LayerShape{sizes.experts, sizes.hidden, sizes.intermediate,
                                                     options.activation, options.gated, options.stored.format,
                                                     options.stored.group, options.stored.zero_point});
  for (int m = options.gated ? 0 : 1; m < kMatrixCount; ++m) {
    const Matrix matrix = static_cast<Matrix>(m);
    const int64_t rows = p.layer->rows(matrix), columns = p.layer->columns(matrix);
    for (int64_t e = 0; e < sizes.experts; ++e) {
      const std::vector<float> values =
          RandomFloats(rows * columns, 1.0F / std::sqrt(static_cast<float>(columns)), random);
      p.layer->Write(matrix, e, {values.data(), DType::kF32, columns, 1});
      std::vector<float> stored(values.size());
      p.layer->Dequantize(matrix, e, stored.data());
      p.weights_of[m].insert(p.weights_of[m].end(), stored.begin(), stored.end());
    }
  }
  if (options.biased) {
    p.gate_up_bias = RandomFloats(sizes.experts * (options.gated ? 2 : 1) * sizes.intermediate, 0.5F, random);
    p.down_bias = RandomFloats(sizes.experts * sizes.hidden, 0.5F, random);
    p.layer->SetBiases(p.gate_up_bias, p.down_bias);
  }
  p.x = RandomTensor(sizes.tokens * sizes.hidden, options.type, random);
  p.dy = RandomTensor(sizes.tokens * sizes.hidden, options.type, random);
  for (int64_t i = 0; i < sizes.tokens * sizes.slots; ++i) {
    const double u = std::uniform_real_distribution<double>(0, 1)(random);
    p.index.push_back(static_cast<int64_t>(u * u * u * static_cast<double>(sizes.experts + 1)));
    p.routing.push_back(std::uniform_real_distribution<float>(-1, 1)(random));
  }
  return p;
}

Unary UnaryAt(Activation activation, double x, double reach) {
  const auto swish = [&](double alpha, double most_slope, double most_curvature) {
    const double s = 1 / (1 + std::exp(-alpha * x));
    return Unary{x * s, s * (1 + alpha * x * (1 - s)), most_slope, most_curvature};
  };
  switch (activation) {
    case Activation::kSilu:
      return swish(1, 1.1, 0.5);
    case Activation::kSwigluOai:
      return swish(1.702, 1.1, 0.86);
    case Activation::kRelu2:
      // 0 * x: not a number stays one.
      return x > 0 ? Unary{x * x, 2 * x, 2 * reach, 2}
                   : Unary{std::isnan(x) ? x : 0, std::isnan(x) ? x : 0, 2 * reach, 2};
    case Activation::kGelu: {
      const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
      return {x * cdf, cdf + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI), 1.13, 0.8};
    }
    case Activation::kGeluTanh:
      break;
  }
  const double c = std::sqrt(2 / M_PI), v = c * (x + 0.044715 * x * x * x), t = std::tanh(v);
  return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x), 1.13, 0.81};
}

Activated Activate(const LayerOptions& options, const Bounded& gate, const Bounded& given_up) {
  constexpr double kLimit = 7;  // of gpt-oss
  Bounded x = options.gated ? gate : given_up, up = given_up;
  bool gate_passes = true, up_passes = true, gate_unsure = false, up_unsure = false;
  if (options.activation == Activation::kSwigluOai) {
    // Within its error of a clamp the derivative may be taken from either side.
    gate_passes = !(x.value > kLimit), up_passes = !(std::fabs(up.value) > kLimit);
    gate_unsure = std::fabs(x.value - kLimit) <= x.error;
    up_unsure = std::fabs(std::fabs(up.value) - kLimit) <= up.error;
    if (!gate_passes) x.value = kLimit;
    if (!up_passes) up.value = std::copysign(kLimit, up.value);
    up.value += 1;
  }
  const Unary f = UnaryAt(options.activation, x.value, std::fabs(x.value) + x.error);
  const double evaluation = 0x1p-20 * (1 + std::fabs(x.value)) * (1 + std::fabs(x.value));
  const Bounded value{f.value, f.most_slope * x.error + evaluation};
  const Bounded slope{f.slope, f.most_curvature * x.error + evaluation};
  if (!options.gated) return {value, {}, slope};
  const double most_up = std::fabs(up.value) + up.error;
  const auto times_up = [&](const Bounded& b) {
    return Bounded{b.value * up.value, b.error * most_up + std::fabs(b.value) * up.error};
  };
  Activated result{times_up(value), times_up(slope), value, gate_passes, up_passes};
  if (gate_unsure) result.by_gate.error += std::fabs(slope.value * up.value);
  if (up_unsure) result.by_up.error += std::fabs(value.value);
  if (!gate_passes) result.by_gate = {0, gate_unsure ? result.by_gate.error : 0};
  if (!up_passes) result.by_up = {0, up_unsure ? result.by_up.error : 0};
  return result;
}

namespace {

// One routed row of the reference: a token at one of its experts.
class Row {
 public:
  Row(const Problem& problem, const TierKernels& kernels, int64_t token, int64_t expert, double weight)
      : p(problem), token_(token), expert_(expert), weight_(weight) {
    element_ = kernels.pair == 2 ? kBf16Rounding : 0;
    input_ = p.options.type == DType::kBf16 ? 0 : element_;
    // Where operands are BF16, forward multiplies exact codes and scales the sums; backward rounds code x scale once,
    // unless there is no scale, or it is a power of two.
    const Format format = p.options.stored.format;
    stored_ = format == Format::kBf16 || format == Format::kMxfp4 ? 0 : element_;
    h_sum_ = static_cast<double>(p.sizes.hidden + 4) * kFloatRounding;
    i_sum_ = static_cast<double>(2 * p.sizes.intermediate + 4) * kFloatRounding;
  }

  void AddTo(Expected* result, Bounded* dw) const {
    Bounded* const y = result->y.data() + token_ * p.sizes.hidden;
    Bounded* const dx = result->dx.data() + token_ * p.sizes.hidden;
    for (int64_t i = 0; i < p.sizes.intermediate; ++i) AddColumn(i, y, dx, dw);
    for (int64_t h = 0; h < p.sizes.hidden && !p.down_bias.empty(); ++h) {
      const double bias = p.down_bias[static_cast<size_t>(expert_ * p.sizes.hidden + h)], dy = Dy(h);
      y[h].Add(weight_ * bias, std::fabs(weight_ * bias) * i_sum_);
      dw->Add(bias * dy, std::fabs(bias * dy) * h_sum_);
    }
  }

 private:
  double X(int64_t h) const { return p.X(token_ * p.sizes.hidden + h); }
  double Dy(int64_t h) const { return p.Dy(token_ * p.sizes.hidden + h); }
  const double* Weights(Matrix matrix) const {
    const auto& all = p.weights_of[static_cast<int>(matrix)];
    return all.empty() ? nullptr : all.data() + expert_ * p.sizes.intermediate * p.sizes.hidden;
  }

  // The pre-activation of a row of gate or up.
  Bounded Pre(Matrix matrix, int64_t i) const {
    Bounded sum;
    if (Weights(matrix) == nullptr) return sum;
    if (!p.gate_up_bias.empty()) {
      const int64_t parts = p.options.gated ? 2 : 1, part = matrix == Matrix::kGate ? 0 : parts - 1;
      const double bias = p.gate_up_bias[static_cast<size_t>((expert_ * parts + part) * p.sizes.intermediate + i)];
      sum.Add(bias, std::fabs(bias) * h_sum_);
    }
    const double* const row = Weights(matrix) + i * p.sizes.hidden;
    for (int64_t h = 0; h < p.sizes.hidden; ++h) {
      const double term = X(h) * row[h];
      sum.Add(term, std::fabs(term) * (input_ + h_sum_));
    }
    return sum;
  }

  // What intermediate column i adds to everything.
  void AddColumn(int64_t i, Bounded* y, Bounded* dx, Bounded* dw) const {
    const int64_t hidden = p.sizes.hidden, intermediate = p.sizes.intermediate;
    const double* const down = Weights(Matrix::kDown);
    Bounded gate = Pre(Matrix::kGate, i), up = Pre(Matrix::kUp, i), u;
    const Bounded act = Activate(p.options, gate, up).act;
    for (int64_t h = 0; h < hidden; ++h) {
      const double weight = down[h * intermediate + i], out = weight_ * weight, in = Dy(h) * weight;
      y[h].Add(out * act.value, std::fabs(out) * (act.error + std::fabs(act.value) * (element_ + i_sum_)));
      u.Add(in, std::fabs(in) * (input_ + stored_ + h_sum_));
    }
    gate.error += kBf16Rounding * std::fabs(gate.value);
    up.error += kBf16Rounding * std::fabs(up.value);
    const Activated back = Activate(p.options, gate, up);
    dw->Add(u.value * back.act.value, std::fabs(u.value) * (back.act.error + i_sum_ * std::fabs(back.act.value)) +
                                          u.error * (std::fabs(back.act.value) + back.act.error));
    AddPreGradient(u, back.by_up, back.up_passes, Weights(Matrix::kUp) + i * hidden, dx);
    if (p.options.gated) {
      AddPreGradient(u, back.by_gate, back.gate_passes, Weights(Matrix::kGate) + i * hidden, dx);
    }
  }

  // What the gradient of one pre-activation, weight x u x slope, adds to dL/dx.
  void AddPreGradient(const Bounded& u, const Bounded& slope, bool passes, const double* row, Bounded* dx) const {
    const double d = passes ? weight_ * u.value * slope.value : 0;
    const double error =
        std::fabs(weight_) * (u.error * (std::fabs(slope.value) + slope.error) + std::fabs(u.value) * slope.error) +
        (element_ + stored_ + i_sum_) * std::fabs(d);
    for (int64_t h = 0; h < p.sizes.hidden; ++h) dx[h].Add(d * row[h], error * std::fabs(row[h]));
  }

  const Problem& p;
  int64_t token_, expert_;
  double weight_;
  double element_, input_, stored_, h_sum_, i_sum_;
};

}  // namespace

Expected Reference(const Problem& p, const TierKernels& kernels) {
  Expected result;
  result.y.resize(static_cast<size_t>(p.sizes.tokens * p.sizes.hidden));
  result.dx.resize(result.y.size());
  result.dw.resize(static_cast<size_t>(p.sizes.tokens * p.sizes.slots));
  for (int64_t t = 0; t < p.sizes.tokens; ++t) {
    for (int64_t j = 0; j < p.sizes.slots; ++j) {
      const size_t at = static_cast<size_t>(t * p.sizes.slots + j);
      if (p.index[at] == p.sizes.experts) continue;
      Row(p, kernels, t, p.index[at], p.routing[at]).AddTo(&result, &result.dw[at]);
    }
  }
  return result;
}

Outputs Run(const Problem& p, const TierKernels& kernels, int threads, bool retain, int64_t scratch_bytes) {
  ThreadPool pool(threads, {});
  Pass pass(kernels, pool);
  Outputs out;
  out.y.resize(p.x.size());
  out.dx.resize(p.x.size());
  out.dw.resize(p.routing.size());
  out.retained.resize(
      static_cast<size_t>(p.sizes.tokens * p.sizes.slots * (p.options.gated ? 2 : 1) * p.sizes.intermediate));
  LayerCall call;
  call.layer = p.layer.get();
  call.tokens = p.sizes.tokens;
  call.slots = p.sizes.slots;
  call.type = p.options.type;
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
  if (retain) call.hidden = nullptr;  // not needed any more
  pass.Backward(call);
  return out;
}

double Excess(const std::vector<Bounded>& expected, const void* actual, DType type) {
  const double rounding = type == DType::kF32 ? kFloatRounding : type == DType::kBf16 ? kBf16Rounding : 0x1p-11;
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = expected[i].value, got = LoadAsFloat(actual, type, static_cast<int64_t>(i));
    if (std::isfinite(value) != std::isfinite(got)) return HUGE_VAL;
    // Denormals may be taken for zero on the way; half the spacing of FP16's.
    const double bound =
        1.1 * expected[i].error + rounding * std::fabs(value) + 1e-30 + (type == DType::kF16 ? 0x1p-25 : 0);
    if (std::isfinite(value) && std::isfinite(bound)) worst = std::max(worst, std::fabs(got - value) / bound);
  }
  return worst;
}

}  // namespace kt::testing
