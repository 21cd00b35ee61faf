// Vector operations of AVX-512 (F, BW, DQ, VL), shared by the tiers that have them. Include inside an anonymous
// namespace's unit only: the including unit must be compiled with these instruction sets.
#pragma once

#include <immintrin.h>

#include "cpu/numeric.h"

namespace {

struct Avx512Vectors {
  static constexpr int kLanes = 16;
  using F = __m512;

  // Makes the compiler compute x here, in a register.
  static void Keep(F& x) { asm volatile("" : "+v"(x)); }
  static F Zero() { return _mm512_setzero_ps(); }
  static F Set(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Abs(F a) { return _mm512_abs_ps(a); }
  static F Round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 2^n for whole n in [-126, 128]; 128 gives infinity.
  static F PowerOfTwo(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static F SelectNegative(F x, F negative, F otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, Zero(), _CMP_LT_OQ), otherwise, negative);
  }
  static float Sum(F a) { return _mm512_reduce_add_ps(a); }

  static F LoadBf16(const kt::Bf16* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static F LoadF16(const kt::F16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void StoreF16(kt::F16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  // Rounds to nearest even in integer arithmetic: denormals are kept, a NaN stays a quiet NaN.
  static __m256i RoundToBf16(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
  }
  static void StoreBf16(kt::Bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), RoundToBf16(x)); }

  static F PackBf16(F even, F odd) {
    const __m512i low = _mm512_cvtepu16_epi32(RoundToBf16(even)), high = _mm512_cvtepu16_epi32(RoundToBf16(odd));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static F FromInt8(const uint8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  }
  static void FromFp8(const uint8_t* codes, F* first, F* second) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
    // Converting from memory saves the shuffle that it takes from a register.
    alignas(64) __m256i halves[2];
    _mm512_store_si512(halves, half);
    asm volatile("" : "+m"(halves));
    *first = _mm512_cvtph_ps(halves[0]);
    *second = _mm512_cvtph_ps(halves[1]);
  }
  static void LookUp(const float* values, const uint8_t* codes, F* even, F* odd) {
    const __m512 table = _mm512_load_ps(values);
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    *even = _mm512_permutexvar_ps(both, table);  // the low four bits of a lane count
    *odd = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
  }
  static __m512 LookUpLowest(const float* values, __m512i codes) {
    return _mm512_permutexvar_ps(codes, _mm512_load_ps(values));
  }
  static void Interleave(F even, F odd, F* first, F* second) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    *first = _mm512_permutex2var_ps(even, low, odd);
    *second = _mm512_permutex2var_ps(even, high, odd);
  }

  // The even and the odd lanes of a and b in a row.
  static void TakeApart(F a, F b, F* even, F* odd) {
    const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = _mm512_permutex2var_ps(a, lanes, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(lanes, _mm512_set1_epi32(1)), b);
  }

  // ---- integers ----

  using I = __m512i;
  // The even and the odd bytes of every 16 bits, widened to them.
  struct Bytes {
    __m512i even, odd;
  };
  static constexpr int kInt8Rows = 12;
  static void KeepInts(I& x) { asm volatile("" : "+v"(x)); }
  static void KeepBytes(Bytes& x) { KeepInts(x.even), KeepInts(x.odd); }
  static I LoadInts(const void* p) { return _mm512_loadu_si512(p); }
  static void StoreInts(void* p, I x) { _mm512_storeu_si512(p, x); }
  static F ToFloat(I x) { return _mm512_cvtepi32_ps(x); }
  static I ToInts(F x) { return _mm512_cvtps_epi32(x); }
  static I ShiftCodes(I codes) { return _mm512_srli_epi32(codes, 4); }
  static I LaneGroups(int shift) {
    const __m512i columns = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    return _mm512_srl_epi32(columns, _mm_cvtsi32_si128(shift));
  }
  static F PickLanes(const float* p, I lanes) {
    return _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x4(_mm_loadu_ps(p)));
  }
  static void StoreInt8(F x, int8_t* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  static Bytes LoadTokens(const void* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(both, 8), 8), _mm512_srai_epi16(both, 8)};
  }
  static Bytes BroadcastWeights(const void* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof(quad));
    const __m512i both = _mm512_set1_epi32(quad);
    return {_mm512_and_si512(both, _mm512_set1_epi16(255)), _mm512_srli_epi16(both, 8)};
  }
  static I AddProducts(I sum, Bytes weights, Bytes tokens) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(weights.even, tokens.even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(weights.odd, tokens.odd));
  }

  static void Transpose(F* v) {
    // 16 x 16 in four rounds: 4 x 4 blocks of single values, then blocks of four lanes.
    F t[16];
    for (int i = 0; i < 16; i += 4) {
      const F a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
      const F c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
      t[i] = _mm512_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const F a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
      const F c = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
      v[i] = _mm512_shuffle_f32x4(a, b, 0x88);
      v[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
      v[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
      v[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
  }
};

}  // namespace
