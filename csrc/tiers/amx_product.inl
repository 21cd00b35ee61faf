// The product of tier.h on tiles. `Tiles` is described in amx_tiles.h, `Ops` are the vector operations of a tier with
// BF16 elements.
#pragma once

#include <cstring>

#include "cpu/numeric.h"
#include "tiers/amx_tiles.h"
#include "tiers/tier.h"

namespace kt {

template <class Ops, class Tiles>
struct TileProduct {
  using F = typename Ops::F;
  static_assert(Ops::kPair == 2 && Ops::kScaleProducts, "tiles multiply pairs of BF16");
  static_assert(32 % Ops::kLanes == 0 && Ops::kLanes * Ops::kTileVectors == 32, "a panel is two tiles wide");

  // Four tiles of C, two by two, so that each tile of A and of B is loaded once for two products: at 16 cycles for a
  // product and 8 for a load the loads take half of the time. Tiles 0-3 are C's, row by row.
  static constexpr int kSide = 16, kBlock = 2 * kSide;
  static constexpr int kA = 4, kB = 6;
  static constexpr int kStep = 32;  // depth values of a product of tiles

  // Up to kBlock rows of a product.
  struct Piece {
    const Bf16* a;
    int64_t a_stride;  // elements
    int rows;
    const Bf16* panel;
    int width;
    int64_t depth;  // padded to whole pairs
    RowScales scales;
    float* c;
    int64_t c_stride;
    bool accumulate;
    Ahead* ahead;
  };

  // Loading a configuration takes about 200 cycles, as long as 12 products of tiles, and clears the tiles. So there is
  // one for all panels of one or two tiles' width (the narrow ones leave the second column's tiles alone); rows and
  // depth that do not fill a tile are copied to one padded with zeros. Other widths occur with short vectors only.
  static TileConfig Configuration(int width) {
    TileConfig config;
    for (int i = 0; i < 2; ++i) {
      const int columns = static_cast<int>(Smaller(kSide, width - i * kSide));
      config.Set(kA + i, kSide, kStep * 2);
      if (columns <= 0) continue;
      config.Set(kB + i, kStep / 2, columns * 4);
      config.Set(i, kSide, columns * 4);
      config.Set(2 + i, kSide, columns * 4);
    }
    return config;
  }

  // The width that this thread's tiles are configured for; 0: none. They stay so until another is needed or
  // EndProducts.
  static inline thread_local int configured_ = 0;

  static void Configure(int panel_width) {
    const int width = panel_width % kSide == 0 ? kBlock : panel_width;
    if (width == configured_) return;
    Tiles::Configure(Configuration(width));
    configured_ = width;
  }

  // Tiles in use would make every context switch save them.
  static void EndProducts() {
    if (configured_ == 0) return;
    Tiles::Release();
    configured_ = 0;
  }

  // Strides in bytes.
  template <int kRows, int kColumns>
  static void Step(const Bf16* a, int64_t a_stride, const Bf16* b, int64_t b_stride) {
    Tiles::template Load<kB>(b, b_stride);
    Tiles::template Load<kA>(a, a_stride);
    Tiles::template MultiplyBf16<0, kA, kB>();
    if constexpr (kColumns > 1) {
      Tiles::template Load<kB + 1>(b + 2 * kSide, b_stride);
      Tiles::template MultiplyBf16<1, kA, kB + 1>();
    }
    if constexpr (kRows > 1) {
      Tiles::template Load<kA + 1>(reinterpret_cast<const char*>(a) + kSide * a_stride, a_stride);
      Tiles::template MultiplyBf16<2, kA + 1, kB>();
      if constexpr (kColumns > 1) Tiles::template MultiplyBf16<3, kA + 1, kB + 1>();
    }
  }

  // A product of one row of tiles takes as many of the steps that Ahead counts as it has pairs.
  template <int kRows>
  static void Ask(Ahead& ahead) {
    for (int64_t s = 0; s < kRows * kStep / 2 && ahead.lines > 0; s += ahead.every) AskAhead(ahead);
  }

