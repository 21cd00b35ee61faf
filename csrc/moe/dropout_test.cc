// Which values dropout leaves out: as many as asked for, anew for each place and seed, and the same every time.
#include "moe/dropout.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "testing.h"

namespace kt {
namespace {

constexpr int64_t kSlots = 200, kColumns = 501;

std::vector<bool> Dropped(const DropoutRow& row, int64_t columns = kColumns) {
  std::vector<bool> dropped(static_cast<size_t>(columns));
  row.ForEachDropped(0, columns, [&](int64_t column) { dropped[static_cast<size_t>(column)] = true; });
  return dropped;
}

int64_t CountDrops(const Dropout& dropout, int of) {
  int64_t count = 0;
  for (int64_t slot = 0; slot < kSlots; ++slot) {
    const std::vector<bool> row = Dropped(DropoutRow(dropout, of, slot));
    count += std::count(row.begin(), row.end(), true);
  }
  return count;
}

// Values left out by both, at another place of the second.
int64_t CountBoth(const DropoutRow& one, const DropoutRow& other, int64_t shift) {
  const std::vector<bool> of_one = Dropped(one), of_other = Dropped(other, kColumns + shift);
  int64_t count = 0;
  for (size_t column = 0; column < of_one.size(); ++column) {
    count += of_one[column] && of_other[column + static_cast<size_t>(shift)] ? 1 : 0;
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

TEST(ARowCanBeTakenInPieces) {
  const DropoutRow row({5, 1U << 30}, DropoutRow::kHidden, 9);
  const std::vector<bool> whole = Dropped(row);
  std::vector<bool> pieces(whole.size());
  for (const auto& [first, end] : std::vector<std::pair<int64_t, int64_t>>{{300, kColumns}, {0, 1}, {1, 7}, {7, 300}}) {
    row.ForEachDropped(first, end, [&, from = first, to = end](int64_t column) {
      CHECK(column >= from && column < to);
      pieces[static_cast<size_t>(column)] = true;
    });
  }
  CHECK(pieces == whole);
}

}  // namespace
}  // namespace kt
