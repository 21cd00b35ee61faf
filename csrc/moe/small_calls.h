// A small layer and calls of it, for tests of how calls are scheduled.
#pragma once

#include <random>
#include <vector>

#include "moe/layer.h"
#include "moe/pass.h"
#include "testing.h"

namespace kt {

struct Layer {
  static constexpr int64_t kExperts = 4, kHidden = 24, kIntermediate = 16;

  explicit Layer(bool gated = true)
      : layer(
            {kExperts, kHidden, kIntermediate, gated ? Activation::kSilu : Activation::kRelu2, gated, Format::kBf16}) {
    std::mt19937 random(6);
    for (int m = 0; m < kMatrixCount; ++m) {
      const Matrix matrix = static_cast<Matrix>(m);
      if (matrix == Matrix::kGate && !gated) continue;
      for (int64_t e = 0; e < kExperts; ++e) {
        const std::vector<float> values = testing::RandomFloats(kHidden * kIntermediate, 0.2F, random);
        layer.Write(matrix, e, {values.data(), DType::kF32, layer.columns(matrix), 1});
      }
    }
  }
  ExpertLayer layer;
};

// The data of one call, its sizes varying with `seed`.
struct Work {
  Work(const Layer& layer, int seed) : Work(layer, seed, 1 + seed % 37) {}
  Work(const Layer& layer, int seed, int64_t tokens) : tokens(tokens) {
    std::mt19937 random(static_cast<uint32_t>(seed));
    x = testing::RandomFloats(tokens * Layer::kHidden, 1.0F, random);
    y.resize(x.size());
    dx.resize(x.size());
    weights.assign(static_cast<size_t>(tokens * 2), 0.5F);
    dw.resize(weights.size());
    for (int64_t i = 0; i < tokens * 2; ++i) index.push_back(static_cast<int64_t>(random() % Layer::kExperts));
    call.layer = &layer.layer;
    call.tokens = tokens;
    call.slots = 2;
    call.hidden = x.data();
    call.experts = index.data();
    call.weights = weights.data();
    call.output = y.data();
    call.output_grad = x.data();
    call.hidden_grad = dx.data();
    call.weights_grad = dw.data();
  }
  int64_t tokens;
  std::vector<float> x, y, dx, weights, dw;
  std::vector<int64_t> index;
  LayerCall call;
};

}  // namespace kt
