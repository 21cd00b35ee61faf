// Vector operations in portable C++, over four-lane vectors of the compiler (GCC and Clang, any CPU).
#pragma once

#include <cstring>

#include "cpu/numeric.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

struct PortableVectors {
  static constexpr int kLanes = 4;
  using F = float __attribute__((vector_size(16)));
  using I = int32_t __attribute__((vector_size(16)));

  template <class Function>
  static F Each(Function function) {
    return F{function(0), function(1), function(2), function(3)};
  }

  // Makes the compiler compute x here.
#if defined(__x86_64__)
  static void Keep(F& x) { asm volatile("" : "+x"(x)); }
#elif defined(__aarch64__)
  static void Keep(F& x) { asm volatile("" : "+w"(x)); }
#else
  static void Keep(F& x) { asm volatile("" : "+m"(x)); }
#endif
  static F Zero() { return F{0, 0, 0, 0}; }
  static F Set(float x) { return F{x, x, x, x}; }
  static F Load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static void Store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
  static F Add(F a, F b) { return a + b; }
  static F Sub(F a, F b) { return a - b; }
  static F Mul(F a, F b) { return a * b; }
  static F Div(F a, F b) { return a / b; }
#if defined(__aarch64__)
  static F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
#else
  static F Fma(F a, F b, F c) { return a * b + c; }
#endif
  static F Min(F a, F b) { return (a < b) ? a : b; }
  static F Max(F a, F b) { return (a > b) ? a : b; }
  static F Abs(F a) {
    I bits;
    std::memcpy(&bits, &a, sizeof(bits));
    bits &= 0x7fffffff;
    std::memcpy(&a, &bits, sizeof(bits));
    return a;
  }
  // Adding and taking away 1.5 * 2^23 leaves a whole number, rounded to nearest, for |a| < 2^22.
  static F Round(F a) { return (a + 12582912.0f) - 12582912.0f; }
  // 2^n for whole n in [-126, 128]; 128 gives infinity.
  static F PowerOfTwo(F n) {
    return Each([&](int i) {
      return kt::FloatFromBits(static_cast<uint32_t>(n[i] == n[i] ? static_cast<int32_t>(n[i]) + 127 : 127) << 23);
    });
  }
  static F SelectNegative(F x, F negative, F otherwise) { return (x < Zero()) ? negative : otherwise; }
  static float Sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }

  static F LoadBf16(const kt::Bf16* p) {
    return Each([&](int i) { return kt::FloatFromBf16(p[i]); });
  }
  static F LoadF16(const kt::F16* p) {
    return Each([&](int i) { return kt::FloatFromF16(p[i]); });
  }
  static void StoreBf16(kt::Bf16* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = kt::Bf16FromFloat(x[i]);
  }
  static void StoreF16(kt::F16* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = kt::F16FromFloat(x[i]);
  }

  // ---- integers ----

  using Bytes = I;
  static constexpr int kInt8Rows = 4;
  static void KeepInts(I& x) {
    F bits;
    std::memcpy(&bits, &x, sizeof(x));
    Keep(bits);
    std::memcpy(&x, &bits, sizeof(x));
  }
  static void KeepBytes(Bytes& x) { KeepInts(x); }
  static I LoadInts(const void* p) {
    I x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static void StoreInts(void* p, I x) { std::memcpy(p, &x, sizeof(x)); }
  static F ToFloat(I x) { return __builtin_convertvector(x, F); }
  static I ToInts(F x) { return __builtin_convertvector(x, I); }
  static I ShiftCodes(I codes) { return codes >> 4; }
  static I LaneGroups(int) { return I{0, 0, 0, 0}; }  // a block of 32 columns lies within one group
  static F PickLanes(const float* p, I) { return Set(*p); }
  static F LookUpLowest(const float* values, I codes) {
    return Each([&](int i) { return values[codes[i] & 15]; });
  }
  static void StoreInt8(F x, int8_t* out) {
    for (int i = 0; i < kLanes; ++i) out[i] = static_cast<int8_t>(x[i]);
  }
  static Bytes LoadTokens(const void* p) { return LoadInts(p); }
  static Bytes BroadcastWeights(const void* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof(quad));
    return I{quad, quad, quad, quad};
  }
  static I AddProducts(I sum, Bytes weights, Bytes tokens) {
    sum += (weights & 255) * ((tokens << 24) >> 24);
    sum += ((weights >> 8) & 255) * ((tokens << 16) >> 24);
    sum += ((weights >> 16) & 255) * ((tokens << 8) >> 24);
    return sum + ((weights >> 24) & 255) * (tokens >> 24);
  }

  static F PackBf16(F even, F odd) {
    return Each([&](int i) {
      return kt::FloatFromBits(kt::Bf16FromFloat(even[i]) | static_cast<uint32_t>(kt::Bf16FromFloat(odd[i])) << 16);
    });
  }

  static F FromInt8(const uint8_t* codes) {
    return Each([&](int i) { return static_cast<float>(static_cast<int8_t>(codes[i])); });
  }
  static void FromFp8(const uint8_t* codes, F* first, F* second) {
    *first = Each([&](int i) { return kt::FloatFromFp8(codes[i]) * 0x1p-8F; });
    *second = Each([&](int i) { return kt::FloatFromFp8(codes[kLanes + i]) * 0x1p-8F; });
  }
  static void LookUp(const float* values, const uint8_t* codes, F* even, F* odd) {
    *even = Each([&](int i) { return values[codes[i] & 15]; });
    *odd = Each([&](int i) { return values[codes[i] >> 4]; });
  }
  static void Interleave(F even, F odd, F* first, F* second) {
    *first = F{even[0], odd[0], even[1], odd[1]};
    *second = F{even[2], odd[2], even[3], odd[3]};
  }

  static void TakeApart(F a, F b, F* even, F* odd) {
    *even = F{a[0], a[2], b[0], b[2]};
    *odd = F{a[1], a[3], b[1], b[3]};
  }

  static void Transpose(F* v) {
    const F a = v[0], b = v[1], c = v[2], d = v[3];
    for (int i = 0; i < kLanes; ++i) v[i] = F{a[i], b[i], c[i], d[i]};
  }
};

}  // namespace
