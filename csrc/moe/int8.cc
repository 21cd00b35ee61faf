// Forward with integer products (Compute::kInt8). Tokens are quantised as they are packed: the hidden rows, and the
// activations, which are kept as rows of elements in between. Blocks of few rows take no part: they wait for memory.
#include <algorithm>

#include "moe/pass_internal.h"

namespace kt {

// Tokens share a scale where the weights do, in groups that are not too long for one.
int64_t Pass::TokenGroup(const MatrixView& view) {
  const bool power = (view.group & (view.group - 1)) == 0;
  return power ? Smaller(view.group, kMostTokenGroup) : kMostTokenGroup;
}

int64_t Pass::TokenBytes(int64_t depth, int64_t token_group) {
  return RoundUp(depth, kQuad) + CeilDiv(depth, token_group) * kTokenHeader;
}

// A panel's pairs of neighbouring rows are values of 32 bits, and so are FP32 elements: turned, they are rows of
// elements.
void Pass::ActivateToRows(const Chunk& chunk, const Panels& act, size_t b, const Group& group, int64_t i, int rows,
                          const float* gate, const float* up, char* scratch) const {
  const LayerShape& shape = chunk.shape;
  float* const panel = ProductTile(scratch, 2, 0);  // where decoded weights were
  kernels_.activate[shape.gated][static_cast<int>(shape.activation)](gate, up, rows, group.width, panel);
  char* const to = act.Unpacked(chunk.routing.blocks[b].first + group.first) + i * act.element_bytes;
  kernels_.transpose_to_float(panel, group.width, static_cast<int>(CeilDiv(rows, kernels_.pair)), group.rows,
                              reinterpret_cast<float*>(to), act.row_stride * act.element_bytes / 4);
}

void Pass::PackActivations(const Chunk& chunk, const Panels& act) {
  const DType type = act.element_bytes == 2 ? DType::kBf16 : DType::kF32;
  ForEachGroup(chunk, [&](size_t b, const Group& group) {
    const RowBlock& block = chunk.routing.blocks[b];
    if (Few(block)) return;  // rows already
    const void* rows[kWidestPanel];
    for (int i = 0; i < group.rows; ++i) rows[i] = act.Unpacked(block.first + group.first + i);
    kernels_.pack_int8_panel(rows, type, group.rows, group.width, chunk.shape.intermediate, act.token_group,
                             act.Panel(b, group.first));
  });
}

}  // namespace kt
