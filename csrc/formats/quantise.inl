// Quantising, for units with wider and wider vectors, which all give the same bits: sums are those of kSums lanes,
// whatever a vector holds of them, and products and sums are not fused (-ffp-contract=off). Everything has internal
// linkage, and no std:: function or class is used (see kernels.inl).
#pragma once

#include <cfloat>

#include "formats/coders.inl"
#include "formats/quantise.h"

namespace kt {
namespace {

constexpr int64_t kSums = 16, kParts = kSums / kLanes;  // a part of them is a vector
// Sums over so many weights are FP32, sums of these double.
constexpr int64_t kRun = 1024;

float Least(float a, float b) { return b < a ? b : a; }
float Most(float a, float b) { return a < b ? b : a; }
float Magnitude(float x) { return __builtin_fabsf(x); }

// Sums in lanes, in an order that does not depend on the vectors.
struct Sums {
  F part[kParts] = {};

  float total() const {
    using F4 = float __attribute__((vector_size(16)));
    F4 quarters[4];  // of the lanes
    std::memcpy(quarters, part, sizeof(quarters));
    const F4 sum = (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
};

// The weights that share a scale: rows of `pitch` values, zeros after the columns, times a power of two, `factor`, that
// keeps every number here far from overflow and from denormals.
class Block {
 public:
  Block() = default;
  // `values` is room for the rows of the block, each a multiple of kSums.
  explicit Block(float* values) : values_(values) {}

  void Fill(const float* from, int64_t stride, int64_t rows, int64_t columns) {
    rows_ = rows, columns_ = columns, pitch_ = RoundUp(columns, kSums);
    F low{}, high{};
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = values_ + r * pitch_;
      const auto copy = [&](int64_t c, F value) {
        std::memcpy(row + c, &value, sizeof(value));
        low = Min(low, value);
        high = Max(high, value);
      };
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) copy(c, Load(from + r * stride + c));
      for (; c < pitch_; c += kLanes) {
        F rest{};
        for (int lane = 0; c + lane < columns; ++lane) rest[lane] = from[r * stride + c + lane];
        copy(c, rest);
      }
    }
    FoldLanes(low, high);
    factor_ = unit_ = 1.0F;
    if (magnitude() > 0x1p-40F && magnitude() < 0x1p40F) return;
    if (magnitude() == 0.0F) return;
    int exponent = -__builtin_ilogbf(magnitude());
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    factor_ = __builtin_ldexpf(1.0F, exponent), unit_ = __builtin_ldexpf(1.0F, -exponent);
    for (int64_t i = 0; i < count(); ++i) values_[i] *= factor_;
    smallest_ *= factor_, largest_ *= factor_;
  }

