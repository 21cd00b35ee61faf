// AVX-512 without BF16 (Skylake-SP, Cascade Lake, Ice Lake): FP32 products.
#include "tiers/avx512_ops.h"
#include "tiers/float_elements.h"
#include "tiers/kernels.inl"

namespace {

struct Ops : FloatElements<Avx512Vectors> {
  static constexpr int kTileRows = 12, kTileVectors = 2;
};

}  // namespace

namespace kt {
extern const TierKernels kAvx512Kernels;
constexpr TierKernels kAvx512Kernels = Kernels<Ops>::Table(Tier::kAvx512);
}  // namespace kt
