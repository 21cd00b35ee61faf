#include "moe/layer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

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

void CopyRows(const uint8_t* from, int64_t stride, int64_t rows, int64_t bytes, uint8_t* to) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * bytes, from + r * stride, static_cast<size_t>(bytes));
}

// One row as FP32.
void LoadRow(const SourceMatrix& source, int64_t row, int64_t columns, float* out) {
  if (source.type == DType::kBf16 && source.column_stride == 1) {  // the usual checkpoint: for vectors
    const uint8_t* const from = static_cast<const uint8_t*>(source.base) + row * source.row_stride * 2;
    for (int64_t c = 0; c < columns; ++c) {
      Bf16 value;
      std::memcpy(&value, from + 2 * c, sizeof(value));
      out[c] = FloatFromBf16(value);
    }
    return;
  }
  for (int64_t c = 0; c < columns; ++c)
    out[c] = LoadAsFloat(source.base, source.type, row * source.row_stride + c * source.column_stride);
}

// The same; throws where a value is not finite, or would not be as BF16.
void LoadFiniteRow(const SourceMatrix& source, int64_t first_row, int64_t row, int64_t columns, float* out) {
  constexpr uint32_t kRoundsToInf = 0x7f7f8000U;  // of the magnitudes' bits, the least
  LoadRow(source, row, columns, out);
  uint32_t bad = 0;
  for (int64_t c = 0; c < columns; ++c)
    bad |= static_cast<uint32_t>((BitsFromFloat(out[c]) & 0x7fffffffU) >= kRoundsToInf);
  if (bad == 0) return;
  for (int64_t c = 0; c < columns; ++c) {
    if (std::isfinite(FloatFromBf16(Bf16FromFloat(out[c])))) continue;
    throw std::invalid_argument("row " + std::to_string(first_row + row) + ", column " + std::to_string(c) + " is " +
                                std::to_string(out[c]));
  }
}

// So much is read at a time, and looked at while the second-level cache still has it.
constexpr int64_t kPiece = int64_t{256} << 10;

// Whether every BF16 value of a contiguous run is finite. What is gathered is as wide as the values, for vectors.
bool AllFinite(const uint8_t* values, int64_t count) {
  uint16_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t value;
    std::memcpy(&value, values + 2 * i, 2);
    bad = static_cast<uint16_t>(bad | ((value & 0x7f80u) == 0x7f80u ? 1 : 0));
  }
  return bad == 0;
}

// Whether every FP8 code of a contiguous run is a number.
bool AllNumbers(const uint8_t* codes, int64_t count) {
  uint8_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad = static_cast<uint8_t>(bad | ((codes[i] & 0x7f) == 0x7f ? 1 : 0));
  return bad == 0;
}

Storage StorageOfLayer(const LayerShape& shape) {
  Storage storage = StorageOf(shape.format, shape.group, shape.zero_point);
  if (shape.scale_type == ScaleType::kNone || shape.scale_type == storage.scale_type) return storage;
  if (shape.format != Format::kInt4 || shape.scale_type == ScaleType::kE8M0)
    throw std::invalid_argument("only int4 has scales of another type than its own: float32, bfloat16 or float16");
  storage.scale_type = shape.scale_type;
  return storage;
}

}  // namespace

