#include "moe/layer.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>

#include "moe/reference.h"

namespace kt {
namespace {

constexpr int64_t kHidden = 10, kIntermediate = 6;

ExpertLayer SmallLayer(bool gated = true) {
  return ExpertLayer({3, kHidden, kIntermediate, Activation::kSilu, gated, Format::kBf16});
}

std::vector<float> Stored(const ExpertLayer& layer, Matrix matrix, int64_t expert) {
  std::vector<float> values(static_cast<size_t>(layer.rows(matrix) * layer.columns(matrix)));
  layer.Dequantize(matrix, expert, values.data());
  return values;
}

// 0, 1, 2, ... are exact in every type here.
std::vector<float> Counting(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i);
  return values;
}

std::vector<char> As(DType type, const std::vector<float>& values) {
  std::vector<char> bytes(values.size() * static_cast<size_t>(DTypeBytes(type)));
  for (size_t i = 0; i < values.size(); ++i) StoreFromFloat(bytes.data(), type, static_cast<int64_t>(i), values[i]);
  return bytes;
}

struct TemporaryFile {
  explicit TemporaryFile(const std::vector<char>& prefix, const std::vector<char>& bytes) {
    char name[] = "/tmp/kt_sft_layer_test_XXXXXX";
    const int descriptor = mkstemp(name);
    path = name;
    if (descriptor < 0) throw std::runtime_error("cannot make a temporary file");
    std::FILE* const file = fdopen(descriptor, "wb");
    if (file == nullptr) throw std::runtime_error("cannot open the temporary file");
    if (!prefix.empty()) std::fwrite(prefix.data(), 1, prefix.size(), file);
    std::fwrite(bytes.data(), 1, bytes.size(), file);
    std::fclose(file);
  }
  ~TemporaryFile() { std::remove(path.c_str()); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  std::string path;
};

TEST(EveryTypeAndOrderIsStoredAsRows) {
  const std::vector<float> rows = Counting(kIntermediate * kHidden);
  for (const DType type : {DType::kF32, DType::kBf16, DType::kF16}) {
    ExpertLayer layer = SmallLayer();
    const std::vector<char> bytes = As(type, rows);
    layer.Write(Matrix::kGate, 1, {bytes.data(), type, kHidden, 1});
    CHECK(Stored(layer, Matrix::kGate, 1) == rows);
    CHECK(layer.written(Matrix::kGate, 1) && !layer.written(Matrix::kGate, 0) && !layer.written(Matrix::kUp, 1));

    // The same bytes, read as a transposed matrix [H, I].
    layer.Write(Matrix::kDown, 2, {bytes.data(), type, 1, kHidden});
    const std::vector<float> down = Stored(layer, Matrix::kDown, 2);
    CHECK(down[1] == static_cast<float>(kHidden) && down[kIntermediate] == 1.0F);
  }
}

TEST(FilesGiveTheSameAsMemory) {
  const std::vector<char> prefix(13, 'x');
  // Twice as many values as a matrix has, so that every other row or column can be taken.
  const std::vector<float> values = Counting(2 * kIntermediate * kHidden);
  for (const DType type : {DType::kF32, DType::kBf16, DType::kF16}) {
    const std::vector<char> bytes = As(type, values);
    const TemporaryFile file(prefix, bytes);
    const SourceMatrix layouts[] = {
        {bytes.data(), type, kHidden, 1},           // plain rows
        {bytes.data(), type, 2 * kHidden, 1},       // every other row
        {bytes.data(), type, 1, kIntermediate},     // transposed
        {bytes.data(), type, 2, 2 * kIntermediate}  // transposed, every other row
    };
    for (const SourceMatrix& layout : layouts) {
      ExpertLayer from_memory = SmallLayer(), from_file = SmallLayer();
      from_memory.Write(Matrix::kUp, 0, layout);
      from_file.ReadFile(Matrix::kUp, 0, file.path, 13, layout);
      CHECK(Stored(from_file, Matrix::kUp, 0) == Stored(from_memory, Matrix::kUp, 0));
    }
  }
}

// Formats quantise blocks of rows together, and files are read a few rows at a time: whatever the pieces, the result is
// that of the whole matrix, as the quantiser gives it.
TEST(EveryFormatIsStoredAlikeFromMemoryAndFromFiles) {
  std::mt19937 random(11);
  // Rows far apart: 4 MiB, which are read at once, hold fewer than there are.
  constexpr int64_t kRows = 300, kColumns = 70, kStride = 9000;
  const std::vector<float> spread = testing::RandomFloats((kRows - 1) * kStride + kColumns, 1.0F, random);
  const TemporaryFile file({}, As(DType::kF32, spread));
  const SourceMatrix layout{spread.data(), DType::kF32, kStride, 1};
  std::vector<float> values;
  for (int64_t r = 0; r < kRows; ++r) {
    values.insert(values.end(), spread.begin() + r * kStride, spread.begin() + r * kStride + kColumns);
  }
  std::vector<float> turned(values.size());  // [kColumns, kRows]
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < kColumns; ++c) {
      turned[static_cast<size_t>(c * kRows + r)] = values[static_cast<size_t>(r * kColumns + c)];
    }
  }
  for (const testing::Stored& stored : testing::kStored) {
    const Storage storage = StorageOf(stored.format, stored.group, stored.zero_point);
    std::vector<uint8_t> block(static_cast<size_t>(storage.bytes(kRows, kColumns)));
    const QuantisationError error = Quantise(storage, values.data(), 0, kRows, kRows, kColumns, block.data());
    std::vector<float> expected(values.size());
    for (int64_t r = 0; r < kRows; ++r) {
      DequantiseRow(stored.format, storage.view(block.data(), kRows, kColumns), r, kColumns,
                    expected.data() + r * kColumns);
    }
    const auto check = [&](const char* how, const auto& store) {
      // gate and up are [kRows, kColumns].
      ExpertLayer layer({1, kColumns, kRows, Activation::kSilu, true, stored.format, stored.group, stored.zero_point});
      store(layer);
      CHECK_MESSAGE(Stored(layer, Matrix::kUp, 0) == expected, NameOf(stored) + " from " + how);
      // Sums of the same numbers, in another order.
      const double off = std::fabs(layer.error().squared_error - error.squared_error);
      CHECK_MESSAGE(off <= 1e-12 * error.squared_error, NameOf(stored) + " from " + how + " says another error");
    };
    check("memory", [&](ExpertLayer& layer) { layer.Write(Matrix::kUp, 0, layout); });
    check("a file", [&](ExpertLayer& layer) { layer.ReadFile(Matrix::kUp, 0, file.path, 0, layout); });
    check("turned memory",
          [&](ExpertLayer& layer) { layer.Write(Matrix::kUp, 0, {turned.data(), DType::kF32, 1, kRows}); });
  }
}

