// How formats are stored: names, what is possible, and where the parts of a matrix lie.
#include <stdexcept>
#include <vector>

#include "formats/quantise.h"
#include "testing.h"

namespace kt {
namespace {

TEST(NamesGoBothWays) {
  for (int i = 0; i < kFormatCount; ++i) {
    const Format format = static_cast<Format>(i);
    CHECK(FormatFromName(FormatName(format)) == format);
  }
  CHECK_THROWS(FormatFromName("int3"), std::invalid_argument);
  CHECK_THROWS(FormatFromName(""), std::invalid_argument);
}

TEST(ImpossibleStorageIsRefused) {
  for (int i = 0; i < kFormatCount; ++i) {
    const Format format = static_cast<Format>(i);
    StorageOf(format, -1, false);
    for (const int64_t group : {-2, 1, 16, 31, 33, 48, 131072}) {
      CHECK_THROWS(StorageOf(format, group, false), std::invalid_argument);
    }
    if (format != Format::kInt4) CHECK_THROWS(StorageOf(format, -1, true), std::invalid_argument);
  }
  CHECK_THROWS(StorageOf(Format::kBf16, 32, false), std::invalid_argument);
  CHECK_THROWS(StorageOf(Format::kFp8, 64, false), std::invalid_argument);
  CHECK_THROWS(StorageOf(Format::kMxfp4, 0, false), std::invalid_argument);
  CHECK_THROWS(StorageOf(Format::kMxfp4, 64, false), std::invalid_argument);
}

TEST(PartsOfAMatrixFollowEachOther) {
  // 3 rows of 35 codes take 54 bytes, 2 groups a row of BF16 scales 12, and as many zero points 6.
  const Storage int4 = StorageOf(Format::kInt4, 32, true);
  std::vector<uint8_t> base(1024);
  const MatrixView w = int4.view(base.data(), 3, 35);
  CHECK(w.rows == base.data() && w.row_stride == 18);
  CHECK(w.scales == base.data() + 64 && w.scale_stride == 4 && w.scale_type == ScaleType::kBf16);
  CHECK(w.zeros == base.data() + 128 && w.zero_stride == 2 && w.group == 32 && w.group_rows == 1);
  CHECK(int4.bytes(3, 35) == 134);
  // 130 rows of 300 codes are 39000 bytes: 2 x 3 blocks.
  const Storage fp8 = StorageOf(Format::kFp8, -1, false);
  const MatrixView blocks = fp8.view(base.data(), 130, 300);
  CHECK(blocks.scales == base.data() + 39040 && blocks.scale_stride == 12 && blocks.zeros == nullptr);
  CHECK(blocks.group == 128 && blocks.group_rows == 128 && fp8.bytes(130, 300) == 39064);
  CHECK(StorageOf(Format::kInt8, -1, false).view(base.data(), 2, 7).group == 7);
  CHECK(StorageOf(Format::kBf16, -1, false).bytes(3, 5) == 30);
}

}  // namespace
}  // namespace kt
