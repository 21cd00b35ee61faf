// How the fastest tier is found. Not in tier.h: units with raised flags must not see the templates used here.
#pragma once

#include <functional>
#include <vector>

namespace kt {

// The number of the tier to use among `count`, lowest first, whose products run at these rates. A lower one has to be
// this many times as fast: a measurement that others on the machine disturb must not decide.
constexpr double kWorthLowering = 1.25;
int FastestOf(const double* rates, int count);

// What rate(tier) gives at best for each of `count` tiers: of many short trials, taken in turn, as others on the
// machine can only make one slower. Together they take some 20 milliseconds: after a rest Intel CPUs run 512-bit
// products at half their speed, for up to a millisecond.
std::vector<double> BestRates(int count, const std::function<double(int)>& rate);

}  // namespace kt