  const float* row(int64_t r) const { return values_ + r * pitch_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t count() const { return rows_ * pitch_; }
  float factor() const { return factor_; }
  float unit() const { return unit_; }          // 1 / factor
  float smallest() const { return smallest_; }  // zero if no weight is below
  float largest() const { return largest_; }    // zero if no weight is above
  float magnitude() const { return Most(-smallest_, largest_); }

 private:
  void FoldLanes(F low, F high) {
    using F4 = float __attribute__((vector_size(16)));
    F4 lows[kLanes / 4], highs[kLanes / 4];
    std::memcpy(lows, &low, sizeof(low));
    std::memcpy(highs, &high, sizeof(high));
    for (int64_t i = 1; i < kLanes / 4; ++i) {
      lows[0] = lows[i] < lows[0] ? lows[i] : lows[0];
      highs[0] = highs[i] > highs[0] ? highs[i] : highs[0];
    }
    smallest_ = Least(Least(lows[0][0], lows[0][1]), Least(lows[0][2], lows[0][3]));
    largest_ = Most(Most(highs[0][0], highs[0][1]), Most(highs[0][2], highs[0][3]));
  }

  float* values_ = nullptr;
  int64_t rows_ = 0, columns_ = 0, pitch_ = 0;
  float factor_ = 1.0F, unit_ = 1.0F, smallest_ = 0.0F, largest_ = 0.0F;
};

// A scale near `scale` that the type can store, never zero, and such that kLargestCode x scale is finite. E8M0 is
// rounded down.
template <ScaleType kType, int kLargestCode>
float Storable(float scale) {
  constexpr float limit = FLT_MAX / kLargestCode * (1.0F - 0x1p-23F);
  scale = Least(Most(scale, -limit), limit);
  switch (kType) {
    case ScaleType::kBf16: {
      Bf16 bits = Bf16FromFloat(scale);
      if (Magnitude(FloatFromBf16(bits)) > limit) --bits;
      if ((bits & 0x7fffu) == 0) ++bits;
      return FloatFromBf16(bits);
    }
    case ScaleType::kE8M0:
      return Most(FloatFromBits(BitsFromFloat(scale) & 0x7f800000u), 0x1p-127F);
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

// Scales that are tried at once, and blocks that are quantised side by side: each step of one block waits for the one
// before, so a CPU is busy only with the same step of several.
constexpr int kTries = 4, kBlocks = 16;

// Values that a block of a band has room for, and how many blocks are worth having side by side: they should stay in
// the first-level cache.
int64_t GroupRoom(const MatrixView& view, int64_t rows, int64_t columns) {
  return rows * RoundUp(Smaller(view.group, columns), kSums);
}
int MostBlocks(const MatrixView& view) { return view.group_rows == 1 && view.group <= 256 ? kBlocks : 1; }

// The error of the nearest codes, at kScales scales at once.
template <int kScales, class Coder>
void ErrorsAt(const Coder& coder, const Block& block, const float* scales, float* errors) {
  Sums sums[kScales];
  const float* const values = block.row(0);
  const int64_t count = block.count();
  F scale[kScales], inverse[kScales];
  for (int s = 0; s < kScales; ++s) scale[s] = Broadcast(scales[s]), inverse[s] = Broadcast(1.0F / scales[s]);
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t end = Smaller(first + kRun, count);
    for (int64_t p = 0; p < kParts; ++p) {
      F error[kScales] = {};
      for (int64_t i = first + p * kLanes; i < end; i += kSums) {
        const F value = Load(values + i);
        for (int s = 0; s < kScales; ++s) {
          const F off = value - coder.Nearest(value * inverse[s]) * scale[s];
          error[s] += off * off;
        }
      }
      for (int s = 0; s < kScales; ++s) sums[s].part[p] += error[s];
    }
  }
  for (int s = 0; s < kScales; ++s) errors[s] = sums[s].total();
}

// The least-squares scale for the nearest codes q at a scale, <w, q> / <q, q>.
template <class Coder>
float LeastSquaresScale(const Coder& coder, const Block& block, float scale) {
  const F inverse = Broadcast(1.0F / scale);
  const float* const values = block.row(0);
  const int64_t count = block.count();
  double products = 0.0, squares = 0.0;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t end = Smaller(first + kRun, count);
    Sums product, square;
    for (int64_t i = first; i < end; i += kSums) {
      for (int64_t p = 0; p < kParts; ++p) {
        const F value = Load(values + i + p * kLanes), q = coder.Nearest(value * inverse);
        product.part[p] += value * q, square.part[p] += q * q;
      }
    }
    products += product.total(), squares += square.total();
  }
  return squares == 0.0 ? scale : static_cast<float>(products / squares);
}

// Where a block's codes go.
struct CodeRows {
  uint8_t* first;
  int64_t stride;  // bytes
};

// The low bits of a vector's codes as bytes, or two to a byte.
template <bool kFourBit>
void StoreCodes(I codes, uint8_t* to) {
  if constexpr (kFourBit) {
    using Pairs = uint64_t __attribute__((vector_size(4 * kLanes)));
    using Bytes = uint8_t __attribute__((vector_size(kLanes / 2)));
    Pairs pairs = reinterpret_cast<Pairs>(codes & 0xf);
    pairs |= pairs >> 28;
    const Bytes bytes = __builtin_convertvector(pairs, Bytes);
    std::memcpy(to, &bytes, sizeof(bytes));
  } else {
    using Bytes = uint8_t __attribute__((vector_size(kLanes)));
    const Bytes bytes = __builtin_convertvector(codes, Bytes);
    std::memcpy(to, &bytes, sizeof(bytes));
  }
}

// Writes the codes of a block.
template <class Coder>
QuantisationError Encode(const Coder& coder, const Block& block, float scale, const CodeRows& to) {
  constexpr int64_t kPerByte = Coder::kFourBit ? 2 : 1;
  const F scale_F = Broadcast(scale), inverse = Broadcast(1.0F / scale);
  double error = 0.0, squares = 0.0;
  for (int64_t r = 0; r < block.rows(); ++r) {
    const float* const values = block.row(r);
    uint8_t* const bytes = to.first + r * to.stride;
    for (int64_t c = 0; c < block.columns(); c += kRun) {
      const int64_t end = Smaller(c + kRun, block.columns());
      Sums errors, values_squared;
      for (int64_t i = c; i < end; i += kSums) {
        uint8_t some[kSums];
        uint8_t* const codes = i + kSums <= end ? bytes + i / kPerByte : some;
        for (int64_t p = 0; p < kParts; ++p) {
          I code;
          const F value = Load(values + i + p * kLanes), q = coder.Nearest(value * inverse, &code);
          const F off = value - q * scale_F;
          errors.part[p] += off * off, values_squared.part[p] += value * value;
          StoreCodes<Coder::kFourBit>(code, codes + p * kLanes / kPerByte);
        }
        if (codes != some) continue;
        if (Coder::kFourBit && (end - i) % 2 != 0) some[(end - i) / 2] &= 0xf;  // the half byte at an odd end is zero
        std::memcpy(bytes + i / kPerByte, some, static_cast<size_t>((end - i + kPerByte - 1) / kPerByte));
      }
      error += errors.total(), squares += values_squared.total();
    }
  }
  return {error, squares};
}

struct Result {
  QuantisationError error;
  float scale = 1.0F;
  int coder = 0;
};

// How a block's scale is searched. Tried are `plain`, the plain definition's scale, plain x `factors` (kTries for each
// coder; the first is 1), and then the least-squares scale for the codes that the best of these gives.
template <ScaleType kScaleType, int kLargest, int kCoderCount, class CoderClass>
struct Search {
  using Coder = CoderClass;
  static constexpr ScaleType kType = kScaleType;
  static constexpr int kLargestCode = kLargest, kCoders = kCoderCount;

