// Matrices copied out as they are stored, written to a file and mapped from it: the same bits on every tier, with the
// last part ending where the file's last page does.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "moe/reference.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

using testing::LayerSizes;
using testing::Outputs;
using testing::Problem;

constexpr Matrix kMatrices[] = {Matrix::kGate, Matrix::kUp, Matrix::kDown};
constexpr int64_t kPage = 4096;

struct Places {
  int64_t codes, scales, zeros;
};

// All codes, then all scales, then all zero points.
class StoredFile {
 public:
  explicit StoredFile(const ExpertLayer& layer) : layer_(layer) {
    std::vector<uint8_t> parts[3];
    for (int64_t expert = 0; expert < layer.shape().experts; ++expert) {
      for (const Matrix matrix : kMatrices) {
        const MatrixView w = layer.view(matrix, expert);
        const int64_t bands = CeilDiv(layer.rows(matrix), w.group_rows);
        const int64_t sizes[] = {layer.rows(matrix) * w.row_stride, bands * w.scale_stride, bands * w.zero_stride};
        uint8_t* to[3];
        int64_t places[3];
        for (int i = 0; i < 3; ++i) {
          places[i] = static_cast<int64_t>(parts[i].size());
          parts[i].resize(parts[i].size() + static_cast<size_t>(sizes[i]));
          to[i] = parts[i].data() + places[i];
        }
        layer.CopyStored(matrix, expert, to[0], to[1], to[2]);
        places_.push_back({places[0], places[1], places[2]});
      }
    }
    const int64_t needed = static_cast<int64_t>(parts[0].size() + parts[1].size() + parts[2].size());
    const int64_t size = CeilDiv(needed + 1, kPage) * kPage;
    std::vector<uint8_t> bytes(static_cast<size_t>(size - needed), 0xff);
    for (Places& places : places_) {
      places.codes += size - needed;
      places.scales += size - needed + static_cast<int64_t>(parts[0].size());
      places.zeros += size - needed + static_cast<int64_t>(parts[0].size() + parts[1].size());
    }
    for (const std::vector<uint8_t>& part : parts) bytes.insert(bytes.end(), part.begin(), part.end());
    char name[] = "/tmp/kt_sft_stored_test_XXXXXX";
    const int descriptor = mkstemp(name);
    path_ = name;
    const bool whole = write(descriptor, bytes.data(), bytes.size()) == size;
    close(descriptor);
    if (!whole) throw std::runtime_error("cannot write the temporary file");
    mapping_ = std::make_shared<const FileMapping>(path_);
    // So that a read beyond the end is a fault. The system puts it elsewhere if something else is there already.
    after_ = mmap(const_cast<uint8_t*>(mapping_->data()) + size, kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  ~StoredFile() {
    munmap(after_, static_cast<size_t>(kPage));
    std::remove(path_.c_str());
  }
  StoredFile(const StoredFile&) = delete;
  StoredFile& operator=(const StoredFile&) = delete;

  const Places& places(Matrix matrix, int64_t expert) const {
    return places_[static_cast<size_t>(expert * kMatrixCount + static_cast<int>(matrix))];
  }
  const std::shared_ptr<const FileMapping>& mapping() const { return mapping_; }

  std::shared_ptr<ExpertLayer> Map() const {
    auto layer = std::make_shared<ExpertLayer>(layer_.shape(), &ExpertLayer::Nothing);
    for (int64_t expert = 0; expert < layer_.shape().experts; ++expert) {
      for (const Matrix matrix : kMatrices) {
        const Places& at = places(matrix, expert);
        layer->MapStored(matrix, expert, mapping_, at.codes, at.scales, at.zeros);
      }
    }
    return layer;
  }

 private:
  const ExpertLayer& layer_;
  std::vector<Places> places_;
  std::string path_;
  std::shared_ptr<const FileMapping> mapping_;
  void* after_;
};

TEST(StoredMatricesComputeTheSameBits) {
  std::mt19937 random(23);
  constexpr LayerSizes kSizes[] = {{1, 1, 1, 2, 1}, {3, 2, 4, 6, 4}, {9, 2, 2, 130, 70}};
  for (const testing::Stored& stored : testing::kStored) {
    for (const LayerSizes& sizes : kSizes) {
      testing::LayerOptions options;
      options.stored = stored;
      const Problem p = testing::MakeProblem(sizes, options, random);
      const StoredFile file(*p.layer);
      Problem mapped = p;
      mapped.layer = file.Map();
      mapped.layer->CheckFiles();
      mapped.layer->ReadAhead();
      CHECK(mapped.layer->written(Matrix::kDown, sizes.experts - 1));
      for (const testing::TestedTier& tier : testing::TestedTiers()) {
        const Outputs own = Run(p, *tier.kernels, 2, true), out = Run(mapped, *tier.kernels, 2, true);
        CHECK_MESSAGE(out.y == own.y && out.dx == own.dx && out.dw == own.dw, tier.name + " " + NameOf(stored));
      }
    }
  }
}

TEST(PartsThatLieInNoFileAreRefused) {
  std::mt19937 random(24);
  testing::LayerOptions options;
  options.stored = {Format::kInt4, 32, true};
  const Problem p = testing::MakeProblem({2, 1, 3, 64, 32}, options, random);
  const StoredFile file(*p.layer);
  const std::shared_ptr<const FileMapping>& mapping = file.mapping();
  ExpertLayer layer(p.layer->shape(), &ExpertLayer::Nothing);
  const Places good = file.places(Matrix::kDown, 2);
  const int64_t size = mapping->size();
  for (const int64_t bad : {int64_t{-1}, size, size - 1, INT64_MAX}) {
    CHECK_THROWS(layer.MapStored(Matrix::kDown, 2, mapping, bad, good.scales, good.zeros), std::invalid_argument);
    CHECK_THROWS(layer.MapStored(Matrix::kDown, 2, mapping, good.codes, bad, good.zeros), std::invalid_argument);
    CHECK_THROWS(layer.MapStored(Matrix::kDown, 2, mapping, good.codes, good.scales, bad), std::invalid_argument);
  }
  CHECK(!layer.written(Matrix::kDown, 2));
  layer.MapStored(Matrix::kDown, 2, mapping, good.codes, good.scales, good.zeros);
  CHECK(layer.written(Matrix::kDown, 2));

  ExpertLayer own(p.layer->shape());
  CHECK_THROWS(own.MapStored(Matrix::kDown, 2, mapping, good.codes, good.scales, good.zeros), std::logic_error);
  uint8_t nothing = 0;
  CHECK_THROWS(own.CopyStored(Matrix::kDown, 2, &nothing, &nothing, &nothing), std::logic_error);
  ExpertLayer plain({1, 4, 4}, &ExpertLayer::Nothing);
  CHECK_THROWS(plain.MapStored(Matrix::kDown, 0, mapping, 1, 0, 0), std::invalid_argument);
}

}  // namespace
}  // namespace kt
