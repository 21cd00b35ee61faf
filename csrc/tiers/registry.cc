#include "tiers/tier.h"

namespace kt {

extern const TierKernels kPortableKernels;
#if defined(__x86_64__)
extern const TierKernels kAvx2Kernels;
extern const TierKernels kAvx512Kernels;
extern const TierKernels kAvx512Bf16Kernels;
extern const TierKernels kAmxKernels;
#endif

const TierKernels* KernelsOf(Tier tier) {
  switch (tier) {
    case Tier::kPortable:
      return &kPortableKernels;
#if defined(__x86_64__)
    case Tier::kAvx2:
      return &kAvx2Kernels;
    case Tier::kAvx512:
      return &kAvx512Kernels;
    case Tier::kAvx512Bf16:
      return &kAvx512Bf16Kernels;
    case Tier::kAmx:
      return &kAmxKernels;
#endif
    default:
      return nullptr;
  }
}

const TierKernels* BestKernels(Tier limit) {
  for (int i = static_cast<int>(limit); i > 0; --i) {
    const Tier tier = static_cast<Tier>(i);
    const TierKernels* kernels = KernelsOf(tier);
    if (kernels != nullptr && CpuSupports(tier)) return kernels;
  }
  return &kPortableKernels;
}

}  // namespace kt
