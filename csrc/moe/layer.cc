#include "moe/layer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "formats/bf16.h"

namespace kt {
namespace {

struct FileDescriptor {
  explicit FileDescriptor(const std::string& path) : number(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (number < 0) throw std::runtime_error("cannot open " + path + ": " + std::strerror(errno));
  }
  ~FileDescriptor() { close(number); }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  const int number;
};

void ReadExactly(const FileDescriptor& file, const std::string& path, int64_t offset, uint8_t* out, int64_t bytes) {
  while (bytes > 0) {
    const ssize_t got = pread(file.number, out, static_cast<size_t>(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::runtime_error("cannot read " + path + ": " + std::strerror(errno));
    if (got == 0)
      throw std::runtime_error(path + " is truncated: it ends before byte " + std::to_string(offset + bytes));
    out += got;
    offset += got;
    bytes -= got;
  }
}

// One row of BF16 values from anything; throws where a value is not finite, before or after rounding.
void StoreBf16Row(const SourceMatrix& source, int64_t row, int64_t columns, uint8_t* out) {
  bool finite = true;
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t at = row * source.row_stride + c * source.column_stride;
    const Bf16 value = Bf16FromFloat(LoadAsFloat(source.base, source.type, at));
    finite &= (value & 0x7f80u) != 0x7f80u;
    std::memcpy(out + c * 2, &value, 2);
  }
  if (finite) return;
  for (int64_t c = 0; c < columns; ++c) {
    const float value = LoadAsFloat(source.base, source.type, row * source.row_stride + c * source.column_stride);
    if (std::isfinite(FloatFromBf16(Bf16FromFloat(value)))) continue;
    throw std::invalid_argument("row " + std::to_string(row) + ", column " + std::to_string(c) + " is " +
                                std::to_string(value));
  }
}

// Whether every BF16 value of a contiguous run is finite.
bool AllFinite(const uint8_t* values, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t value;
    std::memcpy(&value, values + 2 * i, 2);
    bad |= (value & 0x7f80u) == 0x7f80u;
  }
  return bad == 0;
}

}  // namespace

ExpertLayer::ExpertLayer(const LayerShape& shape) : shape_(shape) {
  constexpr int64_t kLargest = int64_t{1} << 24;
  for (const int64_t size : {shape.experts, shape.hidden, shape.intermediate}) {
    if (size < 1 || size > kLargest)
      throw std::invalid_argument(
          "the number of experts, the hidden and the intermediate size must be between 1 and 2^24");
  }
  if (!shape.gated && shape.activation == Activation::kSwigluOai)
    throw std::invalid_argument("activation swiglu_oai needs a gate");
  const int matrices = shape.gated ? 3 : 2;
  // Below 2^62 bytes, so that no product of sizes overflows.
  if (shape.experts > (int64_t{1} << 59) / (shape.hidden * shape.intermediate)) throw std::bad_alloc();
  block_ = Block(static_cast<size_t>(matrices * shape.experts * shape.hidden * shape.intermediate) * 2);
  written_ = std::make_unique<std::atomic<uint8_t>[]>(static_cast<size_t>(kMatrixCount * shape.experts));
}

size_t ExpertLayer::Index(Matrix matrix, int64_t expert) const {
  if (expert < 0 || expert >= shape_.experts) {
    throw std::out_of_range("expert " + std::to_string(expert) + " is out of range: the layer has " +
                            std::to_string(shape_.experts));
  }
  if (matrix == Matrix::kGate && !shape_.gated) throw std::invalid_argument("this layer's experts have no gate");
  return static_cast<size_t>(expert * kMatrixCount + static_cast<int>(matrix));
}

uint8_t* ExpertLayer::Rows(Matrix matrix, int64_t expert) const {
  const size_t index = Index(matrix, expert);
  // An expert's matrices stand one after the other, as they are used together.
  const int64_t matrices = shape_.gated ? 3 : 2, bytes = shape_.hidden * shape_.intermediate * 2;
  const int64_t place = static_cast<int64_t>(index % kMatrixCount) - (shape_.gated ? 0 : 1);
  return block_.data() + (expert * matrices + place) * bytes;
}

MatrixView ExpertLayer::view(Matrix matrix, int64_t expert) const {
  return {Rows(matrix, expert), Bf16Format::RowBytes(columns(matrix))};
}

void ExpertLayer::Write(Matrix matrix, int64_t expert, const SourceMatrix& source) {
  uint8_t* const out = Rows(matrix, expert);
  const int64_t width = columns(matrix), row_bytes = Bf16Format::RowBytes(width);
  for (int64_t r = 0; r < rows(matrix); ++r) {
    uint8_t* const row = out + r * row_bytes;
    if (source.type == DType::kBf16 && source.column_stride == 1) {
      std::memmove(row, static_cast<const uint8_t*>(source.base) + r * source.row_stride * 2,
                   static_cast<size_t>(row_bytes));
      if (AllFinite(row, width)) continue;
    }
    StoreBf16Row(source, r, width, row);
  }
  MarkWritten(matrix, expert);
}

void ExpertLayer::ReadFile(Matrix matrix, int64_t expert, const std::string& path, int64_t offset,
                           const SourceMatrix& layout) {
  const FileDescriptor file(path);
  const int64_t height = rows(matrix), width = columns(matrix), item = DTypeBytes(layout.type);
  uint8_t* const out = Rows(matrix, expert);
  if (layout.type == DType::kBf16 && layout.column_stride == 1 && layout.row_stride == width) {
    ReadExactly(file, path, offset, out, height * width * 2);
    if (!AllFinite(out, height * width))
      return Write(matrix, expert, {out, DType::kBf16, width, 1});  // names the place
    return MarkWritten(matrix, expert);
  }
  if (layout.column_stride <= layout.row_stride) {
    // Rows follow one another: read a few of them at a time.
    const int64_t span = (width - 1) * layout.column_stride + 1;
    const int64_t rows_at_once = std::max<int64_t>(1, (int64_t{4} << 20) / (layout.row_stride * item));
    std::vector<uint8_t> buffer;
    for (int64_t r = 0; r < height; r += rows_at_once) {
      const int64_t count = std::min(rows_at_once, height - r);
      buffer.resize(static_cast<size_t>(((count - 1) * layout.row_stride + span) * item));
      ReadExactly(file, path, offset + r * layout.row_stride * item, buffer.data(),
                  static_cast<int64_t>(buffer.size()));
      for (int64_t i = 0; i < count; ++i) {
        const SourceMatrix source{buffer.data(), layout.type, layout.row_stride, layout.column_stride};
        StoreBf16Row(source, i, width, out + (r + i) * width * 2);
      }
    }
    return MarkWritten(matrix, expert);
  }
  // Transposed on disk: one expert's slab, turned once.
  std::vector<uint8_t> slab(
      static_cast<size_t>(((width - 1) * layout.column_stride + (height - 1) * layout.row_stride + 1) * item));
  ReadExactly(file, path, offset, slab.data(), static_cast<int64_t>(slab.size()));
  Write(matrix, expert, {slab.data(), layout.type, layout.row_stride, layout.column_stride});
}

void ExpertLayer::Dequantize(Matrix matrix, int64_t expert, float* values) const {
  const uint8_t* const source = Rows(matrix, expert);
  for (int64_t i = 0; i < rows(matrix) * columns(matrix); ++i) values[i] = LoadAsFloat(source, DType::kBf16, i);
}

void ExpertLayer::SetBiases(std::vector<float> gate_up, std::vector<float> down) {
  const size_t gate_up_size = static_cast<size_t>(shape_.experts * shape_.intermediate * (shape_.gated ? 2 : 1));
  const size_t down_size = static_cast<size_t>(shape_.experts * shape_.hidden);
  if (!gate_up.empty() && gate_up.size() != gate_up_size)
    throw std::invalid_argument("gate_up_bias has the wrong number of values");
  if (!down.empty() && down.size() != down_size)
    throw std::invalid_argument("down_bias has the wrong number of values");
  gate_up_bias_ = std::move(gate_up);
  down_bias_ = std::move(down);
}

const float* ExpertLayer::gate_bias(int64_t expert) const {
  if (gate_up_bias_.empty() || !shape_.gated) return nullptr;
  return gate_up_bias_.data() + expert * 2 * shape_.intermediate;
}

const float* ExpertLayer::up_bias(int64_t expert) const {
  if (gate_up_bias_.empty()) return nullptr;
  return gate_up_bias_.data() + (shape_.gated ? (expert * 2 + 1) : expert) * shape_.intermediate;
}

const float* ExpertLayer::down_bias(int64_t expert) const {
  return down_bias_.empty() ? nullptr : down_bias_.data() + expert * shape_.hidden;
}

}  // namespace kt
