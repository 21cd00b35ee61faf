// AVX-512 with BF16 dot products (Zen 4 and 5, Cooper Lake, Sapphire Rapids and later).
#include "tiers/avx512_ops.h"
#include "tiers/kernels.inl"

namespace {

struct Ops : Avx512Vectors {
  using Element = kt::Bf16;
  using Panel = __m512i;
  static constexpr int kPair = 2;
  // 24 accumulators leave room for two panel vectors and a broadcast in the 32 registers.
  static constexpr int kTileRows = 12, kTileVectors = 2;

  static Panel LoadPanel(const Element* p) { return _mm512_loadu_si512(p); }
  static Panel Broadcast(const Element* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static F MultiplyAdd(F sum, Panel a, Panel b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  static void ElementsFromBf16(const uint8_t* src, int64_t count, Element* out) { std::memcpy(out, src, count * 2); }
  static void StoreElements(F x, Element* out) { StoreBf16(out, x); }

  static void StoreActivation(Element* out, int, F even, F odd, bool) {
    const __m512i low = _mm512_cvtepu16_epi32(RoundToBf16(even)), high = _mm512_cvtepu16_epi32(RoundToBf16(odd));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static void InterleaveRows(Element* out, const Element* row0, const Element* row1) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1)));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

}  // namespace

namespace kt {
extern const TierKernels kAvx512Bf16Kernels;
constexpr TierKernels kAvx512Bf16Kernels = Kernels<Ops>::Table(Tier::kAvx512Bf16);
}  // namespace kt
