// Quantising, for units with wider and wider vectors, which all give the same bits: sums are those of kSums lanes,
// whatever a vector holds of them, and products and sums are not fused (-ffp-contract=off). Everything has internal
// linkage, and no std:: function or class is used (see kernels.inl).
#pragma once

#include <cfloat>

#include "formats/quantise.h"
#include "formats/searches.inl"

namespace kt {
namespace {

// Sums over so many weights are FP32, sums of these double.
constexpr int64_t kRun = 1024;
// Blocks that are quantised side by side: each step of one block waits for the one before, so a CPU is busy only with
// the same step of several.
constexpr int kBlocks = 16;

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
    search.plain = blocks[b].magnitude() == 0.0F ? 1.0F : storable(b, search.plain);
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
    results[b] = encode(coder[b], scale[b]);
    // Rounding the scale to one that can be stored may have spoilt it.
    if (results[b].error.squared_error > plain_error[b] * square && scale[b] != searches[b].plain)
      results[b] = encode(0, searches[b].plain);
  }
}

uint8_t ZeroPoint(const IntegerCoder<true>& coder) { return static_cast<uint8_t>(coder.offset); }
template <class Coder>
uint8_t ZeroPoint(const Coder&) {
  return 0;
}

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
      if (zeros != nullptr) zeros[group] = ZeroPoint(searches[b].coders[results[b].coder]);
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
