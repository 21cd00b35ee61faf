// Coders: which code is nearest to a weight / scale, for a vector of weights at a time. A coder has
//   F Nearest(F x) const;  // the nearest value that a code stands for; ties go to even codes, but for nf4
//   F Nearest(F x, I* code) const;   // and its code
//   static constexpr bool kFourBit;  // two codes to a byte
// No branches. Vectors are as wide as the unit's instructions allow; as units differ in that, all has internal linkage.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "formats/four_bit.h"

namespace kt {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
using F = float __attribute__((vector_size(4 * kLanes)));
using I = int32_t __attribute__((vector_size(4 * kLanes)));

inline F Load(const float* from) {
  F value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline F Broadcast(float value) { return value - F{}; }
// Compilers do not always see a minimum in a < b ? a : b.
#if defined(__AVX512F__)
inline F Min(F a, F b) { return _mm512_min_ps(a, b); }
inline F Max(F a, F b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline F Min(F a, F b) { return _mm256_min_ps(a, b); }
inline F Max(F a, F b) { return _mm256_max_ps(a, b); }
#elif defined(__SSE2__)
inline F Min(F a, F b) { return _mm_min_ps(a, b); }
inline F Max(F a, F b) { return _mm_max_ps(a, b); }
#else
inline F Min(F a, F b) { return a < b ? a : b; }
inline F Max(F a, F b) { return a > b ? a : b; }
#endif
inline F Clamp(F x, float low, float high) { return Min(Max(x, Broadcast(low)), Broadcast(high)); }
inline I Bits(F x) { return reinterpret_cast<I>(x); }
inline F FromBits(I x) { return reinterpret_cast<F>(x); }

// Integers from `low` to `high`, stored with `offset` added.
template <bool kIsFourBit>
struct IntegerCoder {
  static constexpr bool kFourBit = kIsFourBit;
  float low, high;
  int32_t offset;

  F Nearest(F x) const {
    const F unit = Broadcast(0x1.8p23F);  // FP32 numbers of this size are integers: adding it rounds
    return (Clamp(x, low, high) + unit) - unit;
  }
  F Nearest(F x, I* code) const {
    const F q = Nearest(x);
    *code = __builtin_convertvector(q, I) + offset;
    return q;
  }
};

// Floating-point numbers of kBits: a sign, kMantissa bits of mantissa, exponents from kExponent (2^kExponent is the
// smallest normal number), and the largest number kLargest.
template <int kBits, int kMantissa, int kExponent, int kLargest>
struct FloatCoder {
  static constexpr bool kFourBit = kBits == 4;
  static constexpr uint32_t kSmallestBits = static_cast<uint32_t>(127 + kExponent) << 23;

  F Nearest(F x) const {
    x = Clamp(x, -kLargest, kLargest);
    // Numbers of the size of 1.5 x 2^(23 - kMantissa) x the power of two below |x| are multiples of the code's last
    // bit: adding such a one rounds.
    const F power = Max(FromBits(Bits(x) & 0x7f800000), Broadcast(FloatFromBits(kSmallestBits)));
    const F unit = power * (1.5F * static_cast<float>(1 << (23 - kMantissa)));
    return (x + unit) - unit;
  }
  F Nearest(F x, I* code) const {
    const F q = Nearest(x);
    const float smallest = FloatFromBits(kSmallestBits);
    const I sign = (Bits(q) >> 31) & (1 << (kBits - 1)), magnitude = Bits(q) & 0x7fffffff;
    const I normal = (magnitude >> (23 - kMantissa)) - ((126 + kExponent) << kMantissa);
    const float last_bits = static_cast<float>(1 << kMantissa) / smallest;
    const I denormal = __builtin_convertvector(FromBits(magnitude) * last_bits, I);
    *code = (FromBits(magnitude) < smallest ? denormal : normal) | sign;
    return q;
  }
};
using Fp8Coder = FloatCoder<8, 3, -6, 448>;
using Mxfp4Coder = FloatCoder<4, 1, 0, 6>;

// The thresholds between the table's values are multiples of 2^-12: x x 4096, cut to an integer, tells the code.
struct Nf4Coder {
  static constexpr bool kFourBit = true;
  static constexpr int kUnits = 4096;
  struct Table {
    uint8_t code[2 * kUnits + 1] = {};
  };

  static constexpr Table MakeTable() {
    Table table;
    int code = 0;
    for (int i = -kUnits; i <= kUnits; ++i) {
      // Integer 0 stands for all of (-1, 1), a negative one for what is below it down to the next.
      const float inside = static_cast<float>(i) + (i < 0 ? -0.5F : i > 0 ? 0.5F : 0.0F);
      while (code < 15 && inside > (kNf4Values[code] + kNf4Values[code + 1]) / 2 * kUnits) ++code;
      table.code[i + kUnits] = static_cast<uint8_t>(code);
    }
    return table;
  }

  static I Code(F x) {
    static constexpr Table kTable = MakeTable();
    const I units = __builtin_convertvector(Clamp(x, -1, 1) * kUnits, I);
    const uint8_t* const middle = kTable.code + kUnits;
    I codes{};
    for (int lane = 0; lane < kLanes; ++lane) codes[lane] = middle[units[lane]];
    return codes;
  }
  static F Value(I code) {
    F values{};
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = kNf4Values[code[lane]];
    return values;
  }
  F Nearest(F x) const { return Value(Code(x)); }
  F Nearest(F x, I* code) const {
    *code = Code(x);
    return Value(*code);
  }
};

}  // namespace
}  // namespace kt
