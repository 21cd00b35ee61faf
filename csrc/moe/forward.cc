// Forward: gather -> gate/up and activation -> down -> combine.
//
// Weights are the A operand and tokens the B operand, so a product has one row per weight row and one column per token:
// two neighbouring rows of activations are one depth step of the down product's panel, which is written as it stands.
#include <algorithm>

#include "moe/pass_internal.h"

namespace kt {
namespace {

void AddBias(const float* bias, int tokens, int rows, float* c, int64_t stride) {
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < rows; ++r) c[t * stride + r] += bias[r];
  }
}

}  // namespace

void Pass::ForwardChunk(const Chunk& chunk) {
  Panels x = LayOutPanels(chunk, Matrix::kUp);
  Panels act = LayOutPanels(chunk, Matrix::kDown);
  const int64_t unpacked_bytes = act.token_group > 0 ? chunk.routing.rows() * act.row_stride * act.element_bytes : 0;
  LowRank z = LayOutLowRank(chunk, false);
  const int64_t dropped_bytes = DroppedBytes(chunk, x, act);
  const size_t worker_bytes = ForwardWorkerBytes();
  // The rows to combine take the place of the hidden panels, which nobody needs any more by then.
  const size_t shared_bytes =
      static_cast<size_t>(std::max(x.bytes(), chunk.routing.rows() * ResultStride(chunk.shape.hidden) * 4));
  arena_.Reset(Arena::Measure(shared_bytes) + Arena::Measure(static_cast<size_t>(act.bytes())) +
               Arena::Measure(static_cast<size_t>(unpacked_bytes)) +
               Arena::Measure(static_cast<size_t>(dropped_bytes)) + MeasureLowRank(chunk, z) +
               MeasureWorkers(worker_bytes) + 64);
  x.data = arena_.Take<char>(static_cast<int64_t>(shared_bytes));
  act.data = arena_.Take<char>(act.bytes());
  if (act.token_group > 0) act.unpacked = arena_.Take<char>(unpacked_bytes);
  char* const dropped = arena_.Take<char>(dropped_bytes);
  TakeLowRank(chunk, &z);
  TakeWorkers(worker_bytes);

  const LayerShape& shape = chunk.shape;
  const ExpertLora& lora = chunk.call.lora;
  PackHidden(chunk, x);
  if (lora.rank > 0) MultiplyLowRank(chunk, x, DropoutRow::kHidden, dropped, lora.gate_up.a, shape.hidden, z);
  GateUp(chunk, x, z, &act);
  if (act.unpacked != nullptr) PackActivations(chunk, act);
  float* const rows = reinterpret_cast<float*>(x.data);
  if (lora.rank > 0) MultiplyLowRank(chunk, act, DropoutRow::kActivations, dropped, lora.down.a, shape.intermediate, z);
  Down(chunk, act, z, rows);
  CombineRows(chunk, rows, ResultStride(shape.hidden), true, chunk.call.output);
}

