// The frame of both passes: chunks of tokens, layout of panels, and the stages that forward and backward share.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "moe/pass_internal.h"

namespace kt {
namespace {

constexpr int64_t kTokensPerTask = 16;

}  // namespace

// Both passes cut a call alike, by the one that needs more, as retained rows lie chunk after chunk.
int64_t Pass::TokensAtOnce(const LayerCall& call) const {
  const LayerShape& shape = call.layer->shape();
  const int64_t bytes = kernels_.element_bytes, parts = shape.gated ? 2 : 1;
  const int64_t rank = call.lora.rank;
  const int64_t low_rank = rank == 0 ? 0
                                     : (RowStride(shape.intermediate) + Padded(shape.intermediate)) * bytes +
                                           3 * (ResultStride(rank) * 4 + RowStride(rank) * bytes);
  const int64_t dropped = call.lora.dropout.below > 0 ? (Padded(shape.hidden) + Padded(shape.intermediate)) * bytes : 0;
  // A row of dL/dx, of the gradients of pre-activations (forward's activations are shorter), of recomputed
  // pre-activations, and of sums for the router's gradient.
  const int64_t row = ResultStride(shape.hidden) * 4 + RowStride(parts * Padded(shape.intermediate)) * bytes +
                      parts * shape.intermediate * 2 + shape.intermediate / 64 + 64 + low_rank + dropped;
  // What panels that are not full waste in each block.
  const int64_t waste = kernels_.lanes * (Padded(shape.hidden) + Padded(shape.intermediate)) * bytes + 128;
  // There are at most as many blocks as rows, and as experts and full blocks: either bound will do.
  const int64_t few_rows = call.scratch_bytes / (row + waste);
  const int64_t many_rows = (call.scratch_bytes - shape.experts * waste) / (row + CeilDiv(waste, Routing::kBlockRows));
  const int64_t most = std::max<int64_t>(1, std::max(few_rows, many_rows) / std::max<int64_t>(1, call.slots));
  return CeilDiv(call.tokens, CeilDiv(call.tokens, most));  // chunks of equal length
}

template <class Function>
void Pass::ForEachChunk(const LayerCall& call, const Function& function) {
  if (call.tokens == 0) return;
  const int64_t tokens_at_once = TokensAtOnce(call), experts = call.layer->shape().experts;
  std::vector<int64_t> expert_rows;
  if (tokens_at_once < call.tokens) expert_rows = CountRows(call.experts, call.tokens * call.slots, experts);
  int64_t rows_before = 0;
  for (int64_t token = 0; token < call.tokens; token += tokens_at_once) {
    const int64_t tokens = std::min(tokens_at_once, call.tokens - token), offset = token * call.slots;
    Routing routing = SortByExpert(call.experts + offset, call.weights + offset, tokens, call.slots, experts);
    if (!expert_rows.empty()) {
      for (RowBlock& block : routing.blocks) block.expert_rows = expert_rows[static_cast<size_t>(block.expert)];
    }
    Chunk chunk{call, call.layer->shape(), routing, token, nullptr};
    if (call.retained != nullptr) chunk.retained = call.retained + rows_before * chunk.pre_columns();
    function(chunk);
    rows_before += routing.rows();
  }
}

void Pass::Check(const LayerCall& call) const {
  const Format format = call.layer->shape().format;
  if (call.compute == Compute::kInt8 && kernels_.decode_int8_rows[static_cast<int>(format)] == nullptr) {
    throw std::invalid_argument(std::string("kt_sft engine: there are no integer products with ") + FormatName(format));
  }
  if (call.lora.rank == 0) return;
  if (call.compute == Compute::kInt8) throw std::invalid_argument("kt_sft engine: integer products take no adapters");
  if (call.lora.rank < 0 || call.lora.rank % ExpertLora::kRankStep != 0)
    throw std::invalid_argument("kt_sft engine: the adapters' rank is not padded");
}

void Pass::Forward(const LayerCall& call) {
  Check(call);
  ForEachChunk(call, [this](const Chunk& chunk) { ForwardChunk(chunk); });
}

void Pass::Backward(const LayerCall& call) {
  Check(call);
  ForEachChunk(call, [this](const Chunk& chunk) { BackwardChunk(chunk); });
}

void Pass::TakeWorkers(size_t bytes) {
  worker_bytes_ = Arena::Measure(bytes);
  workers_ = arena_.Take<char>(static_cast<int64_t>(pool_.threads() * worker_bytes_));
}

Pass::Panels Pass::LayOutPanels(const Chunk& chunk, Matrix matrix) const {
  const bool int8 = chunk.call.compute == Compute::kInt8;
  return LayOutPanels(chunk, chunk.call.layer->columns(matrix),
                      int8 ? TokenGroup(chunk.call.layer->view(matrix, 0)) : 0);
}

Pass::Panels Pass::LayOutPanels(const Chunk& chunk, int64_t depth, int64_t token_group) const {
  const Routing& routing = chunk.routing;
  Panels panels;
  panels.token_group = token_group;
  panels.depth = token_group > 0 ? TokenBytes(depth, token_group) / kernels_.element_bytes : Padded(depth);
  panels.row_stride = RowStride(depth);
  panels.element_bytes = kernels_.element_bytes;
  for (const RowBlock& block : routing.blocks) {
    panels.first.push_back(panels.elements);
    const int64_t needed =
        Few(block) ? block.rows * panels.row_stride : RoundUp(block.rows, kernels_.lanes) * panels.depth;
    panels.elements += RoundUp(needed, 64 / panels.element_bytes);
  }
  return panels;
}

Pass::Group Pass::GroupOf(const RowBlock& block, int64_t index) const {
  const int64_t first = index * width(), rows = Smaller(width(), block.rows - first);
  return {first, static_cast<int>(rows), static_cast<int>(RoundUp(rows, kernels_.lanes))};
}

size_t Pass::ForwardWorkerBytes() const {
  const int64_t products = 2 * Routing::kBlockRows, scales = CeilDiv(depth_step(true), kLeastGroup);
  return static_cast<size_t>(task_rows() * ((products + scales) * static_cast<int64_t>(sizeof(float)) +
                                            RowStride(depth_step()) * kernels_.element_bytes));
}

// How the products of a task's rows are cut. For many tokens, a piece is all rows and so much of the depth that it and
// its part of one panel stay in the first-level cache while panel after panel meets it. For few, it is one tile's rows
// and as much more of the depth: read in long runs, which memory likes. Rows that need no decoding are read in full.
struct Pass::Pieces {
  const WeightRows* matrices;
  int count;
  bool by_depth;
  int64_t rows, depth;               // of a piece
  int64_t row_pieces, depth_pieces;  // of a matrix

