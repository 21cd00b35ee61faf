// Matrices on their way to files of our own, and mapped from them: codes, scales and zero points as a layer has them.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "moe/layer.h"

namespace kt {

void ExpertLayer::CopyStored(Matrix matrix, int64_t expert, uint8_t* codes, uint8_t* scales, uint8_t* zeros) const {
  const MatrixView w = view(matrix, expert);
  if (!written(matrix, expert)) throw std::logic_error("nothing was stored there yet");
  const int64_t bytes = storage_.row_bytes(columns(matrix)), height = rows(matrix);
  const int64_t bands = CeilDiv(height, w.group_rows);
  for (int64_t row = 0; row < height; ++row)
    std::memcpy(codes + row * bytes, w.rows + row * w.row_stride, static_cast<size_t>(bytes));
  if (w.scales != nullptr) std::memcpy(scales, w.scales, static_cast<size_t>(bands * w.scale_stride));
  if (w.zeros != nullptr) std::memcpy(zeros, w.zeros, static_cast<size_t>(bands * w.zero_stride));
}

void ExpertLayer::MapStored(Matrix matrix, int64_t expert, std::shared_ptr<const FileMapping> file, int64_t codes,
                            int64_t scales, int64_t zeros) {
  const size_t index = Index(matrix, expert);
  if (mapped_.empty()) throw std::logic_error("these experts have memory of their own; they cannot be mapped");
  const bool scaled = storage_.scale_type != ScaleType::kNone;
  // BF16 elements are read as such, and compilers may count on their alignment; codes and scales are read as bytes.
  if (!scaled && codes % 2 != 0) throw std::invalid_argument("rows must begin at an even byte");
  const int64_t height = rows(matrix);
  const auto place = [&](int64_t offset, int64_t bytes) {
    if (offset < 0 || bytes > file->size() || offset > file->size() - bytes)
      throw std::invalid_argument("a part of the matrix does not lie in the file");
    return file->data() + offset;
  };
  const int64_t row_bytes = storage_.row_bytes(columns(matrix));
  MatrixView view = storage_.view(place(codes, height * row_bytes), height, columns(matrix));
  const int64_t bands = CeilDiv(height, view.group_rows);
  if (scaled) view.scales = place(scales, bands * view.scale_stride);
  if (storage_.zero_point) view.zeros = place(zeros, bands * view.zero_stride);
  mapped_[index] = view;
  if (std::find(files_.begin(), files_.end(), file) == files_.end()) files_.push_back(std::move(file));
  MarkWritten(matrix, expert);
}

}  // namespace kt
