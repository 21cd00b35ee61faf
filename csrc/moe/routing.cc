#include "moe/routing.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

// Says which of the indices is wrong: the smallest if that is below 0, else the largest.
[[noreturn]] void ThrowOutOfRange(const int64_t* experts, int64_t count, int64_t expert_count) {
  const auto [low, high] = std::minmax_element(experts, experts + count);
  throw std::out_of_range("kt_sft: top_k_index holds " + std::to_string(*low < 0 ? *low : *high) + "; valid are 0 to " +
                          std::to_string(expert_count - 1) + ", and " + std::to_string(expert_count) +
                          " for no expert");
}

}  // namespace

std::vector<int64_t> CountRows(const int64_t* experts, int64_t count, int64_t expert_count) {
  std::vector<int64_t> rows(static_cast<size_t>(expert_count) + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (experts[i] < 0 || experts[i] > expert_count) ThrowOutOfRange(experts, count, expert_count);
    ++rows[static_cast<size_t>(experts[i])];
  }
  return rows;
}

Routing SortByExpert(const int64_t* experts, const float* weights, int64_t tokens, int64_t slots,
                     int64_t expert_count) {
  Routing routing;
  routing.tokens = tokens;
  routing.slots = slots;
  std::vector<int64_t> first = {0};
  for (const int64_t count : CountRows(experts, tokens * slots, expert_count)) first.push_back(first.back() + count);
  const int64_t rows = first[static_cast<size_t>(expert_count)];  // the sentinel's come after these

  routing.token_of.resize(static_cast<size_t>(rows));
  routing.slot_of.resize(static_cast<size_t>(rows));
  routing.weight_of.resize(static_cast<size_t>(rows));
  routing.place_of.assign(static_cast<size_t>(tokens * slots), -1);
  std::vector<int64_t> next(first);
  for (int64_t i = 0; i < tokens * slots; ++i) {
    if (experts[i] >= expert_count) continue;
    const int64_t row = next[static_cast<size_t>(experts[i])]++;
    routing.place_of[static_cast<size_t>(i)] = row;
    routing.token_of[static_cast<size_t>(row)] = i / slots;
    routing.slot_of[static_cast<size_t>(row)] = i;
    routing.weight_of[static_cast<size_t>(row)] = weights[i];
  }
  for (int64_t e = 0; e < expert_count; ++e) {
    const int64_t begin = first[static_cast<size_t>(e)], end = first[static_cast<size_t>(e) + 1];
    for (int64_t row = begin; row < end; row += Routing::kBlockRows) {
      routing.blocks.push_back({e, row, std::min(Routing::kBlockRows, end - row), end - begin});
    }
  }
  return routing;
}

std::vector<int64_t> BlocksOfNodes(const Routing& routing, int64_t expert_count, int nodes) {
  std::vector<int64_t> ends;
  for (int64_t node = 0; node < nodes; ++node) {
    // Expert e is on node e * nodes / expert_count, rounded down.
    const auto end = std::partition_point(routing.blocks.begin(), routing.blocks.end(), [&](const RowBlock& block) {
      return block.expert * nodes / expert_count <= node;
    });
    ends.push_back(end - routing.blocks.begin());
  }
  return ends;
}

}  // namespace kt
