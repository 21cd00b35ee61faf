// int8: symmetric, codes in two's complement.
#pragma once

#include "formats/scaled.h"

namespace kt {

struct Int8Codes {
  static constexpr int kBits = 8;
  static constexpr bool kInterleaved = false;

  template <class Ops>
  static void Decode(const uint8_t* codes, typename Ops::F* first, typename Ops::F* second) {
    *first = Ops::FromInt8(codes);
    *second = Ops::FromInt8(codes + Ops::kLanes);
  }
  template <class Ops>
  static void Store(const uint8_t* codes, typename Ops::Element* out) {
    typename Ops::F first, second;
    Decode<Ops>(codes, &first, &second);
    Ops::StoreHalves(first, second, out);
  }
};

using Int8Format = ScaledFormat<Int8Codes>;

}  // namespace kt