  float plain;
  Coder coders[kCoders];
  float factors[kCoders * kTries];
};

// Which is the least; the first of several. Branches here could not be predicted.
int LeastOf(const float* errors, int count) {
  float least = errors[0];
  int best = 0;
  for (int i = 1; i < count; ++i) {
    const int is_less = -static_cast<int>(errors[i] < least);  // all bits
    best = (best & ~is_less) | (i & is_less);
    least = Least(least, errors[i]);
  }
  return best;
}

// Finds the scales of some blocks, and writes their codes.
template <class Searched>
void SearchAndEncode(const Block* blocks, Searched* searches, const CodeRows* to, int count, Result* results) {
  constexpr int kScales = Searched::kCoders * kTries;
  float scale[kBlocks], plain_error[kBlocks];
  int coder[kBlocks];
  const auto storable = [&](int b, float wanted) {
    return Storable<Searched::kType, Searched::kLargestCode>(wanted * blocks[b].unit()) * blocks[b].factor();
  };
  for (int b = 0; b < count; ++b) {
    Searched& search = searches[b];
    search.plain = storable(b, search.plain);
    float scales[kScales], errors[kScales];
    for (int i = 0; i < kScales; ++i) scales[i] = search.plain * search.factors[i];
    for (int c = 0; c < Searched::kCoders; ++c)
      ErrorsAt<kTries>(search.coders[c], blocks[b], scales + c * kTries, errors + c * kTries);
    const int best = LeastOf(errors, kScales);
    scale[b] = scales[best], coder[b] = best / kTries, plain_error[b] = errors[0];
  }
  for (int b = 0; b < count; ++b) {
    // Between powers of two there is nothing to refine; and what is exact stays as it is.
    if (Searched::kType != ScaleType::kE8M0 && plain_error[b] != 0.0F)
      scale[b] = LeastSquaresScale(searches[b].coders[coder[b]], blocks[b], scale[b]);
    scale[b] = storable(b, scale[b]);
  }
  for (int b = 0; b < count; ++b) {
    const Block& block = blocks[b];
    const double square = static_cast<double>(block.unit()) * block.unit();
    const auto encode = [&](int with, float at) {
      const QuantisationError error = Encode(searches[b].coders[with], block, at, to[b]);
      return Result{{error.squared_error * square, error.squared_values * square}, at * block.unit(), with};
    };
    if (block.magnitude() == 0.0F) {
      results[b] = encode(0, 1.0F);
      continue;
    }
    results[b] = encode(coder[b], scale[b]);
    // Rounding the scale to one that can be stored may have spoilt it.
    if (results[b].error.squared_error > plain_error[b] * square && scale[b] != searches[b].plain)
      results[b] = encode(0, searches[b].plain);
  }
}

// The factors below are those with the least error, in all, over normal and heavy-tailed (Student's t, 4 degrees of
// freedom) weights in groups of the usual sizes. Eight instead of four gain 0.3 to 0.8 % of the error.
struct Int8Search {
  static Search<ScaleType::kF32, 127, 1, IntegerCoder<false>> Of(const Block& block) {
    return {block.magnitude() / 127, {{-127, 127, 0}}, {1, 0.992F, 1.008F, 1.023F}};
  }
};

struct Int4Search {
  static constexpr IntegerCoder<true> kCoder{-8, 7, 8};
  static constexpr float kClip = 8.0F / 7.0F;

