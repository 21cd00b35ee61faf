// Dropout in the passes: zeros in the operands of adapters' products, in place of what is left out.
#include "moe/dropout.h"

#include <algorithm>

#include "moe/pass_internal.h"

namespace kt {

DropoutRow Pass::DropoutOf(const Chunk& chunk, int of, int64_t row) {
  const Routing& routing = chunk.routing;
  return DropoutRow(chunk.call.lora.dropout, of,
                    chunk.first_token * routing.slots + routing.slot_of[static_cast<size_t>(row)]);
}

int64_t Pass::DroppedBytes(const Chunk& chunk, const Panels& x, const Panels& act) {
  return chunk.call.lora.dropout.below > 0 ? std::max(x.bytes(), act.bytes()) : 0;
}

// A panel's element (column, token) is part column % pair of its step (column / pair, token).
void Pass::DropFromPanels(const Chunk& chunk, int of, int64_t columns, const Panels& from, const Panels& to) {
  const int64_t bytes = kernels_.element_bytes, pair = kernels_.pair;
  ForEachGroup(chunk, [&](size_t b, const Group& group) {
    const RowBlock& block = chunk.routing.blocks[b];
    const bool few = Few(block);
    char* const panel = few ? nullptr : to.Panel(b, group.first);
    if (!few) std::copy_n(from.Panel(b, group.first), from.depth * group.width * bytes, panel);
    for (int t = 0; t < group.rows; ++t) {
      const DropoutRow dropped = DropoutOf(chunk, of, block.first + group.first + t);
      char* const row = few ? to.Row(b, group.first + t) : panel + t * pair * bytes;
      if (few) std::copy_n(from.Row(b, group.first + t), Padded(columns) * bytes, row);
      const int64_t step = few ? pair : group.width * pair;
      dropped.ForEachDropped(0, columns,
                             [&](int64_t k) { std::fill_n(row + (k / pair * step + k % pair) * bytes, bytes, 0); });
    }
  });
}

void Pass::DropFromRow(const Chunk& chunk, int of, int64_t columns, int64_t row, char* elements) const {
  if (chunk.call.lora.dropout.below == 0) return;
  const int64_t bytes = kernels_.element_bytes;
  DropoutOf(chunk, of, row).ForEachDropped(0, columns, [&](int64_t k) { std::fill_n(elements + k * bytes, bytes, 0); });
}

void Pass::AddKept(const Chunk& chunk, int of, int64_t row, int64_t column, int64_t columns, float* values,
                   float* sums) {
  DropoutOf(chunk, of, row).ForEachDropped(column, column + columns, [&](int64_t k) { values[k - column] = 0.0F; });
  for (int64_t k = 0; k < columns; ++k) sums[k] += values[k];
}

}  // namespace kt
