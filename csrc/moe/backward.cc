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
  const int64_t grad_stride = RowStride(shape.hidden), out_stride = RoundUp(shape.hidden, width()) + 16;
  const int64_t d_pre_bytes = rows * RowStride(parts * Padded(shape.intermediate)) * bytes;
  const int64_t inner_values = rows * CeilDiv(shape.intermediate, kPanelColumns);
  const int64_t panel_columns = RoundUp(kPanelColumns, width());
  const int64_t backward_worker = kPanelRows * panel_columns * bytes + Routing::kBlockRows * (panel_columns + 16) * 4;
  const size_t worker_bytes = std::max(ForwardWorkerBytes(shape), static_cast<size_t>(backward_worker));

  Panels x = LayOutPanels(chunk.routing, shape.hidden);
  const bool recompute = chunk.retained == nullptr;
  const int64_t retained_bytes = recompute ? rows * chunk.pre_columns() * 2 : 0;
  // Used one after the other: hidden panels (to recompute), rows of dL/dy, rows of dL/dx.
  const int64_t shared_bytes = std::max({recompute ? x.bytes() : 0, rows * grad_stride * bytes, rows * out_stride * 4});
  arena_.Reset(Arena::Measure(static_cast<size_t>(shared_bytes)) + Arena::Measure(static_cast<size_t>(d_pre_bytes)) +
               Arena::Measure(static_cast<size_t>(inner_values) * 4) +
               Arena::Measure(static_cast<size_t>(retained_bytes)) + MeasureWorkers(worker_bytes) + 64);
  char* const shared = arena_.Take<char>(shared_bytes);
  char* const d_pre = arena_.Take<char>(d_pre_bytes);
  float* const inner = arena_.Take<float>(inner_values);
  Bf16* const recomputed = arena_.Take<Bf16>(retained_bytes / 2);
  TakeWorkers(worker_bytes);

  if (recompute) {
    chunk.retained = recomputed;
    x.data = shared;
    PackHidden(chunk, x);
    GateUp(chunk, x, nullptr);
  }
  PackOutputGrad(chunk, shared, grad_stride);
  DownBackward(chunk, shared, grad_stride, d_pre, inner);
  if (chunk.call.weights_grad != nullptr) CombineWeightsGrad(chunk, inner);
  if (chunk.call.hidden_grad == nullptr) return;
  float* const out_rows = reinterpret_cast<float*>(shared);
  GateUpBackward(chunk, d_pre, out_rows, out_stride);
  CombineRows(chunk, out_rows, out_stride, false, chunk.call.hidden_grad);
}

void Pass::PackOutputGrad(const Chunk& chunk, char* grad, int64_t stride) {
  const int64_t rows = chunk.routing.rows();
  pool_.Run(CeilDiv(rows, kRowsPerTask), [&](int64_t task, int) {
    const int64_t end = Smaller(rows, (task + 1) * kRowsPerTask);
    for (int64_t r = task * kRowsPerTask; r < end; ++r) {
      const char* const source = chunk.TokenRow(chunk.call.output_grad, chunk.routing.token_of[static_cast<size_t>(r)]);
      kernels_.pack_row(source, chunk.call.type, chunk.shape.hidden, grad + r * stride * kernels_.element_bytes);
    }
  });
}

