// AVX2 with FMA and F16C (Haswell, Zen and later): FP32 products.
#include <immintrin.h>

#include "tiers/float_elements.h"
#include "tiers/kernels.inl"

namespace {

struct Avx2Vectors {
  static constexpr int kLanes = 8;
  using F = __m256;

  // Makes the compiler compute x here, in a register.
  static void Keep(F& x) { asm volatile("" : "+x"(x)); }
  static F Zero() { return _mm256_setzero_ps(); }
  static F Set(float x) { return _mm256_set1_ps(x); }
  static F Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static F Abs(F a) { return _mm256_andnot_ps(Set(-0.0f), a); }
  static F Round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 2^n for whole n in [-126, 128]; 128 gives infinity.
  static F PowerOfTwo(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static F SelectNegative(F x, F negative, F otherwise) {
    return _mm256_blendv_ps(otherwise, negative, _mm256_cmp_ps(x, Zero(), _CMP_LT_OQ));
  }
  static float Sum(F a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static F LoadBf16(const kt::Bf16* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static F LoadF16(const kt::F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void StoreF16(kt::F16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The BF16 bits of every lane, in its upper half. Rounds to nearest even in integer arithmetic; a NaN stays a quiet
  // NaN.
  static __m256i RoundToUpperHalf(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
  }
  static void StoreBf16(kt::Bf16* p, F x) {
    const __m256i high = _mm256_srli_epi32(RoundToUpperHalf(x), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static F PackBf16(F even, F odd) {
    const __m256i low = _mm256_srli_epi32(RoundToUpperHalf(even), 16);
    return _mm256_castsi256_ps(_mm256_blend_epi16(low, RoundToUpperHalf(odd), 0xaa));
  }

  static __m128i LoadEight(const uint8_t* codes) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)); }
  static F FromInt8(const uint8_t* codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(LoadEight(codes))); }
  static void FromFp8(const uint8_t* codes, F* first, F* second) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    *first = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    *second = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  }
  static void LookUp(const float* values, const uint8_t* codes, F* even, F* odd) {
    const __m256i both = _mm256_cvtepu8_epi32(LoadEight(codes));
    *even = LookUpLowest(values, both);
    *odd = LookUpLowest(values, _mm256_srli_epi32(both, 4));
  }
  // A permute looks at three of the lowest four bits, the fourth chooses between two.
  static F LookUpLowest(const float* values, __m256i index) {
    const F low = _mm256_permutevar8x32_ps(_mm256_load_ps(values), index);
    const F high = _mm256_permutevar8x32_ps(_mm256_load_ps(values + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static void Interleave(F even, F odd, F* first, F* second) {
    const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    *first = _mm256_permute2f128_ps(low, high, 0x20);
    *second = _mm256_permute2f128_ps(low, high, 0x31);
  }

  // The even and the odd lanes of a and b in a row.
  static void TakeApart(F a, F b, F* even, F* odd) {
    const auto in_order = [](F x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); };
    *even = in_order(_mm256_shuffle_ps(a, b, 0x88));
    *odd = in_order(_mm256_shuffle_ps(a, b, 0xdd));
  }

  // ---- integers ----

  using I = __m256i;
  // The even and the odd bytes of every 16 bits, widened to them.
  struct Bytes {
    __m256i even, odd;
  };
  static constexpr int kInt8Rows = 4;
  static void KeepInts(I& x) { asm volatile("" : "+x"(x)); }
  static void KeepBytes(Bytes& x) { KeepInts(x.even), KeepInts(x.odd); }
  static I LoadInts(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void StoreInts(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static F ToFloat(I x) { return _mm256_cvtepi32_ps(x); }
  static I ToInts(F x) { return _mm256_cvtps_epi32(x); }
  static I ShiftCodes(I codes) { return _mm256_srli_epi32(codes, 4); }
  static I LaneGroups(int shift) {
    return _mm256_srl_epi32(_mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56), _mm_cvtsi32_si128(shift));
  }
  static F PickLanes(const float* p, I lanes) {
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), lanes);
  }
  static void StoreInt8(F x, int8_t* out) {
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(half, half));
  }
  static Bytes LoadTokens(const void* p) {
    const __m256i both = LoadInts(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8), _mm256_srai_epi16(both, 8)};
  }
  static Bytes BroadcastWeights(const void* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof(quad));
    const __m256i both = _mm256_set1_epi32(quad);
    return {_mm256_and_si256(both, _mm256_set1_epi16(255)), _mm256_srli_epi16(both, 8)};
  }
  static I AddProducts(I sum, Bytes weights, Bytes tokens) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(weights.even, tokens.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weights.odd, tokens.odd));
  }

  static void Transpose(F* v) {
    F t[8];
    for (int i = 0; i < 8; i += 4) {
      const F a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
      const F c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
      t[i] = _mm256_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
      v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
  }
};

struct Ops : FloatElements<Avx2Vectors, 2> {
  // 12 accumulators, two panel vectors and a broadcast fill the 16 registers.
  static constexpr int kTileRows = 6;
};

}  // namespace

namespace kt {
extern const TierKernels kAvx2Kernels;
constexpr TierKernels kAvx2Kernels = Kernels<Ops>::Table(Tier::kAvx2);
}  // namespace kt
