// The micro-kernels, written once over a tier's vector operations `Ops`. A tier's unit defines `Ops` in an anonymous
// namespace, so every instantiation here has internal linkage and the linker can merge none of them with another
// unit's. No std:: function or class is used for the same reason.
//
// What `Ops` provides:
//  - Element (Bf16 or float), kPair, kLanes, kTileRows, kTileVectors
//  - F, a vector of kLanes floats; Zero Set Load Store Add Sub Mul Div Fma Min Max Abs Round PowerOfTwo SelectNegative
//  Sum
//  - LoadBf16 LoadF16 StoreBf16 StoreF16: kLanes values in memory from and to F
//  - Panel, LoadPanel, Broadcast(kPair elements), MultiplyAdd(sum, broadcast, panel)
//  - ElementsFromBf16(src, count, out), StoreElements(F, out): elements in a row
//  - StoreActivation(out, width, F even, F odd, has_odd): two depth steps of a B panel
//  - InterleaveRows(out, row0, row1): one panel's width of kPair weight rows
//  - PackBf16(F even, F odd): lane i holds the BF16 values even[i], odd[i]; Transpose(F[kLanes]); Keep(F&)
#pragma once

#include "cpu/numeric.h"
#include "formats/bf16.h"
#include "tiers/activations.inl"
#include "tiers/tier.h"

namespace kt {

template <class Ops>
struct Kernels {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  static constexpr int kLanes = Ops::kLanes, kPair = Ops::kPair, kWidth = Ops::kLanes * Ops::kTileVectors;
  static constexpr int kChunk = 256;  // columns decoded at a time on the way to a panel; a multiple of every kWidth
  static_assert(kChunk % kWidth == 0, "chunks must hold whole panels");

  // ---- conversions ----

  static F LoadVector(const char* src, DType type) {
    switch (type) {
      case DType::kF32:
        return Ops::Load(reinterpret_cast<const float*>(src));
      case DType::kBf16:
        return Ops::LoadBf16(reinterpret_cast<const Bf16*>(src));
      case DType::kF16:
        break;
    }
    return Ops::LoadF16(reinterpret_cast<const F16*>(src));
  }

  static void StoreVector(char* dst, DType type, F value) {
    switch (type) {
      case DType::kF32:
        return Ops::Store(reinterpret_cast<float*>(dst), value);
      case DType::kBf16:
        return Ops::StoreBf16(reinterpret_cast<Bf16*>(dst), value);
      case DType::kF16:
        break;
    }
    Ops::StoreF16(reinterpret_cast<F16*>(dst), value);
  }

  // The vector at position i of `count` values, the tail filled with zeros.
  static F LoadTail(const char* src, DType type, int64_t i, int64_t count) {
    const int64_t size = DTypeBytes(type), left = count - i;
    if (left >= kLanes) return LoadVector(src + i * size, type);
    alignas(64) char buffer[kLanes * 4] = {};
    std::memcpy(buffer, src + i * size, left * size);
    return LoadVector(buffer, type);
  }

  static void StoreTail(char* dst, DType type, int64_t i, int64_t count, F value) {
    const int64_t size = DTypeBytes(type), left = count - i;
    if (left >= kLanes) return StoreVector(dst + i * size, type, value);
    alignas(64) char buffer[kLanes * 4];
    StoreVector(buffer, type, value);
    std::memcpy(dst + i * size, buffer, left * size);
  }

  static void ConvertRow(const char* src, DType type, int64_t count, Element* out) {
    if (type == DType::kBf16) return Ops::ElementsFromBf16(reinterpret_cast<const uint8_t*>(src), count, out);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Ops::StoreElements(LoadVector(src + i * DTypeBytes(type), type), out + i);
    if (i == count) return;
    alignas(64) Element buffer[kLanes];
    Ops::StoreElements(LoadTail(src, type, i, count), buffer);
    std::memcpy(out + i, buffer, (count - i) * sizeof(Element));
  }

  static void ZeroElements(Element* out, int64_t count) { std::memset(out, 0, count * sizeof(Element)); }

  // ---- operands ----

  static void PackRow(const void* row, DType type, int64_t count, void* a) {
    Element* out = static_cast<Element*>(a);
    ConvertRow(static_cast<const char*>(row), type, count, out);
    ZeroElements(out + count, RoundUp(count, kPair) - count);
  }

