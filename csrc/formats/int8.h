// int8: symmetric, codes in two's complement.
#pragma once

#include "formats/scaled.h"

namespace kt {

struct Int8Codes {
  static constexpr int kBits = 8;
  static constexpr float kUnit = 1.0F;

  template <class Ops>
  static void Decode(const uint8_t* codes, typename Ops::F* first, typename Ops::F* second) {
    *first = Ops::FromInt8(codes);
    *second = Ops::FromInt8(codes + Ops::kLanes);
  }
  template <class Ops>
  static typename Ops::Step Join(typename Ops::F first, typename Ops::F second) {
    return Ops::Halves(first, second);
  }
  template <class Ops>
  static typename Ops::Step Bare(const uint8_t* codes) {
    return Ops::Halves(Ops::FromInt8(codes), Ops::FromInt8(codes + Ops::kLanes));
  }
  template <class Ops>
  static typename Ops::Step InUnits(const uint8_t* codes) {
    return Bare<Ops>(codes);
  }
  template <class Ops>
  static void StorePair(typename Ops::F first, typename Ops::F second, float* out) {
    Ops::Store(out, first);
    Ops::Store(out + Ops::kLanes, second);
  }
};

using Int8Format = ScaledFormat<Int8Codes>;

}  // namespace kt
