// Weight formats: what the rows of a matrix hold, and the list of decoders.
//
// A weight's value is code x scale: a code of 4, 8 or 16 bits, and one scale for `group` neighbouring columns of
// `group_rows` neighbouring rows. A decoder is a struct with
//   static constexpr bool kScales;                                                  // whether the format has scales
//   static const uint8_t* Address(const MatrixView&, int64_t row, int64_t column);  // where a weight's code is stored
//   template <class Ops> static constexpr bool InPlace();  // whether stored rows are rows of the tier's elements
//   template <class Ops, bool kScaled> static void DecodeRow(const MatrixView&, int64_t row, int64_t column,
//                                                            int64_t count, typename Ops::Element* out);
//   static constexpr int64_t CodeBytes(int64_t columns);
//   static constexpr bool kSpread;
//   template <class Ops> static typename Ops::Step Step(const uint8_t* codes);  // unless kSpread; multiples of kUnit
//   template <class Ops> static typename Ops::Panel Lowest(typename Ops::I codes);  // if kSpread
// DecodeRow turns `count` weights of one row, from `column` on (a multiple of kLeastGroup), into the tier's element
// type: code x scale, or the bare code, which every element type holds exactly. Step and Lowest decode in registers,
// for tiers/stream.inl. All are instantiated once per tier, with that tier's `Ops`, so they may use its vector
// operations.
#pragma once

#include <cstdint>

#include "cpu/numeric.h"

namespace kt {

enum class Format {
  kBf16,   // BF16, no scales
  kInt8,   // [-127, 127], two's complement
  kInt4,   // code - 8, or code - zero; two codes to a byte, the even column in the low half, as in all 4-bit formats
  kNf4,    // the 16 quantiles of a normal distribution of QLoRA (Dettmers et al. 2023), rounded to BF16
  kFp8,    // E4M3 (OCP 8-bit floating point: no infinity)
  kMxfp4,  // E2M1 with scales E8M0 (OCP Microscaling formats 1.0)
};
constexpr int kFormatCount = 6;

// Groups of columns that share a scale are a power of two, of at least this size, or whole rows.
constexpr int64_t kLeastGroup = 32;

enum class ScaleType { kNone, kF32, kBf16, kF16, kE8M0 };

// One expert's matrix: rows in the checkpoint's own order, at any alignment, nothing assumed adjacent.
struct MatrixView {
  const uint8_t* rows = nullptr;
  int64_t row_stride = 0;  // bytes
  int64_t bits = 16;       // of a code
  ScaleType scale_type = ScaleType::kNone;
  const uint8_t* scales = nullptr;  // a row of them for every `group_rows` rows of weights, one for every group of it
  int64_t scale_stride = 0;         // bytes from one row of scales to the next
  const uint8_t* zeros = nullptr;   // int4 with a zero point: one byte for every scale, in the same order; else null
  int64_t zero_stride = 0;          // bytes from one row of zero points to the next
  int64_t group = 0;                // columns that share a scale; a group or block at the end may be short
  int64_t group_rows = 1;           // rows that share a scale
};

static inline int64_t ScaleBytes(ScaleType type) {
  switch (type) {
    case ScaleType::kF32:
      return 4;
    case ScaleType::kBf16:
    case ScaleType::kF16:
      return 2;
    case ScaleType::kE8M0:
      return 1;
    case ScaleType::kNone:
      break;
  }
  return 0;
}

// What turns a column into the number of its group: groups are a power of two long, or span whole rows.
static inline int GroupShift(const MatrixView& w) {
  return (w.group & (w.group - 1)) == 0 ? __builtin_ctzll(static_cast<unsigned long long>(w.group)) : 62;
}

// Row `row`'s scales of `count` groups, from group `first` on, as FP32.
static inline void LoadScales(const MatrixView& w, int64_t row, int64_t first, int64_t count, float* out) {
  const uint8_t* const from = w.scales + row / w.group_rows * w.scale_stride + first * ScaleBytes(w.scale_type);
  switch (w.scale_type) {
    case ScaleType::kF32:
      std::memcpy(out, from, static_cast<size_t>(count) * sizeof(float));
      return;
    case ScaleType::kBf16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, sizeof(bits));
        out[i] = FloatFromBf16(bits);
      }
      return;
    case ScaleType::kF16:
      for (int64_t i = 0; i < count; ++i) out[i] = LoadAsFloat(from, DType::kF16, i);
      return;
    case ScaleType::kE8M0:
      // 2^(code - 127); the smallest is a denormal number, and 255 (not a number) never comes here.
      for (int64_t i = 0; i < count; ++i)
        out[i] = FloatFromBits(from[i] == 0 ? uint32_t{1} << 22 : uint32_t{from[i]} << 23);
      return;
    case ScaleType::kNone:
      return;
  }
}

}  // namespace kt
