// Products of integers: 8-bit weight codes times tokens that are quantised on the way (tier.h says how operands lie).
// Sums of such products are exact, so that every tier gets the same ones. Included by kernels.inl.
//
// What `Ops` provides beside its FP32 vectors:
//  - I, a vector of kLanes 32-bit integers; LoadInts StoreInts ToFloat ToInts; StoreInt8(whole F, out)
//  - Bytes, a quad for every lane; LoadTokens, BroadcastWeights(a quad), AddProducts(I sum, Bytes weights, Bytes
//    tokens); KeepInts(I&), KeepBytes(Bytes&); kInt8Rows, the rows of C that stay in registers
#pragma once

#include "tiers/convert.inl"
#include "tiers/tier.h"

namespace kt {

template <class Ops>
struct Int8Product {
  using F = typename Ops::F;
  using I = typename Ops::I;
  using Rows = Convert<Ops>;
  static constexpr int kLanes = Ops::kLanes, kVectorsAtOnce = Ops::kTileVectors;

  // ---- weights ----

  static void DecodeInt8(const MatrixView& w, int64_t row, int rows, int64_t column, int64_t columns, uint8_t* a,
                         int64_t a_stride) {
    for (int r = 0; r < rows; ++r, a += a_stride) {
      const uint8_t* const codes = w.rows + (row + r) * w.row_stride + column;
      for (int64_t i = 0; i < columns; ++i) a[i] = codes[i] ^ kWeightOffset;  // as good as adding it
      std::memset(a + columns, 0, RoundUp(columns, kQuad) - columns);
    }
  }

  static void DecodeInt4(const MatrixView& w, int64_t row, int rows, int64_t column, int64_t columns, uint8_t* a,
                         int64_t a_stride) {
    const int64_t run = w.zeros == nullptr ? columns : Smaller(w.group, columns);  // columns that share a zero point
    for (int r = 0; r < rows; ++r, a += a_stride) {
      const uint8_t* const codes = w.rows + (row + r) * w.row_stride + column / 2;
      const uint8_t* zero = nullptr;
      if (w.zeros != nullptr) zero = w.zeros + (row + r) / w.group_rows * w.zero_stride + column / w.group;
      for (int64_t i = 0; i < columns; i += run) {
        const int offset = kWeightOffset - (zero == nullptr ? 8 : *zero++);
        WidenInt4(codes + i / 2, Smaller(run, columns - i), static_cast<uint16_t>(offset), a + i);
      }
      std::memset(a + columns, 0, RoundUp(columns, kQuad) - columns);
    }
  }

  static void WidenInt4(const uint8_t* __restrict codes, int64_t count, uint16_t offset, uint8_t* __restrict out) {
    constexpr int kBytes = kLeastGroup / 2;  // a length that compilers know makes vectors of the loop
    int64_t i = 0;
    for (; i + kLeastGroup <= count; i += kLeastGroup, codes += kBytes, out += kLeastGroup) {
      uint16_t both[kBytes];
      for (int j = 0; j < kBytes; ++j) both[j] = WidenByte(codes[j], offset);
      std::memcpy(out, both, sizeof(both));
    }
    for (; i < count; i += 2, ++codes, out += 2) {
      const uint16_t both = WidenByte(*codes, offset);
      std::memcpy(out, &both, i + 1 < count ? 2 : 1);
    }
  }

  // Two bytes of two codes, the offset added to each: nothing is carried from one to the other.
  static uint16_t WidenByte(uint8_t codes, uint16_t offset) {
    return static_cast<uint16_t>(((codes | codes << 4) & 0x0f0f) + (offset << 8 | offset));
  }

  // ---- tokens ----

