// Layers with adapters on every tier: outputs and all gradients against double precision, each with an error that is
// carried along the computation, and bit for bit over thread counts.
#include "moe/lora.h"

#include <algorithm>
#include <cmath>

#include "moe/reference.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

using testing::Bounded;
using testing::Problem;

constexpr float kUntouched = 0.25F;  // what gradients are added to

struct Adapter {
  int64_t rank = 0;  // padded
  float scale = 1;
  Dropout dropout;
  std::vector<Bf16> gate_up_a, gate_up_b, down_a, down_b;

  ExpertLora view() const {
    return {rank, scale, dropout, {gate_up_a.data(), gate_up_b.data()}, {down_a.data(), down_b.data()}};
  }
};

int64_t PreColumns(const Problem& p) { return (p.options.gated ? 2 : 1) * p.sizes.intermediate; }

Adapter MakeAdapter(const Problem& p, int64_t rank, float scale, std::mt19937& random) {
  Adapter adapter;
  adapter.rank = RoundUp(rank, ExpertLora::kRankStep);
  adapter.scale = scale;
  const auto matrices = [&](int64_t rows, int64_t columns, int64_t used_rows, int64_t used_columns) {
    std::vector<Bf16> all;
    for (int64_t e = 0; e < p.sizes.experts; ++e) {
      const std::vector<float> values =
          testing::RandomFloats(rows * columns, 1.0F / std::sqrt(static_cast<float>(columns)), random);
      for (int64_t i = 0; i < rows * columns; ++i) {
        const bool used = i / columns < used_rows && i % columns < used_columns;
        all.push_back(used ? Bf16FromFloat(values[static_cast<size_t>(i)]) : Bf16{0});
      }
    }
    return all;
  };
  const int64_t hidden = p.sizes.hidden, intermediate = p.sizes.intermediate;
  adapter.gate_up_a = matrices(adapter.rank, hidden, rank, hidden);
  adapter.gate_up_b = matrices(PreColumns(p), adapter.rank, PreColumns(p), rank);
  adapter.down_a = matrices(adapter.rank, intermediate, rank, intermediate);
  adapter.down_b = matrices(hidden, adapter.rank, hidden, rank);
  return adapter;
}

struct LoraOutputs {
  std::vector<char> y, dx;
  std::vector<float> dw, gate_up_a, gate_up_b, down_a, down_b;

  bool operator==(const LoraOutputs& other) const {
    return SameButGradients(other) && gate_up_a == other.gate_up_a && gate_up_b == other.gate_up_b &&
           down_a == other.down_a && down_b == other.down_b;
  }
  bool SameButGradients(const LoraOutputs& other) const { return y == other.y && dx == other.dx && dw == other.dw; }
};

LoraOutputs RunLora(const Problem& p, const Adapter& adapter, const TierKernels& kernels, int threads, bool retain,
                    int64_t scratch_bytes = int64_t{1} << 30, bool trained = true) {
  ThreadPool pool(threads, {});
  Pass pass(kernels, pool);
  LoraOutputs out;
  out.y.resize(p.x.size());
  out.dx.resize(p.x.size());
  out.dw.resize(p.routing.size());
  out.gate_up_a.assign(adapter.gate_up_a.size(), kUntouched);
  out.gate_up_b.assign(adapter.gate_up_b.size(), kUntouched);
  out.down_a.assign(adapter.down_a.size(), kUntouched);
  out.down_b.assign(adapter.down_b.size(), kUntouched);
  std::vector<Bf16> retained(static_cast<size_t>(p.sizes.tokens * p.sizes.slots * PreColumns(p)));
  LayerCall call;
  call.layer = p.layer.get();
  call.tokens = p.sizes.tokens;
  call.slots = p.sizes.slots;
  call.type = p.options.type;
  call.hidden = p.x.data();
  call.experts = p.index.data();
  call.weights = p.routing.data();
  call.lora = adapter.view();
  call.scratch_bytes = scratch_bytes;
  call.retained = retain ? retained.data() : nullptr;
  call.output = out.y.data();
  call.output_grad = p.dy.data();
  call.hidden_grad = out.dx.data();
  call.weights_grad = out.dw.data();
  if (trained) call.lora_grads = {out.gate_up_a.data(), out.gate_up_b.data(), out.down_a.data(), out.down_b.data()};
  pass.Forward(call);
  if (!trained && retain) call.hidden = nullptr;  // not needed then
  pass.Backward(call);
  return out;
}

// ---- the reference ----

Bounded Product(const Bounded& a, const Bounded& b) {
  return {a.value * b.value, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error};
}