  // Rows are converted piece by piece and turned in registers, kLanes tokens and kLanes lanes' worth of depth at a
  // time.
  static void PackPanel(const void* const* rows, DType type, int tokens, int width, int64_t count, void* panel) {
    constexpr int kPiece = kLanes * kPair;
    static_assert(sizeof(Element) * kPair == sizeof(float), "a lane holds kPair elements");
    float* const out = static_cast<float*>(panel);
    for (int64_t k = 0; k < count; k += kPiece) {
      const int64_t depth = Smaller(kPiece, count - k), steps = CeilDiv(depth, kPair);
      for (int first = 0; first < width; first += kLanes) {
        F block[kLanes];
        for (int t = 0; t < kLanes; ++t) {
          if (first + t >= tokens) {
            block[t] = Ops::Zero();
            continue;
          }
          const char* const source = static_cast<const char*>(rows[first + t]) + k * DTypeBytes(type);
          if (kPair == 2 && type == DType::kBf16 && depth == kPiece) {
            block[t] = Ops::Load(reinterpret_cast<const float*>(source));
            continue;
          }
          alignas(64) Element piece[kPiece];
          if (depth < kPiece) ZeroElements(piece, kPiece);
          ConvertRow(source, type, depth, piece);
          block[t] = Ops::Load(reinterpret_cast<const float*>(piece));
        }
        Ops::Transpose(block);
        for (int64_t s = 0; s < steps; ++s) Ops::Store(out + (k / kPair + s) * width + first, block[s]);
      }
    }
  }

  template <class Format>
  static void DecodeRows(const MatrixView& w, int64_t row, int rows, int64_t columns, void* a, int64_t a_stride) {
    Element* out = static_cast<Element*>(a);
    for (int r = 0; r < rows; ++r, out += a_stride) {
      Format::template DecodeRow<Ops>(w, row + r, 0, columns, out);
      ZeroElements(out + columns, RoundUp(columns, kPair) - columns);
    }
  }

  // Short runs of many rows are more than the hardware foresees: each row is asked for this many rows ahead.
  static constexpr int kAhead = 16;

  template <class Format>
  static void Prefetch(const MatrixView& w, int64_t row, int64_t column, int64_t count) {
    const uint8_t* const end = Format::Address(w, row, column + count);
    for (const uint8_t* line = Format::Address(w, row, column); line < end; line += 64) __builtin_prefetch(line);
  }

  template <class Format>
  static void DecodePanels(const MatrixView& w, int64_t row, int rows, int64_t column, int columns, void* panels,
                           int64_t panel_stride) {
    alignas(64) Element chunk[kPair][kChunk];
    for (int first = 0; first < columns; first += kChunk) {
      const int count = static_cast<int>(Smaller(kChunk, columns - first));
      const int padded = static_cast<int>(RoundUp(count, kWidth));
      for (int r = 0; r < rows; r += kPair) {
        for (int p = 0; p < kPair; ++p) {
          const int decoded = r + p < rows ? count : 0;
          if (decoded > 0) Format::template DecodeRow<Ops>(w, row + r + p, column + first, decoded, chunk[p]);
          if (r + p + kAhead < rows) Prefetch<Format>(w, row + r + p + kAhead, column + first, count);
          ZeroElements(chunk[p] + decoded, padded - decoded);
        }
        Element* out = static_cast<Element*>(panels) + first / kWidth * panel_stride + static_cast<int64_t>(r) * kWidth;
        for (int c = 0; c < padded; c += kWidth, out += panel_stride) {
          Ops::InterleaveRows(out, chunk[0] + c, chunk[kPair - 1] + c);
        }
      }
    }
  }

  // ---- the product ----

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

  // ---- the product for few tokens ----

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

  // ---- activations ----

  template <class Act>
  static void Activate(const float* gate, const float* up, int rows, int width, void* panel) {
    Element* out = static_cast<Element*>(panel);
    const float* g = gate != nullptr ? gate : up;
    for (int r = 0; r < rows; r += 2) {
      for (int t = 0; t < width; t += kLanes) {
        const int64_t at = static_cast<int64_t>(r) * width + t;
        const F even = Act::Forward(Ops::Load(g + at), Ops::Load(up + at));
        const F odd = r + 1 < rows ? Act::Forward(Ops::Load(g + at + width), Ops::Load(up + at + width)) : Ops::Zero();
        // Without pairs an odd last row has no partner in the panel, and nothing is stored for it.
        Ops::StoreActivation(out + static_cast<int64_t>(r) * width + t * kPair, width, even, odd, r + 1 < rows);
      }
    }
  }

