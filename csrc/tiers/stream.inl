// Products for few tokens, which wait for memory: codes go from their rows to the multipliers in registers, without
// being stored as elements in between. Included by kernels.inl.
#pragma once

#include "cpu/numeric.h"
#include "formats/format.h"
#include "tiers/convert.inl"
#include "tiers/tier.h"

namespace kt {

template <class Ops>
struct Stream {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  using Panel = typename Ops::Panel;
  static constexpr int kLanes = Ops::kLanes, kPair = Ops::kPair, kUnits = kLanes * kPair;  // elements in a vector
  static constexpr int kMostTokens = MostFewRows(kLanes);

  // Weights come in blocks, each with one scale for every lane: kSteps steps of columns in order, which share their
  // scale. Or, with codes of four bits, eight of them in every 32 bits, as they lie: taking these apart one after the
  // other costs a shift and a permute, but lane l then meets columns 8 l to 8 l + 7, and tokens must be spread alike.
  static constexpr int kStep = 2 * kLanes, kBlock = 8 * kLanes;

  // Columns of all tokens that are spread at a time: at most 64 KB, which lie in the second-level cache.
  static constexpr int64_t kMostColumns = 16384;

  // Rows are asked for so many bytes ahead: a core's own prefetcher does not keep enough lines under way.
  static constexpr int64_t kFarBytes = 4096;

  template <class Format>
  static void DotRows(const MatrixView& w, int64_t row, int rows, int64_t columns, const void* x_rows, int64_t x_stride,
                      int tokens, int64_t expert_rows, float* c, int64_t c_stride) {
    const Element* const x = static_cast<const Element*>(x_rows);
    // The order of sums, and so the pieces, may not depend on how many of an expert's tokens come in this call.
    const int64_t most = expert_rows == 1 ? kMostColumns : kMostColumns / kMostTokens / kBlock * kBlock;
    for (int64_t k = 0; k < columns; k += most) {
      const Piece piece{w, row, rows, k, Smaller(most, columns - k), c, c_stride};
      if constexpr (Format::kSpread) {
        alignas(64) Element spread[kMostColumns];
        alignas(64) float sums[kMostColumns / kBlock * kLanes];
        const int64_t stride = RoundUp(piece.columns, kBlock), sum_stride = stride / kBlock * kLanes;
        for (int t = 0; t < tokens; ++t)
          Spread(x + t * x_stride + k, piece.columns, spread + t * stride, sums + t * sum_stride);
        ForTokens<Format, 1>(piece, {spread, stride, sums, sum_stride}, tokens);
      } else if (!Format::kScales || w.group >= kBlock) {
        ForTokens<Format, kBlock / kStep>(piece, {x + k, x_stride, nullptr, 0}, tokens);
      } else {
        ForTokens<Format, 1>(piece, {x + k, x_stride, nullptr, 0}, tokens);
      }
    }
  }

 private:
  // Columns [column, column + columns) of rows [row, row + rows), and where the results go.
  struct Piece {
    const MatrixView& w;
    int64_t row;
    int rows;
    int64_t column, columns;
    float* c;
    int64_t c_stride;
  };

  struct TokenRows {
    const Element* x;
    int64_t stride;
    const float* sums;  // of spread tokens: for each block, the sums of the columns that the lanes meet
    int64_t sum_stride;
  };