Bounded Rounded(Bounded x, double rounding) {
  x.error += rounding * (std::fabs(x.value) + x.error);
  return x;
}

// A sum of at most `most` terms in FP32, in whatever order, and some roundings for scales and biases on top.
class Sum {
 public:
  explicit Sum(int64_t most) : roundings_(static_cast<double>(most + 8) * testing::kFloatRounding) {}
  void Add(const Bounded& term) {
    sum_.Add(term.value, term.error);
    magnitude_ += std::fabs(term.value) + term.error;
  }
  Bounded result() const { return {sum_.value, sum_.error + roundings_ * magnitude_}; }

 private:
  double roundings_, magnitude_ = 0;
  Bounded sum_;
};

struct LoraExpected {
  std::vector<Bounded> y, dx, dw, gate_up_a, gate_up_b, down_a, down_b;
};

// One routed row, as the engine goes through it.
class LoraRow {
 public:
  LoraRow(const Problem& problem, const Adapter& adapter, const TierKernels& kernels, int64_t token, int64_t expert,
          double weight)
      : p(problem), lora_(adapter), token_(token), expert_(expert), weight_(weight) {
    element_ = kernels.pair == 2 ? testing::kBf16Rounding : 0;
    stored_ = p.options.stored.format == Format::kBf16 ? 0 : element_;
  }

  void AddTo(LoraExpected* to, size_t slot) const {
    const int64_t hidden = p.sizes.hidden, intermediate = p.sizes.intermediate, rank = lora_.rank;
    const int64_t parts = p.options.gated ? 2 : 1, pre_columns = parts * intermediate;
    const Bounded weight{weight_, 0};
    const double input = p.options.type == DType::kBf16 ? 0 : element_;
    std::vector<Bounded> x, dy;
    for (int64_t h = 0; h < hidden; ++h) {
      x.push_back(Rounded({p.X(token_ * hidden + h), 0}, input));
      dy.push_back(Rounded({p.Dy(token_ * hidden + h), 0}, input));
    }
    // Forward.
    const std::vector<Bounded> z = TimesA(lora_.gate_up_a, x, hidden), z_in = Packed(z);
    std::vector<Bounded> pre;
    for (int64_t i = 0; i < pre_columns; ++i) {
      Sum sum(hidden + rank);
      if (!p.gate_up_bias.empty()) {
        sum.Add({p.gate_up_bias[static_cast<size_t>(expert_ * pre_columns + i)], 0});
      }
      const Matrix matrix = p.options.gated && i < intermediate ? Matrix::kGate : Matrix::kUp;
      for (int64_t h = 0; h < hidden; ++h) sum.Add(Product(Weight(matrix, i % intermediate, h, 0), x[At(h)]));
      for (int64_t r = 0; r < rank; ++r) sum.Add(Product(Of(lora_.gate_up_b, pre_columns, rank, i, r), z_in[At(r)]));
      pre.push_back(sum.result());
    }
    const auto activated = [&](int64_t i) {
      return testing::Activate(p.options, p.options.gated ? pre[At(i)] : Bounded{},
                               pre[At(i + pre_columns - intermediate)]);
    };
    std::vector<Bounded> act;
    act.reserve(At(intermediate));
    for (int64_t i = 0; i < intermediate; ++i) act.push_back(Rounded(activated(i).act, element_));
    const std::vector<Bounded> down_z = Packed(TimesA(lora_.down_a, act, intermediate));
    for (int64_t h = 0; h < hidden; ++h) {
      Sum sum(intermediate + rank);
      for (int64_t i = 0; i < intermediate; ++i) sum.Add(Product(Weight(Matrix::kDown, h, i, 0), act[At(i)]));
      for (int64_t r = 0; r < rank; ++r) sum.Add(Product(Of(lora_.down_b, hidden, rank, h, r), down_z[At(r)]));
      if (!p.down_bias.empty()) sum.Add({p.down_bias[static_cast<size_t>(expert_ * hidden + h)], 0});
      Add(&to->y, token_ * hidden + h, Product(weight, sum.result()));
    }
    // Backward, from pre-activations in BF16.
    for (Bounded& value : pre) value = Rounded(value, testing::kBf16Rounding);
    for (int64_t i = 0; i < intermediate; ++i) act[At(i)] = Rounded(activated(i).act, element_);
    const std::vector<Bounded> z_again = TimesA(lora_.down_a, act, intermediate);
    const std::vector<Bounded> v = TimesB(lora_.down_b, dy, hidden), v_in = Packed(v);
    std::vector<Bounded> d_pre(static_cast<size_t>(pre_columns));
    Sum of_weight(intermediate + hidden);
    for (int64_t i = 0; i < intermediate; ++i) {
      Sum sum(hidden + rank);
      for (int64_t h = 0; h < hidden; ++h) sum.Add(Product(Weight(Matrix::kDown, h, i, stored_), dy[At(h)]));
      for (int64_t r = 0; r < rank; ++r) sum.Add(Product(Of(lora_.down_a, rank, intermediate, r, i), v_in[At(r)]));
      const testing::Activated back = activated(i);
      const Bounded u = sum.result(), weighted = Product(weight, u);
      of_weight.Add(Product(u, back.act));
      if (p.options.gated) d_pre[At(i)] = Rounded(Product(weighted, back.by_gate), element_ + 0x1p-22);
      d_pre[At(i + pre_columns - intermediate)] = Rounded(Product(weighted, back.by_up), element_ + 0x1p-22);
    }
    for (int64_t h = 0; h < hidden && !p.down_bias.empty(); ++h) {
      of_weight.Add(
          Product({p.down_bias[static_cast<size_t>(expert_ * hidden + h)], 0}, {p.Dy(token_ * hidden + h), 0}));
    }
    to->dw[slot] = of_weight.result();
    const std::vector<Bounded> pre_v = TimesB(lora_.gate_up_b, d_pre, pre_columns), pre_v_in = Packed(pre_v);
    for (int64_t h = 0; h < hidden; ++h) {
      Sum sum(pre_columns + rank);
      for (int64_t i = 0; i < pre_columns; ++i) {
        const Matrix matrix = p.options.gated && i < intermediate ? Matrix::kGate : Matrix::kUp;
        sum.Add(Product(Weight(matrix, i % intermediate, h, stored_), d_pre[At(i)]));
      }
      for (int64_t r = 0; r < rank; ++r) sum.Add(Product(Of(lora_.gate_up_a, rank, hidden, r, h), pre_v_in[At(r)]));
      Add(&to->dx, token_ * hidden + h, sum.result());
    }
    // Gradients: sums over tokens, which are at most as many as the call has.
    for (int64_t r = 0; r < rank; ++r) {
      const Bounded of_z = Rounded(Product(weight, z_again[At(r)]), element_);
      const Bounded of_v = Rounded(Product(weight, v[At(r)]), element_);
      for (int64_t h = 0; h < hidden; ++h) {
        AddGradient(&to->down_b, (expert_ * hidden + h) * rank + r, Product(of_z, dy[At(h)]));
        AddGradient(&to->gate_up_a, (expert_ * rank + r) * hidden + h, Product(pre_v_in[At(r)], x[At(h)]));
      }
      for (int64_t i = 0; i < intermediate; ++i) {
        AddGradient(&to->down_a, (expert_ * rank + r) * intermediate + i, Product(of_v, act[At(i)]));
      }
      for (int64_t i = 0; i < pre_columns; ++i) {
        AddGradient(&to->gate_up_b, (expert_ * pre_columns + i) * rank + r, Product(z_in[At(r)], d_pre[At(i)]));
      }
    }
  }

