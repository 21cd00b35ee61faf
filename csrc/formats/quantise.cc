#include "formats/quantise.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "formats/coders.h"

namespace kt {
namespace {

// Sums over so many weights are FP32, sums of these double.
constexpr int64_t kRun = 1024;

float Sum(F4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// The weights that share a scale: rows of `pitch` values, zeros after the columns, times a power of two, `factor`, that
// keeps every number here far from overflow and from denormals.
class Block {
 public:
  Block(int64_t most_rows, int64_t most_columns)
      : values_(static_cast<size_t>(most_rows * RoundUp(most_columns, kLanes))) {}

  void Fill(const float* from, int64_t stride, int64_t rows, int64_t columns) {
    rows_ = rows, columns_ = columns, pitch_ = RoundUp(columns, kLanes);
    F4 low{}, high{};
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = values_.data() + r * pitch_;
      const auto copy = [&](int64_t c, F4 value) {
        std::memcpy(row + c, &value, sizeof(value));
        low = Smaller(low, value);
        high = Larger(high, value);
      };
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) copy(c, Load(from + r * stride + c));
      if (c == columns) continue;
      F4 rest{};
      for (int lane = 0; c + lane < columns; ++lane) rest[lane] = from[r * stride + c + lane];
      copy(c, rest);
    }
    smallest_ = std::min(std::min(low[0], low[1]), std::min(low[2], low[3]));
    largest_ = std::max(std::max(high[0], high[1]), std::max(high[2], high[3]));
    factor_ = unit_ = 1.0F;
    if (magnitude() > 0x1p-40F && magnitude() < 0x1p40F) return;
    if (magnitude() == 0.0F) return;
    const int exponent = std::min(std::max(-std::ilogb(magnitude()), -126), 126);
    factor_ = std::ldexp(1.0F, exponent), unit_ = std::ldexp(1.0F, -exponent);
    for (int64_t i = 0; i < count(); ++i) values_[static_cast<size_t>(i)] *= factor_;
    smallest_ *= factor_, largest_ *= factor_;
  }

  const float* row(int64_t r) const { return values_.data() + r * pitch_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t count() const { return rows_ * pitch_; }
  float factor() const { return factor_; }
  float unit() const { return unit_; }          // 1 / factor
  float smallest() const { return smallest_; }  // zero if no weight is below
  float largest() const { return largest_; }    // zero if no weight is above
  float magnitude() const { return std::max(-smallest_, largest_); }

 private:
  std::vector<float> values_;
  int64_t rows_ = 0, columns_ = 0, pitch_ = 0;
  float factor_ = 1.0F, unit_ = 1.0F, smallest_ = 0.0F, largest_ = 0.0F;
};

// A scale near `scale` that the type can store, never zero, and such that `largest_code` x scale is finite. E8M0 is
// rounded down.
template <ScaleType kType>
float Storable(float largest_code, float scale) {
  const float limit = FLT_MAX / largest_code * (1.0F - 0x1p-23F);
  scale = std::min(std::max(scale, -limit), limit);
  switch (kType) {
    case ScaleType::kBf16: {
      Bf16 bits = Bf16FromFloat(scale);
      if (std::fabs(FloatFromBf16(bits)) > limit) --bits;
      if ((bits & 0x7fffu) == 0) ++bits;
      return FloatFromBf16(bits);
    }
    case ScaleType::kE8M0:
      return std::max(FloatFromBits(BitsFromFloat(scale) & 0x7f800000u), 0x1p-127F);
    default:
      return scale == 0.0F ? FLT_TRUE_MIN : scale;
  }
}

void StoreScale(ScaleType type, float scale, uint8_t* to) {
  if (type == ScaleType::kE8M0) {
    *to = static_cast<uint8_t>(BitsFromFloat(scale) >> 23);  // 0 for 2^-127, which is denormal
  } else {
    StoreFromFloat(to, type == ScaleType::kBf16 ? DType::kBf16 : DType::kF32, 0, scale);
  }
}

// The error of the nearest codes, at kVectors x kLanes scales at once.
template <int kVectors, class Coder>
void ErrorsAt(const Coder* coders, const Block& block, const float* scales, float* errors) {
  F4 scale[kVectors], inverse[kVectors], sum[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) scale[v] = Load(scales + v * kLanes), inverse[v] = 1.0F / scale[v];
  const float* const values = block.row(0);
  const int64_t count = block.count();
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t end = std::min(first + kRun, count);
    F4 error[kVectors] = {};
    for (int64_t i = first; i < end; ++i) {
      const F4 value = Broadcast(values[i]);
      for (int v = 0; v < kVectors; ++v) {
        const F4 off = value - coders[v].Nearest(value * inverse[v]) * scale[v];
        error[v] += off * off;
      }
    }
    for (int v = 0; v < kVectors; ++v) sum[v] += error[v];
  }
  std::memcpy(errors, sum, sizeof(sum));
}

// The least-squares scale for the nearest codes q at a scale, <w, q> / <q, q>.
template <class Coder>
float LeastSquaresScale(const Coder& coder, const Block& block, float scale) {
  const float inverse = 1.0F / scale;
  const float* const values = block.row(0);
  const int64_t count = block.count();
  double products = 0.0, squares = 0.0;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t end = std::min(first + kRun, count);
    F4 products_F4{}, squares_F4{};
    for (int64_t i = first; i < end; i += kLanes) {
      const F4 value = Load(values + i), q = coder.Nearest(value * inverse);
      products_F4 += value * q, squares_F4 += q * q;
    }
    products += Sum(products_F4), squares += Sum(squares_F4);
  }
  return squares == 0.0 ? scale : static_cast<float>(products / squares);
}

// Where a block's codes go.
struct CodeRows {
  uint8_t* first;
  int64_t stride;  // bytes
};

// Four codes as bytes, or two to a byte, in the low bits.
template <bool kFourBit>
uint32_t Pack(I4 codes) {
  using U2 = uint64_t __attribute__((vector_size(16)));
  U2 pairs = reinterpret_cast<U2>(codes & 0xff);
  pairs |= kFourBit ? pairs >> 28 : pairs >> 24;
  constexpr int kBits = kFourBit ? 8 : 16;
  constexpr uint64_t kMask = (1u << kBits) - 1;
  return static_cast<uint32_t>((pairs[0] & kMask) | (pairs[1] & kMask) << kBits);
}

// Writes the codes of a block.
template <class Coder>
QuantisationError Encode(const Coder& coder, const Block& block, float scale, const CodeRows& to) {
  constexpr int64_t kPerByte = Coder::kFourBit ? 2 : 1, kBytes = kLanes / kPerByte;
  const float inverse = 1.0F / scale;
  double error = 0.0, squares = 0.0;
  for (int64_t r = 0; r < block.rows(); ++r) {
    for (int64_t c = 0; c < block.columns(); c += kRun) {
      const int64_t end = std::min(c + kRun, block.columns());
      const float* const values = block.row(r);
      uint8_t* const bytes = to.first + r * to.stride;
      F4 error_F4{}, squares_F4{};
      for (int64_t i = c; i < end; i += kLanes) {
        I4 code;
        const F4 value = Load(values + i), q = coder.Nearest(value * inverse, &code), off = value - q * scale;
        error_F4 += off * off, squares_F4 += value * value;
        const uint32_t packed = Pack<Coder::kFourBit>(code);
        if (i + kLanes <= end) {
          std::memcpy(bytes + i / kPerByte, &packed, kBytes);
        } else {
          const uint32_t some = packed & ~(~0u << (end - i) * 8 / kPerByte);  // the half byte at an odd end is zero
          std::memcpy(bytes + i / kPerByte, &some, static_cast<size_t>((end - i + kPerByte - 1) / kPerByte));
        }
      }
      error += Sum(error_F4), squares += Sum(squares_F4);
    }
  }
  return {error, squares};
}

struct Result {
  QuantisationError error;
  float scale = 1.0F;
  int coder = 0;
};

// Finds the scale of one block, and writes its codes. Tried are `plain`, the plain definition's scale, plain x
// `factors` (kLanes for each coder; the first is 1), and then the least-squares scale for the codes that the best of
// these gives.
template <ScaleType kType, int kVectors, class Coder>
Result SearchAndEncode(const Block& block, float largest_code, float plain, const Coder (&coders)[kVectors],
                       const float (&factors)[kVectors * kLanes], const CodeRows& to) {
  constexpr int kScales = kVectors * kLanes;
  const double square = static_cast<double>(block.unit()) * block.unit();
  const auto storable = [&](float scale) {
    return Storable<kType>(largest_code, scale * block.unit()) * block.factor();
  };
  const auto encode = [&](int coder, float scale) {
    const QuantisationError error = Encode(coders[coder], block, scale, to);
    return Result{{error.squared_error * square, error.squared_values * square}, scale * block.unit(), coder};
  };
  if (block.magnitude() == 0.0F) return encode(0, 1.0F);
  float scales[kScales], errors[kScales];
  plain = storable(plain);
  for (int i = 0; i < kScales; ++i) scales[i] = plain * factors[i];
  ErrorsAt<kVectors>(coders, block, scales, errors);
  int best = 0;
  for (int i = 1; i < kScales; ++i) best = errors[i] < errors[best] ? i : best;
  const int coder = best / static_cast<int>(kLanes);
  float scale = scales[best];
  // Between powers of two there is nothing to refine; and what is exact stays as it is.
  if (kType != ScaleType::kE8M0 && errors[0] != 0.0F) scale = LeastSquaresScale(coders[coder], block, scale);
  scale = storable(scale);
  const Result result = encode(coder, scale);
  // Rounding the scale to one that can be stored may have spoilt it.
  return result.error.squared_error <= errors[0] * square || scale == plain ? result : encode(0, plain);
}

// The factors below are those with the least error, in all, over normal and heavy-tailed (Student's t, 4 degrees of
// freedom) weights in groups of the usual sizes. Eight instead of four gain 0.3 to 0.8 % of the error.
Result QuantiseInt4(const Block& block, const CodeRows& to) {
  // The end with the larger magnitude goes onto -8, so the scale may be negative; 8/7 brings it to 7.
  const float end = block.largest() == block.magnitude() ? block.largest() : block.smallest();
  const IntegerCoder<true> coder{-8, 7, 8};
  constexpr float kClip = 8.0F / 7.0F;
  if (block.columns() <= 128)
    return SearchAndEncode<ScaleType::kBf16, 1>(block, 8, end / -8, {coder}, {1, kClip, 0.945F, 0.885F}, to);
  // The longer a group, the farther out its largest weight, and the more of it is better cut off.
  return SearchAndEncode<ScaleType::kBf16, 2>(block, 8, end / -8, {coder, coder},
                                              {1, kClip, 0.93F, 0.86F, 0.78F, 0.7F, 0.6F, 0.5F}, to);
}

// The weights' range, widened to hold zero, onto the 16 codes; where zero falls between two of them both are tried.
Result QuantiseAsymmetricInt4(const Block& block, const CodeRows& to, uint8_t* zero) {
  const float range = block.largest() - block.smallest();
  const float exact = range == 0.0F ? 0.0F : -block.smallest() * 15.0F / range, near = std::nearbyint(exact);
  const float other = std::min(std::max(near > exact ? near - 1 : near + 1, 0.0F), 15.0F);
  const IntegerCoder<true> coders[2] = {{-near, 15 - near, static_cast<int32_t>(near)},
                                        {-other, 15 - other, static_cast<int32_t>(other)}};
  const Result result = SearchAndEncode<ScaleType::kBf16, 2>(block, 15, range / 15, coders,
                                                             {1, 0.94F, 0.88F, 0.82F, 1.03F, 0.97F, 0.91F, 0.85F}, to);
  *zero = static_cast<uint8_t>(coders[result.coder].offset);
  return result;
}

// `zero` is written where there are zero points.
Result QuantiseBlock(const Storage& storage, const Block& block, const CodeRows& to, uint8_t* zero) {
  const float magnitude = block.magnitude();
  switch (storage.format) {
    case Format::kInt8:
      return SearchAndEncode<ScaleType::kF32, 1>(block, 127, magnitude / 127, {IntegerCoder<false>{-127, 127, 0}},
                                                 {1, 0.992F, 1.008F, 1.023F}, to);
    case Format::kInt4:
      return storage.zero_point ? QuantiseAsymmetricInt4(block, to, zero) : QuantiseInt4(block, to);
    case Format::kNf4:
      // The table has one more value above zero than below: a negative scale turns it round.
      return SearchAndEncode<ScaleType::kBf16, 1>(block, 1, magnitude, {Nf4Coder{}}, {1, 0.92F, -0.94F, -1.02F}, to);
    case Format::kFp8:
      return SearchAndEncode<ScaleType::kF32, 1>(block, 448, magnitude / 448, {Fp8Coder{}}, {1, 1.072F, 1.275F, 1.866F},
                                                 to);
    case Format::kMxfp4:
      // The plain definition is the specification's (section 6.3): the largest magnitude lands between 4 and 8. Its
      // neighbours bring it between 2 and 4, or cut off more.
      return SearchAndEncode<ScaleType::kE8M0, 1>(block, 6, magnitude / 4, {Mxfp4Coder{}}, {1, 2, 0.5F, 4}, to);
    case Format::kBf16:
      break;
  }
  return {};
}

QuantisationError RoundToBf16(const float* values, int64_t count, uint8_t* to) {
  const float limit = FloatFromBf16(0x7f7f);  // the largest
  double error = 0.0, squares = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i] > limit ? limit : values[i] < -limit ? -limit : values[i];
    const Bf16 rounded = Bf16FromFloat(value);
    std::memcpy(to + 2 * i, &rounded, 2);
    const double exact = values[i], off = exact - FloatFromBf16(rounded);
    error += off * off, squares += exact * exact;
  }
  return {error, squares};
}

}  // namespace

QuantisationError Quantise(const Storage& storage, const float* values, int64_t row, int64_t rows, int64_t matrix_rows,
                           int64_t columns, uint8_t* base) {
  const int64_t row_bytes = storage.row_bytes(columns);
  if (storage.format == Format::kBf16) return RoundToBf16(values, rows * columns, base + row * row_bytes);
  const MatrixView view = storage.view(base, matrix_rows, columns);
  const int64_t codes_per_byte = row_bytes < columns ? 2 : 1;
  // The view's addresses lie in the matrix at `base`, which may be written.
  uint8_t* const scales = base + (view.scales - base);
  Block block(std::min(view.group_rows, rows), std::min(view.group, columns));
  QuantisationError sum;
  for (int64_t r = 0; r < rows; r += view.group_rows) {
    const int64_t band = (row + r) / view.group_rows;
    for (int64_t c = 0, group = 0; c < columns; c += view.group, ++group) {
      block.Fill(values + r * columns + c, columns, std::min(view.group_rows, rows - r),
                 std::min(view.group, columns - c));
      uint8_t* const codes = base + (row + r) * row_bytes + c / codes_per_byte;
      uint8_t* const zero = storage.zero_point ? base + (view.zeros - base) + band * view.zero_stride + group : nullptr;
      const Result result = QuantiseBlock(storage, block, {codes, row_bytes}, zero);
      sum.squared_error += result.error.squared_error, sum.squared_values += result.error.squared_values;
      StoreScale(storage.scale_type, result.scale,
                 scales + band * view.scale_stride + group * ScaleBytes(storage.scale_type));
    }
  }
  return sum;
}

}  // namespace kt
