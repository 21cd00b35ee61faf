// fp8: E4M3, as the OCP's 8-bit floating point specification has it: bias 7, no infinity, 0x7f and 0xff are not numbers
// (and are refused on load).
#pragma once

#include "formats/scaled.h"

namespace kt {

struct Fp8Codes {
  static constexpr int kBits = 8;

  template <class Ops>
  static void Decode(const uint8_t* codes, typename Ops::F* first, typename Ops::F* second) {
    *first = Ops::FromFp8(codes);
    *second = Ops::FromFp8(codes + Ops::kLanes);
  }
  template <class Ops>
  static typename Ops::Step Join(typename Ops::F first, typename Ops::F second) {
    return Ops::Halves(first, second);
  }
  template <class Ops>
  static typename Ops::Step Bare(const uint8_t* codes) {
    return Ops::Halves(Ops::FromFp8(codes), Ops::FromFp8(codes + Ops::kLanes));
  }
  template <class Ops>
  static void StorePair(typename Ops::F first, typename Ops::F second, float* out) {
    Ops::Store(out, first);
    Ops::Store(out + Ops::kLanes, second);
  }
};

using Fp8Format = ScaledFormat<Fp8Codes>;

}  // namespace kt
