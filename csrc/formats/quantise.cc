#include "formats/quantise.h"

#include <algorithm>
#include <vector>

#include "cpu/features.h"
#include "formats/quantise.inl"

namespace kt {
namespace {

QuantisationError RoundToBf16(const float* values, int64_t count, uint8_t* to) {
  const float limit = FloatFromBf16(0x7f7f);  // the largest
  double error = 0.0, squares = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i] > limit ? limit : values[i] < -limit ? -limit : values[i];
    const Bf16 rounded = Bf16FromFloat(value);
    std::memcpy(to + 2 * i, &rounded, 2);
    const double exact = values[i], off = exact - FloatFromBf16(rounded);
    error += off * off, squares += exact * exact;
  }
  return {error, squares};
}

// The unit with the widest vectors that this CPU has.
QuantiseFn WidestUnit() {
#if defined(__x86_64__)
  if (CpuSupports(Tier::kAvx512)) return kQuantiseAvx512;
  if (CpuSupports(Tier::kAvx2)) return kQuantiseAvx2;
#endif
  return QuantiseGroups;
}

}  // namespace

QuantisationError Quantise(const Storage& storage, const float* values, int64_t row, int64_t rows, int64_t matrix_rows,
                           int64_t columns, uint8_t* base) {
  if (storage.format == Format::kBf16)
    return RoundToBf16(values, rows * columns, base + row * storage.row_bytes(columns));
  static const QuantiseFn kUnit = WidestUnit();
  const MatrixView view = storage.view(base, matrix_rows, columns);
  std::vector<float> room(
      static_cast<size_t>(MostBlocks(view) * GroupRoom(view, std::min(view.group_rows, rows), columns)));
  return kUnit(storage, values, row, rows, matrix_rows, columns, base, room.data());
}

}  // namespace kt
