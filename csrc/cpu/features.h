// Instruction tiers and what this CPU offers of them.
#pragma once

#include <string>
#include <vector>

namespace kt {

// Lowest first: a tier is usable where the CPU, the operating system and this build all have it.
enum class Tier { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

constexpr int kTierCount = 5;

const char* TierName(Tier tier);

// The tier of that name; throws std::invalid_argument for any other name.
Tier TierFromName(const std::string& name);

// Whether CPUID and XGETBV say that `tier`'s instructions, and the registers they use, are usable here. The first call
// for AMX asks the operating system to grant its tiles to the process, and so belongs before worker threads start.
bool CpuSupports(Tier tier);

// The CPU's own name, empty where it cannot be read.
std::string CpuModel();

}  // namespace kt