TEST(ValuesThatAreNotFiniteAreRefusedWithTheirPlace) {
  std::vector<float> values = Counting(kIntermediate * kHidden);
  // 3.4e38 is finite in FP32 but not in BF16.
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), 3.4e38F}) {
    values[2 * kHidden + 3] = bad;
    for (const DType type : {DType::kF32, DType::kBf16}) {
      const std::vector<char> bytes = As(type, values);
      const TemporaryFile file({}, bytes);
      ExpertLayer layer = SmallLayer();
      CHECK_THROWS(layer.Write(Matrix::kUp, 0, {bytes.data(), type, kHidden, 1}), std::invalid_argument);
      CHECK(!layer.written(Matrix::kUp, 0));
      try {
        layer.ReadFile(Matrix::kUp, 0, file.path, 0, {nullptr, type, kHidden, 1});
        CHECK(false);
      } catch (const std::invalid_argument& error) {
        const std::string message = error.what();
        CHECK_MESSAGE(message.find("row 2, column 3 is ") == 0, message);
      }
    }
  }
}

TEST(ShortAndMissingFilesAreNamed) {
  ExpertLayer layer = SmallLayer();
  const TemporaryFile file({}, std::vector<char>(static_cast<size_t>(kIntermediate * kHidden * 2 - 1), 0));
  for (const int64_t row_stride : {kHidden, 2 * kHidden}) {
    try {
      layer.ReadFile(Matrix::kUp, 0, file.path, 0, {nullptr, DType::kBf16, row_stride, 1});
      CHECK(false);
    } catch (const std::runtime_error& error) {
      CHECK(std::string(error.what()).find(file.path) != std::string::npos);
    }
  }
  CHECK_THROWS(layer.ReadFile(Matrix::kUp, 0, "/nonexistent", 0, {nullptr, DType::kBf16, kHidden, 1}),
               std::runtime_error);
}

