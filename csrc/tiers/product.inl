// The products: tiles of C from panels, and dot products for few tokens. Included by kernels.inl.
#pragma once

#include "cpu/numeric.h"
#include "formats/format.h"

namespace kt {

template <class Ops>
struct Product {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  static constexpr int kLanes = Ops::kLanes, kPair = Ops::kPair;

  template <int kRows, int kVectors>
  static void Tile(const Element* a, int64_t a_stride, const Element* b, int64_t steps, float* c, int64_t c_stride,
                   bool accumulate) {
    F sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[m][v] = accumulate ? Ops::Load(c + m * c_stride + v * kLanes) : Ops::Zero();
    }
    for (int64_t s = 0; s < steps; ++s) {
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
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Ops::Store(c + m * c_stride + v * kLanes, sum[m][v]);
    }
  }

  // Full tiles first, then the largest remainder that fits: every row count takes few passes over the panel.
  template <int kRows, int kVectors>
  static void Rows(const Element* a, int64_t a_stride, int64_t rows, const Element* b, int64_t steps, float* c,
                   int64_t c_stride, bool accumulate) {
    for (; rows >= kRows; rows -= kRows, a += kRows * a_stride, c += kRows * c_stride) {
      Tile<kRows, kVectors>(a, a_stride, b, steps, c, c_stride, accumulate);
    }
    if constexpr (kRows > 1) Rows<kRows - 1, kVectors>(a, a_stride, rows, b, steps, c, c_stride, accumulate);
  }

  template <int kVectors>
  static void MultiplyWidth(int vectors, const Element* a, int64_t a_stride, int64_t rows, const Element* b,
                            int64_t steps, float* c, int64_t c_stride, bool accumulate) {
    if (vectors == kVectors)
      return Rows<Ops::kTileRows, kVectors>(a, a_stride, rows, b, steps, c, c_stride, accumulate);
    if constexpr (kVectors > 1)
      MultiplyWidth<kVectors - 1>(vectors, a, a_stride, rows, b, steps, c, c_stride, accumulate);
  }

  static void Multiply(const void* a, int64_t a_stride, int64_t rows, const void* panel, int width, int64_t depth,
                       float* c, int64_t c_stride, bool accumulate) {
    MultiplyWidth<Ops::kTileVectors>(width / kLanes, static_cast<const Element*>(a), a_stride, rows,
                                     static_cast<const Element*>(panel), CeilDiv(depth, kPair), c, c_stride,
                                     accumulate);
  }

  // ---- for few tokens ----

  // kRows weight rows times kTokens x rows, along the depth. Loads are whole vectors; the tail is padded with zeros.
  template <int kRows, int kTokens>
  static void Dot(const Element* const* w, const Element* x, int64_t x_stride, int64_t columns, float* c,
                  int64_t c_stride) {
    constexpr int kPiece = kLanes * kPair;
    F sum[kRows][kTokens];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sum[r][t] = Ops::Zero();
    }
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
    int64_t k = 0;
    for (; k + kPiece <= columns; k += kPiece) {
      step([&](int r) { return w[r] + k; }, [&](int t) { return x + t * x_stride + k; });
    }
    if (k < columns) {
      alignas(64) Element w_tail[kRows][kPiece] = {}, x_tail[kTokens][kPiece] = {};
      for (int r = 0; r < kRows; ++r) std::memcpy(w_tail[r], w[r] + k, (columns - k) * sizeof(Element));
      for (int t = 0; t < kTokens; ++t) std::memcpy(x_tail[t], x + t * x_stride + k, (columns - k) * sizeof(Element));
      step([&](int r) { return w_tail[r]; }, [&](int t) { return x_tail[t]; });
    }
    if constexpr (kRows * kTokens % kLanes == 0) {
      // A turn in registers lets kLanes sums be finished together.
      alignas(64) float total[kRows * kTokens];
      F* const all = &sum[0][0];
      for (int first = 0; first < kRows * kTokens; first += kLanes) {
        Ops::Transpose(all + first);
        F add = all[first];
        for (int i = 1; i < kLanes; ++i) add = Ops::Add(add, all[first + i]);
        Ops::Store(total + first, add);
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
  static void DotTokens(const Element* const* w, const Element* x, int64_t x_stride, int tokens, int64_t columns,
                        float* c, int64_t c_stride) {
    for (; tokens >= kTokens; tokens -= kTokens, x += kTokens * x_stride, c += kTokens * c_stride) {
      Dot<kRows, kTokens>(w, x, x_stride, columns, c, c_stride);
    }
    if constexpr (kTokens > 1) DotTokens<kRows, kTokens - 1>(w, x, x_stride, tokens, columns, c, c_stride);
  }

  template <class Format>
  static void DotRows(const MatrixView& w, int64_t row, int rows, int64_t columns, const void* x, int64_t x_stride,
                      int tokens, float* c, int64_t c_stride) {
    const Element* const x_rows = static_cast<const Element*>(x);
    if (Format::template Elements<Ops>(w, row) != nullptr) {
      // A few tokens stay in L1 while the weights pass by, once from memory and then from L2.
      for (int t = 0; t < tokens; t += kDotTokens) {
        const int some = static_cast<int>(Smaller(kDotTokens, tokens - t));
        for (int r = 0; r < rows; r += kDotRows) {
          const int count = static_cast<int>(Smaller(kDotRows, rows - r));
          const Element* sources[kDotRows];
          for (int i = 0; i < count; ++i) sources[i] = Format::template Elements<Ops>(w, row + r + i);
          DotPiece(sources, count, x_rows + t * x_stride, x_stride, some, columns, c + t * c_stride + r, c_stride,
                   false);
        }
      }
      return;
    }
    // Rows are decoded once for all tokens, in pieces that are added up in the order of the depth.
    alignas(64) Element decoded[kDotRows][kDotPiece];
    for (int r = 0; r < rows; r += kDotRows) {
      const int count = static_cast<int>(Smaller(kDotRows, rows - r));
      for (int64_t k = 0; k < columns; k += kDotPiece) {
        const int64_t depth = Smaller(kDotPiece, columns - k);
        const Element* sources[kDotRows];
        for (int i = 0; i < count; ++i) {
          Format::template DecodeRow<Ops>(w, row + r + i, k, depth, decoded[i]);
          sources[i] = decoded[i];
        }
        DotPiece(sources, count, x_rows + k, x_stride, tokens, depth, c + r, c_stride, k > 0);
      }
    }
  }

  static constexpr int kDotRows = 4, kDotTokens = 4, kDotPiece = 1024;
  static constexpr int kMostDotTokens = 16;
  static_assert(3 * kLanes <= 4 * kMostDotTokens, "a block of few rows (Pass::Few) must fit");

  static void DotPiece(const Element* const* w, int rows, const Element* x, int64_t x_stride, int tokens, int64_t depth,
                       float* c, int64_t c_stride, bool accumulate) {
    float sums[kMostDotTokens * kDotRows];
    if (rows == kDotRows) {
      DotTokens<kDotRows, kDotTokens>(w, x, x_stride, tokens, depth, sums, kDotRows);
    } else {
      for (int r = 0; r < rows; ++r) DotTokens<1, kDotTokens>(w + r, x, x_stride, tokens, depth, sums + r, kDotRows);
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
