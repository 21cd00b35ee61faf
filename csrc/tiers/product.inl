// The products: tiles of C from panels, and dot products for few tokens. Included by kernels.inl.
#pragma once

#include "cpu/numeric.h"
#include "formats/format.h"
#include "tiers/tier.h"

namespace kt {

template <class Ops>
struct Product {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  static constexpr int kLanes = Ops::kLanes, kPair = Ops::kPair;

  // Scales of weight rows, where the product applies them: row r's for the depth's group g is
  // values[r * row_stride + g]. A group spans `steps` steps of the depth.
  struct Scales {
    const float* values = nullptr;
    int64_t row_stride = 0, steps = 0;

    Scales FromRow(int row) const { return {values + row * row_stride, row_stride, steps}; }
  };

  // Asking ahead is left out of the innermost loop, where it would take as many instructions as a step.
  template <int kRows, int kVectors>
  static void AddSteps(const Element* a, int64_t a_stride, const Element* b, int64_t steps, F (&sum)[kRows][kVectors],
                       Ahead& ahead) {
    constexpr int64_t kRun = 8;
    for (int64_t s = 0, end; s < steps; s = end) {
      end = steps;
      if (ahead.lines > 0) {
        end = Smaller(steps, s + kRun);
        AskAhead(ahead, end - s);
      }
      AddRun<kRows, kVectors>(a, a_stride, b, s, end, sum);
    }
  }

