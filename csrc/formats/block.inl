// The weights that share a scale, and sums over them. Everything has internal linkage (see quantise.inl).
#pragma once

#include "formats/coders.inl"

namespace kt {
namespace {

constexpr int64_t kSums = 16, kParts = kSums / kLanes;  // a part of them is a vector

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

}  // namespace
}  // namespace kt
