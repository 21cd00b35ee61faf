// The units with wider vectors against the one for every CPU. A store that is made on one machine goes on on another,
// and its hashes are compared, so they must give the same bits.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/features.h"
#include "formats/quantise.inl"
#include "testing.h"

namespace kt {
namespace {

// All ways to store weights with scales.
std::vector<Storage> ScaledStorages() {
  std::vector<Storage> found;
  for (int format = 0; format < kFormatCount; ++format) {
    for (const int64_t group : {-1, 0, 32, 64, 128}) {
      for (const bool zero_point : {false, true}) {
        try {
          found.push_back(StorageOf(static_cast<Format>(format), group, zero_point));
        } catch (const std::invalid_argument&) {
          continue;  // the format has no such group, or no zero points
        }
        if (found.back().scale_type == ScaleType::kNone) found.pop_back();
      }
    }
  }
  return found;
}

struct Outcome {
  std::vector<uint8_t> bytes;
  QuantisationError error;
};

Outcome QuantiseWith(QuantiseFn unit, const Storage& storage, const std::vector<float>& values, int64_t rows,
                     int64_t columns) {
  Outcome outcome{std::vector<uint8_t>(static_cast<size_t>(storage.bytes(rows, columns))), {}};
  const MatrixView view = storage.view(outcome.bytes.data(), rows, columns);
  std::vector<float> room(
      static_cast<size_t>(MostBlocks(view) * GroupRoom(view, std::min(view.group_rows, rows), columns)));
  outcome.error = unit(storage, values.data(), 0, rows, rows, columns, outcome.bytes.data(), room.data());
  return outcome;
}

TEST(EveryUnitGivesTheSameBits) {
  std::vector<std::pair<std::string, QuantiseFn>> units;
#if defined(__x86_64__)
  if (CpuSupports(Tier::kAvx2)) units.emplace_back("AVX2", kQuantiseAvx2);
  if (CpuSupports(Tier::kAvx512)) units.emplace_back("AVX-512", kQuantiseAvx512);
#endif
  const std::vector<Storage> storages = ScaledStorages();
  CHECK(storages.size() >= 12);
  std::mt19937 random(8);
  std::student_t_distribution<float> tailed(4);
  for (const Storage& storage : storages) {
    for (const int64_t columns : {1, 7, 16, 31, 33, 100, 131, 1000, 2048, 5003}) {
      for (const float magnitude : {0.0F, 1.0F, 0x1p-60F, 0x1p-140F, 0x1p100F}) {
        const int64_t rows = columns < 200 ? 150 : 3;
        std::vector<float> values(static_cast<size_t>(rows * columns));
        for (float& value : values) value = tailed(random) * magnitude;
        const Outcome expected = QuantiseWith(QuantiseGroups, storage, values, rows, columns);
        for (const auto& [name, unit] : units) {
          const Outcome found = QuantiseWith(unit, storage, values, rows, columns);
          const std::string what = name + ", " + FormatName(storage.format) + " of " + std::to_string(columns);
          CHECK_MESSAGE(found.bytes == expected.bytes, what);
          CHECK_MESSAGE(found.error.squared_error == expected.error.squared_error, what);
          CHECK_MESSAGE(found.error.squared_values == expected.error.squared_values, what);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt
