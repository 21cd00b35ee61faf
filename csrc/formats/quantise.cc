#include "formats/quantise.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/four_bit.h"

namespace kt {
namespace {

constexpr int64_t kLanes = 4;
using F4 = float __attribute__((vector_size(16)));
using I4 = int32_t __attribute__((vector_size(16)));

F4 Load(const float* from) {
  F4 value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
F4 Clamp(F4 x, float low, float high) {
  x = x < low ? F4{} + low : x;
  return x > high ? F4{} + high : x;
}
F4 Magnitude(F4 x) { return reinterpret_cast<F4>(reinterpret_cast<I4>(x) & 0x7fffffff); }
float Sum(F4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// A coder says which code is nearest to a weight / scale:
//   F4 Nearest(F4 x) const;  // the nearest value that a code has, ties to even codes
//   I4 Code(F4 q) const;     // the code of such a value

// Integers from `low` to `high`, stored with `offset` added.
struct IntegerCoder {
  float low, high;
  int32_t offset;

  F4 Nearest(F4 x) const {
    constexpr float kUnit = 0x1.8p23F;  // FP32 numbers of this size are integers: adding it rounds
    return (Clamp(x, low, high) + kUnit) - kUnit;
  }
  I4 Code(F4 q) const { return __builtin_convertvector(q, I4) + offset; }
};

// Floating-point numbers with a sign, kMantissa bits of mantissa and the smallest normal exponent kExponent.
template <int kMantissa, int kExponent, int kLargest, int kBits>
struct FloatCoder {
  F4 Nearest(F4 x) const {
    x = Clamp(x, -kLargest, kLargest);
    // 1.5 x 2^(23 - mantissa) x the power of two below |x|: numbers of this size are multiples of the code's last bit.
    const F4 smallest = F4{} + FloatFromBits((127 + kExponent) << 23);
    F4 power = reinterpret_cast<F4>(reinterpret_cast<I4>(x) & 0x7f800000);
    power = power < smallest ? smallest : power;
    const F4 unit = power * (1.5F * static_cast<float>(1 << (23 - kMantissa)));
    return (x + unit) - unit;
  }
  I4 Code(F4 q) const {
    const I4 sign = (reinterpret_cast<I4>(q) >> 31) & (1 << (kBits - 1));
    q = Magnitude(q);
    const float smallest = FloatFromBits((127 + kExponent) << 23);
    const I4 normal = (reinterpret_cast<I4>(q) >> (23 - kMantissa)) - ((126 + kExponent) << kMantissa);
    const I4 denormal = __builtin_convertvector(q * (static_cast<float>(1 << kMantissa) / smallest), I4);
    return (q < smallest ? denormal : normal) | sign;
  }
};
using Fp8Coder = FloatCoder<3, -6, 448, 8>;
using Mxfp4Coder = FloatCoder<1, 0, 6, 4>;

// The thresholds between a table's neighbours are counted.
struct Nf4Coder {
  static float Threshold(int i) { return (kNf4Values[i] + kNf4Values[i + 1]) / 2; }

  F4 Nearest(F4 x) const {
    F4 q = F4{} + kNf4Values[0];
    for (int i = 0; i < 15; ++i) q += x > Threshold(i) ? F4{} + (kNf4Values[i + 1] - kNf4Values[i]) : F4{};
    return q;
  }
  I4 Code(F4 q) const {
    I4 code{};
    for (int i = 0; i < 15; ++i) code -= q > Threshold(i);
    return code;
  }
};

// What a block of weights that share a scale is quantised in: rows of `pitch` values, zeros after the columns,
// multiplied by `factor`, a power of two that keeps every number here far from overflow and denormals.
struct Block {
  std::vector<float> values;
  int64_t rows = 0, columns = 0, pitch = 0;
  float factor = 1.0F, smallest = 0.0F, largest = 0.0F;

  int64_t count() const { return rows * pitch; }

  void Fill(const float* from, int64_t stride, int64_t block_rows, int64_t block_columns) {
    rows = block_rows, columns = block_columns, pitch = RoundUp(columns, kLanes);
    values.resize(static_cast<size_t>(count()));
    F4 low{}, high{};
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = values.data() + r * pitch;
      for (int64_t c = columns; c < pitch; ++c) row[c] = 0.0F;
      std::memcpy(row, from + r * stride, static_cast<size_t>(columns) * sizeof(float));
      for (int64_t c = 0; c < pitch; c += kLanes) {
        const F4 value = Load(row + c);
        low = value < low ? value : low;
        high = value > high ? value : high;
      }
    }
    smallest = std::min(std::min(low[0], low[1]), std::min(low[2], low[3]));
    largest = std::max(std::max(high[0], high[1]), std::max(high[2], high[3]));
    const float magnitude = std::max(-smallest, largest);
    factor = magnitude < 0x1p-60F ? 0x1p96F : magnitude > 0x1p60F ? 0x1p-64F : 1.0F;
    if (factor == 1.0F) return;
    for (float& value : values) value *= factor;
    smallest *= factor, largest *= factor;
  }
};

// The scale nearest to `scale` that the type can hold, never zero, and such that `code` x scale is finite.
float StorableScale(ScaleType type, float scale, float factor, float code) {
  const float limit = FLT_MAX / code * (1.0F - 0x1p-23F);
  const float bare = std::min(std::max(scale / factor, -limit), limit);
  float stored = bare;
  if (type == ScaleType::kBf16) {
    Bf16 bits = Bf16FromFloat(bare);
    if (std::fabs(FloatFromBf16(bits)) > limit) --bits;
    if ((bits & 0x7fffu) == 0) ++bits;
    stored = FloatFromBf16(bits);
  } else if (type == ScaleType::kE8M0) {
    stored = std::min(std::max(bare, 0x1p-127F), 0x1p125F);
    stored = std::ldexp(1.0F, std::ilogb(stored));
  } else if (stored == 0.0F) {
    stored = FLT_TRUE_MIN;
  }
  return stored * factor;
}

void StoreScale(ScaleType type, float scale, float factor, uint8_t* to) {
  const float bare = scale / factor;
  if (type == ScaleType::kE8M0) {
    *to = static_cast<uint8_t>(std::ilogb(bare) + 127);
  } else {
    StoreFromFloat(to, type == ScaleType::kBf16 ? DType::kBf16 : DType::kF32, 0, bare);
  }
}

// Where a block's codes go.
struct CodeRows {
  uint8_t* first;
  int64_t stride;
  bool four_bit;
};

// Writes the codes of a block.
template <class Coder>
QuantisationError Encode(const Coder& coder, const Block& block, float scale, const CodeRows& to) {
  const float inverse = 1.0F / scale;
  double error = 0.0, values = 0.0;
  for (int64_t r = 0; r < block.rows; ++r) {
    for (int64_t c = 0; c < block.columns;) {
      constexpr int64_t kRun = 128;
      const int64_t run = std::min(kRun, block.columns - c);
      uint8_t codes[kRun];
      F4 error_F4{}, values_F4{};
      for (int64_t i = 0; i < run; i += kLanes) {
        const F4 value = Load(block.values.data() + r * block.pitch + c + i), x = value * inverse;
        const F4 q = coder.Nearest(x), off = (value - q * scale) * inverse;
        error_F4 += off * off, values_F4 += x * x;
        const I4 code = coder.Code(q);
        for (int lane = 0; lane < kLanes; ++lane) codes[i + lane] = static_cast<uint8_t>(code[lane]);
      }
      error += Sum(error_F4), values += Sum(values_F4);
      if (to.four_bit) {
        if (run % 2 != 0) codes[run] = 0;
        uint8_t* const bytes = to.first + r * to.stride + c / 2;
        for (int64_t i = 0; i < run; i += 2) bytes[i / 2] = static_cast<uint8_t>(codes[i] | codes[i + 1] << 4);
      } else {
        std::memcpy(to.first + r * to.stride + c, codes, static_cast<size_t>(run));
      }
      c += run;
    }
  }
  const double unit = static_cast<double>(scale) / block.factor;
  return {error * unit * unit, values * unit * unit};
}

struct Scale {
  float value;
  uint8_t zero;
};

// Quantises one block.
QuantisationError QuantiseBlock(const Storage& storage, const Block& block, const CodeRows& to, Scale* scale) {
  const float magnitude = std::max(-block.smallest, block.largest);
  const auto storable = [&](float exact, float code) {
    return StorableScale(storage.scale_type, exact, block.factor, code);
  };
  scale->zero = 8;
  switch (storage.format) {
    case Format::kInt8:
      scale->value = storable(magnitude / 127, 127);
      return Encode(IntegerCoder{-127, 127, 0}, block, scale->value, to);
    case Format::kInt4: {
      if (!storage.zero_point) {
        scale->value = storable(magnitude == block.largest ? -magnitude / 8 : magnitude / 8, 8);
        return Encode(IntegerCoder{-8, 7, 8}, block, scale->value, to);
      }
      scale->value = storable((block.largest - block.smallest) / 15, 15);
      const float zero = std::min(std::max(std::nearbyint(-block.smallest / scale->value), 0.0F), 15.0F);
      scale->zero = static_cast<uint8_t>(zero);
      return Encode(IntegerCoder{-zero, 15 - zero, scale->zero}, block, scale->value, to);
    }
    case Format::kNf4:
      scale->value = storable(magnitude, 1);
      return Encode(Nf4Coder{}, block, scale->value, to);
    case Format::kFp8:
      scale->value = storable(magnitude / 448, 448);
      return Encode(Fp8Coder{}, block, scale->value, to);
    case Format::kMxfp4:
      scale->value = storable(magnitude / 4, 6);
      return Encode(Mxfp4Coder{}, block, scale->value, to);
    case Format::kBf16:
      break;
  }
  return {};
}

// Bytes of a row of scales, and how many rows of them there are.
int64_t Groups(const Storage& storage, int64_t columns) {
  return storage.scale_type == ScaleType::kNone ? 0 : storage.group == 0 ? 1 : CeilDiv(columns, storage.group);
}
int64_t ScalesAt(const Storage& storage, int64_t rows, int64_t columns) {
  return RoundUp(rows * storage.row_bytes(columns), 64);
}
int64_t ScalesEnd(const Storage& storage, int64_t rows, int64_t columns) {
  return ScalesAt(storage, rows, columns) +
         CeilDiv(rows, storage.group_rows) * Groups(storage, columns) * ScaleBytes(storage.scale_type);
}

QuantisationError RoundToBf16(const float* values, int64_t count, uint8_t* to) {
  constexpr Bf16 kLargest = 0x7f7f;
  QuantisationError error;
  for (int64_t i = 0; i < count; ++i) {
    const float limit = FloatFromBf16(kLargest), value = std::min(std::max(values[i], -limit), limit);
    const Bf16 rounded = Bf16FromFloat(value);
    std::memcpy(to + 2 * i, &rounded, 2);
    const double exact = values[i], off = exact - FloatFromBf16(rounded);
    error.squared_error += off * off, error.squared_values += exact * exact;
  }
  return error;
}

constexpr const char* kNames[kFormatCount] = {"bf16", "int8", "int4", "nf4", "fp8", "mxfp4"};

}  // namespace

const char* FormatName(Format format) { return kNames[static_cast<int>(format)]; }

Format FormatFromName(const char* name) {
  for (int i = 0; i < kFormatCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Format>(i);
  }
  throw std::invalid_argument(std::string("unknown weight format '") + name +
                              "'; it is one of bf16, int8, int4, nf4, fp8, mxfp4");
}

int64_t Storage::row_bytes(int64_t columns) const {
  switch (format) {
    case Format::kBf16:
      return 2 * columns;
    case Format::kInt8:
    case Format::kFp8:
      return columns;
    case Format::kInt4:
    case Format::kNf4:
    case Format::kMxfp4:
      break;
  }
  return CeilDiv(columns, 2);
}

int64_t Storage::bytes(int64_t rows, int64_t columns) const {
  if (scale_type == ScaleType::kNone) return rows * row_bytes(columns);
  const int64_t end = ScalesEnd(*this, rows, columns);
  return zero_point ? RoundUp(end, 64) + CeilDiv(rows, group_rows) * Groups(*this, columns) : end;
}

MatrixView Storage::view(const uint8_t* base, int64_t rows, int64_t columns) const {
  MatrixView view;
  view.rows = base;
  view.row_stride = row_bytes(columns);
  view.bits = row_bytes(2) * 4;  // of two columns' bytes
  view.group = group == 0 ? std::max<int64_t>(columns, 1) : group;
  view.group_rows = group_rows;
  if (scale_type == ScaleType::kNone) return view;
  view.scale_type = scale_type;
  view.scales = base + ScalesAt(*this, rows, columns);
  view.scale_stride = Groups(*this, columns) * ScaleBytes(scale_type);
  if (!zero_point) return view;
  view.zeros = base + RoundUp(ScalesEnd(*this, rows, columns), 64);
  view.zero_stride = Groups(*this, columns);
  return view;
}

Storage StorageOf(Format format, int64_t group, bool zero_point) {
  const std::string name = FormatName(format);
  if (zero_point && format != Format::kInt4)
    throw std::invalid_argument("a zero point belongs to int4; " + name + " has none");
  const auto require = [&](bool holds, const char* possible) {
    if (holds) return;
    throw std::invalid_argument("a group size of " + std::to_string(group) + " is not possible with " + name + ": " +
                                possible);
  };
  constexpr const char* kPowers = "it is 0 (whole rows) or a power of two from 32 to 65536";
  const bool power = group == 0 || (group >= kLeastGroup && group <= 65536 && (group & (group - 1)) == 0);
  switch (format) {
    case Format::kBf16:
      require(group == -1 || group == 0, "it has no scales");
      return {format, ScaleType::kNone, 0, 1, false};
    case Format::kInt8:
      require(group == -1 || power, kPowers);
      return {format, ScaleType::kF32, group == -1 ? 0 : group, 1, false};
    case Format::kInt4:
      require(group == -1 || power, kPowers);
      return {format, ScaleType::kBf16, group == -1 ? 32 : group, 1, zero_point};
    case Format::kNf4:
      require(group == -1 || power, kPowers);
      return {format, ScaleType::kBf16, group == -1 ? 64 : group, 1, false};
    case Format::kFp8:
      require(group == -1 || group == 0 || group == 128, "it is 128 (blocks of 128 x 128) or 0 (whole rows)");
      return {format, ScaleType::kF32, group == -1 ? 128 : group, group == 0 ? 1 : 128, false};
    case Format::kMxfp4:
      break;
  }
  require(group == -1 || group == 32, "it is 32");
  return {format, ScaleType::kE8M0, 32, 1, false};
}

QuantisationError Quantise(const Storage& storage, const float* values, int64_t row, int64_t rows, int64_t matrix_rows,
                           int64_t columns, uint8_t* base) {
  const int64_t row_bytes = storage.row_bytes(columns);
  if (storage.format == Format::kBf16) return RoundToBf16(values, rows * columns, base + row * row_bytes);
  const MatrixView view = storage.view(base, matrix_rows, columns);
  const bool four_bit = row_bytes < columns;
  Block block;
  QuantisationError sum;
  for (int64_t r = 0; r < rows; r += view.group_rows) {
    const int64_t band = (row + r) / view.group_rows;
    for (int64_t c = 0, group = 0; c < columns; c += view.group, ++group) {
      block.Fill(values + r * columns + c, columns, std::min(view.group_rows, rows - r),
                 std::min(view.group, columns - c));
      uint8_t* const codes = base + (row + r) * row_bytes + (four_bit ? c / 2 : c);
      Scale scale{};
      const QuantisationError error = QuantiseBlock(storage, block, {codes, row_bytes, four_bit}, &scale);
      sum.squared_error += error.squared_error, sum.squared_values += error.squared_values;
      // The view's addresses lie in the matrix at `base`, which may be written.
      uint8_t* const scales = base + (view.scales - base) + band * view.scale_stride;
      StoreScale(storage.scale_type, scale.value, block.factor, scales + group * ScaleBytes(storage.scale_type));
      if (storage.zero_point) base[view.zeros - base + band * view.zero_stride + group] = scale.zero;
    }
  }
  return sum;
}

void DequantiseRow(Format format, const MatrixView& view, int64_t row, int64_t columns, float* values) {
  const uint8_t* const codes = view.rows + row * view.row_stride;
  for (int64_t c = 0; c < columns; ++c) {
    const int nibble = codes[format == Format::kBf16 ? 0 : c / 2] >> (c % 2 * 4) & 15;
    const int64_t group = view.group == 0 ? 0 : c / view.group;
    float code = 0.0F, scale = 1.0F;
    switch (format) {
      case Format::kBf16:
        code = LoadAsFloat(codes, DType::kBf16, c);
        break;
      case Format::kInt8:
        code = static_cast<float>(static_cast<int8_t>(codes[c]));
        break;
      case Format::kInt4:
        code = static_cast<float>(
            nibble - (view.zeros == nullptr ? 8 : view.zeros[row / view.group_rows * view.zero_stride + group]));
        break;
      case Format::kNf4:
        code = kNf4Values[nibble];
        break;
      case Format::kFp8:
        code = FloatFromFp8(codes[c]);
        break;
      case Format::kMxfp4:
        code = kMxfp4Values[nibble];
        break;
    }
    if (view.scale_type != ScaleType::kNone) LoadScales(view, row, group, 1, &scale);
    values[c] = code * scale;
  }
}

}  // namespace kt
