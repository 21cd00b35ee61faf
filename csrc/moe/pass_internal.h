// Shared by the units that implement Pass.
#pragma once

#include <vector>

#include "moe/pass.h"

namespace kt {

// Some tokens of a call. Long batches are cut so that scratch stays bounded.
struct Pass::Chunk {
  const LayerCall& call;
  const LayerShape& shape;
  const Routing& routing;
  int64_t first_token;
  Bf16* retained;  // of this chunk's rows, null if there is none

  // Values of one row of pre-activations.
  int64_t pre_columns() const { return shape.gated ? 2 * shape.intermediate : shape.intermediate; }

  // A token's row of `base`, a [T, H] tensor of the call.
  char* TokenRow(const void* base, int64_t token) const {
    return static_cast<char*>(const_cast<void*>(base)) + (first_token + token) * shape.hidden * DTypeBytes(call.type);
  }
};

// The B operand of routed rows, block after block. Most blocks are cut into groups of the tier's panel width: the panel
// of the group whose first row is r starts at Panel(block, r) and is as wide as its rows need, in whole vectors. Blocks
// of few rows hold plain rows instead. Where products are of integers, `depth` is the room of a token with its scales.
struct Pass::Panels {
  char* data = nullptr;
  int64_t depth = 0;       // padded
  int64_t row_stride = 0;  // of plain rows
  int64_t element_bytes = 0;
  int64_t token_group = 0;     // of integer products, else 0
  char* unpacked = nullptr;    // plain rows of all blocks that are yet to be packed, or null
  std::vector<int64_t> first;  // element at which each block starts
  int64_t elements = 0;        // in all

  int64_t bytes() const { return elements * element_bytes; }
  char* Panel(size_t block, int64_t row) const { return data + (first[block] + row * depth) * element_bytes; }
  char* Unpacked(int64_t row) const { return unpacked + row * row_stride * element_bytes; }
  char* Row(size_t block, int64_t row) const { return data + (first[block] + row * row_stride) * element_bytes; }
};

// Low-rank values of routed rows: as FP32 rows, and as the operand of the next product, panels or plain rows.
struct Pass::LowRank {
  int64_t stride = 0;  // of rows; 0: there is no adapter
  float* rows = nullptr;
  Panels panels;
};

// A gradient, FP32 [E, rank, columns] or its transpose, and how far experts lie apart.
struct Pass::OuterSum {
  float* values;
  int64_t expert_stride;
  bool transposed;
};

// Weight rows that meet the tokens of one block.
struct Pass::WeightRows {
  MatrixView view;
  int64_t row;
  int rows;
  int64_t columns;
  const float* bias;  // of these rows, null if there is none
};

// The columns of a matrix that a task multiplies by, all rows of it.
struct Pass::WeightColumns {
  MatrixView view;
  int64_t rows;
  int64_t column, columns;
};

// A piece of a matrix to be asked for while `steps` steps of products are done.
inline Ahead AheadOf(const MatrixView& view, int64_t row, int64_t rows, int64_t column, int64_t columns,
                     int64_t steps) {
  Ahead ahead;
  ahead.row = view.rows + row * view.row_stride + column * view.bits / 8;
  ahead.row_stride = view.row_stride;
  ahead.lines_per_row = CeilDiv(columns * view.bits / 8, 64);
  ahead.lines = rows * ahead.lines_per_row;
  ahead.rate = steps > ahead.lines ? CeilDiv(ahead.lines * Ahead::kSteps, steps) : Ahead::kSteps;
  return ahead;
}

struct Pass::Group {
  int64_t first;  // row of the block
  int rows;
  int width;
};

template <class Function>
void Pass::ForEachGroup(const Chunk& chunk, const Function& function) {
  struct Task {
    size_t block;
    int64_t group;
  };
  std::vector<Task> tasks;
  for (size_t b = 0; b < chunk.routing.blocks.size(); ++b) {
    for (int64_t g = 0; g * width() < chunk.routing.blocks[b].rows; ++g) tasks.push_back({b, g});
  }
  if (width() > kWidestPanel) throw std::logic_error("kt_sft engine: a tier's panels are wider than 64 columns");
  pool_.Run(static_cast<int64_t>(tasks.size()), [&](int64_t t, int) {
    const Task& task = tasks[static_cast<size_t>(t)];
    function(task.block, GroupOf(chunk.routing.blocks[task.block], task.group));
  });
}

template <class Function>
void Pass::RunOnBlocks(const Chunk& chunk, int64_t tasks_per_block, const Function& function) {
  std::vector<int64_t> ends = BlocksOfNodes(chunk.routing, chunk.shape.experts, pool_.nodes());
  for (int64_t& end : ends) end *= tasks_per_block;
  pool_.Run(ends, function);
}

}  // namespace kt
