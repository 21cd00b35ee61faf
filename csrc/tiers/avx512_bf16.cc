// AVX-512 with BF16 dot products (Zen 4 and 5, Cooper Lake, Sapphire Rapids and later).
#include "tiers/avx512_bf16_ops.h"
#include "tiers/kernels.inl"

namespace kt {
extern const TierKernels kAvx512Bf16Kernels;
constexpr TierKernels kAvx512Bf16Kernels = Kernels<Avx512Bf16Ops>::Table(Tier::kAvx512Bf16);
}  // namespace kt