 private:
  static size_t At(int64_t i) { return static_cast<size_t>(i); }
  static void Add(std::vector<Bounded>* to, int64_t i, const Bounded& x) {
    (*to)[At(i)].Add(x.value, x.error + 8 * testing::kFloatRounding * std::fabs(x.value));
  }
  void AddGradient(std::vector<Bounded>* to, int64_t i, const Bounded& x) const {
    const double roundings = static_cast<double>(p.sizes.tokens + 4) * testing::kFloatRounding;
    (*to)[At(i)].Add(x.value, x.error + roundings * (std::fabs(x.value) + x.error));
  }

  Bounded Weight(Matrix matrix, int64_t row, int64_t column, double rounding) const {
    const int64_t rows = p.layer->rows(matrix), columns = p.layer->columns(matrix);
    return Rounded({p.weights_of[static_cast<int>(matrix)][At((expert_ * rows + row) * columns + column)], 0},
                   rounding);
  }
  Bounded Of(const std::vector<Bf16>& all, int64_t rows, int64_t columns, int64_t row, int64_t column) const {
    return {FloatFromBf16(all[At((expert_ * rows + row) * columns + column)]), 0};
  }
  std::vector<Bounded> Packed(std::vector<Bounded> values) const {
    for (Bounded& value : values) value = Rounded(value, element_);
    return values;
  }

