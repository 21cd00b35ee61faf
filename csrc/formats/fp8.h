// fp8: E4M3, as the OCP's 8-bit floating point specification has it: bias 7, no infinity, 0x7f and 0xff are not numbers
// (and are refused on load).
#pragma once

#include "formats/scaled.h"

namespace kt {

struct Fp8Codes {
  static constexpr int kBits = 8;

  // As FP16 a code's bits, moved up by 7, are its value / 2^8, denormals included.
  static constexpr float kUnit = 256.0F;

  template <class Ops>
  static void Decode(const uint8_t* codes, typename Ops::F* first, typename Ops::F* second) {
    Ops::FromFp8(codes, first, second);
    *first = Ops::Mul(*first, Ops::Set(kUnit));
    *second = Ops::Mul(*second, Ops::Set(kUnit));
  }
  template <class Ops>
  static typename Ops::Step Join(typename Ops::F first, typename Ops::F second) {
    return Ops::Halves(first, second);
  }
  template <class Ops>
  static typename Ops::Step Bare(const uint8_t* codes) {
    typename Ops::F first, second;
    Decode<Ops>(codes, &first, &second);
    return Ops::Halves(first, second);
  }
  template <class Ops>
  static typename Ops::Step InUnits(const uint8_t* codes) {
    typename Ops::F first, second;
    Ops::FromFp8(codes, &first, &second);
    return Ops::Halves(first, second);
  }
  template <class Ops>
  static void StorePair(typename Ops::F first, typename Ops::F second, float* out) {
    Ops::Store(out, first);
    Ops::Store(out + Ops::kLanes, second);
  }
};

using Fp8Format = ScaledFormat<Fp8Codes>;

}  // namespace kt