  // The end with the larger magnitude goes onto -8, so the scale may be negative; 8/7 brings it to 7.
  static float Plain(const Block& block) {
    return (block.largest() == block.magnitude() ? block.largest() : block.smallest()) / -8;
  }
  static Search<ScaleType::kBf16, 8, 1, IntegerCoder<true>> Of(const Block& block) {
    return {Plain(block), {kCoder}, {1, kClip, 0.945F, 0.885F}};
  }
};

// The longer a group, the farther out its largest weight, and the more of it is better cut off.
struct LongInt4Search {
  static Search<ScaleType::kBf16, 8, 2, IntegerCoder<true>> Of(const Block& block) {
    return {Int4Search::Plain(block),
            {Int4Search::kCoder, Int4Search::kCoder},
            {1, Int4Search::kClip, 0.93F, 0.86F, 0.78F, 0.7F, 0.6F, 0.5F}};
  }
};

// The weights' range, widened to hold zero, onto the 16 codes; where zero falls between two of them both are tried.
struct AsymmetricInt4Search {
  static Search<ScaleType::kBf16, 15, 2, IntegerCoder<true>> Of(const Block& block) {
    const float range = block.largest() - block.smallest();
    const float exact = range == 0.0F ? 0.0F : -block.smallest() * 15.0F / range, near = __builtin_nearbyintf(exact);
    const float other = Least(Most(near > exact ? near - 1 : near + 1, 0.0F), 15.0F);
    return {range / 15,
            {{-near, 15 - near, static_cast<int32_t>(near)}, {-other, 15 - other, static_cast<int32_t>(other)}},
            {1, 0.94F, 0.88F, 0.82F, 1.03F, 0.97F, 0.91F, 0.85F}};
  }
};

// The table has one more value above zero than below: a negative scale turns it round.
struct Nf4Search {
  static Search<ScaleType::kBf16, 1, 1, Nf4Coder> Of(const Block& block) {
    return {block.magnitude(), {{}}, {1, 0.92F, -0.94F, -1.02F}};
  }
};

struct Fp8Search {
  static Search<ScaleType::kF32, 448, 1, Fp8Coder> Of(const Block& block) {
    return {block.magnitude() / 448, {{}}, {1, 1.072F, 1.275F, 1.866F}};
  }
};

// The plain definition is the specification's (section 6.3): the largest magnitude lands between 4 and 8. Its
// neighbours bring it between 2 and 4, or cut off more.
struct Mxfp4Search {
  static Search<ScaleType::kE8M0, 6, 1, Mxfp4Coder> Of(const Block& block) {
    return {block.magnitude() / 4, {{}}, {1, 2, 0.5F, 4}};
  }
};

// A matrix that rows of a source go to.
struct Target {
  const Storage& storage;
  MatrixView view;
  uint8_t* base;
  int64_t row_bytes;

