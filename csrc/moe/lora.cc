// Adapters join the products of both passes: what A gives is some more depth of the same sums. Their gradients are
// products over an expert's tokens, block after block in a fixed order.
#include "moe/lora.h"

#include <algorithm>

#include "moe/pass_internal.h"

namespace kt {
namespace {

constexpr int64_t kOuterColumns = 256, kOuterRows = 32;  // of a task, and of the rank at a time

}  // namespace

MatrixView Pass::LoraView(const Bf16* matrices, int64_t expert, int64_t rows, int64_t columns) {
  MatrixView view;
  view.rows = reinterpret_cast<const uint8_t*>(matrices + expert * rows * columns);
  view.row_stride = columns * 2;
  view.group = columns;
  return view;
}

Pass::LowRank Pass::LayOutLowRank(const Chunk& chunk, bool plain) const {
  LowRank z;
  const int64_t rank = chunk.call.lora.rank;
  if (rank == 0) return z;
  z.stride = ResultStride(rank);
  z.panels = LayOutPanels(chunk, rank);
  if (plain) z.panels.elements = chunk.routing.rows() * z.panels.row_stride;
  return z;
}

size_t Pass::MeasureLowRank(const Chunk& chunk, const LowRank& z) {
  return Arena::Measure(static_cast<size_t>(chunk.routing.rows() * z.stride) * 4) +
         Arena::Measure(static_cast<size_t>(z.panels.bytes()));
}

void Pass::TakeLowRank(const Chunk& chunk, LowRank* z) {
  z->rows = arena_.Take<float>(chunk.routing.rows() * z->stride);
  z->panels.data = arena_.Take<char>(z->panels.bytes());
}

void Pass::Scale(float factor, int64_t count, float* row) const {
  const float* const terms = row;
  kernels_.combine(&terms, &factor, 1, count, row, DType::kF32);
}

void Pass::MultiplyLowRank(const Chunk& chunk, const Panels& given, int of, char* dropped, const Bf16* a,
                           int64_t inputs, const LowRank& z) {
  Panels x = given;
  if (dropped != nullptr && chunk.call.lora.dropout.below > 0) {
    x.data = dropped;
    DropFromPanels(chunk, of, inputs, given, x);
  }
  const int64_t rank = chunk.call.lora.rank;
  RunOnBlocks(chunk, 1, [&](int64_t task, int worker) {
    const size_t b = static_cast<size_t>(task);
    const RowBlock& block = chunk.routing.blocks[b];
    const MatrixView view = LoraView(a, block.expert, rank, inputs);
    float* const rows = z.rows + block.first * z.stride;
    if (Few(block)) {
      kernels_.dot_rows[static_cast<int>(Format::kBf16)](view, 0, static_cast<int>(rank), inputs, x.Row(b, 0),
                                                         x.row_stride, static_cast<int>(block.rows), block.expert_rows,
                                                         rows, z.stride);
    }
    for (int64_t r = 0; r < rank && !Few(block); r += task_rows()) {
      const WeightRows weights{view, r, static_cast<int>(Smaller(task_rows(), rank - r)), inputs, nullptr};
      MultiplyRows(&weights, 1, nullptr, Format::kBf16, x, chunk, b, Worker(worker));
      for (int64_t g = 0; g * width() < block.rows; ++g) {
        const Group group = GroupOf(block, g);
        kernels_.transpose_to_float(ProductTile(Worker(worker), 0, group.first), group.width, weights.rows, group.rows,
                                    rows + group.first * z.stride + r, z.stride);
      }
    }
    for (int64_t t = 0; t < block.rows; ++t) Scale(chunk.call.lora.scale, rank, rows + t * z.stride);
  });
  ForEachGroup(chunk, [&](size_t b, const Group& group) {
    const RowBlock& block = chunk.routing.blocks[b];
    const void* rows[kWidestPanel];
    for (int i = 0; i < group.rows; ++i) rows[i] = z.rows + (block.first + group.first + i) * z.stride;
    if (Few(block)) {
      for (int i = 0; i < group.rows; ++i)
        kernels_.pack_row(rows[i], DType::kF32, rank, z.panels.Row(b, group.first + i));
    } else {
      kernels_.pack_panel(rows, DType::kF32, group.rows, group.width, rank, z.panels.Panel(b, group.first));
    }
  });
}

void Pass::AddLowRankFew(const Chunk& chunk, const LowRank& z, const Bf16* matrices, int64_t outputs, size_t b,
                         int64_t row, int rows, float* c, int64_t c_stride, float* scratch) const {
  const RowBlock& block = chunk.routing.blocks[b];
  const MatrixView view = LoraView(matrices, block.expert, outputs, chunk.call.lora.rank);
  kernels_.dot_rows[static_cast<int>(Format::kBf16)](view, row, rows, chunk.call.lora.rank, z.panels.Row(b, 0),
                                                     z.panels.row_stride, static_cast<int>(block.rows),
                                                     block.expert_rows, scratch, rows);
  for (int64_t t = 0; t < block.rows; ++t) {
    for (int64_t r = 0; r < rows; ++r) c[t * c_stride + r] += scratch[t * rows + r];
  }
}

// What adapters read of activations of all routed rows once more, from pre-activations: as plain rows, and as panels.
void Pass::Reactivate(const Chunk& chunk, char* rows, int64_t stride, const Panels& act) {
  const LayerShape& shape = chunk.shape;
  const int64_t bytes = kernels_.element_bytes, columns = shape.intermediate, pre_columns = chunk.pre_columns();
  const ActivateRowFn activate = kernels_.activate_row[shape.gated][static_cast<int>(shape.activation)];
  ForEachGroup(chunk, [&](size_t b, const Group& group) {
    const RowBlock& block = chunk.routing.blocks[b];
    const void* packed[kWidestPanel];
    for (int i = 0; i < group.rows; ++i) {
      const int64_t row = block.first + group.first + i;
      const Bf16* const gate = chunk.retained + row * pre_columns;
      const Bf16* const up = gate + pre_columns - columns;
      char* const out = rows + row * stride * bytes;
      for (int64_t k = 0; k < columns; k += kOuterColumns) {
        const int64_t some = Smaller(kOuterColumns, columns - k);
        alignas(64) float values[2][kOuterColumns];
        for (int64_t j = 0; j < some; ++j) {
          values[0][j] = FloatFromBf16(gate[k + j]), values[1][j] = FloatFromBf16(up[k + j]);
        }
        activate(shape.gated ? values[0] : nullptr, values[1], some, out + k * bytes);
      }
      std::fill_n(out + columns * bytes, (Padded(columns) - columns) * bytes, 0);
      DropFromRow(chunk, DropoutRow::kActivations, columns, row, out);
      packed[i] = out;
      if (Few(block)) std::copy_n(out, Padded(columns) * bytes, act.Row(b, group.first + i));
    }
    if (Few(block)) return;
    const DType type = bytes == 2 ? DType::kBf16 : DType::kF32;
    kernels_.pack_panel(packed, type, group.rows, group.width, columns, act.Panel(b, group.first));
  });
}

void Pass::MultiplyByB(const Chunk& chunk, const Bf16* matrices, int64_t outputs, int64_t first_row, int64_t rows,
                       const char* grad, int64_t grad_stride, bool accumulate, const LowRank& v) {
  RunOnBlocks(chunk, 1, [&](int64_t task, int worker) {
    const RowBlock& block = chunk.routing.blocks[static_cast<size_t>(task)];
    MatrixView view = LoraView(matrices, block.expert, outputs, chunk.call.lora.rank);
    view.rows += first_row * view.row_stride;
    MultiplyColumns({view, rows, 0, chunk.call.lora.rank}, nullptr, Format::kBf16, block.rows,
                    grad + block.first * grad_stride * kernels_.element_bytes, grad_stride,
                    v.rows + block.first * v.stride, v.stride, accumulate, Worker(worker));
  });
}

char* Pass::LowRankRow(const LowRank& z, int64_t row) const {
  return z.panels.data + row * z.panels.row_stride * kernels_.element_bytes;
}

void Pass::PackLowRankRows(const Chunk& chunk, const LowRank& v) {
  const int64_t rank = chunk.call.lora.rank;
  RunOnBlocks(chunk, 1, [&](int64_t task, int) {
    const RowBlock& block = chunk.routing.blocks[static_cast<size_t>(task)];
    for (int64_t row = block.first; row < block.first + block.rows; ++row) {
      Scale(chunk.call.lora.scale, rank, v.rows + row * v.stride);
      kernels_.pack_row(v.rows + row * v.stride, DType::kF32, rank, LowRankRow(v, row));
    }
  });
}

void Pass::WeighLowRank(const Chunk& chunk, const LowRank& z) {
  RunOnBlocks(chunk, 1, [&](int64_t task, int) {
    const RowBlock& block = chunk.routing.blocks[static_cast<size_t>(task)];
    for (int64_t row = block.first; row < block.first + block.rows; ++row)
      Scale(chunk.routing.weight_of[static_cast<size_t>(row)], chunk.call.lora.rank, z.rows + row * z.stride);
  });
}

// Elements as they lie, to panels.
void Pass::PanelsOfRows(const char* rows, int64_t stride, int64_t count, int64_t columns, char* panels,
                        int64_t panel_elements) const {
  const int64_t bytes = kernels_.element_bytes;
  if (kernels_.pair == 2) {
    MatrixView view;
    view.rows = reinterpret_cast<const uint8_t*>(rows);
    view.row_stride = stride * bytes;
    view.group = columns;
    kernels_.decode_panels[static_cast<int>(Format::kBf16)](view, 0, static_cast<int>(count), 0,
                                                            static_cast<int>(columns), panels, panel_elements);
    return;
  }
  for (int64_t p = 0; p * width() < columns; ++p) {
    const int64_t some = Smaller(width(), columns - p * width());
    for (int64_t r = 0; r < count; ++r) {
      char* const to = panels + (p * panel_elements + r * width()) * bytes;
      std::copy_n(rows + (r * stride + p * width()) * bytes, some * bytes, to);
      std::fill_n(to + some * bytes, (width() - some) * bytes, 0);
    }
  }
}

size_t Pass::OuterWorkerBytes(int64_t rank) const {
  const int64_t columns = RoundUp(kOuterColumns, width());
  return static_cast<size_t>(rank * (columns + 16) * 4 + kOuterRows * ResultStride(Routing::kBlockRows) * 4 +
                             rank * RowStride(Routing::kBlockRows) * kernels_.element_bytes +
                             Routing::kBlockRows * columns * kernels_.element_bytes + 256);
}

void Pass::AddOuter(const Chunk& chunk, const LowRank& left, const char* right, int64_t right_stride, int64_t columns,
                    const OuterSum& to) {
  const std::vector<RowBlock>& blocks = chunk.routing.blocks;
  std::vector<size_t> starts;  // of each expert's blocks
  starts.reserve(blocks.size() + 1);
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (b == 0 || blocks[b].expert != blocks[b - 1].expert) starts.push_back(b);
  }
  const int64_t pieces = CeilDiv(columns, kOuterColumns), experts = static_cast<int64_t>(starts.size());
  starts.push_back(blocks.size());
  const int64_t rank = chunk.call.lora.rank, bytes = kernels_.element_bytes, a_stride = RowStride(Routing::kBlockRows);
  const int64_t c_stride = RoundUp(kOuterColumns, width()) + 16, turned_stride = ResultStride(Routing::kBlockRows);
  const int64_t panel_elements = Routing::kBlockRows * width();
  pool_.Run(experts * pieces, [&](int64_t task, int worker) {
    const size_t first = starts[static_cast<size_t>(task / pieces)],
                 end = starts[static_cast<size_t>(task / pieces) + 1];
    const int64_t column = task % pieces * kOuterColumns, some = Smaller(kOuterColumns, columns - column);
    float* const c = reinterpret_cast<float*>(Worker(worker));
    float* const turned = c + RoundUp(rank * c_stride, 16);
    char* const a = reinterpret_cast<char*>(turned + kOuterRows * turned_stride);
    char* const panels = a + RoundUp(rank * a_stride * bytes, 64);
    for (size_t b = first; b < end; ++b) {
      const RowBlock& block = blocks[b];
      for (int64_t r = 0; r < rank; r += kOuterRows) {
        const int64_t ranks = Smaller(kOuterRows, rank - r);
        kernels_.transpose_to_float(left.rows + block.first * left.stride + r, left.stride,
                                    static_cast<int>(block.rows), static_cast<int>(ranks), turned, turned_stride);
        for (int64_t i = 0; i < ranks; ++i)
          kernels_.pack_row(turned + i * turned_stride, DType::kF32, block.rows, a + (r + i) * a_stride * bytes);
      }
      PanelsOfRows(right + (block.first * right_stride + column) * bytes, right_stride, block.rows, some, panels,
                   panel_elements);
      Ahead none;
      for (int64_t p = 0; p * width() < some; ++p) {
        kernels_.multiply(a, a_stride, rank, panels + p * panel_elements * bytes, static_cast<int>(width()), block.rows,
                          RowScales(), c + p * width(), c_stride, b > first, none);
      }
    }
    EndProducts();
    float* const sum = to.values + blocks[first].expert * to.expert_stride;
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t i = 0; i < some; ++i)
        sum[to.transposed ? (column + i) * rank + r : r * columns + column + i] += c[r * c_stride + i];
    }
  });
}

}  // namespace kt
