// What the tiers without BF16 dot products share: operands are FP32, one depth value per lane. `V` is the tier's vector
// operations.
#pragma once

#include <cstring>

#include "cpu/numeric.h"

namespace {

template <class V, int kVectors>
struct FloatElements : V {
  using F = typename V::F;
  using Element = float;
  using Panel = F;
  static constexpr int kPair = 1, kTileVectors = kVectors;
  static constexpr bool kScaleProducts = false;

  static Panel LoadPanel(const Element* p) { return V::Load(p); }
  static void StorePanel(Element* p, Panel x) { V::Store(p, x); }
  static Panel Broadcast(const Element* p) { return V::Set(*p); }
  static F MultiplyAdd(F sum, Panel a, Panel b) { return V::Fma(a, b, sum); }

  static void ElementsFromBf16(const uint8_t* src, int64_t count, Element* out) {
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes)
      V::Store(out + i, V::LoadBf16(reinterpret_cast<const kt::Bf16*>(src + 2 * i)));
    for (; i < count; ++i) out[i] = kt::LoadAsFloat(src, kt::DType::kBf16, i);
  }
  static void StoreElements(F x, Element* out) { V::Store(out, x); }

  struct Step {
    Panel panels[2];
  };
  static Step Halves(F first, F second) { return {{first, second}}; }
  static Step StepOfBf16(const kt::Bf16* p) { return {{V::LoadBf16(p), V::LoadBf16(p + V::kLanes)}}; }
  static Step Interleaved(F even, F odd) {
    Step step;
    V::Interleave(even, odd, &step.panels[0], &step.panels[1]);
    return step;
  }
  static Step LookUpStep(const float* values, const uint8_t* codes) {
    F even, odd;
    V::LookUp(values, codes, &even, &odd);
    return Interleaved(even, odd);
  }
  static void StoreStep(const Step& step, Element* out) {
    V::Store(out, step.panels[0]);
    V::Store(out + V::kLanes, step.panels[1]);
  }

  static void StoreActivation(Element* out, int width, F even, F odd, bool has_odd) {
    V::Store(out, even);
    if (has_odd) V::Store(out + width, odd);
  }

  static void InterleaveRows(Element* out, const Element* row, const Element*) {
    for (int i = 0; i < kTileVectors * V::kLanes; i += V::kLanes) V::Store(out + i, V::Load(row + i));
  }
};

}  // namespace