  int64_t size() const { return count * row_pieces * depth_pieces; }
  struct Piece {
    int matrix;
    int64_t row, depth;  // the first
    int64_t rows, depths;
  };
  Piece at(int64_t i) const {
    const int64_t m = by_depth ? i % count : i / (row_pieces * depth_pieces);
    const int64_t row = by_depth ? 0 : i / depth_pieces % row_pieces * rows;
    const int64_t d = (by_depth ? i / count : i % depth_pieces) * depth;
    return {static_cast<int>(m), row, d, Smaller(rows, matrices[0].rows - row),
            Smaller(depth, matrices[0].columns - d)};
  }
};

Pass::Pieces Pass::CutProducts(const WeightRows* matrices, int count, int64_t groups, bool in_place, bool int8) const {
  const bool by_depth = groups > kFewGroups;
  const int64_t rows = by_depth ? task_rows() : kernels_.tile_rows, columns = matrices[0].columns;
  const int64_t step = depth_step(int8), depth = by_depth ? step : in_place ? columns : step * kTilesPerTask;
  return {matrices, count, by_depth, rows, depth, CeilDiv(matrices[0].rows, rows), CeilDiv(columns, depth)};
}

void Pass::MultiplyRows(const WeightRows* matrices, int count, const WeightRows* next, Format format,
                        const Panels& panels, const Chunk& chunk, size_t b, char* scratch, bool add) const {
  const RowBlock& block = chunk.routing.blocks[b];
  const int64_t groups = CeilDiv(block.rows, width()), bytes = kernels_.element_bytes;
  for (int m = 0; m < count; ++m) {
    if (matrices[m].bias == nullptr) continue;
    for (int64_t g = 0; g < groups; ++g) {
      const Group group = GroupOf(block, g);
      float* const c = ProductTile(scratch, m, group.first);
      for (int r = 0; r < matrices[m].rows; ++r) std::fill_n(c + r * group.width, group.width, matrices[m].bias[r]);
    }
  }
  const int64_t token_group = panels.token_group;  // 0: products are not of integers
  const bool in_place = token_group == 0 && kernels_.in_place[static_cast<int>(format)] &&
                        matrices[0].view.row_stride % bytes == 0 && matrices[0].columns % kernels_.pair == 0;
  const Pieces pieces = CutProducts(matrices, count, groups, in_place, token_group > 0);
  const int64_t scale_stride = CeilDiv(pieces.depth, kLeastGroup), stride = RowStride(pieces.depth);
  float* const scales = ProductTile(scratch, 2, 0);
  char* const decoded = reinterpret_cast<char*>(scales + pieces.rows * scale_stride);
  uint8_t* const codes = reinterpret_cast<uint8_t*>(decoded);
  for (int64_t i = 0; i < pieces.size(); ++i) {
    const Pieces::Piece piece = pieces.at(i);
    const WeightRows& w = matrices[piece.matrix];
    const int64_t row = w.row + piece.row;
    const char* a = reinterpret_cast<const char*>(w.view.rows + row * w.view.row_stride + piece.depth * bytes);
    if (token_group > 0) {
      kernels_.decode_int8_rows[static_cast<int>(format)](w.view, row, static_cast<int>(piece.rows), piece.depth,
                                                          piece.depths, codes, stride);
    } else if (!in_place) {
      a = decoded;
      kernels_.decode_rows[static_cast<int>(format)](w.view, row, static_cast<int>(piece.rows), piece.depth,
                                                     piece.depths, decoded, stride);
    }
    RowScales of_rows;
    if ((kernels_.scale_products || token_group > 0) && w.view.scale_type != ScaleType::kNone) {
      const int64_t first = piece.depth / w.view.group, last = (piece.depth + piece.depths - 1) / w.view.group;
      for (int64_t r = 0; r < piece.rows; ++r) {
        LoadScales(w.view, row + r, first, last - first + 1, scales + r * scale_stride);
      }
      of_rows = {scales, scale_stride, w.view.group};
    }
    Ahead ahead;
    const bool last = i + 1 == pieces.size();
    if (!last || next != nullptr) {
      const Pieces::Piece then = pieces.at(last ? 0 : i + 1);
      const WeightRows& of = (last ? next : matrices)[then.matrix];
      ahead = AheadOf(of.view, of.row + then.row, Smaller(then.rows, of.rows), then.depth, then.depths,
                      groups * CeilDiv(piece.rows, kernels_.tile_rows) *
                          CeilDiv(piece.depths, token_group > 0 ? kQuad : kernels_.pair));
    }
    const bool accumulate = add || w.bias != nullptr || piece.depth > 0;
    for (int64_t g = 0; g < groups; ++g) {
      const Group group = GroupOf(block, g);
      float* const c = ProductTile(scratch, piece.matrix, group.first) + piece.row * group.width;
      const char* panel = panels.Panel(b, group.first);
      if (token_group > 0) {
        kernels_.multiply_int8(codes, stride, piece.rows, panel + TokenBytes(piece.depth, token_group) * group.width,
                               group.width, piece.depths, token_group, of_rows, c, group.width, accumulate, ahead);
        continue;
      }
      panel += piece.depth * group.width * bytes;
      kernels_.multiply(a, in_place ? w.view.row_stride / bytes : stride, piece.rows, panel, group.width, piece.depths,
                        of_rows, c, group.width, accumulate, ahead);
    }
  }
  EndProducts();
}

void Pass::PackHidden(const Chunk& chunk, const Panels& x) {
  const DType type = chunk.call.type;
  const int64_t hidden = chunk.shape.hidden;
  ForEachGroup(chunk, [&](size_t b, const Group& group) {
    const RowBlock& block = chunk.routing.blocks[b];
    const int64_t* const tokens = chunk.routing.token_of.data() + block.first + group.first;
    const void* rows[kWidestPanel];
    for (int i = 0; i < group.rows; ++i) rows[i] = chunk.TokenRow(chunk.call.hidden, tokens[i]);
    if (Few(block)) {
      for (int i = 0; i < group.rows; ++i) kernels_.pack_row(rows[i], type, hidden, x.Row(b, group.first + i));
    } else if (x.token_group > 0) {
      kernels_.pack_int8_panel(rows, type, group.rows, group.width, hidden, x.token_group, x.Panel(b, group.first));
    } else {
      kernels_.pack_panel(rows, type, group.rows, group.width, hidden, x.Panel(b, group.first));
    }
  });
}

void Pass::CombineRows(const Chunk& chunk, const float* rows, int64_t stride, bool weighted, void* out) {
  const Routing& routing = chunk.routing;
  const size_t slots = static_cast<size_t>(routing.slots);
  // Allocated here: a task must not throw.
  std::vector<const float*> all_terms(static_cast<size_t>(pool_.threads()) * slots);
  std::vector<float> all_weights(all_terms.size(), 1.0f);
  pool_.Run(CeilDiv(routing.tokens, kTokensPerTask), [&](int64_t task, int worker) {
    const float** const terms = all_terms.data() + static_cast<size_t>(worker) * slots;
    float* const weights = all_weights.data() + static_cast<size_t>(worker) * slots;
    const int64_t end = Smaller(routing.tokens, (task + 1) * kTokensPerTask);
    for (int64_t token = task * kTokensPerTask; token < end; ++token) {
      for (size_t j = 0; j < slots; ++j) {
        const int64_t row = routing.place_of[static_cast<size_t>(token) * slots + j];
        terms[j] = row < 0 ? nullptr : rows + row * stride;
        if (weighted && row >= 0) weights[j] = routing.weight_of[static_cast<size_t>(row)];
      }
      kernels_.combine(terms, weights, static_cast<int>(slots), chunk.shape.hidden, chunk.TokenRow(out, token),
                       chunk.call.type);
    }
  });
}

}  // namespace kt