  template <int kRows, int kVectors>
  static void AddRun(const Element* a, int64_t a_stride, const Element* b, int64_t s, int64_t end,
                     F (&sum)[kRows][kVectors]) {
    for (; s < end; ++s) {
      typename Ops::Panel column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) column[v] = Ops::LoadPanel(b + (s * kVectors + v) * kLanes * kPair);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const typename Ops::Panel value = Ops::Broadcast(a + m * a_stride + s * kPair);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] = Ops::MultiplyAdd(sum[m][v], value, column[v]);
      }
    }
  }

  template <int kRows, int kVectors>
  static void Tile(const Element* a, int64_t a_stride, const Element* b, int64_t steps, const Scales& scales, float* c,
                   int64_t c_stride, bool accumulate, Ahead& ahead) {
    if constexpr (Ops::kScaleProducts) {
      if (scales.values != nullptr) {
        return ScaledTile<kRows, kVectors>(a, a_stride, b, steps, scales, c, c_stride, accumulate, ahead);
      }
    }
    F sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[m][v] = accumulate ? Ops::Load(c + m * c_stride + v * kLanes) : Ops::Zero();
    }
    AddSteps<kRows, kVectors>(a, a_stride, b, steps, sum, ahead);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Ops::Store(c + m * c_stride + v * kLanes, sum[m][v]);
    }
  }

  // Sums of codes, group by group, are scaled into C, which stays in L1.
  template <int kRows, int kVectors>
  static void ScaledTile(const Element* a, int64_t a_stride, const Element* b, int64_t steps, const Scales& scales,
                         float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    const float* scale = scales.values;
    for (; steps > 0; steps -= scales.steps, ++scale, accumulate = true) {
      const int64_t some = Smaller(scales.steps, steps);
      F sum[kRows][kVectors];
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] = Ops::Zero();
      }
      AddSteps<kRows, kVectors>(a, a_stride, b, some, sum, ahead);
      a += some * kPair;
      b += some * kVectors * kLanes * kPair;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const F factor = Ops::Set(scale[m * scales.row_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* const to = c + m * c_stride + v * kLanes;
          Ops::Store(to, accumulate ? Ops::Fma(sum[m][v], factor, Ops::Load(to)) : Ops::Mul(sum[m][v], factor));
        }
      }
    }
  }

  template <int kRows, int kVectors>
  static void TileOf(int64_t rows, const Element* a, int64_t a_stride, const Element* b, int64_t steps,
                     const Scales& scales, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    if (rows == kRows) return Tile<kRows, kVectors>(a, a_stride, b, steps, scales, c, c_stride, accumulate, ahead);
    if constexpr (kRows > 1)
      TileOf<kRows - 1, kVectors>(rows, a, a_stride, b, steps, scales, c, c_stride, accumulate, ahead);
  }

  // As few tiles as possible, and as even: a low tile has too few sums to keep the multipliers busy.
  template <int kVectors>
  static void Rows(const Element* a, int64_t a_stride, int64_t rows, const Element* b, int64_t steps, Scales scales,
                   float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    for (int64_t tiles = CeilDiv(rows, Ops::kTileRows); tiles > 0; --tiles) {
      const int64_t some = CeilDiv(rows, tiles);
      TileOf<Ops::kTileRows, kVectors>(some, a, a_stride, b, steps, scales, c, c_stride, accumulate, ahead);
      rows -= some, a += some * a_stride, c += some * c_stride;
      if (scales.values != nullptr) scales = scales.FromRow(static_cast<int>(some));
    }
  }

  template <int kVectors>
  static void MultiplyWidth(int vectors, const Element* a, int64_t a_stride, int64_t rows, const Element* b,
                            int64_t steps, const Scales& scales, float* c, int64_t c_stride, bool accumulate,
                            Ahead& ahead) {
    if (vectors == kVectors) return Rows<kVectors>(a, a_stride, rows, b, steps, scales, c, c_stride, accumulate, ahead);
    if constexpr (kVectors > 1)
      MultiplyWidth<kVectors - 1>(vectors, a, a_stride, rows, b, steps, scales, c, c_stride, accumulate, ahead);
  }

  static void Multiply(const void* a, int64_t a_stride, int64_t rows, const void* panel, int width, int64_t depth,
                       const RowScales& scales, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    // Groups are multiples of the pair; one as long as the depth, or longer, is a single run of steps.
    const Scales in_steps{scales.values, scales.row_stride, CeilDiv(Smaller(scales.group, depth), kPair)};
    MultiplyWidth<Ops::kTileVectors>(width / kLanes, static_cast<const Element*>(a), a_stride, rows,
                                     static_cast<const Element*>(panel), CeilDiv(depth, kPair), in_steps, c, c_stride,
                                     accumulate, ahead);
  }

  // ---- for few tokens ----

  // kRows weight rows times kTokens x rows, along the depth. Loads are whole vectors; the tail is padded with zeros.
  // With scales (a row of them for each weight row) the sums of each group are scaled before they are added.
  template <int kRows, int kTokens>
  static void Dot(const Element* const* w, const Element* x, int64_t x_stride, int64_t columns, int64_t ahead,
                  const Scales& scales, float* c, int64_t c_stride) {
    F sum[kRows][kTokens];
    if (scales.values == nullptr) {
      Clear<kRows, kTokens>(sum);
      DotRun<kRows, kTokens>(w, x, x_stride, 0, columns, sum, ahead);
    } else {
      F total[kRows][kTokens];
      Clear<kRows, kTokens>(total);
      const float* scale = scales.values;
      for (int64_t k = 0, group = scales.steps * kPair; k < columns; k += group, ++scale) {
        Clear<kRows, kTokens>(sum);
        DotRun<kRows, kTokens>(w, x, x_stride, k, Smaller(columns, k + group), sum);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const F factor = Ops::Set(scale[r * scales.row_stride]);
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) total[r][t] = Ops::Fma(sum[r][t], factor, total[r][t]);
        }
      }
      std::memcpy(&sum, &total, sizeof(sum));
    }
    if constexpr (kRows * kTokens % kLanes == 0) {
      // A turn in registers lets kLanes sums be finished together.
      alignas(64) float total[kRows * kTokens];
      F* const all = &sum[0][0];
      for (int first = 0; first < kRows * kTokens; first += kLanes) {
        Ops::Transpose(all + first);
        for (int half = kLanes / 2; half > 0; half /= 2) {  // in the order of Ops::Sum
          for (int i = first; i < first + half; ++i) all[i] = Ops::Add(all[i], all[i + half]);
        }
        Ops::Store(total + first, all[first]);
      }
      for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kTokens; ++t) c[t * c_stride + r] = total[r * kTokens + t];
      }
    } else {
      for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kTokens; ++t) c[t * c_stride + r] = Ops::Sum(sum[r][t]);
      }
    }
  }

  template <int kRows, int kTokens>
  static void Clear(F (&sum)[kRows][kTokens]) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sum[r][t] = Ops::Zero();
    }
  }

  // Adds the products of columns [k, end), and asks for what lies `ahead` elements further on, if that is not 0.
  template <int kRows, int kTokens>
  static void DotRun(const Element* const* w, const Element* x, int64_t x_stride, int64_t k, int64_t end,
                     F (&sum)[kRows][kTokens], int64_t ahead = 0) {
    constexpr int kPiece = kLanes * kPair;
    const auto step = [&](auto weights, auto tokens) {
      typename Ops::Panel token[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) token[t] = Ops::LoadPanel(tokens(t));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const typename Ops::Panel weight = Ops::LoadPanel(weights(r));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sum[r][t] = Ops::MultiplyAdd(sum[r][t], weight, token[t]);
      }
    };
    for (; k + kPiece <= end; k += kPiece) {
      if (ahead != 0) {
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(w[r] + k + ahead, 0, 2);
      }
      step([&](int r) { return w[r] + k; }, [&](int t) { return x + t * x_stride + k; });
    }
    if (k == end) return;
    alignas(64) Element w_tail[kRows][kPiece] = {}, x_tail[kTokens][kPiece] = {};
    for (int r = 0; r < kRows; ++r) std::memcpy(w_tail[r], w[r] + k, (end - k) * sizeof(Element));
    for (int t = 0; t < kTokens; ++t) std::memcpy(x_tail[t], x + t * x_stride + k, (end - k) * sizeof(Element));
    step([&](int r) { return w_tail[r]; }, [&](int t) { return x_tail[t]; });
  }

  template <int kRows, int kTokens>
  static void DotTokens(const Element* const* w, const Element* x, int64_t x_stride, int tokens, int64_t columns,
                        int64_t ahead, const Scales& scales, float* c, int64_t c_stride) {
    for (; tokens >= kTokens; tokens -= kTokens, x += kTokens * x_stride, c += kTokens * c_stride) {
      Dot<kRows, kTokens>(w, x, x_stride, columns, ahead, scales, c, c_stride);
    }
    if constexpr (kTokens > 1)
      DotTokens<kRows, kTokens - 1>(w, x, x_stride, tokens, columns, ahead, scales, c, c_stride);
  }

  template <class Format>
  static void DotRows(const MatrixView& w, int64_t row, int rows, int64_t columns, const void* x, int64_t x_stride,
                      int tokens, int64_t expert_rows, float* c, int64_t c_stride) {
    const Element* const x_rows = static_cast<const Element*>(x);
    if constexpr (Format::template InPlace<Ops>()) {
      // A few tokens stay in L1 while the weights pass by, once from memory and then from L2.
      for (int t = 0; t < tokens; t += kDotTokens) {
        const int some = static_cast<int>(Smaller(kDotTokens, tokens - t));
        for (int r = 0; r < rows; r += kDotRows) {
          const int count = static_cast<int>(Smaller(kDotRows, rows - r));
          const Element* sources[kDotRows];
          for (int i = 0; i < count; ++i)
            sources[i] = reinterpret_cast<const Element*>(Format::Address(w, row + r + i, 0));
          // With several tokens the hardware does not see far enough ahead. With one it does, better than asked.
          const int64_t ahead = t == 0 && tokens > 1 ? kDotRows * w.row_stride / int64_t{sizeof(Element)} : 0;
          DotPiece(sources, count, x_rows + t * x_stride, x_stride, some, columns, ahead, Scales(),
                   c + t * c_stride + r, c_stride, false);
        }
      }
      return;
    }
    if (w.zeros == nullptr && expert_rows == 1) {
      return StreamRows<Format, 4, 1>(w, row, rows, columns, x_rows, x_stride, tokens, c, c_stride);
    }
    if (w.zeros == nullptr) {
      return StreamRows<Format, 2, kStreamTokens>(w, row, rows, columns, x_rows, x_stride, tokens, c, c_stride);
    }
    // Rows are decoded once for all tokens, in pieces that are added up in the order of the depth. A piece holds whole
    // groups, or lies within one.
    constexpr bool kScaleSums = Format::kScales && Ops::kScaleProducts;
    alignas(64) Element decoded[kDotRows][kDotPiece];
    float scales[kDotRows][kDotPiece / kLeastGroup];
    const Scales of_piece{kScaleSums ? scales[0] : nullptr, kDotPiece / kLeastGroup,
                          CeilDiv(Smaller(kScaleSums ? w.group : columns, kDotPiece), kPair)};
    for (int r = 0; r < rows; r += kDotRows) {
      const int count = static_cast<int>(Smaller(kDotRows, rows - r));
      for (int64_t k = 0; k < columns; k += kDotPiece) {
        const int64_t depth = Smaller(kDotPiece, columns - k);
        const Element* sources[kDotRows];
        for (int i = 0; i < count; ++i) {
          Format::template DecodeRow<Ops, !Ops::kScaleProducts>(w, row + r + i, k, depth, decoded[i]);
          sources[i] = decoded[i];
          if (kScaleSums) {
            const int64_t first = k / w.group;
            LoadScales(w, row + r + i, first, (k + depth - 1) / w.group - first + 1, scales[i]);
          }
        }
        DotPiece(sources, count, x_rows + k, x_stride, tokens, depth, 0, of_piece, c + r, c_stride, k > 0);
      }
    }
  }

  // ---- the same for rows that are no elements as they stand ----

  // Codes go from memory to the product in registers, one row after the other, in the order of memory. They are asked
  // for kFarBytes ahead: a core's own prefetcher does not keep enough lines under way. Each step's sums are scaled on
  // their own, and added to one of kParts that do not wait for each other.
  template <class Format, int kParts, int kTokens>
  static void StreamRows(const MatrixView& w, int64_t row, int rows, int64_t columns, const Element* x,
                         int64_t x_stride, int tokens, float* c, int64_t c_stride) {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens)
        return StreamRows<Format, kParts, kTokens - 1>(w, row, rows, columns, x, x_stride, tokens, c, c_stride);
    }
    for (int r = 0; r < rows; ++r)
      StreamRow<Format, kParts, kTokens>(w, row + r, columns, x, x_stride, c + r, c_stride);
  }

  static constexpr int kStreamTokens = MostFewRows(kLanes);
  static constexpr int kStep = 2 * kLanes;
  static constexpr int64_t kFarBytes = 4096;

  template <class Format, int kParts, int kTokens>
  static void StreamRow(const MatrixView& w, int64_t row, int64_t columns, const Element* x, int64_t x_stride, float* c,
                        int64_t c_stride) {
    constexpr int64_t kBytes = Format::CodeBytes(kStep);
    const uint8_t* codes = Format::Address(w, row, 0);
    F total[kParts][kTokens];
    Clear<kParts, kTokens>(total);
    const int shift = Format::kScales ? GroupShift(w) : 0;
    float scales[kDotPiece / kLeastGroup];
    for (int64_t piece = 0; piece < columns; piece += kDotPiece) {
      const int64_t end = Smaller(columns, piece + kDotPiece);
      if constexpr (Format::kScales)
        LoadScales(w, row, piece >> shift, ((end - 1) >> shift) - (piece >> shift) + 1, scales);
      const auto scale = [&](int64_t k) {
        return Format::kScales ? scales[(k - piece) >> shift] : 1.0F;
      };  // a piece holds whole groups, or lies within one
      int64_t k = piece;
      for (; k + kParts * kStep <= end; k += kParts * kStep, codes += kParts * kBytes) {
        for (int64_t line = 0; line < kParts * kBytes; line += 64) __builtin_prefetch(codes + kFarBytes + line, 0, 2);
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p)
          StreamStep<Format, kTokens>(codes + p * kBytes, x + k + p * kStep, x_stride, scale(k + p * kStep), total[p]);
      }
      for (; k + kStep <= end; k += kStep, codes += kBytes)
        StreamStep<Format, kTokens>(codes, x + k, x_stride, scale(k), total[0]);
      if (k == end) continue;
      uint8_t last_codes[kBytes] = {};
      alignas(64) Element last[kTokens][kStep] = {};
      std::memcpy(last_codes, codes, static_cast<size_t>(Format::CodeBytes(end - k)));
      for (int t = 0; t < kTokens; ++t) std::memcpy(last[t], x + t * x_stride + k, (end - k) * sizeof(Element));
      StreamStep<Format, kTokens>(last_codes, last[0], kStep, scale(k), total[0]);
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int half = kParts / 2; half > 0; half /= 2) {
        for (int p = 0; p < half; ++p) total[p][t] = Ops::Add(total[p][t], total[p + half][t]);
      }
      c[t * c_stride] = Ops::Sum(total[0][t]);
    }
  }

  template <class Format, int kTokens>
  static void StreamStep(const uint8_t* codes, const Element* x, int64_t x_stride, float scale, F (&sum)[kTokens]) {
    const typename Ops::Step step = Format::template Step<Ops>(codes);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      F part = Format::kScales ? Ops::Zero() : sum[t];
#pragma GCC unroll 2
      for (int p = 0; p < 2 / kPair; ++p) {
        part = Ops::MultiplyAdd(part, step.panels[p], Ops::LoadPanel(x + t * x_stride + p * kLanes * kPair));
      }
      sum[t] = Format::kScales ? Ops::Fma(part, Ops::Set(scale), sum[t]) : part;
    }
  }

  static constexpr int kDotRows = 4, kDotTokens = 4, kDotPiece = 1024;

  static void DotPiece(const Element* const* w, int rows, const Element* x, int64_t x_stride, int tokens, int64_t depth,
                       int64_t ahead, const Scales& scales, float* c, int64_t c_stride, bool accumulate) {
    float sums[MostFewRows(kLanes) * kDotRows];
    if (rows == kDotRows) {
      DotTokens<kDotRows, kDotTokens>(w, x, x_stride, tokens, depth, ahead, scales, sums, kDotRows);
    } else {
      for (int r = 0; r < rows; ++r) {
        const Scales of_row = scales.values == nullptr ? scales : scales.FromRow(r);
        DotTokens<1, kDotTokens>(w + r, x, x_stride, tokens, depth, ahead, of_row, sums + r, kDotRows);
      }
    }
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < rows; ++r) {
        float* const to = c + t * c_stride + r;
        *to = accumulate ? *to + sums[t * kDotRows + r] : sums[t * kDotRows + r];
      }
    }
  }
};

}  // namespace kt
