// The frame of both passes: chunks of tokens, layout of panels, and the stages that forward and backward share.
#include <algorithm>
#include <stdexcept>

#include "moe/pass_internal.h"

namespace kt {
namespace {

constexpr int64_t kTokensPerTask = 16;

}  // namespace

// Both passes cut a call alike, by the one that needs more, as retained rows lie chunk after chunk.
int64_t Pass::TokensAtOnce(const LayerCall& call) const {
  const LayerShape& shape = call.layer->shape();
  const int64_t bytes = kernels_.element_bytes, parts = shape.gated ? 2 : 1;
  // A row of dL/dx, of the gradients of pre-activations (forward's activations are shorter), of recomputed
  // pre-activations, and of sums for the router's gradient.
  const int64_t row = ResultStride(shape.hidden) * 4 + RowStride(parts * Padded(shape.intermediate)) * bytes +
                      parts * shape.intermediate * 2 + shape.intermediate / 64 + 64;
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

void Pass::Forward(const LayerCall& call) {
  ForEachChunk(call, [this](const Chunk& chunk) { ForwardChunk(chunk); });
}

void Pass::Backward(const LayerCall& call) {
  ForEachChunk(call, [this](const Chunk& chunk) { BackwardChunk(chunk); });
}

void Pass::TakeWorkers(size_t bytes) {
  worker_bytes_ = Arena::Measure(bytes);
  workers_ = arena_.Take<char>(static_cast<int64_t>(pool_.threads() * worker_bytes_));
}

Pass::Panels Pass::LayOutPanels(const Routing& routing, int64_t depth) const {
  Panels panels;
  panels.depth = Padded(depth);
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
  const int64_t products = 2 * Routing::kBlockRows, scales = CeilDiv(depth_step(), kLeastGroup);
  return static_cast<size_t>(task_rows() * ((products + scales) * static_cast<int64_t>(sizeof(float)) +
                                            RowStride(depth_step()) * kernels_.element_bytes));
}

void Pass::MultiplyRows(const WeightRows* matrices, int count, const WeightRows* next, Format format,
                        const Panels& panels, const Chunk& chunk, size_t b, char* scratch) const {
  const RowBlock& block = chunk.routing.blocks[b];
  const int64_t groups = CeilDiv(block.rows, width()), step = depth_step(), stride = RowStride(step);
  const int64_t bytes = kernels_.element_bytes, scale_stride = CeilDiv(step, kLeastGroup);
  float* const scales = ProductTile(scratch, 2, 0);
  char* const decoded = reinterpret_cast<char*>(scales + task_rows() * scale_stride);
  for (int m = 0; m < count; ++m) {
    if (matrices[m].bias == nullptr) continue;
    for (int64_t g = 0; g < groups; ++g) {
      const Group group = GroupOf(block, g);
      float* const c = ProductTile(scratch, m, group.first);
      for (int r = 0; r < matrices[m].rows; ++r) std::fill_n(c + r * group.width, group.width, matrices[m].bias[r]);
    }
  }
  const int64_t columns = matrices[0].columns;
  for (int64_t d = 0; d < columns; d += step) {
    const int64_t depth = Smaller(step, columns - d);
    for (int m = 0; m < count; ++m) {
      const WeightRows& w = matrices[m];
      kernels_.decode_rows[static_cast<int>(format)](w.view, w.row, w.rows, d, depth, decoded, stride);
      RowScales of_rows;
      if (kernels_.scale_products && w.view.scale_type != ScaleType::kNone) {
        const int64_t first = d / w.view.group, last = (d + depth - 1) / w.view.group;
        for (int r = 0; r < w.rows; ++r) {
          LoadScales(w.view, w.row + r, first, last - first + 1, scales + r * scale_stride);
        }
        of_rows = {scales, scale_stride, w.view.group};
      }
      const WeightRows* const then = m + 1 < count ? &matrices[m + 1] : d + step < columns ? matrices : next;
      const int64_t then_d = m + 1 < count ? d : d + step < columns ? d + step : 0;
      Ahead ahead;
      if (then != nullptr) {
        ahead = AheadOf(then->view, then->row, then->rows, then_d, Smaller(step, columns - then_d),
                        groups * CeilDiv(w.rows, kernels_.tile_rows) * CeilDiv(depth, kernels_.pair));
      }
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = GroupOf(block, g);
        float* const c = ProductTile(scratch, m, group.first);
        const char* const panel = panels.Panel(b, group.first) + d * group.width * bytes;
        kernels_.multiply(decoded, stride, w.rows, panel, group.width, depth, of_rows, c, group.width,
                          w.bias != nullptr || d > 0, ahead);
      }
    }
  }
  EndProducts();
}

void Pass::PackHidden(const Chunk& chunk, const Panels& x) {
  struct Task {
    size_t block;
    int64_t group;
  };
  std::vector<Task> tasks;
  for (size_t b = 0; b < chunk.routing.blocks.size(); ++b) {
    for (int64_t g = 0; g * width() < chunk.routing.blocks[b].rows; ++g) tasks.push_back({b, g});
  }
  constexpr int kWidest = 64;
  if (width() > kWidest) throw std::logic_error("kt_sft engine: a tier's panels are wider than 64 columns");
  pool_.Run(static_cast<int64_t>(tasks.size()), [&](int64_t t, int) {
    const size_t b = tasks[static_cast<size_t>(t)].block;
    const RowBlock& block = chunk.routing.blocks[b];
    const Group group = GroupOf(block, tasks[static_cast<size_t>(t)].group);
    const int64_t* const tokens = chunk.routing.token_of.data() + block.first + group.first;
    const void* rows[kWidest];
    for (int i = 0; i < group.rows; ++i) rows[i] = chunk.TokenRow(chunk.call.hidden, tokens[i]);
    if (Few(block)) {
      for (int i = 0; i < group.rows; ++i) {
        kernels_.pack_row(rows[i], chunk.call.type, chunk.shape.hidden, x.Row(b, group.first + i));
      }
      return;
    }
    kernels_.pack_panel(rows, chunk.call.type, group.rows, group.width, chunk.shape.hidden, x.Panel(b, group.first));
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