  // Adds the products of depth values [first, end) to the tiles of C.
  template <int kRows, int kColumns>
  static void AddSteps(const Piece& p, int64_t first, int64_t end) {
    // Copies of what the loop needs: every tile load tells the compiler that memory may have changed.
    const int rows = p.rows, width = p.width;
    const int64_t a_stride = p.a_stride, a_bytes = a_stride * 2, b_bytes = width * 4;
    const Bf16 *a_at = p.a + first, *b_at = p.panel + first * width;
    int64_t d = first;
    if (rows == kRows * kSide) {
      for (; d + kStep <= end; d += kStep, a_at += kStep, b_at += kStep * width) {
        Ask<kRows>(*p.ahead);
        Step<kRows, kColumns>(a_at, a_bytes, b_at, b_bytes);
      }
    } else {
      alignas(64) Bf16 a[kBlock][kStep] = {};
      for (; d + kStep <= end; d += kStep, a_at += kStep, b_at += kStep * width) {
        Ask<kRows>(*p.ahead);
        for (int r = 0; r < rows; ++r) std::memcpy(a[r], a_at + r * a_stride, sizeof(a[r]));
        Step<kRows, kColumns>(a[0], sizeof(a[0]), b_at, b_bytes);
      }
    }
    if (d == end) return;
    alignas(64) Bf16 a[kBlock][kStep] = {}, b[kStep / 2][2 * kBlock] = {};
    for (int r = 0; r < rows; ++r) std::memcpy(a[r], a_at + r * a_stride, (end - d) * 2);
    for (int64_t k = 0; k < end - d; k += 2) std::memcpy(b[k / 2], b_at + k * width, b_bytes);
    Step<kRows, kColumns>(a[0], sizeof(a[0]), b[0], sizeof(b[0]));
  }

  template <int kRows, int kColumns>
  static void ZeroBlock() {
    Tiles::template Zero<0>();
    if constexpr (kColumns > 1) Tiles::template Zero<1>();
    if constexpr (kRows > 1) Tiles::template Zero<2>();
    if constexpr (kRows > 1 && kColumns > 1) Tiles::template Zero<3>();
  }

  template <int kRows, int kColumns>
  static void LoadBlock(const float* c, int64_t c_stride) {
    Tiles::template Load<0>(c, c_stride * 4);
    if constexpr (kColumns > 1) Tiles::template Load<1>(c + kSide, c_stride * 4);
    if constexpr (kRows > 1) Tiles::template Load<2>(c + kSide * c_stride, c_stride * 4);
    if constexpr (kRows > 1 && kColumns > 1) Tiles::template Load<3>(c + kSide * c_stride + kSide, c_stride * 4);
  }

  template <int kRows, int kColumns>
  static void StoreBlock(float* c, int64_t c_stride) {
    Tiles::template Store<0>(c, c_stride * 4);
    if constexpr (kColumns > 1) Tiles::template Store<1>(c + kSide, c_stride * 4);
    if constexpr (kRows > 1) Tiles::template Store<2>(c + kSide * c_stride, c_stride * 4);
    if constexpr (kRows > 1 && kColumns > 1) Tiles::template Store<3>(c + kSide * c_stride + kSide, c_stride * 4);
  }

  template <int kRows, int kColumns>
  static void MultiplyPiece(const Piece& p) {
    if (p.scales.values != nullptr || p.rows < kRows * kSide) return MultiplyGroups<kRows, kColumns>(p);
    if (p.accumulate) {
      LoadBlock<kRows, kColumns>(p.c, p.c_stride);
    } else {
      ZeroBlock<kRows, kColumns>();
    }
    AddSteps<kRows, kColumns>(p, 0, p.depth);
    StoreBlock<kRows, kColumns>(p.c, p.c_stride);
  }