ExpertLayer::ExpertLayer(const LayerShape& shape, const Allocate& allocate)
    : shape_(shape), storage_(StorageOfLayer(shape)) {
  constexpr int64_t kLargest = int64_t{1} << 24;
  for (const int64_t size : {shape.experts, shape.hidden, shape.intermediate}) {
    if (size < 1 || size > kLargest)
      throw std::invalid_argument(
          "the number of experts, the hidden and the intermediate size must be between 1 and 2^24");
  }
  if (!shape.gated && shape.activation == Activation::kSwigluOai)
    throw std::invalid_argument("activation swiglu_oai needs a gate");
  // Below 2^62 bytes, so that no product of sizes overflows: a weight and its share of scales take less than 8 bytes.
  if (shape.experts > (int64_t{1} << 57) / (shape.hidden * shape.intermediate)) throw std::bad_alloc();
  const int64_t expert_bytes = (shape.gated ? 2 : 1) * MatrixBytes(Matrix::kUp) + MatrixBytes(Matrix::kDown);
  block_ = allocate(static_cast<size_t>(shape.experts * expert_bytes));
  if (block_.size() == 0) {
    mapped_.resize(static_cast<size_t>(kMatrixCount * shape.experts));
    mapped_scales_.resize(mapped_.size());
  }
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

int64_t ExpertLayer::MatrixBytes(Matrix matrix) const {
  return RoundUp(storage_.bytes(rows(matrix), columns(matrix)), 64);
}

uint8_t* ExpertLayer::Base(Matrix matrix, int64_t expert) const {
  Index(matrix, expert);  // checks
  // An expert's matrices stand one after the other, as they are used together.
  const int64_t first = MatrixBytes(Matrix::kUp), gates = shape_.gated ? 1 : 0;
  const int64_t expert_bytes = (gates + 1) * first + MatrixBytes(Matrix::kDown);
  const int64_t before = matrix == Matrix::kGate ? 0 : matrix == Matrix::kUp ? gates : gates + 1;
  return block_.data() + expert * expert_bytes + before * first;
}

uint8_t* ExpertLayer::WritableBase(Matrix matrix, int64_t expert) const {
  if (!mapped_.empty()) throw std::logic_error("these experts are mapped from files, and read only");
  if (!block_.writable()) throw std::logic_error("these experts are another process's, and read only");
  return Base(matrix, expert);
}

void ExpertLayer::Adopt(const QuantisationError& error) {
  {
    const std::lock_guard<std::mutex> lock(error_mutex_);
    error_ = error;
  }
  for (int64_t i = 0; i < kMatrixCount * shape_.experts; ++i) written_[static_cast<size_t>(i)].store(1);
}

MatrixView ExpertLayer::view(Matrix matrix, int64_t expert) const {
  if (!mapped_.empty()) return mapped_[Index(matrix, expert)];
  return storage_.view(Base(matrix, expert), rows(matrix), columns(matrix));
}

size_t ExpertLayer::bytes() const {
  if (mapped_.empty()) return block_.size();
  const auto of = [&](Matrix matrix) { return storage_.bytes(rows(matrix), columns(matrix)); };
  return static_cast<size_t>(shape_.experts * ((shape_.gated ? 2 : 1) * of(Matrix::kUp) + of(Matrix::kDown)));
}

QuantisationError ExpertLayer::error() const {
  const std::lock_guard<std::mutex> lock(error_mutex_);
  return error_;
}

void ExpertLayer::StoreRows(Matrix matrix, int64_t expert, int64_t row, int64_t count, const SourceMatrix& source) {
  if (shape_.scale_type != ScaleType::kNone && shape_.scale_type != ScaleType::kBf16)
    throw std::invalid_argument("this layer keeps a checkpoint's own scales, so it takes codes and not values");
  const int64_t width = columns(matrix), band = storage_.group_rows;
  uint8_t* const base = WritableBase(matrix, expert);
  const bool copies = storage_.format == Format::kBf16 && source.type == DType::kBf16 && source.column_stride == 1;
  std::vector<float> values(copies ? 0 : static_cast<size_t>(band * width));
  QuantisationError error;
  for (int64_t r = 0; r < count; r += band) {
    const int64_t some = std::min(band, count - r);
    if (copies) {
      const uint8_t* const from = static_cast<const uint8_t*>(source.base) + r * source.row_stride * 2;
      uint8_t* const to = base + (row + r) * storage_.row_bytes(width);
      std::memmove(to, from, static_cast<size_t>(width) * 2);
      if (AllFinite(to, width)) continue;
      values.resize(static_cast<size_t>(width));  // to name the place
    }
    for (int64_t i = 0; i < some; ++i) LoadFiniteRow(source, row, r + i, width, values.data() + i * width);
    const QuantisationError more = Quantise(storage_, values.data(), row + r, some, rows(matrix), width, base);
    error.squared_error += more.squared_error;
    error.squared_values += more.squared_values;
  }
  const std::lock_guard<std::mutex> lock(error_mutex_);
  error_.squared_error += error.squared_error;
  error_.squared_values += error.squared_values;
}

void ExpertLayer::Write(Matrix matrix, int64_t expert, const SourceMatrix& source) {
  StoreRows(matrix, expert, 0, rows(matrix), source);
  MarkWritten(matrix, expert);
}

void ExpertLayer::ReadFile(Matrix matrix, int64_t expert, const std::string& path, int64_t offset,
                           const SourceMatrix& layout) {
  const FileDescriptor file(path);
  const int64_t height = rows(matrix), width = columns(matrix), item = DTypeBytes(layout.type);
  if (storage_.format == Format::kBf16 && layout.type == DType::kBf16 && layout.column_stride == 1 &&
      layout.row_stride == width) {
    uint8_t* const out = WritableBase(matrix, expert);
    bool finite = true;
    for (int64_t at = 0; at < height * width * 2; at += kPiece) {
      const int64_t some = std::min(kPiece, height * width * 2 - at);
      ReadExactly(file, path, offset + at, out + at, some);
      finite = AllFinite(out + at, some / 2) && finite;
    }
    if (!finite) return Write(matrix, expert, {out, DType::kBf16, width, 1});  // names the place
    return MarkWritten(matrix, expert);
  }
  if (layout.column_stride <= layout.row_stride) {
    // Rows follow one another: read a few of them at a time, and all that share scales at once.
    const int64_t span = (width - 1) * layout.column_stride + 1, band = storage_.group_rows;
    const int64_t rows_at_once = std::max(band, (int64_t{4} << 20) / (layout.row_stride * item) / band * band);
    std::vector<uint8_t> buffer;
    for (int64_t r = 0; r < height; r += rows_at_once) {
      const int64_t count = std::min(rows_at_once, height - r);
      buffer.resize(static_cast<size_t>(((count - 1) * layout.row_stride + span) * item));
      ReadExactly(file, path, offset + r * layout.row_stride * item, buffer.data(),
                  static_cast<int64_t>(buffer.size()));
      StoreRows(matrix, expert, r, count, {buffer.data(), layout.type, layout.row_stride, layout.column_stride});
    }
    return MarkWritten(matrix, expert);
  }
  // Transposed on disk: one expert's slab, turned once.
  std::vector<uint8_t> slab(
      static_cast<size_t>(((width - 1) * layout.column_stride + (height - 1) * layout.row_stride + 1) * item));
  ReadExactly(file, path, offset, slab.data(), static_cast<int64_t>(slab.size()));
  Write(matrix, expert, {slab.data(), layout.type, layout.row_stride, layout.column_stride});
}

void ExpertLayer::WriteCodes(Matrix matrix, int64_t expert, const SourceCodes& source) {
  CheckKind(source);
  uint8_t* const to = WritableBase(matrix, expert);
  CopyRows(source.codes, source.row_stride, rows(matrix), storage_.row_bytes(columns(matrix)), to);
  CheckCodes(matrix, to);
  FinishCodes(matrix, expert, source);
}

void ExpertLayer::ReadCodes(Matrix matrix, int64_t expert, const std::string& path, int64_t offset,
                            const SourceCodes& layout) {
  CheckKind(layout);
  const FileDescriptor file(path);
  const int64_t height = rows(matrix), bytes = storage_.row_bytes(columns(matrix)), stride = layout.row_stride;
  uint8_t* const to = WritableBase(matrix, expert);
  if (stride == bytes) {
    bool numbers = true;
    for (int64_t at = 0; at < height * bytes; at += kPiece) {
      const int64_t some = std::min(kPiece, height * bytes - at);
      ReadExactly(file, path, offset + at, to + at, some);
      numbers = (shape_.format != Format::kFp8 || AllNumbers(to + at, some)) && numbers;
    }
    if (!numbers) CheckCodes(matrix, to);  // names the place
    return FinishCodes(matrix, expert, layout);
  }
  const int64_t rows_at_once = std::max<int64_t>(1, (int64_t{4} << 20) / stride);
  std::vector<uint8_t> buffer;
  for (int64_t r = 0; r < height; r += rows_at_once) {
    const int64_t count = std::min(rows_at_once, height - r);
    buffer.resize(static_cast<size_t>((count - 1) * stride + bytes));
    ReadExactly(file, path, offset + r * stride, buffer.data(), static_cast<int64_t>(buffer.size()));
    CopyRows(buffer.data(), stride, count, bytes, to + r * bytes);
  }
  CheckCodes(matrix, to);
  FinishCodes(matrix, expert, layout);
}

void ExpertLayer::CheckCodes(Matrix matrix, const uint8_t* codes) const {
  const int64_t height = rows(matrix), width = columns(matrix);
  if (shape_.format != Format::kFp8 || AllNumbers(codes, height * width)) return;
  int64_t bad = 0;
  while (AllNumbers(codes + bad, 1)) ++bad;
  throw std::invalid_argument("row " + std::to_string(bad / width) + ", column " + std::to_string(bad % width) +
                              " is no number");
}

void ExpertLayer::FinishCodes(Matrix matrix, int64_t expert, const SourceCodes& source) {
  const int64_t height = rows(matrix), width = columns(matrix);
  uint8_t* const base = WritableBase(matrix, expert);
  const MatrixView w = storage_.view(base, height, width);
  TakeScales(matrix, source, w, base + (w.scales - base), w.zeros == nullptr ? nullptr : base + (w.zeros - base));
  MarkWritten(matrix, expert);
}

void ExpertLayer::Dequantize(Matrix matrix, int64_t expert, float* values) const {
  const MatrixView stored = view(matrix, expert);
  const int64_t width = columns(matrix);
  for (int64_t r = 0; r < rows(matrix); ++r) DequantiseRow(shape_.format, stored, r, width, values + r * width);
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
