// Matrices that are in a layer's format already: stored as they are, from memory and from files, and checked.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "moe/layer.h"
#include "testing.h"

namespace kt {
namespace {

constexpr int64_t kHidden = 130, kIntermediate = 129;

struct Codes {
  std::vector<uint8_t> rows, scales, zeros;
  int64_t stride = 0;
  SourceCodes source() const { return {rows.data(), stride, scales.data(), zeros.empty() ? nullptr : zeros.data()}; }
};

ExpertLayer Layer(Format format, int64_t group = -1, bool zero_point = false, ScaleType scales = ScaleType::kNone) {
  return ExpertLayer({2, kHidden, kIntermediate, Activation::kSilu, true, format, group, zero_point, scales});
}

// What another layer quantised, so codes, scales and zero points are of the right kind.
Codes CodesOf(const ExpertLayer& layer) {
  const MatrixView w = layer.view(Matrix::kDown, 0);
  const int64_t rows = layer.rows(Matrix::kDown);
  Codes codes;
  codes.stride = w.row_stride;
  codes.rows.assign(w.rows, w.rows + rows * w.row_stride);
  const int64_t bands = CeilDiv(rows, w.group_rows);
  codes.scales.assign(w.scales, w.scales + bands * w.scale_stride);
  if (w.zeros != nullptr) codes.zeros.assign(w.zeros, w.zeros + bands * w.zero_stride);
  return codes;
}

std::vector<float> Values(const ExpertLayer& layer, int64_t expert) {
  std::vector<float> values(static_cast<size_t>(kHidden * kIntermediate));
  layer.Dequantize(Matrix::kDown, expert, values.data());
  return values;
}

void Fill(ExpertLayer* layer) {
  std::vector<float> values(static_cast<size_t>(kHidden * kIntermediate));
  for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i)) * static_cast<float>(i % 7);
  layer->Write(Matrix::kDown, 0, {values.data(), DType::kF32, kIntermediate, 1});
}

struct Kind {
  int64_t group;
  Format format;
  bool zero_point;
};
constexpr Kind kKinds[] = {{0, Format::kInt8, false},  {32, Format::kInt4, false}, {128, Format::kInt4, true},
                           {64, Format::kNf4, false},  {128, Format::kFp8, false}, {0, Format::kFp8, false},
                           {32, Format::kMxfp4, false}};

TEST(CodesComeOutAsTheyWentIn) {
  for (const Kind& kind : kKinds) {
    ExpertLayer source = Layer(kind.format, kind.group, kind.zero_point);
    Fill(&source);
    const Codes codes = CodesOf(source);
    ExpertLayer layer = Layer(kind.format, kind.group, kind.zero_point);
    layer.WriteCodes(Matrix::kDown, 1, codes.source());
    CHECK(Values(layer, 1) == Values(source, 0));
    CHECK(layer.written(Matrix::kDown, 1) && !layer.written(Matrix::kDown, 0));
    CHECK(layer.error().squared_values == 0.0);

    // Every other row of a file, behind seven bytes.
    char name[] = "/tmp/kt_sft_codes_test_XXXXXX";
    const int descriptor = mkstemp(name);
    CHECK(descriptor >= 0);
    std::vector<uint8_t> content = {'1', '2', '3', '4', '5', '6', '7'};
    for (int64_t r = 0; r < kHidden; ++r) {
      const uint8_t* const row = codes.rows.data() + r * codes.stride;
      content.insert(content.end(), row, row + codes.stride);
      if (r + 1 < kHidden) content.insert(content.end(), static_cast<size_t>(codes.stride), 0xff);
    }
    CHECK(write(descriptor, content.data(), content.size()) == static_cast<ssize_t>(content.size()));
    close(descriptor);
    SourceCodes apart = codes.source();
    apart.row_stride = 2 * codes.stride;
    ExpertLayer from_file = Layer(kind.format, kind.group, kind.zero_point);
    from_file.ReadCodes(Matrix::kDown, 1, name, 7, apart);
    CHECK(Values(from_file, 1) == Values(source, 0));
    CHECK_THROWS(from_file.ReadCodes(Matrix::kDown, 0, name, 8, apart), std::runtime_error);
    CHECK(!from_file.written(Matrix::kDown, 0));
    std::remove(name);
  }
}