  // scale x A x, and scale x B^T dy.
  std::vector<Bounded> TimesA(const std::vector<Bf16>& a, const std::vector<Bounded>& x, int64_t inputs) const {
    std::vector<Bounded> z;
    for (int64_t r = 0; r < lora_.rank; ++r) {
      Sum sum(inputs);
      for (int64_t i = 0; i < inputs; ++i) sum.Add(Product(Of(a, lora_.rank, inputs, r, i), x[At(i)]));
      z.push_back(Product({lora_.scale, 0}, sum.result()));
    }
    return z;
  }
  std::vector<Bounded> TimesB(const std::vector<Bf16>& b, const std::vector<Bounded>& dy, int64_t outputs) const {
    std::vector<Bounded> v;
    for (int64_t r = 0; r < lora_.rank; ++r) {
      Sum sum(outputs);
      for (int64_t i = 0; i < outputs; ++i) sum.Add(Product(Of(b, outputs, lora_.rank, i, r), dy[At(i)]));
      v.push_back(Product({lora_.scale, 0}, sum.result()));
    }
    return v;
  }

  const Problem& p;
  const Adapter& lora_;
  int64_t token_, expert_;
  double weight_, element_, stored_;
};

LoraExpected LoraReference(const Problem& p, const Adapter& adapter, const TierKernels& kernels) {
  LoraExpected expected;
  expected.y.resize(static_cast<size_t>(p.sizes.tokens * p.sizes.hidden));
  expected.dx.resize(expected.y.size());
  expected.dw.resize(p.routing.size());
  expected.gate_up_a.assign(adapter.gate_up_a.size(), {kUntouched, 0});
  expected.gate_up_b.assign(adapter.gate_up_b.size(), {kUntouched, 0});
  expected.down_a.assign(adapter.down_a.size(), {kUntouched, 0});
  expected.down_b.assign(adapter.down_b.size(), {kUntouched, 0});
  for (size_t slot = 0; slot < p.index.size(); ++slot) {
    if (p.index[slot] == p.sizes.experts) continue;
    const int64_t token = static_cast<int64_t>(slot) / p.sizes.slots;
    LoraRow(p, adapter, kernels, token, p.index[slot], p.routing[slot]).AddTo(&expected, slot);
  }
  return expected;
}

void CheckLora(const Problem& p, const Adapter& adapter, const std::string& what) {
  LoraExpected of_pair[2];
  for (const testing::TestedTier& tier : testing::TestedTiers()) {
    LoraExpected& expected = of_pair[tier.kernels->pair - 1];
    if (expected.y.empty()) expected = LoraReference(p, adapter, *tier.kernels);
    const LoraOutputs out = RunLora(p, adapter, *tier.kernels, 2, true);
    const auto check = [&](const std::vector<Bounded>& bounded, const void* actual, DType type, const char* name) {
      const double excess = testing::Excess(bounded, actual, type);
      CHECK_MESSAGE(excess <= 1, tier.name + " " + what + " rank " + std::to_string(adapter.rank) + ": " + name +
                                     " is " + std::to_string(excess) + " times its bound");
    };
    check(expected.y, out.y.data(), p.options.type, "y");
    check(expected.dx, out.dx.data(), p.options.type, "dx");
    check(expected.dw, out.dw.data(), DType::kF32, "dw");
    check(expected.gate_up_a, out.gate_up_a.data(), DType::kF32, "d gate_up A");
    check(expected.gate_up_b, out.gate_up_b.data(), DType::kF32, "d gate_up B");
    check(expected.down_a, out.down_a.data(), DType::kF32, "d down A");
    check(expected.down_b, out.down_b.data(), DType::kF32, "d down B");
  }
}

TEST(EveryTierIsWithinTheBoundAtEveryRank) {
  std::mt19937 random(1);
  for (const int64_t rank : {1, 3, 8, 17, 64, 128}) {
    if (testing::Quick() && rank > 17) continue;
    const Problem few = testing::MakeProblem({9, 2, 3, 33, 18}, {DType::kBf16}, random);
    CheckLora(few, MakeAdapter(few, rank, 2.0F, random), "few tokens");
    const Problem many = testing::MakeProblem({130, 2, 3, 37, 29}, {DType::kF32, true}, random);
    CheckLora(many, MakeAdapter(many, rank, 0.75F, random), "many tokens");
  }
}

TEST(EveryKindOfExpertTakesAdapters) {
  std::mt19937 random(2);
  for (const Activation activation :
       {Activation::kSilu, Activation::kGelu, Activation::kRelu2, Activation::kSwigluOai}) {
    for (const bool gated : {true, false}) {
      if (!gated && activation == Activation::kSwigluOai) continue;
      testing::LayerOptions options{DType::kBf16, true, {Format::kInt4}, activation, gated};
      if (activation == Activation::kGelu) options.stored = {Format::kFp8};
      const Problem p = testing::MakeProblem({60, 2, 3, 40, 70}, options, random);
      CheckLora(p, MakeAdapter(p, 5, 1.5F, random), gated ? "gated" : "ungated");
    }
  }
}