  // Turns every block of columns around: what the lanes meet first, in the order of the lanes, then what they meet
  // second. Taking the even elements of a run apart from the odd ones, again and again, leaves every kCodes-th
  // together.
  static void Spread(const Element* x, int64_t columns, Element* out, float* sums) {
    constexpr int kCodes = kBlock / kUnits;
    alignas(64) Element ones[kUnits];
    alignas(64) float values[kUnits];
    for (float& value : values) value = 1.0F;
    Convert<Ops>::ConvertRow(reinterpret_cast<const char*>(values), DType::kF32, kUnits, ones);
    for (int64_t k = 0; k < columns; k += kBlock, out += kBlock, sums += kLanes) {
      alignas(64) Element last[kBlock] = {};
      const Element* from = x + k;
      if (columns - k < kBlock) {
        std::memcpy(last, from, static_cast<size_t>(columns - k) * sizeof(Element));
        from = last;
      }
      Panel run[kCodes], apart[kCodes];
#pragma GCC unroll 8
      for (int i = 0; i < kCodes; ++i) run[i] = Ops::LoadPanel(from + i * kUnits);
#pragma GCC unroll 4
      for (int runs = 1; runs < kCodes; runs *= 2) {  // run r is run[r], run[r + runs], ...
#pragma GCC unroll 8
        for (int i = 0; i < kCodes / 2; ++i) {
          const int r = i % runs, n = i / runs * 2 * runs;
          Ops::TakeApart(run[r + n], run[r + n + runs], &apart[r + n], &apart[r + n + runs]);
        }
        std::memcpy(&run, &apart, sizeof(run));
      }
      F sum = Ops::Zero();
#pragma GCC unroll 8
      for (int i = 0; i < kCodes; ++i) {
        Ops::StorePanel(out + i * kUnits, run[i]);
        sum = Ops::MultiplyAdd(sum, Ops::LoadPanel(ones), run[i]);
      }
      Ops::Store(sums, sum);
    }
  }

  template <class Format, int kSteps, int kTokens = kMostTokens>
  static void ForTokens(const Piece& piece, const TokenRows& x, int tokens) {
    if (tokens == kTokens) return ForRows<Format, kSteps, kTokens>(piece, x);
    if constexpr (kTokens > 1) ForTokens<Format, kSteps, kTokens - 1>(piece, x, tokens);
  }

  template <class Format, int kSteps, int kTokens>
  static void ForRows(const Piece& piece, const TokenRows& x) {
    // In the order of memory where pieces are whole rows.
    const int64_t far = CeilDiv(kFarBytes, Format::CodeBytes(piece.columns)) * piece.w.row_stride;
    F sums[kTokens][kLanes];
    for (int first = 0; first < piece.rows; first += kLanes) {
      const int count = static_cast<int>(Smaller(kLanes, piece.rows - first));
      for (int r = 0; r < count; ++r) {
        F total[kTokens];
        Row<Format, kSteps, kTokens>(piece, piece.row + first + r, far, x, total);
        for (int t = 0; t < kTokens; ++t) sums[t][r] = total[t];
      }
      for (int t = 0; t < kTokens; ++t) {
        for (int r = count; r < kLanes; ++r) sums[t][r] = Ops::Zero();
        alignas(64) float finished[kLanes];
        SumLanes(sums[t], finished);
        float* const to = piece.c + t * piece.c_stride + first;
        for (int r = 0; r < count; ++r) to[r] = piece.column == 0 ? finished[r] : to[r] + finished[r];
      }
    }
  }