  template <class Act>
  static void ActivateRow(const float* gate, const float* up, int64_t count, void* row) {
    const char* const g = reinterpret_cast<const char*>(gate != nullptr ? gate : up);
    const char* const u = reinterpret_cast<const char*>(up);
    for (int64_t i = 0; i < count; i += kLanes) {
      const F act = Act::Forward(LoadTail(g, DType::kF32, i, count), LoadTail(u, DType::kF32, i, count));
      StoreElementsTail(act, static_cast<Element*>(row), i, count);
    }
  }

  template <class Act>
  static float ActivateBackward(const Bf16* gate, const Bf16* up, const float* u, float weight, int64_t count,
                                void* d_gate, void* d_up) {
    const char* g_src = reinterpret_cast<const char*>(gate != nullptr ? gate : up);
    const char* u_src = reinterpret_cast<const char*>(up);
    Element* g_out = static_cast<Element*>(d_gate);
    Element* u_out = static_cast<Element*>(d_up);
    const F scale = Ops::Set(weight);
    F inner = Ops::Zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      const F d_act = LoadTail(reinterpret_cast<const char*>(u), DType::kF32, i, count);
      F dg, du;
      const F act = Act::Backward(LoadTail(g_src, DType::kBf16, i, count), LoadTail(u_src, DType::kBf16, i, count),
                                  Ops::Mul(d_act, scale), &dg, &du);
      inner = Ops::Fma(d_act, act, inner);
      if (g_out != nullptr) StoreElementsTail(dg, g_out, i, count);
      StoreElementsTail(du, u_out, i, count);
    }
    return Ops::Sum(inner);
  }

  static void StoreElementsTail(F value, Element* out, int64_t i, int64_t count) {
    if (count - i >= kLanes) return Ops::StoreElements(value, out + i);
    alignas(64) Element buffer[kLanes];
    Ops::StoreElements(value, buffer);
    std::memcpy(out + i, buffer, (count - i) * sizeof(Element));
  }

  // ---- results ----

  static void TransposeToFloat(const float* tile, int64_t tile_stride, int rows, int columns, float* out,
                               int64_t out_stride) {
    for (int r = 0; r < rows; r += kLanes) {
      for (int c = 0; c < columns; c += kLanes) {
        F block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          block[i] = r + i < rows ? Ops::Load(tile + (r + i) * tile_stride + c) : Ops::Zero();
        }
        Ops::Transpose(block);
        const int last = static_cast<int>(Smaller(kLanes, columns - c));
        for (int i = 0; i < last; ++i) {
          StoreTail(reinterpret_cast<char*>(out + (c + i) * out_stride), DType::kF32, r, rows, block[i]);
        }
      }
    }
  }

  // Two rows are rounded into the halves of one vector first, so that one turn in registers serves twice as many
  // values.
  static void TransposeToBf16(const float* tile, int64_t tile_stride, int rows, int columns, Bf16* out,
                              int64_t out_stride) {
    constexpr int kBlockRows = 2 * kLanes;
    for (int r = 0; r < rows; r += kBlockRows) {
      const int64_t left = Smaller(kBlockRows, rows - r);
      for (int c = 0; c < columns; c += kLanes) {
        F block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const float* const even = tile + (r + 2 * i) * tile_stride + c;
          block[i] = Ops::PackBf16(2 * i < left ? Ops::Load(even) : Ops::Zero(),
                                   2 * i + 1 < left ? Ops::Load(even + tile_stride) : Ops::Zero());
        }
        Ops::Transpose(block);
        const int last = static_cast<int>(Smaller(kLanes, columns - c));
        for (int i = 0; i < last; ++i) {
          float* const to = reinterpret_cast<float*>(out + (c + i) * out_stride + r);
          if (left == kBlockRows) {
            Ops::Store(to, block[i]);
            continue;
          }
          alignas(64) float buffer[kLanes];
          Ops::Store(buffer, block[i]);
          std::memcpy(to, buffer, left * sizeof(Bf16));
        }
      }
    }
  }

  static void Combine(const float* const* rows, const float* weights, int terms, int64_t count, void* out, DType type) {
    for (int64_t i = 0; i < count; i += kLanes) {
      F sum = Ops::Zero();
      for (int j = 0; j < terms; ++j) {
        if (rows[j] == nullptr) continue;
        sum = Ops::Fma(Ops::Set(weights[j]), LoadTail(reinterpret_cast<const char*>(rows[j]), DType::kF32, i, count),
                       sum);
      }
      StoreTail(static_cast<char*>(out), type, i, count, sum);
    }
  }

  static float DotOf(const void* x, DType type, const float* y, int64_t count) {
    F sum = Ops::Zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      sum = Ops::Fma(LoadTail(static_cast<const char*>(x), type, i, count),
                     LoadTail(reinterpret_cast<const char*>(y), DType::kF32, i, count), sum);
    }
    return Ops::Sum(sum);
  }

  // ---- measuring ----

  static double RegisterProducts(int64_t steps) {
    constexpr int kSums = Ops::kTileRows * Ops::kTileVectors;
    alignas(64) Element zeros[kLanes * kPair];
    ZeroElements(zeros, kLanes * kPair);
    const typename Ops::Panel zero = Ops::LoadPanel(zeros);
    F sum[kSums];
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = Ops::Set(static_cast<float>(i));
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) {
        sum[i] = Ops::MultiplyAdd(sum[i], zero, zero);
        Ops::Keep(sum[i]);
      }
    }
    float total = 0.0f;
