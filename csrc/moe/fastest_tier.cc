#include "moe/fastest_tier.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace kt {

int FastestOf(const double* rates, int count) {
  int best = count - 1;
  for (int i = count - 2; i >= 0; --i) {
    if (rates[i] > kWorthLowering * rates[best]) best = i;
  }
  return best;
}

std::vector<double> BestRates(int count, const std::function<double(int)>& rate) {
  constexpr int kTrials = 512;
  std::vector<double> best(static_cast<size_t>(count), 0.0);
  for (int trial = 0; trial < kTrials; ++trial) {
    for (int i = 0; i < count; ++i) best[static_cast<size_t>(i)] = std::max(best[static_cast<size_t>(i)], rate(i));
  }
  return best;
}

namespace {

double SecondsNow() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// FLOPs per second of products on registers, for each tier.
std::vector<double> MeasureRates(const std::vector<const TierKernels*>& tiers,
                                 double (*TierKernels::*products)(int64_t)) {
  constexpr int64_t kSteps = 1000;  // some microseconds
  return BestRates(static_cast<int>(tiers.size()), [&](int i) {
    const TierKernels& kernels = *tiers[static_cast<size_t>(i)];
    const double start = SecondsNow();
    const double flops = (kernels.*products)(kSteps);
    const double rate = flops / (SecondsNow() - start);
    if (kernels.end_products != nullptr) kernels.end_products();
    return rate;
  });
}

bool Interchangeable(const TierKernels& kernels, const TierKernels& integers) {
  return integers.lanes == kernels.lanes && integers.tile_vectors == kernels.tile_vectors &&
         integers.end_products == nullptr;
}

TierChoice ChooseFastest() {
  std::vector<const TierKernels*> tiers;
  for (int i = static_cast<int>(Tier::kAvx2); i < kTierCount; ++i) {
    const TierKernels* const kernels = KernelsOf(static_cast<Tier>(i));
    if (kernels != nullptr && CpuSupports(kernels->tier)) tiers.push_back(kernels);
  }
  if (tiers.empty()) return {};
  const auto fastest = [&](double (*TierKernels::*products)(int64_t)) {
    return tiers[static_cast<size_t>(FastestOf(MeasureRates(tiers, products).data(), static_cast<int>(tiers.size())))];
  };
  const TierKernels& chosen = *fastest(&TierKernels::register_products);
  if (chosen.tier == tiers.back()->tier) return {chosen.tier, chosen.tier};
  const TierKernels& integers = *fastest(&TierKernels::register_int8_products);
  return {chosen.tier, Interchangeable(chosen, integers) ? integers.tier : chosen.tier};
}

const TierKernels& SupportedKernels(Tier tier) {
  const TierKernels* const kernels = KernelsOf(tier);
  if (kernels == nullptr || !CpuSupports(tier))
    throw std::invalid_argument(std::string("this CPU or build has no tier ") + TierName(tier));
  return *kernels;
}

}  // namespace

TierChoice FastestTiers() {
  static const TierChoice chosen = ChooseFastest();
  return chosen;
}

const TierKernels* KernelsOf(const TierChoice& choice) {
  const TierKernels &own = SupportedKernels(choice.products), &integers = SupportedKernels(choice.integers);
  if (choice.products == choice.integers) return &own;
  if (!Interchangeable(own, integers))
    throw std::invalid_argument(std::string(TierName(choice.products)) + " cannot have integer products of " +
                                TierName(choice.integers));
  static std::mutex mutex;
  static std::map<std::pair<Tier, Tier>, TierKernels> combined;  // whose elements stay where they are
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, added] = combined.try_emplace({choice.products, choice.integers}, own);
  TierKernels& kernels = place->second;
  if (added) {
    std::copy_n(integers.decode_int8_rows, kFormatCount, kernels.decode_int8_rows);
    kernels.pack_int8_panel = integers.pack_int8_panel;
    kernels.multiply_int8 = integers.multiply_int8;
    kernels.register_int8_products = integers.register_int8_products;
  }
  return &kernels;
}

}  // namespace kt
