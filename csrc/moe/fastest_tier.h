// Which tier the engine uses.
#pragma once

#include <functional>
#include <vector>

#include "tiers/tier.h"

namespace kt {

// Integer products take operands of their own, so that they may be another tier's where panels are as wide.
struct TierChoice {
  Tier products = Tier::kPortable;
  Tier integers = Tier::kPortable;
};

// The tiers to use where none is asked for: the highest, unless a lower one multiplies much faster here, as measured
// once in each process. Intel CPUs with AMX hidden by a hypervisor start a BF16 dot product only every other cycle, but
// two FP32 multiply-adds in each, so `avx512` has twice the speed of `avx512_bf16`. Two processes may measure
// differently, so those of one job agree on what one of them found.
TierChoice FastestTiers();

// The kernels of a choice, alive as long as the process. Throws std::invalid_argument for tiers that this CPU or build
// does not have, or that do not fit each other.
const TierKernels* KernelsOf(const TierChoice& choice);

// The number of the tier to use among `count`, lowest first, whose products run at these rates. A lower one has to be
// this many times as fast: a measurement that others on the machine disturb must not decide.
constexpr double kWorthLowering = 1.25;
int FastestOf(const double* rates, int count);

// What rate(tier) gives at best for each of `count` tiers: of many short trials, taken in turn, as others on the
// machine can only make one slower. Together they take some 20 milliseconds: after a rest Intel CPUs run 512-bit
// products at half their speed, for up to a millisecond.
std::vector<double> BestRates(int count, const std::function<double(int)>& rate);

}  // namespace kt