void Pass::GateUp(const Chunk& chunk, const Panels& x, const LowRank& z, const Panels* act) {
  const ExpertLayer& layer = *chunk.call.layer;
  const LayerShape& shape = chunk.shape;
  const ActivateFn activate = kernels_.activate[shape.gated][static_cast<int>(shape.activation)];
  const int64_t pre_columns = chunk.pre_columns(), tasks_per_block = CeilDiv(shape.intermediate, task_rows());
  const int64_t tasks = static_cast<int64_t>(chunk.routing.blocks.size()) * tasks_per_block;
  const auto rows_of = [&](int64_t task, WeightRows* up, WeightRows* gate) {
    const int64_t expert = chunk.routing.blocks[static_cast<size_t>(task / tasks_per_block)].expert;
    const int64_t i = task % tasks_per_block * task_rows();
    const int rows = static_cast<int>(Smaller(task_rows(), shape.intermediate - i));
    const auto at = [&](Matrix matrix, const float* bias) {
      return WeightRows{layer.view(matrix, expert), i, rows, shape.hidden, bias == nullptr ? nullptr : bias + i};
    };
    *up = at(Matrix::kUp, layer.up_bias(expert));
    if (shape.gated) *gate = at(Matrix::kGate, layer.gate_bias(expert));
  };

  RunOnBlocks(chunk, tasks_per_block, [&](int64_t task, int worker) {
    const size_t b = static_cast<size_t>(task / tasks_per_block);
    const RowBlock& block = chunk.routing.blocks[b];
    WeightRows weights[2], next[2];
    rows_of(task, &weights[0], &weights[1]);
    const int64_t i = weights[0].row;
    const int rows = weights[0].rows;
    char* const scratch = Worker(worker);
    if (Few(block)) return GateUpFew(chunk, x, z, act, b, i, rows, reinterpret_cast<float*>(scratch));
    const bool more = task + pool_.TaskStride() < tasks;  // most likely this worker's next
    if (more) rows_of(task + pool_.TaskStride(), &next[0], &next[1]);
    MultiplyRows(weights, shape.gated ? 2 : 1, more ? next : nullptr, shape.format, x, chunk, b, scratch);
    if (z.stride > 0) {
      const MatrixView view = LoraView(chunk.call.lora.gate_up.b, block.expert, pre_columns, chunk.call.lora.rank);
      const WeightRows up_b{view, pre_columns - shape.intermediate + i, rows, chunk.call.lora.rank, nullptr};
      const WeightRows both[2] = {up_b, {view, i, rows, chunk.call.lora.rank, nullptr}};
      MultiplyRows(both, shape.gated ? 2 : 1, nullptr, Format::kBf16, z.panels, chunk, b, scratch, true);
    }
    for (int64_t g = 0; g * width() < block.rows; ++g) {
      const Group group = GroupOf(block, g);
      const float* const up = ProductTile(scratch, 0, group.first);
      const float* const gate = shape.gated ? ProductTile(scratch, 1, group.first) : nullptr;
      if (act != nullptr && act->unpacked != nullptr) {
        ActivateToRows(chunk, *act, b, group, i, rows, gate, up, scratch);
      } else if (act != nullptr) {
        activate(gate, up, rows, group.width, act->Panel(b, group.first) + i * group.width * kernels_.element_bytes);
      }
      if (chunk.retained == nullptr) continue;
      Bf16* const pre = chunk.retained + (block.first + group.first) * pre_columns + i;
      if (shape.gated) kernels_.transpose_to_bf16(gate, group.width, rows, group.rows, pre, pre_columns);
      kernels_.transpose_to_bf16(up, group.width, rows, group.rows, pre + pre_columns - shape.intermediate,
                                 pre_columns);
    }
  });
}

void Pass::GateUpFew(const Chunk& chunk, const Panels& x, const LowRank& z, const Panels* act, size_t b, int64_t i,
                     int rows, float* c) {
  const ExpertLayer& layer = *chunk.call.layer;
  const LayerShape& shape = chunk.shape;
  const RowBlock& block = chunk.routing.blocks[b];
  const int tokens = static_cast<int>(block.rows);
  const int64_t pre_columns = chunk.pre_columns();
  const auto dot = kernels_.dot_rows[static_cast<int>(shape.format)];
  const auto product = [&](Matrix matrix, const float* bias, float* out) {
    dot(layer.view(matrix, block.expert), i, rows, shape.hidden, x.Row(b, 0), x.row_stride, tokens, block.expert_rows,
        out, rows);
    if (bias != nullptr) AddBias(bias + i, tokens, rows, out, rows);
    if (z.stride == 0) return;
    const int64_t first = matrix == Matrix::kUp ? pre_columns - shape.intermediate : 0;
    AddLowRankFew(chunk, z, chunk.call.lora.gate_up.b, pre_columns, b, first + i, rows, out, rows,
                  c + 2 * tokens * rows);
  };
  float* const up = c;
  float* const gate = shape.gated ? c + tokens * rows : nullptr;
  product(Matrix::kUp, layer.up_bias(block.expert), up);
  if (shape.gated) product(Matrix::kGate, layer.gate_bias(block.expert), gate);
  const ActivateRowFn activate = kernels_.activate_row[shape.gated][static_cast<int>(shape.activation)];
  for (int t = 0; t < tokens; ++t) {
    const float* const gate_row = shape.gated ? gate + t * rows : nullptr;
    if (act != nullptr) {
      activate(gate_row, up + t * rows, rows, act->Row(b, t) + i * act->element_bytes);
    }
    if (chunk.retained == nullptr) continue;
    Bf16* const pre = chunk.retained + (block.first + t) * pre_columns + i;
    const float* const up_row = up + t * rows;
    const float one = 1.0F;
    if (shape.gated) kernels_.combine(&gate_row, &one, 1, rows, pre, DType::kBf16);
    kernels_.combine(&up_row, &one, 1, rows, pre + pre_columns - shape.intermediate, DType::kBf16);
  }
}

