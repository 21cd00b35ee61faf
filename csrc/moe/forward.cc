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

size_t Pass::ForwardWorkerBytes(const LayerShape& shape) const {
  const int64_t depth = std::max(shape.hidden, shape.intermediate);
  const int64_t row_bytes = RowStride(depth) * kernels_.element_bytes + width() * static_cast<int64_t>(sizeof(float));
  return static_cast<size_t>(2 * kTilesPerTask * kernels_.tile_rows * row_bytes);
}

void Pass::ForwardChunk(const Chunk& chunk) {
  Panels x = LayOutPanels(chunk.routing, chunk.shape.hidden);
  Panels act = LayOutPanels(chunk.routing, chunk.shape.intermediate);
  const size_t worker_bytes = ForwardWorkerBytes(chunk.shape);
  // The rows to combine take the place of the hidden panels, which nobody needs any more by then.
  const size_t shared_bytes = static_cast<size_t>(std::max(x.bytes(), chunk.routing.rows() * chunk.shape.hidden * 4));
  arena_.Reset(Arena::Measure(shared_bytes) + Arena::Measure(static_cast<size_t>(act.bytes())) +
               MeasureWorkers(worker_bytes) + 64);
  x.data = arena_.Take<char>(static_cast<int64_t>(shared_bytes));
  act.data = arena_.Take<char>(act.bytes());
  TakeWorkers(worker_bytes);

  PackHidden(chunk, x);
  GateUp(chunk, x, &act);
  float* const rows = reinterpret_cast<float*>(x.data);
  Down(chunk, act, rows);
  CombineRows(chunk, rows, chunk.shape.hidden, true, chunk.call.output);
}

void Pass::GateUp(const Chunk& chunk, const Panels& x, const Panels* act) {
  const ExpertLayer& layer = *chunk.call.layer;
  const LayerShape& shape = chunk.shape;
  const auto decode = kernels_.decode_rows[static_cast<int>(shape.format)];
  const ActivateFn activate = kernels_.activate[shape.gated][static_cast<int>(shape.activation)];
  const int64_t task_rows = kTilesPerTask * kernels_.tile_rows;
  const int64_t stride = RowStride(shape.hidden), pre_columns = chunk.pre_columns();
  const int64_t tasks_per_block = CeilDiv(shape.intermediate, task_rows);

  pool_.Run(static_cast<int64_t>(chunk.routing.blocks.size()) * tasks_per_block, [&](int64_t task, int worker) {
    const size_t b = static_cast<size_t>(task / tasks_per_block);
    const RowBlock& block = chunk.routing.blocks[b];
    const int64_t i = task % tasks_per_block * task_rows;
    const int rows = static_cast<int>(Smaller(task_rows, shape.intermediate - i));
    float* const up = reinterpret_cast<float*>(Worker(worker));
    if (Few(block)) return GateUpFew(chunk, x, act, b, i, rows, up);
    float* const gate = shape.gated ? up + task_rows * width() : nullptr;
    char* const a_up = reinterpret_cast<char*>(up + 2 * task_rows * width());
    char* const a_gate = a_up + task_rows * stride * kernels_.element_bytes;
    const float* const up_bias = layer.up_bias(block.expert);
    const float* const gate_bias = layer.gate_bias(block.expert);

    decode(layer.view(Matrix::kUp, block.expert), i, rows, shape.hidden, a_up, stride);
    if (shape.gated) decode(layer.view(Matrix::kGate, block.expert), i, rows, shape.hidden, a_gate, stride);
    for (int64_t g = 0; g * width() < block.rows; ++g) {
      const Group group = GroupOf(block, g);
      const char* const panel = x.Panel(b, group.first);
      Product(a_up, stride, rows, panel, group.width, shape.hidden, up_bias == nullptr ? nullptr : up_bias + i, up);
      if (shape.gated) {
        const float* const bias = gate_bias == nullptr ? nullptr : gate_bias + i;
        Product(a_gate, stride, rows, panel, group.width, shape.hidden, bias, gate);
      }
      if (act != nullptr) {
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

void Pass::GateUpFew(const Chunk& chunk, const Panels& x, const Panels* act, size_t b, int64_t i, int rows, float* c) {
  const ExpertLayer& layer = *chunk.call.layer;
  const LayerShape& shape = chunk.shape;
  const RowBlock& block = chunk.routing.blocks[b];
  const int tokens = static_cast<int>(block.rows);
  const int64_t pre_columns = chunk.pre_columns();
  const auto dot = kernels_.dot_rows[static_cast<int>(shape.format)];
  const auto product = [&](Matrix matrix, const float* bias, float* out) {
    dot(layer.view(matrix, block.expert), i, rows, shape.hidden, x.Row(b, 0), x.row_stride, tokens, out, rows);
    if (bias != nullptr) AddBias(bias + i, tokens, rows, out, rows);
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

void Pass::Down(const Chunk& chunk, const Panels& act, float* out_rows) {
  const ExpertLayer& layer = *chunk.call.layer;
  const LayerShape& shape = chunk.shape;
  const auto decode = kernels_.decode_rows[static_cast<int>(shape.format)];
  const int64_t task_rows = kTilesPerTask * kernels_.tile_rows;
  const int64_t stride = RowStride(shape.intermediate);
  const int64_t tasks_per_block = CeilDiv(shape.hidden, task_rows);

  pool_.Run(static_cast<int64_t>(chunk.routing.blocks.size()) * tasks_per_block, [&](int64_t task, int worker) {
    const size_t b = static_cast<size_t>(task / tasks_per_block);
    const RowBlock& block = chunk.routing.blocks[b];
    const int64_t h = task % tasks_per_block * task_rows;
    const int rows = static_cast<int>(Smaller(task_rows, shape.hidden - h));
    float* const c = reinterpret_cast<float*>(Worker(worker));
    char* const a = reinterpret_cast<char*>(c + task_rows * width());
    const float* const bias = layer.down_bias(block.expert);
    if (Few(block)) {
      const int tokens = static_cast<int>(block.rows);
      float* const out = out_rows + block.first * shape.hidden + h;
      kernels_.dot_rows[static_cast<int>(shape.format)](layer.view(Matrix::kDown, block.expert), h, rows,
                                                        shape.intermediate, act.Row(b, 0), act.row_stride, tokens, out,
                                                        shape.hidden);
      if (bias != nullptr) AddBias(bias + h, tokens, rows, out, shape.hidden);
      return;
    }

    decode(layer.view(Matrix::kDown, block.expert), h, rows, shape.intermediate, a, stride);
    for (int64_t g = 0; g * width() < block.rows; ++g) {
      const Group group = GroupOf(block, g);
      Product(a, stride, rows, act.Panel(b, group.first), group.width, shape.intermediate,
              bias == nullptr ? nullptr : bias + h, c);
      float* const out = out_rows + (block.first + group.first) * shape.hidden + h;
      kernels_.transpose_to_float(c, group.width, rows, group.rows, out, shape.hidden);
    }
  });
}

}  // namespace kt