TEST(WhatDoesNotExistIsRefused) {
  ExpertLayer ungated = SmallLayer(false);
  const std::vector<char> bytes = As(DType::kBf16, Counting(kIntermediate * kHidden));
  const SourceMatrix source{bytes.data(), DType::kBf16, kHidden, 1};
  CHECK_THROWS(ungated.Write(Matrix::kGate, 0, source), std::invalid_argument);
  CHECK_THROWS(ungated.Write(Matrix::kUp, 3, source), std::out_of_range);
  CHECK_THROWS(ungated.Write(Matrix::kUp, -1, source), std::out_of_range);
  CHECK_THROWS(ExpertLayer({0, 1, 1, Activation::kSilu, true, Format::kBf16}), std::invalid_argument);
  CHECK_THROWS(ExpertLayer({1, 1, 1, Activation::kSwigluOai, false, Format::kBf16}), std::invalid_argument);
  constexpr int64_t kHuge = int64_t{1} << 24;
  CHECK_THROWS(ExpertLayer({kHuge, kHuge, kHuge, Activation::kSilu, true, Format::kBf16}), std::bad_alloc);
  CHECK_THROWS(ungated.SetBiases({1.0F}, {}), std::invalid_argument);
}

TEST(AnotherProcessReadsWhatOneFilled) {
  const LayerShape shape{3, kHidden, kIntermediate, Activation::kSilu, false, Format::kInt8};
  ExpertLayer filled(shape, &Block::Shared);
  const std::vector<float> values = Counting(kIntermediate * kHidden);
  for (int64_t expert = 0; expert < 3; ++expert) {
    filled.Write(Matrix::kUp, expert, {values.data(), DType::kF32, kHidden, 1});
    filled.Write(Matrix::kDown, expert, {values.data(), DType::kF32, kIntermediate, 1});
  }
  ExpertLayer reader(shape, [&](size_t bytes) { return Block::MapShared(filled.descriptor(), bytes); });
  CHECK(reader.bytes() == filled.bytes() && reader.descriptor() == -1);
  CHECK(!reader.written(Matrix::kUp, 0));
  reader.Adopt(filled.error());
  CHECK(reader.error().squared_error == filled.error().squared_error && filled.error().squared_error > 0);
  for (int64_t expert = 0; expert < 3; ++expert) {
    for (const Matrix matrix : {Matrix::kUp, Matrix::kDown}) {
      CHECK(reader.written(matrix, expert));
      CHECK(Stored(reader, matrix, expert) == Stored(filled, matrix, expert));
    }
  }
  CHECK_THROWS(reader.Write(Matrix::kUp, 0, {values.data(), DType::kF32, kHidden, 1}), std::logic_error);
}

TEST(MatricesDoNotOverlap) {
  const auto value_of = [](int64_t expert, Matrix matrix) {
    return std::ldexp(1.0F, static_cast<int>(2 * (kMatrixCount * expert + static_cast<int64_t>(matrix))));
  };
  for (const testing::Stored& stored : testing::kStored) {
    const bool gated = stored.group != 0;
    ExpertLayer layer(
        {3, kHidden, kIntermediate, Activation::kSilu, gated, stored.format, stored.group, stored.zero_point});
    std::vector<Matrix> matrices = {Matrix::kUp, Matrix::kDown};
    if (gated) matrices.push_back(Matrix::kGate);
    for (int64_t expert = 0; expert < 3; ++expert) {
      for (const Matrix matrix : matrices) {
        const std::vector<float> values(static_cast<size_t>(kHidden * kIntermediate), value_of(expert, matrix));
        layer.Write(matrix, expert, {values.data(), DType::kF32, layer.columns(matrix), 1});
      }
    }
    for (int64_t expert = 0; expert < 3; ++expert) {
      for (const Matrix matrix : matrices) {
        // A power of two is a code times a scale, but for the rounding of a scale to BF16.
        const float written = value_of(expert, matrix);
        for (const float value : Stored(layer, matrix, expert)) {
          CHECK_MESSAGE(std::fabs(value - written) <= 0.01F * written, NameOf(stored));
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt
