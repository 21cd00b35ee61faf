// Backward: gather dL/dy -> down and activation backward -> gate/up backward -> combine.
//
// Tokens are the A operand and weights the B operand: rows of weights that neighbour each other along the contraction
// are interleaved into panels on the way, from the same bytes that forward reads. The routing weight's gradient is
// <dL/dy_t W_down, act_t>, so no output of forward is kept for it.
#include <algorithm>

#include "moe/pass_internal.h"

namespace kt {
namespace {

// A task multiplies panels of this many weight rows (depth) and columns at a time: they stay in L2, each single panel
// in L1.
constexpr int64_t kPanelRows = 256;
constexpr int64_t kPanelColumns = 256;
constexpr int64_t kRowsPerTask = 64;

}  // namespace

void Pass::BackwardChunk(const Chunk& given) {
  Chunk chunk = given;
  const LayerShape& shape = chunk.shape;
  const int64_t rows = chunk.routing.rows(), parts = shape.gated ? 2 : 1, bytes = kernels_.element_bytes;
  const int64_t grad_stride = RowStride(shape.hidden), out_stride = ResultStride(shape.hidden);
  const int64_t d_pre_bytes = rows * RowStride(parts * Padded(shape.intermediate)) * bytes;
  const int64_t inner_values = rows * CeilDiv(shape.intermediate, kPanelColumns);
  const int64_t panel_columns = RoundUp(kPanelColumns, width());
  const int64_t backward_worker = kPanelRows * panel_columns * bytes + Routing::kBlockRows * (panel_columns + 16) * 4;
  const ExpertLora& lora = chunk.call.lora;
  const int64_t apart = lora.dropout.below > 0 ? Routing::kBlockRows * (panel_columns + 16) * 4 : 0;
  const size_t worker_bytes = std::max({ForwardWorkerBytes(), static_cast<size_t>(backward_worker + apart),
                                        lora.rank > 0 ? OuterWorkerBytes(lora.rank) : 0});

  Panels x = LayOutPanels(chunk, Matrix::kUp), act = LayOutPanels(chunk, Matrix::kDown);
  LowRank z = LayOutLowRank(chunk, false), down_z = z, v = LayOutLowRank(chunk, true);
  // Adapters that are not trained have no gradients, which are all that needs activations and hidden states again.
  const bool trained = lora.rank > 0 && chunk.call.lora_grads.gate_up_a != nullptr;
  const bool recompute = chunk.retained == nullptr, hidden = recompute || trained;
  const int64_t retained_bytes = recompute ? rows * chunk.pre_columns() * 2 : 0;
  const int64_t act_stride = RowStride(shape.intermediate), act_bytes = trained ? act.bytes() : 0;
  const int64_t dropped_bytes = hidden ? DroppedBytes(chunk, x, x) : 0;
  const int64_t act_row_bytes = trained ? rows * act_stride * bytes : 0;
  // Used one after the other: hidden panels (to recompute), rows of dL/dy, of hidden, of dL/dx.
  const int64_t shared_bytes = std::max({hidden ? x.bytes() : 0, rows * grad_stride * bytes, rows * out_stride * 4});
  arena_.Reset(Arena::Measure(static_cast<size_t>(shared_bytes)) + Arena::Measure(static_cast<size_t>(d_pre_bytes)) +
               Arena::Measure(static_cast<size_t>(inner_values) * 4) +
               Arena::Measure(static_cast<size_t>(retained_bytes)) + Arena::Measure(static_cast<size_t>(act_bytes)) +
               Arena::Measure(static_cast<size_t>(act_row_bytes)) + Arena::Measure(static_cast<size_t>(dropped_bytes)) +
               2 * MeasureLowRank(chunk, z) + MeasureLowRank(chunk, v) + MeasureWorkers(worker_bytes) + 64);
  char* const shared = arena_.Take<char>(shared_bytes);
  char* const d_pre = arena_.Take<char>(d_pre_bytes);
  float* const inner = arena_.Take<float>(inner_values);
  Bf16* const recomputed = arena_.Take<Bf16>(retained_bytes / 2);
  act.data = arena_.Take<char>(act_bytes);
  char* const act_rows = arena_.Take<char>(act_row_bytes);
  char* const dropped = arena_.Take<char>(dropped_bytes);
  TakeLowRank(chunk, &z);
  TakeLowRank(chunk, &down_z);
  TakeLowRank(chunk, &v);
  TakeWorkers(worker_bytes);

  if (hidden) {
    x.data = shared;
    PackHidden(chunk, x);
    if (lora.rank > 0) MultiplyLowRank(chunk, x, DropoutRow::kHidden, dropped, lora.gate_up.a, shape.hidden, z);
  }
  if (recompute) {
    chunk.retained = recomputed;
    GateUp(chunk, x, z, nullptr);
  }
  PackRows(chunk, chunk.call.output_grad, shared, grad_stride);
  if (trained) {
    Reactivate(chunk, act_rows, act_stride, act);
    MultiplyLowRank(chunk, act, DropoutRow::kActivations, nullptr, lora.down.a, shape.intermediate, down_z);
  }
  if (lora.rank > 0) {
    MultiplyByB(chunk, lora.down.b, shape.hidden, 0, shape.hidden, shared, grad_stride, false, v);
    PackLowRankRows(chunk, v);
  }
  DownBackward(chunk, shared, grad_stride, v, d_pre, inner);
  if (chunk.call.weights_grad != nullptr) CombineWeightsGrad(chunk, inner);
  if (lora.rank > 0) {
    const LoraGradients& to = chunk.call.lora_grads;
    const int64_t padded = Padded(shape.intermediate), d_pre_stride = RowStride(parts * padded);
    if (trained) {
      WeighLowRank(chunk, down_z);
      AddOuter(chunk, down_z, shared, grad_stride, shape.hidden, {to.down_b, shape.hidden * lora.rank, true});
      WeighLowRank(chunk, v);
      AddOuter(chunk, v, act_rows, act_stride, shape.intermediate, {to.down_a, shape.intermediate * lora.rank, false});
    }
    for (int64_t part = 0; part < parts; ++part) {
      const char* const of_part = d_pre + part * padded * bytes;
      const int64_t first = part * shape.intermediate;
      MultiplyByB(chunk, lora.gate_up.b, chunk.pre_columns(), first, shape.intermediate, of_part, d_pre_stride,
                  part > 0, v);
      if (!trained) continue;
      AddOuter(chunk, z, of_part, d_pre_stride, shape.intermediate,
               {to.gate_up_b + first * lora.rank, chunk.pre_columns() * lora.rank, true});
    }
    PackLowRankRows(chunk, v);
    if (trained) {
      PackRows(chunk, chunk.call.hidden, shared, grad_stride);
      pool_.Run(CeilDiv(rows, kRowsPerTask), [&](int64_t task, int) {
        for (int64_t r = task * kRowsPerTask; r < Smaller(rows, (task + 1) * kRowsPerTask); ++r)
          DropFromRow(chunk, DropoutRow::kHidden, shape.hidden, r, shared + r * grad_stride * bytes);
      });
      AddOuter(chunk, v, shared, grad_stride, shape.hidden, {to.gate_up_a, shape.hidden * lora.rank, false});
    }
  }
  if (chunk.call.hidden_grad == nullptr) return;
  float* const out_rows = reinterpret_cast<float*>(shared);
  GateUpBackward(chunk, d_pre, v, out_rows, out_stride);
  CombineRows(chunk, out_rows, out_stride, false, chunk.call.hidden_grad);
}

void Pass::PackRows(const Chunk& chunk, const void* base, char* packed, int64_t stride) {
  const int64_t rows = chunk.routing.rows();
  pool_.Run(CeilDiv(rows, kRowsPerTask), [&](int64_t task, int) {
    const int64_t end = Smaller(rows, (task + 1) * kRowsPerTask);
    for (int64_t r = task * kRowsPerTask; r < end; ++r) {
      const char* const source = chunk.TokenRow(base, chunk.routing.token_of[static_cast<size_t>(r)]);
      kernels_.pack_row(source, chunk.call.type, chunk.shape.hidden, packed + r * stride * kernels_.element_bytes);
    }
  });
}

void Pass::MultiplyColumns(const WeightColumns& w, const WeightColumns* next, Format format, int64_t a_rows,
                           const char* a, int64_t a_stride, float* c, int64_t c_stride, bool accumulate,
                           char* panels) const {
  const int64_t bytes = kernels_.element_bytes, panel_elements = kPanelRows * width();
  for (int64_t n = 0; n < w.rows; n += kPanelRows) {
    const int64_t depth = Smaller(kPanelRows, w.rows - n);
    kernels_.decode_panels[static_cast<int>(format)](w.view, n, static_cast<int>(depth), w.column,
                                                     static_cast<int>(w.columns), panels, panel_elements);
    const bool last = n + kPanelRows >= w.rows;
    const WeightColumns* const then = last ? next : &w;
    Ahead ahead;
    if (then != nullptr) {
      const int64_t row = last ? 0 : n + kPanelRows;
      ahead =
          AheadOf(then->view, row, Smaller(kPanelRows, then->rows - row), then->column, then->columns,
                  CeilDiv(w.columns, width()) * CeilDiv(a_rows, kernels_.tile_rows) * CeilDiv(depth, kernels_.pair));
    }
    for (int64_t p = 0; p * width() < w.columns; ++p) {
      kernels_.multiply(a + n * bytes, a_stride, a_rows, panels + p * panel_elements * bytes, static_cast<int>(width()),
                        depth, RowScales(), c + p * width(), c_stride, accumulate || n > 0, ahead);
    }
  }
  EndProducts();
}

void Pass::DownBackward(const Chunk& chunk, const char* grad, int64_t grad_stride, const LowRank& v, char* d_pre,
                        float* inner) {
  const LayerShape& shape = chunk.shape;
  const ActivateBackwardFn activate_backward =
      kernels_.activate_backward[shape.gated][static_cast<int>(shape.activation)];
  const int64_t bytes = kernels_.element_bytes, padded = Padded(shape.intermediate), parts = shape.gated ? 2 : 1;
  const int64_t d_pre_stride = RowStride(parts * padded), pre_columns = chunk.pre_columns();
  const int64_t tasks_per_block = CeilDiv(shape.intermediate, kPanelColumns);
  const int64_t tasks = static_cast<int64_t>(chunk.routing.blocks.size()) * tasks_per_block;
  const int64_t u_stride = RoundUp(kPanelColumns, width()) + 16;
  const auto columns_of = [&](int64_t task) {
    const int64_t expert = chunk.routing.blocks[static_cast<size_t>(task / tasks_per_block)].expert;
    const int64_t i = task % tasks_per_block * kPanelColumns;
    return WeightColumns{chunk.call.layer->view(Matrix::kDown, expert), shape.hidden, i,
                         Smaller(kPanelColumns, shape.intermediate - i)};
  };

  RunOnBlocks(chunk, tasks_per_block, [&](int64_t task, int worker) {
    const size_t b = static_cast<size_t>(task / tasks_per_block);
    const RowBlock& block = chunk.routing.blocks[b];
    const WeightColumns weights = columns_of(task);
    const int64_t i = weights.column, columns = weights.columns;
    const bool more = task + pool_.TaskStride() < tasks;  // most likely this worker's next
    const WeightColumns next = more ? columns_of(task + pool_.TaskStride()) : WeightColumns{};
    float* const u = reinterpret_cast<float*>(Worker(worker));
    char* const panels = reinterpret_cast<char*>(u + Routing::kBlockRows * u_stride);
    float* const apart = reinterpret_cast<float*>(panels + kPanelRows * (u_stride - 16) * bytes);
    MultiplyColumns(weights, more ? &next : nullptr, shape.format, block.rows, grad + block.first * grad_stride * bytes,
                    grad_stride, u, u_stride, false, panels);
    if (v.stride > 0) {
      AddLowRankColumns(chunk, b, v, chunk.call.lora.down.a, shape.intermediate, DropoutRow::kActivations, i, columns,
                        u, u_stride, panels, apart);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t row = block.first + r;
      const Bf16* const pre = chunk.retained + row * pre_columns + i;
      char* const out = d_pre + row * d_pre_stride * bytes;
      char* const d_gate = shape.gated ? out + i * bytes : nullptr;
      char* const d_up = out + ((parts - 1) * padded + i) * bytes;
      const float weight = chunk.routing.weight_of[static_cast<size_t>(row)];
      inner[row * tasks_per_block + task % tasks_per_block] =
          activate_backward(shape.gated ? pre : nullptr, pre + pre_columns - shape.intermediate, u + r * u_stride,
                            weight, columns, d_gate, d_up);
      if (i + columns < shape.intermediate || padded == shape.intermediate) continue;
      // The pairs of an odd depth end in zeros.
      for (int64_t part = 0; part < parts; ++part)
        std::fill_n(out + (part * padded + shape.intermediate) * bytes, bytes, 0);
    }
  });
}

void Pass::GateUpBackward(const Chunk& chunk, const char* d_pre, const LowRank& v, float* out_rows,
                          int64_t out_stride) {
  const LayerShape& shape = chunk.shape;
  const int64_t bytes = kernels_.element_bytes, padded = Padded(shape.intermediate), parts = shape.gated ? 2 : 1;
  const int64_t d_pre_stride = RowStride(parts * padded);
  const int64_t tasks_per_block = CeilDiv(shape.hidden, kPanelColumns);
  const int64_t tasks = static_cast<int64_t>(chunk.routing.blocks.size()) * tasks_per_block;
  const auto columns_of = [&](int64_t task, int64_t part) {
    const int64_t expert = chunk.routing.blocks[static_cast<size_t>(task / tasks_per_block)].expert;
    const int64_t h = task % tasks_per_block * kPanelColumns;
    return WeightColumns{chunk.call.layer->view(part + 1 == parts ? Matrix::kUp : Matrix::kGate, expert),
                         shape.intermediate, h, Smaller(kPanelColumns, shape.hidden - h)};
  };

  RunOnBlocks(chunk, tasks_per_block, [&](int64_t task, int worker) {
    const size_t b = static_cast<size_t>(task / tasks_per_block);
    const RowBlock& block = chunk.routing.blocks[b];
    for (int64_t part = 0; part < parts; ++part) {
      const WeightColumns weights = columns_of(task, part);
      const int64_t next_task = part + 1 < parts ? task : task + pool_.TaskStride();  // most likely this worker's
      const bool more = next_task < tasks;
      const WeightColumns next = more ? columns_of(next_task, (part + 1) % parts) : WeightColumns{};
      MultiplyColumns(weights, more ? &next : nullptr, shape.format, block.rows,
                      d_pre + (block.first * d_pre_stride + part * padded) * bytes, d_pre_stride,
                      out_rows + block.first * out_stride + weights.column, out_stride, part > 0, Worker(worker));
    }
    if (v.stride == 0) return;
    const WeightColumns first = columns_of(task, 0);
    float* const apart =
        reinterpret_cast<float*>(Worker(worker) + kPanelRows * RoundUp(kPanelColumns, width()) * bytes);
    AddLowRankColumns(chunk, b, v, chunk.call.lora.gate_up.a, shape.hidden, DropoutRow::kHidden, first.column,
                      first.columns, out_rows + block.first * out_stride + first.column, out_stride, Worker(worker),
                      apart);
  });
}

void Pass::AddLowRankColumns(const Chunk& chunk, size_t b, const LowRank& v, const Bf16* a, int64_t inputs, int of,
                             int64_t column, int64_t columns, float* c, int64_t c_stride, char* panels,
                             float* apart) const {
  const RowBlock& block = chunk.routing.blocks[b];
  const int64_t rank = chunk.call.lora.rank, apart_stride = RoundUp(kPanelColumns, width()) + 16;
  const bool dropout = chunk.call.lora.dropout.below > 0;
  MultiplyColumns({LoraView(a, block.expert, rank, inputs), rank, column, columns}, nullptr, Format::kBf16, block.rows,
                  LowRankRow(v, block.first), v.panels.row_stride, dropout ? apart : c,
                  dropout ? apart_stride : c_stride, !dropout, panels);
  for (int64_t r = 0; r < block.rows && dropout; ++r)
    AddKept(chunk, of, block.first + r, column, columns, apart + r * apart_stride, c + r * c_stride);
}

void Pass::CombineWeightsGrad(const Chunk& chunk, const float* inner) {
  const Routing& routing = chunk.routing;
  const int64_t terms = CeilDiv(chunk.shape.intermediate, kPanelColumns);
  float* const out = chunk.call.weights_grad + chunk.first_token * routing.slots;
  std::fill_n(out, routing.tokens * routing.slots, 0.0f);
  RunOnBlocks(chunk, 1, [&](int64_t task, int) {
    const RowBlock& block = routing.blocks[static_cast<size_t>(task)];
    const float* const bias = chunk.call.layer->down_bias(block.expert);
    for (int64_t row = block.first; row < block.first + block.rows; ++row) {
      float sum = 0.0f;
      for (int64_t j = 0; j < terms; ++j) sum += inner[row * terms + j];
      const int64_t token = routing.token_of[static_cast<size_t>(row)];
      if (bias != nullptr) {
        sum += kernels_.dot(chunk.TokenRow(chunk.call.output_grad, token), chunk.call.type, bias, chunk.shape.hidden);
      }
      for (int64_t j = 0; j < routing.slots; ++j) {
        if (routing.place_of[static_cast<size_t>(token * routing.slots + j)] == row)
          out[token * routing.slots + j] = sum;
      }
    }
  });
}

}  // namespace kt
