// One layer's experts: geometry, weights, biases.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/file_mapping.h"
#include "cpu/memory.h"
#include "formats/format.h"
#include "formats/quantise.h"
#include "tiers/tier.h"

namespace kt {

enum class Matrix { kGate, kUp, kDown };
constexpr int kMatrixCount = 3;

struct LayerShape {
  int64_t experts = 0;       // E
  int64_t hidden = 0;        // H
  int64_t intermediate = 0;  // I
  Activation activation = Activation::kSilu;
  bool gated = true;
  Format format = Format::kBf16;
  int64_t group = -1;       // columns that share a scale; -1: the format's own; 0: whole rows
  bool zero_point = false;  // int4 only
  // Of int4, where a checkpoint's own scales are kept as they are; kNone: the format's own. Such a layer takes codes
  // only.
  ScaleType scale_type = ScaleType::kNone;
};

// Where a matrix to be stored comes from: element (r, c) is at `base` + (r * row_stride + c * column_stride) elements.
struct SourceMatrix {
  const void* base;
  DType type;
  int64_t row_stride;
  int64_t column_stride;
};

// A matrix that is in the layer's format already.
struct SourceCodes {
  const uint8_t* codes;   // of row r at codes + r * row_stride
  int64_t row_stride;     // bytes
  const uint8_t* scales;  // in the layer's scale type, as `Storage` has them: rows of scales, one after the other
  const uint8_t* zeros;   // likewise, a byte for every scale; null where the layer has no zero points
};

class ExpertLayer {
 public:
  // Gives the weights' memory for a number of bytes; none (Nothing) for weights that are mapped.
  using Allocate = std::function<Block(size_t)>;
  static Block Nothing(size_t) { return {}; }

  // Reserves memory for the weights; throws std::invalid_argument for sizes that make no sense.
  explicit ExpertLayer(const LayerShape& shape, const Allocate& allocate = [](size_t bytes) { return Block(bytes); });

  // For memory that another process filled, all of it: takes its word for what storing did.
  void Adopt(const QuantisationError& error);
  // Takes all memory now, in huge pages: for memory that other processes can map, before anything is stored.
  void TakeHugePages() { block_.TakeHugePages(); }
  // Of memory that other processes can map; else -1.
  int descriptor() const { return block_.descriptor(); }

  // Before anything is stored: expert e's memory is to lie on NUMA node nodes[e * nodes.size() / E], where the tasks
  // that read it are queued (BlocksOfNodes). Whole experts, because forward reads ranges of rows and backward ranges of
  // columns, and both find an expert's matrices near; and because parts of a matrix may be smaller than a huge page.
  void PlaceOnNodes(const std::vector<int>& nodes) { block_.PlaceOnNodes(nodes); }

  const LayerShape& shape() const { return shape_; }
  // Of memory, or of the files that are mapped.
  size_t bytes() const;
  int64_t rows(Matrix matrix) const { return matrix == Matrix::kDown ? shape_.hidden : shape_.intermediate; }
  int64_t columns(Matrix matrix) const { return matrix == Matrix::kDown ? shape_.intermediate : shape_.hidden; }

  MatrixView view(Matrix matrix, int64_t expert) const;

  // What storing the matrices so far did to them.
  QuantisationError error() const;

  // Stores one matrix, rounding to the format. Throws std::invalid_argument naming the place where the source is not
  // finite, and std::logic_error for memory of another process. Thread-safe for different matrices.
  void Write(Matrix matrix, int64_t expert, const SourceMatrix& source);

  // The same from a file, from byte `offset` on, without mapping it and with bounded memory. Throws std::runtime_error
  // when it cannot be read or ends early.
  void ReadFile(Matrix matrix, int64_t expert, const std::string& path, int64_t offset, const SourceMatrix& layout);

  // Takes one matrix for what lies in a file, as rows in this layer's format: from byte `offset` on,
  // `layout.row_stride` bytes from row to row. Values and codes are not looked at. Scales and zero points are copied,
  // and checked as `WriteCodes` does; formats without them take none. Throws std::invalid_argument where the rows are
  // not whole, or those of BF16 not at even bytes, and std::logic_error for a layer with memory. Not thread-safe.
  void Map(Matrix matrix, int64_t expert, std::shared_ptr<const FileMapping> file, int64_t offset,
           const SourceCodes& layout);
  // Throws std::runtime_error when a file that matrices lie in has changed.
  void CheckFiles() const {
    for (const auto& file : files_) file->CheckUnchanged();
  }
  // Reads all that lies in files, unless it is in memory.
  void ReadAhead() const;

