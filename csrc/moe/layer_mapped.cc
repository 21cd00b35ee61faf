// Matrices that lie in files: their rows stay there, scales are held in memory.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "moe/layer.h"

namespace kt {

void ExpertLayer::Map(Matrix matrix, int64_t expert, std::shared_ptr<const FileMapping> file, int64_t offset,
                      const SourceCodes& layout) {
  const size_t index = Index(matrix, expert);
  if (mapped_.empty()) throw std::logic_error("these experts have memory of their own; they cannot be mapped");
  const bool scaled = storage_.scale_type != ScaleType::kNone;
  if (scaled) CheckKind(layout);
  const int64_t width = columns(matrix), height = rows(matrix), bytes = storage_.row_bytes(width);
  const int64_t stride = layout.row_stride;
  // BF16 elements are read as such, and compilers may count on their alignment; codes are bytes.
  if (!scaled && (offset % 2 != 0 || stride % 2 != 0)) throw std::invalid_argument("rows must begin at even bytes");
  if (offset < 0 || stride < bytes || offset > file->size() - bytes ||
      (height - 1) > (file->size() - bytes - offset) / stride)
    throw std::invalid_argument("rows must lie in the file one after the other");
  MatrixView view = storage_.view(file->data() + offset, height, width);
  view.row_stride = stride;
  if (scaled) {
    const int64_t bands = CeilDiv(height, view.group_rows);
    const int64_t scale_bytes = bands * view.scale_stride, zero_bytes = bands * view.zero_stride;
    std::unique_ptr<uint8_t[]> memory(new uint8_t[static_cast<size_t>(scale_bytes + zero_bytes)]);  // not cleared
    uint8_t* const zeros = storage_.zero_point ? memory.get() + scale_bytes : nullptr;
    view.scales = memory.get();
    view.zeros = zeros;
    TakeScales(matrix, layout, view, memory.get(), zeros);
    mapped_scales_[index] = std::move(memory);
  }
  mapped_[index] = view;
  if (std::find(files_.begin(), files_.end(), file) == files_.end()) files_.push_back(std::move(file));
  MarkWritten(matrix, expert);
}

void ExpertLayer::ReadAhead() const {
  using Range = std::pair<const uint8_t*, const uint8_t*>;
  std::vector<Range> ranges;
  for (size_t i = 0; i < mapped_.size(); ++i) {
    const Matrix matrix = static_cast<Matrix>(i % kMatrixCount);
    const MatrixView& view = mapped_[i];
    if (view.rows == nullptr) continue;
    ranges.emplace_back(view.rows,
                        view.rows + (rows(matrix) - 1) * view.row_stride + storage_.row_bytes(columns(matrix)));
    const int64_t bands = CeilDiv(rows(matrix), view.group_rows);
    if (mapped_scales_[i] != nullptr) continue;
    if (view.scales != nullptr) ranges.emplace_back(view.scales, view.scales + bands * view.scale_stride);
    if (view.zeros != nullptr) ranges.emplace_back(view.zeros, view.zeros + bands * view.zero_stride);
  }
  std::sort(ranges.begin(), ranges.end());
  // Matrices that lie side by side, or row by row among each other, are read as one.
  for (size_t i = 0; i < ranges.size();) {
    Range all = ranges[i++];
    while (i < ranges.size() && ranges[i].first <= all.second) all.second = std::max(all.second, ranges[i++].second);
    ReadPages(all.first, all.second);
  }
}

}  // namespace kt
