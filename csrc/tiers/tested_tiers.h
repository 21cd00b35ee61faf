// The tiers that tests run over.
#pragma once

#include <string>
#include <vector>

#include "tiers/tier.h"

namespace kt {

// The AMX tier on emulated tiles, with portable vectors and with AVX512-BF16's.
extern const TierKernels kEmulatedAmxPortableKernels;
#if defined(__x86_64__)
extern const TierKernels kEmulatedAmxKernels;
#endif

}  // namespace kt

namespace kt::testing {

struct TestedTier {
  std::string name;
  const TierKernels* kernels;
};

// The AMX tier in every form that runs here.
inline std::vector<TestedTier> AmxTiers() {
  std::vector<TestedTier> tiers{{"amx emulated on portable vectors", &kEmulatedAmxPortableKernels}};
#if defined(__x86_64__)
  if (CpuSupports(Tier::kAvx512Bf16)) tiers.push_back({"amx emulated on avx512_bf16", &kEmulatedAmxKernels});
  if (CpuSupports(Tier::kAmx)) tiers.push_back({"amx", KernelsOf(Tier::kAmx)});
#endif
  return tiers;
}

// Every tier that this CPU has, and the emulated ones.
inline std::vector<TestedTier> TestedTiers() {
  std::vector<TestedTier> tiers = AmxTiers();
  for (int i = 0; i < static_cast<int>(Tier::kAmx); ++i) {
    const TierKernels* const kernels = KernelsOf(static_cast<Tier>(i));
    if (kernels != nullptr && CpuSupports(kernels->tier)) tiers.push_back({TierName(kernels->tier), kernels});
  }
  return tiers;
}

}  // namespace kt::testing