  // Stores one matrix as it is. Throws std::invalid_argument naming the place where a code is no number, a scale is not
  // finite, negative (but for int4 and nf4) or too large for its products to be BF16, or a zero point is no code.
  // Thread-safe as `Write` is.
  void WriteCodes(Matrix matrix, int64_t expert, const SourceCodes& source);

  // The same with codes from a file, from byte `offset` on; `layout.codes` is not looked at.
  void ReadCodes(Matrix matrix, int64_t expert, const std::string& path, int64_t offset, const SourceCodes& layout);

  // One matrix as it is stored, each part without gaps: codes row by row, scales and zero points as in SourceCodes.
  // Those that the layer does not have are not looked at.
  void CopyStored(Matrix matrix, int64_t expert, uint8_t* codes, uint8_t* scales, uint8_t* zeros) const;
  // Takes one matrix for what lies in a file just as CopyStored gives it, from these bytes on. Nothing is read. Throws
  // std::invalid_argument where it does not lie in the file, or BF16 rows not at an even byte, and std::logic_error for
  // a layer with memory.
  void MapStored(Matrix matrix, int64_t expert, std::shared_ptr<const FileMapping> file, int64_t codes, int64_t scales,
                 int64_t zeros);

  bool written(Matrix matrix, int64_t expert) const {
    return written_[Index(matrix, expert)].load(std::memory_order_acquire) != 0;
  }

  // FP32, `values` is [rows, columns].
  void Dequantize(Matrix matrix, int64_t expert, float* values) const;

  // FP32 biases: gate_up [E, 2I] ([E, I] ungated), down [E, H]; empty for none.
  void SetBiases(std::vector<float> gate_up, std::vector<float> down);
  const float* gate_bias(int64_t expert) const;
  const float* up_bias(int64_t expert) const;
  const float* down_bias(int64_t expert) const;

 private:
  size_t Index(Matrix matrix, int64_t expert) const;
  // Where a matrix is stored.
  uint8_t* Base(Matrix matrix, int64_t expert) const;
  // The same, to be written to.
  uint8_t* WritableBase(Matrix matrix, int64_t expert) const;
  // Stores rows [row, row + count); `source` holds them alone.
  void StoreRows(Matrix matrix, int64_t expert, int64_t row, int64_t count, const SourceMatrix& source);
  // Throws std::invalid_argument where the layer has no scales, or zero points and the source none, or the other way.
  void CheckKind(const SourceCodes& source) const;
  // Stores the scales and zero points of a matrix where its view `w` has them, which `scales` and `zeros` are.
  void TakeScales(Matrix matrix, const SourceCodes& source, const MatrixView& w, uint8_t* scales, uint8_t* zeros) const;
  // Throws std::invalid_argument, naming the place, where a stored code is no number.
  void CheckCodes(Matrix matrix, const uint8_t* codes) const;
  // Stores the scales and zero points of a matrix whose codes are stored, and marks it as written.
  void FinishCodes(Matrix matrix, int64_t expert, const SourceCodes& source);
  // Bytes that a matrix takes, the last cache line in full.
  int64_t MatrixBytes(Matrix matrix) const;
  void MarkWritten(Matrix matrix, int64_t expert) {
    written_[Index(matrix, expert)].store(1, std::memory_order_release);
  }

  const LayerShape shape_;
  const Storage storage_;
  Block block_;
  std::vector<MatrixView> mapped_;                         // by Index; empty for a layer with memory
  std::vector<std::unique_ptr<uint8_t[]>> mapped_scales_;  // likewise: the scales and zero points of mapped rows
  std::vector<std::shared_ptr<const FileMapping>> files_;
  mutable std::mutex error_mutex_;
  QuantisationError error_;
  std::unique_ptr<std::atomic<uint8_t>[]> written_;
  std::vector<float> gate_up_bias_, down_bias_;
};

}  // namespace kt
