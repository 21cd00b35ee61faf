// Layers whose matrices lie in a file: the same bits as with memory of their own, on every tier, at any even alignment
// and row stride, and up to the last byte of the file.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "moe/reference.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

using testing::LayerSizes;
using testing::Outputs;
using testing::Problem;

// The experts of a problem in a file, rows as they are stored: gate and up alternate, down has gaps between its rows,
// and the last row of the last matrix ends with a page.
class ExpertsFile {
 public:
  explicit ExpertsFile(const Problem& p) : problem_(p) {
    constexpr int64_t kPage = 4096, kGap = 6;
    const int64_t hidden = p.sizes.hidden, intermediate = p.sizes.intermediate;
    first_stride_ = 2 * 2 * hidden;
    down_stride_ = 2 * intermediate + kGap;
    down_at_ = intermediate * first_stride_;
    expert_bytes_ = down_at_ + hidden * down_stride_;
    const int64_t needed = p.sizes.experts * expert_bytes_ - kGap, size = CeilDiv(needed + 1, kPage) * kPage;
    start_ = (size - needed) / 2 * 2;  // all is even
    std::vector<uint8_t> bytes(static_cast<size_t>(size + kGap), 0xff);
    for (int64_t expert = 0; expert < p.sizes.experts; ++expert) {
      for (const Matrix matrix : {Matrix::kGate, Matrix::kUp, Matrix::kDown}) {
        const MatrixView view = p.layer->view(matrix, expert);
        for (int64_t row = 0; row < p.layer->rows(matrix); ++row) {
          std::memcpy(bytes.data() + Offset(matrix, expert) + row * Stride(matrix), view.rows + row * view.row_stride,
                      static_cast<size_t>(2 * p.layer->columns(matrix)));
        }
      }
    }
    char name[] = "/tmp/kt_sft_mapped_test_XXXXXX";
    const int descriptor = mkstemp(name);
    path_ = name;
    const bool whole = write(descriptor, bytes.data(), static_cast<size_t>(size)) == size;
    close(descriptor);
    if (!whole) throw std::runtime_error("cannot write the temporary file");
    mapping_ = std::make_shared<const FileMapping>(path_);
    // So that a read beyond the end is a fault. The system puts it elsewhere if something else is there already.
    after_ = mmap(const_cast<uint8_t*>(mapping_->data()) + size, kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  ~ExpertsFile() {
    munmap(after_, 4096);
    std::remove(path_.c_str());
  }
  ExpertsFile(const ExpertsFile&) = delete;
  ExpertsFile& operator=(const ExpertsFile&) = delete;

  int64_t Offset(Matrix matrix, int64_t expert) const {
    const int64_t in_expert = matrix == Matrix::kGate ? 0 : matrix == Matrix::kUp ? first_stride_ / 2 : down_at_;
    return start_ + expert * expert_bytes_ + in_expert;
  }
  int64_t Stride(Matrix matrix) const { return matrix == Matrix::kDown ? down_stride_ : first_stride_; }

  std::shared_ptr<ExpertLayer> Map() const {
    auto layer = std::make_shared<ExpertLayer>(problem_.layer->shape(), &ExpertLayer::Nothing);
    for (int64_t expert = 0; expert < problem_.sizes.experts; ++expert) {
      for (const Matrix matrix : {Matrix::kGate, Matrix::kUp, Matrix::kDown})
        layer->Map(matrix, expert, mapping_, Offset(matrix, expert), Stride(matrix));
    }
    return layer;
  }
  const std::string& path() const { return path_; }
  const std::shared_ptr<const FileMapping>& mapping() const { return mapping_; }

 private:
  const Problem& problem_;
  int64_t first_stride_, down_stride_, down_at_, expert_bytes_, start_;
  std::string path_;
  std::shared_ptr<const FileMapping> mapping_;
  void* after_;
};

TEST(MappedLayersComputeTheSameBits) {
  std::mt19937 random(17);
  constexpr LayerSizes kSizes[] = {
      {1, 1, 1, 1, 1}, {3, 2, 4, 5, 3}, {40, 2, 5, 64, 32}, {70, 3, 2, 37, 29}, {9, 2, 2, 300, 270}};
  for (const LayerSizes& sizes : kSizes) {
    const Problem p = testing::MakeProblem(sizes, {}, random);
    const ExpertsFile file(p);
    Problem mapped = p;
    mapped.layer = file.Map();
    mapped.layer->CheckFiles();
    mapped.layer->ReadAhead();
    for (const testing::TestedTier& tier : testing::TestedTiers()) {
      const Outputs own = Run(p, *tier.kernels, 2, true), out = Run(mapped, *tier.kernels, 2, true);
      CHECK_MESSAGE(out.y == own.y && out.dx == own.dx && out.dw == own.dw, tier.name);
    }
  }
}

TEST(MappedLayersSayWhatTheyAre) {
  std::mt19937 random(18);
  const Problem p = testing::MakeProblem({2, 1, 3, 10, 6}, {}, random);
  const ExpertsFile file(p);
  const std::shared_ptr<ExpertLayer> layer = file.Map();
  CHECK(layer->bytes() == size_t{3} * 3 * 10 * 6 * 2);
  CHECK(layer->error().squared_error == 0.0);
  for (const Matrix matrix : {Matrix::kGate, Matrix::kUp, Matrix::kDown}) {
    std::vector<float> own(60), mapped(60);
    p.layer->Dequantize(matrix, 2, own.data());
    layer->Dequantize(matrix, 2, mapped.data());
    CHECK(own == mapped && layer->written(matrix, 2));
  }
  const float value = 0;
  CHECK_THROWS(layer->Write(Matrix::kUp, 0, {&value, DType::kF32, 0, 0}), std::logic_error);
  CHECK_THROWS(layer->ReadFile(Matrix::kUp, 0, file.path(), 0, {nullptr, DType::kBf16, 10, 1}), std::logic_error);
  CHECK(truncate(file.path().c_str(), 100) == 0);
  CHECK_THROWS(layer->CheckFiles(), std::runtime_error);
}

TEST(RowsThatAreNoRowsOfTheFileAreRefused) {
  std::mt19937 random(19);
  const Problem p = testing::MakeProblem({2, 1, 3, 10, 6}, {}, random);
  const ExpertsFile file(p);
  const std::shared_ptr<const FileMapping>& mapping = file.mapping();
  ExpertLayer layer(p.layer->shape(), &ExpertLayer::Nothing);
  const int64_t last = mapping->size() - 6 * 20;
  layer.Map(Matrix::kUp, 0, mapping, last, 20);
  struct Rows {
    int64_t offset, stride;
  };
  constexpr int64_t kFar = int64_t{1} << 62;
  for (const Rows& bad : {Rows{last + 2, 20}, Rows{last, 22}, Rows{0, 18}, Rows{1, 20}, Rows{0, 21}, Rows{-2, 20},
                          Rows{0, kFar}, Rows{kFar, 20}, Rows{0, -20}}) {
    CHECK_THROWS(layer.Map(Matrix::kUp, 1, mapping, bad.offset, bad.stride), std::invalid_argument);
  }
  CHECK(!layer.written(Matrix::kUp, 1));
  CHECK_THROWS(p.layer->Map(Matrix::kUp, 0, mapping, 0, 20), std::logic_error);
  LayerShape quantised = p.layer->shape();
  quantised.format = Format::kInt8;
  ExpertLayer int8(quantised, &ExpertLayer::Nothing);
  CHECK_THROWS(int8.Map(Matrix::kUp, 0, mapping, 0, 20), std::invalid_argument);
}

}  // namespace
}  // namespace kt