  // The view's addresses lie in the matrix at `base`, which may be written.
  uint8_t* written(const uint8_t* address) const { return base + (address - base); }
};

// Quantises `rows` rows that share scales, the first of which is row `row` of the matrix.
template <class Searching>
QuantisationError QuantiseBand(const Target& target, const float* values, int64_t row, int64_t rows, int64_t columns,
                               float* room) {
  using Searched = decltype(Searching::Of(Block(nullptr)));
  const MatrixView& view = target.view;
  const int64_t band = row / view.group_rows, codes_per_byte = Searched::Coder::kFourBit ? 2 : 1;
  const int64_t scale_bytes = ScaleBytes(target.storage.scale_type), group_room = GroupRoom(view, rows, columns);
  uint8_t* const scales = target.written(view.scales) + band * view.scale_stride;
  uint8_t* const zeros = target.storage.zero_point ? target.written(view.zeros) + band * view.zero_stride : nullptr;
  QuantisationError sum;
  int64_t group = 0;
  for (int64_t c = 0; c < columns;) {
    Block blocks[kBlocks];
    Searched searches[kBlocks];
    CodeRows to[kBlocks];
    Result results[kBlocks];
    int count = 0;
    for (; count < MostBlocks(view) && c < columns; ++count, c += view.group) {
      blocks[count] = Block(room + count * group_room);
      blocks[count].Fill(values + c, columns, rows, Smaller(view.group, columns - c));
      searches[count] = Searching::Of(blocks[count]);
      to[count] = {target.base + row * target.row_bytes + c / codes_per_byte, target.row_bytes};
    }
    SearchAndEncode(blocks, searches, to, count, results);
    for (int b = 0; b < count; ++b, ++group) {
      sum.squared_error += results[b].error.squared_error, sum.squared_values += results[b].error.squared_values;
      StoreScale(target.storage.scale_type, results[b].scale, scales + group * scale_bytes);
      if constexpr (Searched::Coder::kFourBit && Searched::kCoders == 2) {
        if (zeros != nullptr) zeros[group] = static_cast<uint8_t>(searches[b].coders[results[b].coder].offset);
      }
    }
  }
  return sum;
}

using BandFn = QuantisationError (*)(const Target& target, const float* values, int64_t row, int64_t rows,
                                     int64_t columns, float* room);

BandFn BandOf(const Storage& storage, int64_t group) {
  switch (storage.format) {
    case Format::kInt8:
      return QuantiseBand<Int8Search>;
    case Format::kInt4:
      return storage.zero_point ? QuantiseBand<AsymmetricInt4Search>
             : group <= 128     ? QuantiseBand<Int4Search>
                                : QuantiseBand<LongInt4Search>;
    case Format::kNf4:
      return QuantiseBand<Nf4Search>;
    case Format::kFp8:
      return QuantiseBand<Fp8Search>;
    case Format::kMxfp4:
      return QuantiseBand<Mxfp4Search>;
    case Format::kBf16:
      break;
  }
  return nullptr;
}

// As `Quantise`, of formats with scales. `room` is for the values of the blocks that are quantised side by side.
QuantisationError QuantiseGroups(const Storage& storage, const float* values, int64_t row, int64_t rows,
                                 int64_t matrix_rows, int64_t columns, uint8_t* base, float* room) {
  const Target target{storage, storage.view(base, matrix_rows, columns), base, storage.row_bytes(columns)};
  const BandFn quantise = BandOf(storage, Smaller(target.view.group, columns));
  QuantisationError sum;
  for (int64_t r = 0; r < rows; r += target.view.group_rows) {
    const int64_t some = Smaller(target.view.group_rows, rows - r);
    const QuantisationError error = quantise(target, values + r * columns, row + r, some, columns, room);
    sum.squared_error += error.squared_error, sum.squared_values += error.squared_values;
  }
  return sum;
}

}  // namespace
}  // namespace kt
