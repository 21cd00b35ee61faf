// Which scales are tried for a block, by format. Everything has internal linkage (see quantise.inl).
#pragma once

#include "formats/block.inl"

namespace kt {
namespace {

// Scales that are tried at once.
constexpr int kTries = 4;

// How a block's scale is searched. Tried are `plain`, the plain definition's scale, plain x `factors` (kTries for each
// coder; the first is 1), and then the least-squares scale for the codes that the best of these gives.
template <ScaleType kScaleType, int kLargest, int kCoderCount, class CoderClass>
struct Search {
  using Coder = CoderClass;
  static constexpr ScaleType kType = kScaleType;
  static constexpr int kLargestCode = kLargest, kCoders = kCoderCount;

  float plain;
  Coder coders[kCoders];
  float factors[kCoders * kTries];
};

// The factors below are those with the least error, in all, over normal and heavy-tailed (Student's t, 4 degrees of
// freedom) weights in groups of the usual sizes. Eight instead of four gain 0.3 to 0.8 % of the error.
struct Int8Search {
  static Search<ScaleType::kF32, 127, 1, IntegerCoder<false>> Of(const Block& block) {
    return {block.magnitude() / 127, {{-127, 127, 0}}, {1, 0.992F, 1.008F, 1.023F}};
  }
};

struct Int4Search {
  static constexpr IntegerCoder<true> kCoder{-8, 7, 8};
  static constexpr float kClip = 8.0F / 7.0F;

  // The end with the larger magnitude goes onto -8, so the scale may be negative; 8/7 brings it to 7.
  static float Plain(const Block& block) {
    return (block.largest() == block.magnitude() ? block.largest() : block.smallest()) / -8;
  }
  static Search<ScaleType::kBf16, 8, 1, IntegerCoder<true>> Of(const Block& block) {
    return {Plain(block), {kCoder}, {1, kClip, 0.945F, 0.885F}};
  }
};

// The longer a group, the farther out its largest weight, and the more of it is better cut off.
struct LongInt4Search {
  static Search<ScaleType::kBf16, 8, 2, IntegerCoder<true>> Of(const Block& block) {
    return {Int4Search::Plain(block),
            {Int4Search::kCoder, Int4Search::kCoder},
            {1, Int4Search::kClip, 0.93F, 0.86F, 0.78F, 0.7F, 0.6F, 0.5F}};
  }
};

// The weights' range, widened to hold zero, onto the 16 codes; where zero falls between two of them both are tried.
struct AsymmetricInt4Search {
  static Search<ScaleType::kBf16, 15, 2, IntegerCoder<true>> Of(const Block& block) {
    const float range = block.largest() - block.smallest();
    const float exact = range == 0.0F ? 0.0F : -block.smallest() * 15.0F / range, near = __builtin_nearbyintf(exact);
    const float other = Least(Most(near > exact ? near - 1 : near + 1, 0.0F), 15.0F);
    return {range / 15,
            {{-near, 15 - near, static_cast<int32_t>(near)}, {-other, 15 - other, static_cast<int32_t>(other)}},
            {1, 0.94F, 0.88F, 0.82F, 1.03F, 0.97F, 0.91F, 0.85F}};
  }
};

// The table has one more value above zero than below: a negative scale turns it round.
struct Nf4Search {
  static Search<ScaleType::kBf16, 1, 1, Nf4Coder> Of(const Block& block) {
    return {block.magnitude(), {{}}, {1, 0.92F, -0.94F, -1.02F}};
  }
};

struct Fp8Search {
  static Search<ScaleType::kF32, 448, 1, Fp8Coder> Of(const Block& block) {
    return {block.magnitude() / 448, {{}}, {1, 1.072F, 1.275F, 1.866F}};
  }
};

// The plain definition is the specification's (section 6.3): the largest magnitude lands between 4 and 8. Its
// neighbours bring it between 2 and 4, or cut off more.
struct Mxfp4Search {
  static Search<ScaleType::kE8M0, 6, 1, Mxfp4Coder> Of(const Block& block) {
    return {block.magnitude() / 4, {{}}, {1, 2, 0.5F, 4}};
  }
};

}  // namespace
}  // namespace kt