  // out[i] = the sum of the lanes of sums[i], for i < kLanes: a turn in registers lets them be finished together.
  static void SumLanes(F* sums, float* out) {
    Ops::Transpose(sums);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] = Ops::Add(sums[i], sums[i + half]);
    }
    Ops::Store(out, sums[0]);
  }

  // What the groups of one row's piece multiply sums of codes and, with zero points, sums of tokens by. Codes count
  // from 8, so that a zero point z leaves 8 - z of each. A block may read three groups more than there are, where
  // tokens are zero.
  struct Groups {
    Groups(const MatrixView& w, int64_t row, int64_t column, int64_t columns)
        : shift(GroupShift(w)), first(column >> shift) {
      const int64_t count = ((column + columns - 1) >> shift) - first + 1;
      LoadScales(w, row, first, count, scales);
      for (int i = 0; i < 3; ++i) scales[count + i] = offsets[count + i] = 0.0F;
      if (w.zeros == nullptr) return;
      const uint8_t* const zeros = w.zeros + row / w.group_rows * w.zero_stride + first;
      for (int64_t i = 0; i < count; ++i) offsets[i] = scales[i] * static_cast<float>(8 - zeros[i]);
    }

    int shift;
    int64_t first;
    float scales[kMostColumns / kLeastGroup + 3], offsets[kMostColumns / kLeastGroup + 3];
  };
  struct NoGroups {
    NoGroups(const MatrixView&, int64_t, int64_t, int64_t) {}
  };
  template <bool kScales, class Yes, class No>
  struct Either {
    using Type = Yes;
  };
  template <class Yes, class No>
  struct Either<false, Yes, No> {
    using Type = No;
  };

  template <class Format, int kSteps, int kTokens>
  static void Row(const Piece& piece, int64_t row, int64_t far, const TokenRows& x, F (&total)[kTokens]) {
    constexpr int kColumns = kSteps * (Format::kSpread ? kBlock : kStep);
    constexpr int64_t kBytes = Format::CodeBytes(kColumns);
    const uint8_t* codes = Format::Address(piece.w, row, piece.column);
    const typename Either<Format::kScales, Groups, NoGroups>::Type groups(piece.w, row, piece.column, piece.columns);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) total[t] = Ops::Zero();
    const auto block = [&](int64_t k, const uint8_t* from, const Element* tokens, int64_t stride) {
      F sum[kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) sum[t] = Ops::Zero();
      AddBlock<Format, kSteps, kTokens>(from, tokens, stride, sum);
      if constexpr (Format::kScales) {
        const int64_t group = ((piece.column + k) >> groups.shift) - groups.first;
        const F scale = ScaleOf<Format>(groups.scales + group, groups.shift);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) total[t] = Ops::Fma(sum[t], scale, total[t]);
        if (!Format::kSpread || piece.w.zeros == nullptr) return;
        const F offset = ScaleOf<Format>(groups.offsets + group, groups.shift);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
          total[t] = Ops::Fma(Ops::Load(x.sums + t * x.sum_stride + k / kBlock * kLanes), offset, total[t]);
      } else {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) total[t] = Ops::Add(total[t], sum[t]);
      }
    };
    int64_t k = 0;
    for (; k + kColumns <= piece.columns; k += kColumns, codes += kBytes) {
      for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(codes + far + line, 0, 2);
      block(k, codes, x.x + k, x.stride);
    }
    if (k == piece.columns) return;
    uint8_t last_codes[kBytes] = {};
    std::memcpy(last_codes, codes, static_cast<size_t>(Format::CodeBytes(piece.columns - k)));
    if (Format::kSpread) return block(k, last_codes, x.x + k, x.stride);
    alignas(64) Element last[kTokens][kColumns] = {};
    for (int t = 0; t < kTokens; ++t)
      std::memcpy(last[t], x.x + t * x.stride + k, static_cast<size_t>(piece.columns - k) * sizeof(Element));
    block(k, last_codes, last[0], kColumns);
  }

  template <class Format>
  static F ScaleOf(const float* groups, int shift) {
    if (Format::kSpread) return Ops::PickLanes(groups, Ops::LaneGroups(shift));
    return Ops::Set(*groups * Format::kUnit);
  }

  template <class Format, int kSteps, int kTokens>
  static void AddBlock(const uint8_t* codes, const Element* x, int64_t x_stride, F (&sum)[kTokens]) {
    const auto add = [&](Panel weights, int i) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        sum[t] = Ops::MultiplyAdd(sum[t], weights, Ops::LoadPanel(x + t * x_stride + i * kUnits));
    };
    if constexpr (Format::kSpread) {
      typename Ops::I all = Ops::LoadInts(codes);
#pragma GCC unroll 8
      for (int i = 0; i < kBlock / kUnits; ++i) {
        add(Format::template Lowest<Ops>(all), i);
        all = Ops::ShiftCodes(all);
      }
    } else {
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s) {
        const typename Ops::Step step = Format::template Step<Ops>(codes + s * Format::CodeBytes(kStep));
#pragma GCC unroll 2
        for (int p = 0; p < 2 / kPair; ++p) add(step.panels[p], s * 2 / kPair + p);
      }
    }
  }
};

}  // namespace kt