  static void PackPanel(const void* const* rows, DType type, int tokens, int width, int64_t count, int64_t group,
                        void* panel) {
    char* out = static_cast<char*>(panel);
    alignas(64) int8_t codes[kLanes][kMostTokenGroup];
    for (int64_t k = 0; k < count; k += group) {
      const int64_t depth = Smaller(group, count - k), padded = RoundUp(depth, kQuad);
      float* const scales = reinterpret_cast<float*>(out);
      int32_t* const starts = reinterpret_cast<int32_t*>(scales + width);
      float* const quads = reinterpret_cast<float*>(starts + width);
      for (int first = 0; first < width; first += kLanes) {
        const int some = static_cast<int>(Smaller(kLanes, tokens - first));
        const char* sources[kLanes];
        for (int t = 0; t < some; ++t) {
          sources[t] = static_cast<const char*>(rows[first + t]) + k * DTypeBytes(type);
        }
        Quantise(sources, type, some, depth, codes, scales + first, starts + first);
        for (int64_t d = 0; d < padded; d += kQuad * kLanes) {
          F block[kLanes];
          for (int t = 0; t < kLanes; ++t) block[t] = Ops::Load(reinterpret_cast<const float*>(codes[t] + d));
          Ops::Transpose(block);
          const int64_t steps = Smaller(kLanes, (padded - d) / kQuad);
          for (int64_t s = 0; s < steps; ++s) Ops::Store(quads + (d / kQuad + s) * width + first, block[s]);
        }
      }
      out += (kTokenHeader + padded) * width;
    }
  }

  // One group of `tokens` rows: codes, padded with zeros, scales and starts of kLanes tokens, zeros where there is
  // none.
  static void Quantise(const char* const* sources, DType type, int tokens, int64_t depth,
                       int8_t (&codes)[kLanes][kMostTokenGroup], float* scales, int32_t* starts) {
    F largest[kLanes], broken[kLanes], sum[kLanes];
    for (int t = 0; t < kLanes; ++t) {
      largest[t] = Ops::Zero(), broken[t] = Ops::Zero(), sum[t] = Ops::Zero();
      if (t >= tokens) continue;
      for (int64_t i = 0; i < depth; i += kLanes) {
        const F x = Rows::LoadTail(sources[t], type, i, depth);
        largest[t] = Ops::Max(largest[t], Ops::Abs(x));
        broken[t] = Ops::Fma(x, Ops::Zero(), broken[t]);  // not a number if x is infinite or none
      }
    }
    Ops::Transpose(largest);
    Ops::Transpose(broken);
    F most = largest[0], none = broken[0];
    for (int i = 1; i < kLanes; ++i) most = Ops::Max(most, largest[i]), none = Ops::Add(none, broken[i]);
    // A group with infinities or NaNs has NaN for its scale, and so makes NaNs of all that it contributes to. One of
    // numbers too small for 1 / scale to be finite becomes zeros.
    Ops::Store(scales, Ops::Add(Ops::Mul(most, Ops::Set(1.0F / 127)), none));
    alignas(64) float inverse[kLanes];
    Ops::Store(inverse,
               Ops::SelectNegative(Ops::Sub(most, Ops::Set(1e-36F)), Ops::Zero(), Ops::Div(Ops::Set(127.0F), most)));
    const F low = Ops::Set(-127.0F), high = Ops::Set(127.0F);
    for (int t = 0; t < kLanes; ++t) {
      for (int64_t i = 0; i < RoundUp(depth, kQuad); i += kLanes) {
        F code = Ops::Zero();
        if (t < tokens) {
          code = Ops::Mul(Rows::LoadTail(sources[t], type, i, depth), Ops::Set(inverse[t]));
          code = Ops::Round(Ops::Min(Ops::Max(code, low), high));
          sum[t] = Ops::Add(sum[t], code);
        }
        Ops::StoreInt8(code, codes[t] + i);
      }
    }
    Ops::Transpose(sum);
    for (int i = 1; i < kLanes; ++i) sum[0] = Ops::Add(sum[0], sum[i]);
    Ops::StoreInts(starts, Ops::ToInts(Ops::Mul(sum[0], Ops::Set(-kWeightOffset))));
  }

  // ---- products ----

  // Scales of a row's weights: one for `token_groups` groups of the tokens.
  struct Scales {
    const float* values;
    int64_t row_stride, token_groups;
  };

  struct Depth {
    int64_t columns, group;
  };

  template <int kRows, int kVectors>
  static void AddRun(const uint8_t* a, int64_t a_stride, const char* quads, int64_t s, int64_t end,
                     I (&sum)[kRows][kVectors]) {
    for (; s < end; ++s) {
      typename Ops::Bytes tokens[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tokens[v] = Ops::LoadTokens(quads + (s * kVectors + v) * kLanes * kQuad);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const typename Ops::Bytes weights = Ops::BroadcastWeights(a + m * a_stride + s * kQuad);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] = Ops::AddProducts(sum[m][v], weights, tokens[v]);
      }
    }
  }

