// AVX-512 without BF16 (Skylake-SP, Cascade Lake, Ice Lake): FP32 products.
#include "tiers/avx512_ops.h"
#include "tiers/float_elements.h"
#include "tiers/kernels.inl"

namespace {

struct Ops : FloatElements<Avx512Vectors, 2> {
  static constexpr int kTileRows = 12;
};

}  // namespace

namespace kt {
extern const TierKernels kAvx512Kernels;
constexpr TierKernels kAvx512Kernels = Kernels<Ops>::Table(Tier::kAvx512);
}  // namespace kt