  // Through a buffer: the sums of each group are scaled into C, and rows beyond C's stay behind. Without scales the
  // whole depth is one group. For groups of 32 that costs 64 vector stores of sums, 64 of C, and as many loads, where
  // the products take 64 cycles: the stores bind, at half of the tiles' peak at best; groups of 128 hide most of it.
  // (One tile at a time, with C in vector registers, would need as many cycles to load A and B twice as often.)
  template <int kRows, int kColumns>
  static void MultiplyGroups(const Piece& p) {
    alignas(64) float sums[kBlock][kBlock];
    const float* scale = p.scales.values;
    const int64_t group = scale == nullptr ? p.depth : RoundUp(Smaller(p.scales.group, p.depth), 2);
    bool accumulate = p.accumulate;
    for (int64_t d = 0; d < p.depth; d += group, accumulate = true) {
      if (accumulate && scale == nullptr) {
        // On top of C, as full blocks do it: a row's bits do not depend on how many others there are.
        for (int r = 0; r < p.rows; ++r) std::memcpy(sums[r], p.c + r * p.c_stride, p.width * sizeof(float));
        std::memset(sums[p.rows], 0, (kRows * kSide - p.rows) * sizeof(sums[0]));
        LoadBlock<kRows, kColumns>(sums[0], kBlock);
      } else {
        ZeroBlock<kRows, kColumns>();
      }
      AddSteps<kRows, kColumns>(p, d, Smaller(p.depth, d + group));
      StoreBlock<kRows, kColumns>(sums[0], kBlock);
      for (int r = 0; r < p.rows; ++r) {
        const F factor = Ops::Set(scale == nullptr ? 1.0F : scale[r * p.scales.row_stride]);
        for (int column = 0; column < p.width; column += Ops::kLanes) {
          float* const to = p.c + r * p.c_stride + column;
          const F sum = Ops::Load(sums[r] + column);
          Ops::Store(to, accumulate && scale != nullptr ? Ops::Fma(sum, factor, Ops::Load(to)) : Ops::Mul(sum, factor));
        }
      }
      if (scale != nullptr) ++scale;
    }
  }

  static void MultiplyAny(const Piece& p) {
    if (p.rows > kSide) {
      return p.width > kSide ? MultiplyPiece<2, 2>(p) : MultiplyPiece<2, 1>(p);
    }
    return p.width > kSide ? MultiplyPiece<1, 2>(p) : MultiplyPiece<1, 1>(p);
  }

  static void Multiply(const void* a, int64_t a_stride, int64_t rows, const void* panel, int width, int64_t depth,
                       const RowScales& scales, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    Configure(width);
    for (int64_t r = 0; r < rows; r += kBlock) {
      RowScales of_rows = scales;
      if (of_rows.values != nullptr) of_rows.values += r * of_rows.row_stride;
      MultiplyAny({static_cast<const Bf16*>(a) + r * a_stride, a_stride, static_cast<int>(Smaller(kBlock, rows - r)),
                   static_cast<const Bf16*>(panel), width, RoundUp(depth, 2), of_rows, c + r * c_stride, c_stride,
                   accumulate, &ahead});
    }
  }

  // Four products that do not wait for each other, as in Step.
  static double RegisterProducts(int64_t steps) {
    EndProducts();
    Configure(kBlock);  // to zeros
    for (int64_t s = 0; s < steps; ++s) {
      Tiles::template MultiplyBf16<0, kA, kB>();
      Tiles::template MultiplyBf16<1, kA, kB + 1>();
      Tiles::template MultiplyBf16<2, kA + 1, kB>();
      Tiles::template MultiplyBf16<3, kA + 1, kB + 1>();
    }
    EndProducts();
    return 2.0 * static_cast<double>(steps) * kBlock * kBlock * kStep;
  }

  // The table of these `Ops`, with its products on tiles. A task of four times tile_rows has 64 rows: 256 columns of
  // them, decoded, take 32 KB, and fit into 48 KB of L1 beside a panel's 16. Few rows (dot_rows) stay with the vectors:
  // they wait for memory, not for products.
  static constexpr TierKernels Table(TierKernels table) {
    table.tile_rows = kSide;
    table.multiply = Multiply;
    table.end_products = EndProducts;
    table.register_products = RegisterProducts;
    return table;
  }
};

}  // namespace kt