void Pass::Down(const Chunk& chunk, const Panels& act, const LowRank& z, float* out_rows) {
  const ExpertLayer& layer = *chunk.call.layer;
  const LayerShape& shape = chunk.shape;
  const int64_t tasks_per_block = CeilDiv(shape.hidden, task_rows()), out_stride = ResultStride(shape.hidden);
  const int64_t tasks = static_cast<int64_t>(chunk.routing.blocks.size()) * tasks_per_block;
  const auto rows_of = [&](int64_t task) {
    const int64_t expert = chunk.routing.blocks[static_cast<size_t>(task / tasks_per_block)].expert;
    const int64_t h = task % tasks_per_block * task_rows();
    const float* const bias = layer.down_bias(expert);
    return WeightRows{layer.view(Matrix::kDown, expert), h, static_cast<int>(Smaller(task_rows(), shape.hidden - h)),
                      shape.intermediate, bias == nullptr ? nullptr : bias + h};
  };

  RunOnBlocks(chunk, tasks_per_block, [&](int64_t task, int worker) {
    const size_t b = static_cast<size_t>(task / tasks_per_block);
    const RowBlock& block = chunk.routing.blocks[b];
    const WeightRows weights = rows_of(task);
    float* const block_out = out_rows + block.first * out_stride + weights.row;
    if (Few(block)) {
      const int tokens = static_cast<int>(block.rows);
      kernels_.dot_rows[static_cast<int>(shape.format)](weights.view, weights.row, weights.rows, shape.intermediate,
                                                        act.Row(b, 0), act.row_stride, tokens, block.expert_rows,
                                                        block_out, out_stride);
      if (weights.bias != nullptr) AddBias(weights.bias, tokens, weights.rows, block_out, out_stride);
      if (z.stride > 0)
        AddLowRankFew(chunk, z, chunk.call.lora.down.b, shape.hidden, b, weights.row, weights.rows, block_out,
                      out_stride, reinterpret_cast<float*>(Worker(worker)));
      return;
    }
    const bool more = task + pool_.TaskStride() < tasks;  // most likely this worker's next
    const WeightRows next = more ? rows_of(task + pool_.TaskStride()) : WeightRows{};
    MultiplyRows(&weights, 1, more ? &next : nullptr, shape.format, act, chunk, b, Worker(worker));
    if (z.stride > 0) {
      const int64_t rank = chunk.call.lora.rank;
      const WeightRows of_b{LoraView(chunk.call.lora.down.b, block.expert, shape.hidden, rank), weights.row,
                            weights.rows, rank, nullptr};
      MultiplyRows(&of_b, 1, nullptr, Format::kBf16, z.panels, chunk, b, Worker(worker), true);
    }
    for (int64_t g = 0; g * width() < block.rows; ++g) {
      const Group group = GroupOf(block, g);
      kernels_.transpose_to_float(ProductTile(Worker(worker), 0, group.first), group.width, weights.rows, group.rows,
                                  block_out + group.first * out_stride, out_stride);
    }
  });
}

}  // namespace kt