TEST(BlocksOfOneExpertAddUp) {
  // More tokens of one expert than a block has, and more columns than a task.
  std::mt19937 random(3);
  const Problem p = testing::MakeProblem({testing::Quick() ? 300 : 600, 1, 1, 300, 12}, {DType::kBf16}, random);
  CheckLora(p, MakeAdapter(p, 6, 1.0F, random), "several blocks");
}

TEST(BitsDoNotDependOnThreadsPolicyOrScratch) {
  std::mt19937 random(4);
  const Problem p = testing::MakeProblem({testing::Quick() ? 60 : 333, 3, 6, 150, 290}, {DType::kBf16, true}, random);
  Adapter adapter = MakeAdapter(p, 12, 2.0F, random);
  adapter.dropout = {1, 1U << 31};
  for (const testing::TestedTier& tier : testing::CpuTiers()) {
    const LoraOutputs one = RunLora(p, adapter, *tier.kernels, 1, true);
    for (const int threads : {2, 5}) {
      for (const bool retain : {true, false}) {
        CHECK_MESSAGE(RunLora(p, adapter, *tier.kernels, threads, retain) == one, tier.name + " differs");
      }
    }
    // Gradients are added up chunk by chunk, which is another order.
    CHECK(RunLora(p, adapter, *tier.kernels, 2, true, 1 << 20).SameButGradients(one));
  }
}

TEST(ExpertsWithoutTokensAreLeftAlone) {
  std::mt19937 random(5);
  Problem p = testing::MakeProblem({20, 1, 4, 24, 16}, {DType::kBf16}, random);
  for (int64_t& expert : p.index) expert = expert == 2 ? 1 : expert;
  const Adapter adapter = MakeAdapter(p, 4, 1.0F, random);
  const LoraOutputs out = RunLora(p, adapter, *testing::CpuTiers().back().kernels, 2, true);
  const auto all_untouched = [](const std::vector<float>& values, size_t expert) {
    const auto first = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 4 * expert);
    return std::all_of(first, first + static_cast<std::ptrdiff_t>(values.size() / 4),
                       [](float value) { return value == kUntouched; });
  };
  CHECK(all_untouched(out.gate_up_a, 2) && all_untouched(out.gate_up_b, 2));
  CHECK(all_untouched(out.down_a, 2) && all_untouched(out.down_b, 2));
  CHECK(!all_untouched(out.gate_up_a, 1) && !all_untouched(out.down_b, 1));
}

TEST(GradientsThatAreNotWantedChangeNothingElse) {
  std::mt19937 random(7);
  const Problem p = testing::MakeProblem({70, 2, 3, 48, 36}, {DType::kBf16}, random);
  const Adapter adapter = MakeAdapter(p, 4, 1.0F, random);
  for (const testing::TestedTier& tier : testing::CpuTiers()) {
    const LoraOutputs trained = RunLora(p, adapter, *tier.kernels, 2, true);
    for (const bool retain : {true, false}) {
      const LoraOutputs frozen = RunLora(p, adapter, *tier.kernels, 2, retain, int64_t{1} << 30, false);
      CHECK_MESSAGE(frozen.SameButGradients(trained), tier.name + " differs");
    }
  }
}

TEST(WhatIsNotPossibleIsRefused) {
  std::mt19937 random(6);
  const Problem p = testing::MakeProblem({3, 1, 2, 8, 8}, {DType::kF32, false, {Format::kInt8}}, random);
  Adapter adapter = MakeAdapter(p, 2, 1.0F, random);
  ThreadPool pool(1, {});
  Pass pass(*testing::CpuTiers().back().kernels, pool);
  std::vector<char> y(p.x.size());
  LayerCall call;
  call.layer = p.layer.get();
  call.tokens = 3;
  call.slots = 1;
  call.hidden = p.x.data();
  call.experts = p.index.data();
  call.weights = p.routing.data();
  call.output = y.data();
  call.lora = adapter.view();
  call.compute = Compute::kInt8;
  CHECK_THROWS(pass.Forward(call), std::invalid_argument);
  call.compute = Compute::kBf16;
  call.lora.rank = 3;
  CHECK_THROWS(pass.Forward(call), std::invalid_argument);
}

}  // namespace
}  // namespace kt
