// For tests: a layer with inputs, its forward and backward in double precision, and how far a tier may be from them.
//
// The bound is a first-order error analysis, term by term. `element` is the rounding of the tier's operands (zero for
// FP32, whose own rounding the sums cover), a sum of n terms in whatever order is within n roundings of FP32, and 4
// more are for scales and biases. Activations pass an error of their argument on with at most max|f'|, their derivative
// with max|f''|, and are within 2^-20 (1 + |x|)^2 themselves: exp within 2^-22, and a handful of roundings of values up
// to x^2. Backward reads gate and up rounded to BF16. Products of errors that are left out are covered by the factor
// 1.1 in the end.
#pragma once

#include <memory>

#include "moe/pass.h"
#include "testing.h"

namespace kt::testing {

constexpr double kBf16Rounding = 0x1p-8;  // half the spacing of BF16 at 1
constexpr double kFloatRounding = 0x1p-24;

// What a layer is and is called with.
struct LayerSizes {
  int64_t tokens, slots, experts, hidden, intermediate;
};

// A format with all its options: the format's own group (-1) or another.
struct Stored {
  Format format = Format::kBf16;
  int64_t group = -1;
  bool zero_point = false;
};

constexpr Stored kStored[] = {
    {Format::kBf16},     {Format::kInt8},      {Format::kInt8, 64}, {Format::kInt8, 512},      {Format::kInt4},
    {Format::kInt4, 64}, {Format::kInt4, 128}, {Format::kInt4, 0},  {Format::kInt4, 32, true}, {Format::kInt4, 0, true},
    {Format::kNf4},      {Format::kNf4, 256},  {Format::kFp8},      {Format::kFp8, 0},         {Format::kMxfp4},
};

std::string NameOf(const Stored& stored);

struct LayerOptions {
  DType type = DType::kBf16;  // of the inputs
  bool biased = false;
  Stored stored;
  Activation activation = Activation::kSilu;
  bool gated = true;
};

struct Problem {
  LayerSizes sizes;
  LayerOptions options;
  std::shared_ptr<ExpertLayer> layer;
  std::vector<double> weights_of[kMatrixCount];  // [E, rows, columns], as stored
  std::vector<float> gate_up_bias, down_bias;
  std::vector<char> x, dy;  // in options.type
  std::vector<int64_t> index;
  std::vector<float> routing;

  double X(int64_t i) const { return LoadAsFloat(x.data(), options.type, i); }
  double Dy(int64_t i) const { return LoadAsFloat(dy.data(), options.type, i); }
};

std::vector<char> RandomTensor(int64_t count, DType type, std::mt19937& random);

// Normally distributed weights, tokens and gradients. Routing is skewed: low numbers are much more frequent, the
// sentinel occurs, and some experts get nothing.
Problem MakeProblem(const LayerSizes& sizes, const LayerOptions& options, std::mt19937& random);

// A value in double precision and how far the engine's may be from it.
struct Bounded {
  double value = 0, error = 0;
  void Add(double v, double e) {
    value += v;
    error += e;
  }
};

// f, its derivative, and the most that |f'| and |f''| are up to |x| = reach.
struct Unary {
  double value, slope, most_slope, most_curvature;
};

Unary UnaryAt(Activation activation, double x, double reach);

// act and its derivatives; an ungated expert has by_up alone. A clamp lets nothing through, be it not a number.
struct Activated {
  Bounded act, by_gate, by_up;
  bool gate_passes = true, up_passes = true;
};

Activated Activate(const LayerOptions& options, const Bounded& gate, const Bounded& up);

struct Expected {
  std::vector<Bounded> y, dx, dw;
};

// What a tier may give: y [T, H], dL/dx [T, H] and dL/d(routing weight) [T, K].
Expected Reference(const Problem& p, const TierKernels& kernels);

// References of one problem: they depend on the type of a tier's operands alone.
class References {
 public:
  explicit References(const Problem& problem) : problem_(problem) {}
  const Expected& For(const TierKernels& kernels) {
    Expected& expected = of_pair_[kernels.pair - 1];
    if (expected.y.empty()) expected = Reference(problem_, kernels);
    return expected;
  }

 private:
  const Problem& problem_;
  Expected of_pair_[2];
};

// Outputs of a forward and a backward.
struct Outputs {
  std::vector<char> y, dx;
  std::vector<float> dw;
  std::vector<Bf16> retained;
};

Outputs Run(const Problem& p, const TierKernels& kernels, int threads, bool retain,
            int64_t scratch_bytes = int64_t{1} << 30);

// The largest error as a multiple of its bound; infinity where one of the two is finite and the other not. Where the
// bound is not finite, it only counts whether the value is.
double Excess(const std::vector<Bounded>& expected, const void* actual, DType type);

}  // namespace kt::testing