  // The sums of each group are scaled into C, which stays in L1.
  template <int kRows, int kVectors>
  static void Tile(const uint8_t* a, int64_t a_stride, const char* panel, const Depth& depth, const Scales& scales,
                   float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    constexpr int kWidth = kVectors * kLanes;
    const float* scale = scales.values;
    int64_t left = scales.token_groups;
    for (int64_t k = 0; k < depth.columns; k += depth.group, accumulate = true) {
      const int64_t steps = CeilDiv(Smaller(depth.group, depth.columns - k), kQuad);
      const float* const token_scales = reinterpret_cast<const float*>(panel);
      const int32_t* const starts = reinterpret_cast<const int32_t*>(token_scales + kWidth);
      I sum[kRows][kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const I start = Ops::LoadInts(starts + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) sum[m][v] = start;
      }
      // Asking ahead is left out of the innermost loop: with it, sums would not stay in registers.
      if (ahead.lines > 0) AskAhead(ahead, steps);
      AddRun<kRows, kVectors>(a + k, a_stride, panel + kTokenHeader * kWidth, 0, steps, sum);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const F of_row = Ops::Set(scale[m * scales.row_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* const to = c + m * c_stride + v * kLanes;
          const F factor = Ops::Mul(of_row, Ops::Load(token_scales + v * kLanes)), value = Ops::ToFloat(sum[m][v]);
          Ops::Store(to, accumulate ? Ops::Fma(value, factor, Ops::Load(to)) : Ops::Mul(value, factor));
        }
      }
      panel += (kTokenHeader + steps * kQuad) * kWidth;
      if (--left == 0) left = scales.token_groups, ++scale;
    }
  }

  template <int kRows, int kVectors>
  static void Multiply(const uint8_t* a, int64_t a_stride, int64_t rows, const char* panel, const Depth& depth,
                       Scales scales, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    for (; rows >= kRows; rows -= kRows, a += kRows * a_stride, c += kRows * c_stride) {
      Tile<kRows, kVectors>(a, a_stride, panel, depth, scales, c, c_stride, accumulate, ahead);
      scales.values += kRows * scales.row_stride;
    }
    if constexpr (kRows > 1) {
      Multiply<kRows - 1, kVectors>(a, a_stride, rows, panel, depth, scales, c, c_stride, accumulate, ahead);
    }
  }

  template <int kVectors>
  static void MultiplyWidth(int vectors, const uint8_t* a, int64_t a_stride, int64_t rows, const char* panel,
                            const Depth& depth, const Scales& scales, float* c, int64_t c_stride, bool accumulate,
                            Ahead& ahead) {
    if (vectors == kVectors) {
      return Multiply<Ops::kInt8Rows, kVectors>(a, a_stride, rows, panel, depth, scales, c, c_stride, accumulate,
                                                ahead);
    }
    if constexpr (kVectors > 1) {
      MultiplyWidth<kVectors - 1>(vectors, a, a_stride, rows, panel, depth, scales, c, c_stride, accumulate, ahead);
    }
  }

  static void MultiplyAll(const uint8_t* a, int64_t a_stride, int64_t rows, const void* panel, int width, int64_t depth,
                          int64_t token_group, const RowScales& scales, float* c, int64_t c_stride, bool accumulate,
                          Ahead& ahead) {
    const Scales of_rows{scales.values, scales.row_stride, CeilDiv(Smaller(scales.group, depth), token_group)};
    MultiplyWidth<kVectorsAtOnce>(width / kLanes, a, a_stride, rows, static_cast<const char*>(panel),
                                  {depth, token_group}, of_rows, c, c_stride, accumulate, ahead);
  }

  // As Kernels::RegisterProducts.
  static double RegisterProducts(int64_t steps) {
    constexpr int kSums = Ops::kInt8Rows * kVectorsAtOnce;
    alignas(64) static constexpr int32_t kStart[kLanes] = {};
    typename Ops::Bytes zero = Ops::LoadTokens(kStart);
    I sum[kSums];
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = Ops::LoadInts(kStart);
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) {
        Ops::KeepBytes(zero);  // or one product would do for all sums
        sum[i] = Ops::AddProducts(sum[i], zero, zero);
        Ops::KeepInts(sum[i]);
      }
    }
    float total = 0.0F;
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) total += Ops::Sum(Ops::ToFloat(sum[i]));
    volatile float sink = total;
    (void)sink;
    return 2.0 * static_cast<double>(steps) * kSums * kLanes * kQuad;
  }
};

}  // namespace kt
