// Portable C++: FP32 products. The reference for the other tiers.
#include "tiers/float_elements.h"
#include "tiers/kernels.inl"
#include "tiers/portable_ops.h"

namespace {

struct Ops : FloatElements<PortableVectors, 2> {
  static constexpr int kTileRows = 4;
};

}  // namespace

namespace kt {
extern const TierKernels kPortableKernels;
constexpr TierKernels kPortableKernels = Kernels<Ops>::Table(Tier::kPortable);
}  // namespace kt