#pragma GCC unroll 32  // an index known only at run time would keep the sums in memory throughout
    for (int i = 0; i < kSums; ++i) total += Ops::Sum(sum[i]);
    volatile float sink = total;
    (void)sink;
    return 2.0 * static_cast<double>(steps) * kSums * kLanes * kPair;
  }

  static float ReadSum(const float* values, int64_t count) {
    F sum[4] = {Ops::Zero(), Ops::Zero(), Ops::Zero(), Ops::Zero()};
    for (int64_t i = 0; i < count; i += 4 * kLanes) {
      for (int v = 0; v < 4; ++v) sum[v] = Ops::Add(sum[v], Ops::Load(values + i + v * kLanes));
    }
    return Ops::Sum(Ops::Add(Ops::Add(sum[0], sum[1]), Ops::Add(sum[2], sum[3])));
  }

  static constexpr TierKernels Table(Tier tier) {
    TierKernels table{};
    table.tier = tier;
    table.lanes = kLanes;
    table.pair = kPair;
    table.element_bytes = sizeof(Element);
    table.tile_rows = Ops::kTileRows;
    table.tile_vectors = Ops::kTileVectors;
    table.decode_rows[static_cast<int>(Format::kBf16)] = DecodeRows<Bf16Format>;
    table.decode_panels[static_cast<int>(Format::kBf16)] = DecodePanels<Bf16Format>;
    table.dot_rows[static_cast<int>(Format::kBf16)] = DotRows<Bf16Format>;
    table.pack_row = PackRow;
    table.pack_panel = PackPanel;
    table.multiply = Multiply;
    SetActivation<Gated<Ops, Silu>>(table, 1, Activation::kSilu);
    SetActivation<Gated<Ops, Gelu>>(table, 1, Activation::kGelu);
    SetActivation<Gated<Ops, GeluTanh>>(table, 1, Activation::kGeluTanh);
    SetActivation<Gated<Ops, Relu2>>(table, 1, Activation::kRelu2);
    SetActivation<SwigluOai<Ops>>(table, 1, Activation::kSwigluOai);
    SetActivation<Ungated<Ops, Silu>>(table, 0, Activation::kSilu);
    SetActivation<Ungated<Ops, Gelu>>(table, 0, Activation::kGelu);
    SetActivation<Ungated<Ops, GeluTanh>>(table, 0, Activation::kGeluTanh);
    SetActivation<Ungated<Ops, Relu2>>(table, 0, Activation::kRelu2);
    table.transpose_to_float = TransposeToFloat;
    table.transpose_to_bf16 = TransposeToBf16;
    table.combine = Combine;
    table.dot = DotOf;
    table.register_products = RegisterProducts;
    table.read_sum = ReadSum;
    return table;
  }

  template <class Act>
  static constexpr void SetActivation(TierKernels& table, int gated, Activation activation) {
    table.activate[gated][static_cast<int>(activation)] = Activate<Act>;
    table.activate_row[gated][static_cast<int>(activation)] = ActivateRow<Act>;
    table.activate_backward[gated][static_cast<int>(activation)] = ActivateBackward<Act>;
  }
};

}  // namespace kt