TEST(ScalesOfACheckpointsOwnType) {
  for (const ScaleType type : {ScaleType::kF32, ScaleType::kF16, ScaleType::kBf16}) {
    ExpertLayer layer = Layer(Format::kInt4, 0, false, type);
    Codes codes;
    codes.stride = CeilDiv(kIntermediate, 2);
    codes.rows.assign(static_cast<size_t>(kHidden * codes.stride), 0x9a);  // 2, then 1
    codes.scales.resize(static_cast<size_t>(kHidden * ScaleBytes(type)));
    const float scale = 0.625F;  // exact in all of them
    for (int64_t r = 0; r < kHidden; ++r) {
      if (type == ScaleType::kF32) {
        std::memcpy(codes.scales.data() + 4 * r, &scale, 4);
      } else {
        StoreFromFloat(codes.scales.data(), type == ScaleType::kF16 ? DType::kF16 : DType::kBf16, r, scale);
      }
    }
    layer.WriteCodes(Matrix::kDown, 0, codes.source());
    const std::vector<float> values = Values(layer, 0);
    CHECK(values[0] == 1.25F && values[1] == 0.625F && values.back() == 1.25F);
    if (type == ScaleType::kBf16) continue;
    CHECK_THROWS(layer.Write(Matrix::kDown, 0, {values.data(), DType::kF32, kIntermediate, 1}), std::invalid_argument);
  }
  CHECK_THROWS(Layer(Format::kFp8, -1, false, ScaleType::kF16), std::invalid_argument);
  CHECK_THROWS(Layer(Format::kInt4, -1, false, ScaleType::kE8M0), std::invalid_argument);
}

TEST(WrongCodesAreRefused) {
  ExpertLayer fp8 = Layer(Format::kFp8);
  Fill(&fp8);
  const Codes good = CodesOf(fp8);
  ExpertLayer layer = Layer(Format::kFp8);
  for (const uint8_t code : {0x7f, 0xff}) {
    Codes codes = good;
    codes.rows[5 * kIntermediate + 3] = code;
    CHECK_THROWS(layer.WriteCodes(Matrix::kDown, 0, codes.source()), std::invalid_argument);
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float scale : {kInfinity, std::nanf(""), -1.0F, -0.0F, 1e36F}) {
    Codes codes = good;
    std::memcpy(codes.scales.data() + 4, &scale, 4);
    CHECK_THROWS(layer.WriteCodes(Matrix::kDown, 0, codes.source()), std::invalid_argument);
  }
  CHECK(!layer.written(Matrix::kDown, 0));
  layer.WriteCodes(Matrix::kDown, 0, good.source());

  ExpertLayer mxfp4 = Layer(Format::kMxfp4);
  Fill(&mxfp4);
  for (const uint8_t scale : {255, 254}) {
    Codes codes = CodesOf(mxfp4);
    codes.scales[3] = scale;
    CHECK_THROWS(mxfp4.WriteCodes(Matrix::kDown, 1, codes.source()), std::invalid_argument);
  }
  ExpertLayer int4 = Layer(Format::kInt4, 32, true);
  Fill(&int4);
  Codes codes = CodesOf(int4);
  codes.zeros[7] = 17;
  CHECK_THROWS(int4.WriteCodes(Matrix::kDown, 1, codes.source()), std::invalid_argument);
  codes.zeros.clear();
  CHECK_THROWS(int4.WriteCodes(Matrix::kDown, 1, codes.source()), std::invalid_argument);
  CHECK_THROWS(Layer(Format::kBf16).WriteCodes(Matrix::kDown, 0, good.source()), std::invalid_argument);
}

}  // namespace
}  // namespace kt
