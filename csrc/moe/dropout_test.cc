// Which values dropout leaves out: as many as asked for, anew for each place and seed, and the same every time.
#include "moe/dropout.h"

#include <cmath>

#include "testing.h"

namespace kt {
namespace {

constexpr int64_t kSlots = 200, kColumns = 501;

int64_t CountDrops(const Dropout& dropout, int of) {
  int64_t count = 0;
  for (int64_t slot = 0; slot < kSlots; ++slot) {
    const DropoutRow row(dropout, of, slot);
    for (int64_t column = 0; column < kColumns; ++column) count += row.Drops(column) ? 1 : 0;
  }
  return count;
}

// Values left out by both, at another place of the second.
int64_t CountBoth(const DropoutRow& one, const DropoutRow& other, int64_t shift) {
  int64_t count = 0;
  for (int64_t column = 0; column < kColumns; ++column) {
    count += one.Drops(column) && other.Drops(column + shift) ? 1 : 0;
  }
  return count;
}

// Counts of n draws of chance p lie within 6 standard deviations but for one seed in 500 million.
bool AsLikely(int64_t count, double n, double p) {
  return std::fabs(static_cast<double>(count) - n * p) <= 6 * std::sqrt(n * p * (1 - p));
}

TEST(AsManyAsAskedForAreLeftOut) {
  for (const double share : {0.05, 0.1, 0.5, 0.9}) {
    for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}}) {
      const Dropout dropout{seed, static_cast<uint32_t>(share * 0x1p32)};
      CHECK(AsLikely(CountDrops(dropout, DropoutRow::kHidden), kSlots * kColumns, share));
      CHECK(AsLikely(CountDrops(dropout, DropoutRow::kActivations), kSlots * kColumns, share));
    }
  }
  const Dropout none{7, 0};
  CHECK(CountDrops(none, DropoutRow::kHidden) == 0);
}

TEST(EveryPlaceAndSeedHasItsOwn) {
  const Dropout dropout{3, 1U << 31}, next{4, 1U << 31};
  int64_t slots = 0, columns = 0, kinds = 0, seeds = 0;
  for (int64_t slot = 0; slot < kSlots; ++slot) {
    const DropoutRow row(dropout, DropoutRow::kHidden, slot);
    slots += CountBoth(row, DropoutRow(dropout, DropoutRow::kHidden, slot + 1), 0);
    columns += CountBoth(row, row, 1);
    kinds += CountBoth(row, DropoutRow(dropout, DropoutRow::kActivations, slot), 0);
    seeds += CountBoth(row, DropoutRow(next, DropoutRow::kHidden, slot), 0);
  }
  for (const int64_t both : {slots, columns, kinds, seeds}) CHECK(AsLikely(both, kSlots * kColumns, 0.25));
}

TEST(TheSamePlaceIsTheSameEveryTime) {
  const Dropout dropout{5, 1U << 30};
  const DropoutRow row(dropout, DropoutRow::kHidden, 9), again(dropout, DropoutRow::kHidden, 9);
  for (int64_t column = kColumns - 1; column >= 0; --column) CHECK(row.Drops(column) == again.Drops(column));
}

}  // namespace
}  // namespace kt
