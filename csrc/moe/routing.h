// From (token, slot) -> expert to rows sorted by expert.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

// A run of routed rows of one expert, at most kBlockRows long: what one decoded piece of its weights is used for.
struct RowBlock {
  int64_t expert;
  int64_t first;  // in sorted rows
  int64_t rows;
  int64_t expert_rows;  // of this expert in the whole call
};

struct Routing {
  static constexpr int64_t kBlockRows = 256;

  int64_t tokens = 0;
  int64_t slots = 0;              // K
  std::vector<int64_t> token_of;  // [rows] which token a sorted row belongs to
  std::vector<int64_t> slot_of;   // [rows] which place of [T, K] it came from
  std::vector<int64_t> place_of;  // [T * K] which sorted row a slot went to, -1 for the sentinel
  std::vector<float> weight_of;   // [rows] routing weight of a sorted row
  std::vector<RowBlock> blocks;   // all rows, expert by expert

  int64_t rows() const { return static_cast<int64_t>(token_of.size()); }
};

// Sorts the T * K slots by expert, keeping the order of tokens within one expert. `experts` is [T, K], every value in
// [0, E]; E is the sentinel for "no expert" and gets no row. `weights` is [T, K].
Routing SortByExpert(const int64_t* experts, const float* weights, int64_t tokens, int64_t slots, int64_t expert_count);

// Which blocks belong to which of `nodes` NUMA nodes: node n's end before block of[n] and are those of the experts that
// lie there (ExpertLayer::PlaceOnNodes). Experts are shared out evenly and in order; what the load makes of it is
// evened out by workers that help other nodes.
std::vector<int64_t> BlocksOfNodes(const Routing& routing, int64_t expert_count, int nodes);

// How many of `count` slots each expert has, the sentinel's last. Throws std::out_of_range for an index outside [0, E].
std::vector<int64_t> CountRows(const int64_t* experts, int64_t count, int64_t expert_count);

}  // namespace kt
