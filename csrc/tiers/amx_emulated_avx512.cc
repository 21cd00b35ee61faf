// The AMX tier with emulated tiles, for tests on CPUs with AVX512-BF16: all else is the tier's own code.
#include "tiers/amx_emulated.h"
#include "tiers/amx_product.inl"
#include "tiers/avx512_bf16_ops.h"
#include "tiers/kernels.inl"

namespace kt {
extern const TierKernels kEmulatedAmxKernels;
constexpr TierKernels kEmulatedAmxKernels =
    TileProduct<Avx512Bf16Ops, EmulatedTiles>::Table(Kernels<Avx512Bf16Ops>::Table(Tier::kAmx));
}  // namespace kt