void Pass::DownBackward(const Chunk& chunk, const char* grad, int64_t grad_stride, char* d_pre, float* inner) {
  const LayerShape& shape = chunk.shape;
  const auto decode = kernels_.decode_panels[static_cast<int>(shape.format)];
  const ActivateBackwardFn activate_backward =
      kernels_.activate_backward[shape.gated][static_cast<int>(shape.activation)];
  const int64_t bytes = kernels_.element_bytes, padded = Padded(shape.intermediate), parts = shape.gated ? 2 : 1;
  const int64_t d_pre_stride = RowStride(parts * padded), pre_columns = chunk.pre_columns();
  const int64_t tasks_per_block = CeilDiv(shape.intermediate, kPanelColumns);
  const int64_t panel_elements = kPanelRows * width(), u_stride = RoundUp(kPanelColumns, width()) + 16;

  pool_.Run(static_cast<int64_t>(chunk.routing.blocks.size()) * tasks_per_block, [&](int64_t task, int worker) {
    const RowBlock& block = chunk.routing.blocks[static_cast<size_t>(task / tasks_per_block)];
    const MatrixView weights = chunk.call.layer->view(Matrix::kDown, block.expert);
    const int64_t i = task % tasks_per_block * kPanelColumns, columns = Smaller(kPanelColumns, shape.intermediate - i);
    float* const u = reinterpret_cast<float*>(Worker(worker));
    char* const panels = reinterpret_cast<char*>(u + Routing::kBlockRows * u_stride);

    for (int64_t h = 0; h < shape.hidden; h += kPanelRows) {
      const int64_t depth = Smaller(kPanelRows, shape.hidden - h);
      decode(weights, h, static_cast<int>(depth), i, static_cast<int>(columns), panels, panel_elements);
      const char* const a = grad + (block.first * grad_stride + h) * bytes;
      for (int64_t c = 0; c * width() < columns; ++c) {
        kernels_.multiply(a, grad_stride, block.rows, panels + c * panel_elements * bytes, static_cast<int>(width()),
                          depth, u + c * width(), u_stride, h > 0);
      }
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

void Pass::GateUpBackward(const Chunk& chunk, const char* d_pre, float* out_rows, int64_t out_stride) {
  const LayerShape& shape = chunk.shape;
  const auto decode = kernels_.decode_panels[static_cast<int>(shape.format)];
  const int64_t bytes = kernels_.element_bytes, padded = Padded(shape.intermediate), parts = shape.gated ? 2 : 1;
  const int64_t d_pre_stride = RowStride(parts * padded);
  const int64_t tasks_per_block = CeilDiv(shape.hidden, kPanelColumns);
  const int64_t panel_elements = kPanelRows * width();

  pool_.Run(static_cast<int64_t>(chunk.routing.blocks.size()) * tasks_per_block, [&](int64_t task, int worker) {
    const RowBlock& block = chunk.routing.blocks[static_cast<size_t>(task / tasks_per_block)];
    const int64_t h = task % tasks_per_block * kPanelColumns, columns = Smaller(kPanelColumns, shape.hidden - h);
    char* const panels = Worker(worker);
    for (int64_t part = 0; part < parts; ++part) {
      const MatrixView weights = chunk.call.layer->view(part + 1 == parts ? Matrix::kUp : Matrix::kGate, block.expert);
      for (int64_t i = 0; i < shape.intermediate; i += kPanelRows) {
        const int64_t depth = Smaller(kPanelRows, shape.intermediate - i);
        decode(weights, i, static_cast<int>(depth), h, static_cast<int>(columns), panels, panel_elements);
        const char* const a = d_pre + (block.first * d_pre_stride + part * padded + i) * bytes;
        for (int64_t c = 0; c * width() < columns; ++c) {
          float* const out = out_rows + block.first * out_stride + h + c * width();
          kernels_.multiply(a, d_pre_stride, block.rows, panels + c * panel_elements * bytes, static_cast<int>(width()),
                            depth, out, out_stride, part + i > 0);
        }
      }
    }
  });
}

void Pass::CombineWeightsGrad(const Chunk& chunk, const float* inner) {
  const Routing& routing = chunk.routing;
  const int64_t terms = CeilDiv(chunk.shape.intermediate, kPanelColumns);
  float* const out = chunk.call.weights_grad + chunk.first_token * routing.slots;
  std::fill_n(out, routing.tokens * routing.slots, 0.0f);
  pool_.Run(static_cast<int64_t>(routing.blocks.size()), [&](int64_t task, int) {
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
