// The four-bit formats: a table of 16 values each, all of them exact in BF16. Two codes to a byte, the even column in
// the low half.
#pragma once

#include "formats/scaled.h"

namespace kt {

// Code - 8; a zero point z moves it to code - z.
alignas(64) static constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// E2M1: one sign, two exponent, one mantissa bit (OCP Microscaling formats 1.0, section 5.3.3).
alignas(64) static constexpr float kMxfp4Values[16] = {0.0F,  0.5F,  1.0F,  1.5F,  2.0F,  3.0F,  4.0F,  6.0F,
                                                       -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F};

// Quantiles of the standard normal distribution, scaled to [-1, 1], zero among them (Dettmers et al., "QLoRA", 2023,
// appendix E), rounded to BF16: multiples of 2^-8 between 1/2 and 1, and finer below.
alignas(64) static constexpr float kNf4Values[16] = {
    -1.0F,          -0.6953125F,   -0.5234375F, -0.39453125F, -0.28515625F, -0.1845703125F, -0.0908203125F, 0.0F,
    0.07958984375F, 0.1611328125F, 0.24609375F, 0.337890625F, 0.44140625F,  0.5625F,        0.72265625F,    1.0F};

template <const float (&kValues)[16]>
struct FourBitCodes {
  static constexpr int kBits = 4;
  static constexpr float kUnit = 1.0F;

  template <class Ops>
  static void Decode(const uint8_t* codes, typename Ops::F* even, typename Ops::F* odd) {
    Ops::LookUp(kValues, codes, even, odd);
  }
  template <class Ops>
  static typename Ops::Step Join(typename Ops::F even, typename Ops::F odd) {
    return Ops::Interleaved(even, odd);
  }
  template <class Ops>
  static typename Ops::Step Bare(const uint8_t* codes) {
    return Ops::LookUpStep(kValues, codes);
  }
  template <class Ops>
  static typename Ops::Panel Lowest(typename Ops::I codes) {
    return Ops::LookUpLowest(kValues, codes);
  }
  template <class Ops>
  static void StorePair(typename Ops::F even, typename Ops::F odd, float* out) {
    typename Ops::F first, second;
    Ops::Interleave(even, odd, &first, &second);
    Ops::Store(out, first);
    Ops::Store(out + Ops::kLanes, second);
  }
};

// A template argument must have linkage of some kind; these names have it within their unit only.
using Int4Format = ScaledFormat<FourBitCodes<kInt4Values>>;
using Nf4Format = ScaledFormat<FourBitCodes<kNf4Values>>;
using Mxfp4Format = ScaledFormat<FourBitCodes<kMxfp4Values>>;

}  // namespace kt
