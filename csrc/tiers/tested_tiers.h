// The tiers that tests run over.
#pragma once

#include <string>
#include <vector>

#include "tiers/amx_trap.h"
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

// Every tier that this CPU has.
inline std::vector<TestedTier> CpuTiers() {
  std::vector<TestedTier> tiers;
  for (int i = 0; i < kTierCount; ++i) {
    const TierKernels* const kernels = KernelsOf(static_cast<Tier>(i));
    if (kernels != nullptr && CpuSupports(kernels->tier)) tiers.push_back({TierName(kernels->tier), kernels});
  }
  return tiers;
}

inline std::vector<TestedTier> EmulatedTiers() {
  std::vector<TestedTier> tiers{{"amx emulated on portable vectors", &kEmulatedAmxPortableKernels}};
#if defined(__x86_64__)
  if (CpuSupports(Tier::kAvx512Bf16)) tiers.push_back({"amx emulated on avx512_bf16", &kEmulatedAmxKernels});
#if defined(__linux__)
  if (CpuSupports(Tier::kAvx512Bf16) && !CpuSupports(Tier::kAmx)) {
    TrapTileInstructions();
    tiers.push_back({"amx with its instructions trapped", KernelsOf(Tier::kAmx)});
  }
#endif
#endif
  return tiers;
}

inline std::vector<TestedTier> TestedTiers() {
  std::vector<TestedTier> tiers = CpuTiers();
  for (const TestedTier& tier : EmulatedTiers()) tiers.push_back(tier);
  return tiers;
}

// The AMX tier in every form that runs here.
inline std::vector<TestedTier> AmxTiers() {
  std::vector<TestedTier> tiers = EmulatedTiers();
  if (CpuSupports(Tier::kAmx)) tiers.push_back({TierName(Tier::kAmx), KernelsOf(Tier::kAmx)});
  return tiers;
}

}  // namespace kt::testing
