// Layers whose matrices lie in a file: the same bits as with memory of their own, on every tier, at any alignment
// (BF16: any even one) and row stride, and up to the last byte of the file.
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
    const bool plain = p.options.stored.format == Format::kBf16;
    const int64_t kPage = 4096, kGap = plain ? 6 : 5;
    const int64_t hidden = p.sizes.hidden, intermediate = p.sizes.intermediate;
    first_stride_ = 2 * RowBytes(Matrix::kUp);
    down_stride_ = RowBytes(Matrix::kDown) + kGap;
    down_at_ = intermediate * first_stride_;
    expert_bytes_ = down_at_ + hidden * down_stride_;
    const int64_t needed = p.sizes.experts * expert_bytes_ - kGap, size = CeilDiv(needed + 1, kPage) * kPage;
    start_ = size - needed;  // of BF16 all is even
    std::vector<uint8_t> bytes(static_cast<size_t>(size + kGap), 0xff);
    for (int64_t expert = 0; expert < p.sizes.experts; ++expert) {
      for (const Matrix matrix : {Matrix::kGate, Matrix::kUp, Matrix::kDown}) {
        const MatrixView view = p.layer->view(matrix, expert);
        for (int64_t row = 0; row < p.layer->rows(matrix); ++row) {
          std::memcpy(bytes.data() + Offset(matrix, expert) + row * Stride(matrix), view.rows + row * view.row_stride,
                      static_cast<size_t>(RowBytes(matrix)));
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
    const int64_t in_expert = matrix == Matrix::kGate ? 0 : matrix == Matrix::kUp ? RowBytes(matrix) : down_at_;
    return start_ + expert * expert_bytes_ + in_expert;
  }
  int64_t Stride(Matrix matrix) const { return matrix == Matrix::kDown ? down_stride_ : first_stride_; }

  std::shared_ptr<ExpertLayer> Map() const {
    auto layer = std::make_shared<ExpertLayer>(problem_.layer->shape(), &ExpertLayer::Nothing);
    for (int64_t expert = 0; expert < problem_.sizes.experts; ++expert) {
      for (const Matrix matrix : {Matrix::kGate, Matrix::kUp, Matrix::kDown}) {
        const MatrixView own = problem_.layer->view(matrix, expert);
        layer->Map(matrix, expert, mapping_, Offset(matrix, expert), {nullptr, Stride(matrix), own.scales, own.zeros});
      }
    }
    return layer;
  }
  const std::string& path() const { return path_; }
  const std::shared_ptr<const FileMapping>& mapping() const { return mapping_; }

 private:
  int64_t RowBytes(Matrix matrix) const { return problem_.layer->view(matrix, 0).row_stride; }

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
  for (const testing::Stored& stored : testing::kStored) {
    for (const LayerSizes& sizes : kSizes) {
      testing::LayerOptions options;
      options.stored = stored;
      const Problem p = testing::MakeProblem(sizes, options, random);
      const ExpertsFile file(p);
      Problem mapped = p;
      mapped.layer = file.Map();
      mapped.layer->CheckFiles();
      mapped.layer->ReadAhead();
      for (const testing::TestedTier& tier : testing::TestedTiers()) {
        const Outputs own = Run(p, *tier.kernels, 2, true), out = Run(mapped, *tier.kernels, 2, true);
        CHECK_MESSAGE(out.y == own.y && out.dx == own.dx && out.dw == own.dw, tier.name + " " + NameOf(stored));
      }
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
  const auto map = [&](ExpertLayer* onto, int64_t expert, int64_t offset, int64_t stride) {
    onto->Map(Matrix::kUp, expert, mapping, offset, {nullptr, stride, nullptr, nullptr});
  };
  map(&layer, 0, last, 20);
  struct Rows {
    int64_t offset, stride;
  };
  constexpr int64_t kFar = int64_t{1} << 62;
  for (const Rows& bad : {Rows{last + 2, 20}, Rows{last, 22}, Rows{0, 18}, Rows{1, 20}, Rows{0, 21}, Rows{-2, 20},
                          Rows{0, kFar}, Rows{kFar, 20}, Rows{0, -20}}) {
    CHECK_THROWS(map(&layer, 1, bad.offset, bad.stride), std::invalid_argument);
  }
  CHECK(!layer.written(Matrix::kUp, 1));
  CHECK_THROWS(map(p.layer.get(), 0, 0, 20), std::logic_error);
}

TEST(ScalesOfMappedRowsAreChecked) {
  std::mt19937 random(20);
  testing::LayerOptions options;
  options.stored = {Format::kInt4, 32, true};
  const Problem p = testing::MakeProblem({2, 1, 3, 70, 6}, options, random);
  const ExpertsFile file(p);
  const std::shared_ptr<ExpertLayer> layer = file.Map();
  const MatrixView own = p.layer->view(Matrix::kUp, 1), mapped = layer->view(Matrix::kUp, 1);
  const auto map = [&](const uint8_t* scales, const uint8_t* zeros) {
    ExpertLayer other(p.layer->shape(), &ExpertLayer::Nothing);
    other.Map(Matrix::kUp, 1, file.mapping(), file.Offset(Matrix::kUp, 1),
              {nullptr, file.Stride(Matrix::kUp), scales, zeros});
  };
  std::vector<uint8_t> scales(own.scales, own.scales + 6 * own.scale_stride);
  std::vector<uint8_t> zeros(own.zeros, own.zeros + 6 * own.zero_stride);
  CHECK(mapped.scales != own.scales && std::memcmp(mapped.scales, scales.data(), scales.size()) == 0);
  CHECK(mapped.zeros != own.zeros && std::memcmp(mapped.zeros, zeros.data(), zeros.size()) == 0);
  map(scales.data(), zeros.data());
  CHECK_THROWS(map(nullptr, nullptr), std::invalid_argument);
  CHECK_THROWS(map(scales.data(), nullptr), std::invalid_argument);
  zeros[5] = 17;
  CHECK_THROWS(map(scales.data(), zeros.data()), std::invalid_argument);
  zeros[5] = 8;
  scales[7] = 0x7f, scales[6] = 0x80;  // infinity
  CHECK_THROWS(map(scales.data(), zeros.data()), std::invalid_argument);
}

}  // namespace
}  // namespace kt
