// AVX-512 with BF16 dot products: the vector operations that the AVX512-BF16 and the AMX tier share.
#pragma once

#include "tiers/avx512_ops.h"

namespace {

struct Avx512Bf16Ops : Avx512Vectors {
  using Element = kt::Bf16;
  using Panel = __m512i;
  static constexpr int kPair = 2;
  static constexpr bool kScaleProducts = true;
  // 24 accumulators leave room for two panel vectors and a broadcast in the 32 registers.
  static constexpr int kTileRows = 12, kTileVectors = 2;

  static Panel LoadPanel(const Element* p) { return _mm512_loadu_si512(p); }
  static void StorePanel(Element* p, Panel x) { _mm512_storeu_si512(p, x); }
  // The even and the odd elements of a and b in a row.
  static void TakeApart(Panel a, Panel b, Panel* even, Panel* odd) {
    const __m512i low = _mm512_set1_epi32(0xffff);
    const __m512i evens = _mm512_packus_epi32(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
    const __m512i odds = _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    *even = _mm512_permutexvar_epi64(in_order, evens);
    *odd = _mm512_permutexvar_epi64(in_order, odds);
  }
  static Panel Broadcast(const Element* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static F MultiplyAdd(F sum, Panel a, Panel b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // One VNNI instruction multiplies and adds quads, without saturating.
  using Bytes = __m512i;
  static void KeepBytes(Bytes& x) { KeepInts(x); }
  static Bytes LoadTokens(const void* p) { return _mm512_loadu_si512(p); }
  static Bytes BroadcastWeights(const void* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof(quad));
    return _mm512_set1_epi32(quad);
  }
  // As assembly: with the intrinsic GCC 12 copies every sum twice for each product.
  static I AddProducts(I sum, Bytes weights, Bytes tokens) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(tokens));
    return sum;
  }

  // One instruction rounds to nearest even; denormals become zero, as in the products.
  static __m256i RoundToBf16(F x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
  static void StoreBf16(Element* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), RoundToBf16(x)); }

  static void ElementsFromBf16(const uint8_t* src, int64_t count, Element* out) { std::memcpy(out, src, count * 2); }
  static void StoreElements(F x, Element* out) { StoreBf16(out, x); }

  struct Step {
    Panel panels[1];
  };
  static Step Halves(F first, F second) { return {{reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first))}}; }
  static Step StepOfBf16(const kt::Bf16* p) { return {{LoadPanel(p)}}; }
  static Step Interleaved(F even, F odd) { return {{_mm512_castps_si512(PackBf16(even, odd))}}; }
  static Step LookUpStep(const float* values, const uint8_t* codes) {
    const __m256i table = RoundToBf16(_mm512_load_ps(values));  // exact
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    // Each half of a lane gets its code's four bits as its lowest; the fifth does not matter, as the table comes twice.
    const __m512i index = _mm512_or_si512(both, _mm512_slli_epi32(both, 12));
    return {{_mm512_permutexvar_epi16(index, _mm512_broadcast_i64x4(table))}};
  }
  static Panel LookUpLowest(const float* values, I codes) {
    // A permute of 32 looks at five bits, the fifth of them the next code's: the table comes twice.
    return _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(RoundToBf16(_mm512_load_ps(values))));
  }
  static void StoreStep(Step step, Element* out) { _mm512_storeu_si512(out, step.panels[0]); }

  static F PackBf16(F even, F odd) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));  // 16 of `even`, then 16 of `odd`
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_loadu_si512(kInterleave), both));
  }
  static void StoreActivation(Element* out, int, F even, F odd, bool) {
    Store(reinterpret_cast<float*>(out), PackBf16(even, odd));
  }

  static void InterleaveRows(Element* out, const Element* row0, const Element* row1) {
    const __m512i low = _mm512_loadu_si512(row0), high = _mm512_loadu_si512(row1);
    // Within each 256-bit half of the inputs, to two vectors.
    const __m512i first = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
    const __m512i second = _mm512_inserti64x4(high, _mm512_extracti64x4_epi64(low, 1), 0);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_loadu_si512(kInterleave), first));
    _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(_mm512_loadu_si512(kInterleave), second));
  }

  // 0, 16, 1, 17, ...: the halves of a vector, interleaved.
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
};

}  // namespace
