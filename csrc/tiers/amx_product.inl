// The products of tier.h on tiles, of BF16 and of integers. `Tiles` is described in amx_tiles.h, `Ops` are the vector
// operations of a tier with BF16 elements.
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

  // Depth is counted in bytes of A's rows: 64 of them make a product of tiles, and every 4, a pair of BF16 or a quad of
  // integers, stand beside each other in a column of B.
  static constexpr int kStep = 64, kGroup = 4;

  enum class Kind { kBf16, kInt8 };

  // Up to kBlock rows of a product.
  struct Piece {
    const char* a;
    int64_t a_stride;  // bytes
    int rows;
    const char* panel;
    int width;
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
      config.Set(kA + i, kSide, kStep);
      if (columns <= 0) continue;
      config.Set(kB + i, kStep / kGroup, columns * kGroup);
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

  template <Kind kKind, int kC, int kOfA, int kOfB>
  static void MultiplyTiles() {
    if constexpr (kKind == Kind::kBf16) {
      Tiles::template MultiplyBf16<kC, kOfA, kOfB>();
    } else {
      Tiles::template MultiplyInt8<kC, kOfA, kOfB>();
    }
  }

  template <Kind kKind, int kRows, int kColumns>
  static void Step(const char* a, int64_t a_stride, const char* b, int64_t b_stride) {
    Tiles::template Load<kB>(b, b_stride);
    Tiles::template Load<kA>(a, a_stride);
    MultiplyTiles<kKind, 0, kA, kB>();
    if constexpr (kColumns > 1) {
      Tiles::template Load<kB + 1>(b + kGroup * kSide, b_stride);
      MultiplyTiles<kKind, 1, kA, kB + 1>();
    }
    if constexpr (kRows > 1) {
      Tiles::template Load<kA + 1>(a + kSide * a_stride, a_stride);
      MultiplyTiles<kKind, 2, kA + 1, kB>();
      if constexpr (kColumns > 1) MultiplyTiles<kKind, 3, kA + 1, kB + 1>();
    }
  }

  // A product of one row of tiles takes as many of the steps that Ahead counts as it has pairs or quads.
  template <int kRows>
  static void Ask(Ahead& ahead) {
    if (ahead.lines > 0) AskAhead(ahead, kRows * kStep / kGroup);
  }

  // Adds the products of the first `depth` bytes of rows to the tiles of C.
  template <Kind kKind, int kRows, int kColumns>
  static void AddSteps(const Piece& p, int64_t depth) {
    // Copies of what the loop needs: every tile load tells the compiler that memory may have changed.
    const int rows = p.rows, width = p.width;
    const int64_t a_stride = p.a_stride, b_stride = width * kGroup;
    const char *a_at = p.a, *b_at = p.panel;
    int64_t left = depth;
    if (rows == kRows * kSide) {
      for (; left >= kStep; left -= kStep, a_at += kStep, b_at += kStep * width) {
        Ask<kRows>(*p.ahead);
        Step<kKind, kRows, kColumns>(a_at, a_stride, b_at, b_stride);
      }
    } else {
      alignas(64) char a[kBlock][kStep] = {};
      for (; left >= kStep; left -= kStep, a_at += kStep, b_at += kStep * width) {
        Ask<kRows>(*p.ahead);
        for (int r = 0; r < rows; ++r) std::memcpy(a[r], a_at + r * a_stride, kStep);
        Step<kKind, kRows, kColumns>(a[0], kStep, b_at, b_stride);
      }
    }
    if (left == 0) return;
    alignas(64) char a[kBlock][kStep] = {}, b[kStep / kGroup][kBlock * kGroup] = {};
    for (int r = 0; r < rows; ++r) std::memcpy(a[r], a_at + r * a_stride, left);
    for (int64_t i = 0; i < left / kGroup; ++i) std::memcpy(b[i], b_at + i * b_stride, b_stride);
    Step<kKind, kRows, kColumns>(a[0], kStep, b[0], sizeof(b[0]));
  }

  template <int kRows, int kColumns>
  static void ZeroBlock() {
    Tiles::template Zero<0>();
    if constexpr (kColumns > 1) Tiles::template Zero<1>();
    if constexpr (kRows > 1) Tiles::template Zero<2>();
    if constexpr (kRows > 1 && kColumns > 1) Tiles::template Zero<3>();
  }

  // C or sums in memory, strides in bytes.
  template <int kRows, int kColumns>
  static void LoadBlock(const void* from, int64_t stride) {
    const char* const c = static_cast<const char*>(from);
    Tiles::template Load<0>(c, stride);
    if constexpr (kColumns > 1) Tiles::template Load<1>(c + kSide * 4, stride);
    if constexpr (kRows > 1) Tiles::template Load<2>(c + kSide * stride, stride);
    if constexpr (kRows > 1 && kColumns > 1) Tiles::template Load<3>(c + kSide * stride + kSide * 4, stride);
  }

  template <int kRows, int kColumns>
  static void StoreBlock(void* to, int64_t stride) {
    char* const c = static_cast<char*>(to);
    Tiles::template Store<0>(c, stride);
    if constexpr (kColumns > 1) Tiles::template Store<1>(c + kSide * 4, stride);
    if constexpr (kRows > 1) Tiles::template Store<2>(c + kSide * stride, stride);
    if constexpr (kRows > 1 && kColumns > 1) Tiles::template Store<3>(c + kSide * stride + kSide * 4, stride);
  }

  // The product of BF16; depth in bytes, as its scales' groups.
  struct Bf16Piece : Piece {
    int64_t depth;
    RowScales scales;

    template <int kRows, int kColumns>
    void Multiply() const {
      if (scales.values != nullptr || this->rows < kRows * kSide) return MultiplyGroups<kRows, kColumns>();
      if (this->accumulate) {
        LoadBlock<kRows, kColumns>(this->c, this->c_stride * 4);
      } else {
        ZeroBlock<kRows, kColumns>();
      }
      AddSteps<Kind::kBf16, kRows, kColumns>(*this, depth);
      StoreBlock<kRows, kColumns>(this->c, this->c_stride * 4);
    }

    // Through a buffer: the sums of each group are scaled into C, and rows beyond C's stay behind. Without scales the
    // whole depth is one group. For groups of 32 that costs 64 vector stores of sums, 64 of C, and as many loads, where
    // the products take 64 cycles: the stores bind, at half of the tiles' peak at best; groups of 128 hide most of it.
    // (One tile at a time, with C in vector registers, would need as many cycles to load A and B twice as often.)
    template <int kRows, int kColumns>
    void MultiplyGroups() const {
      alignas(64) float sums[kBlock][kBlock];
      const float* scale = scales.values;
      const int64_t group = scale == nullptr ? depth : RoundUp(Smaller(scales.group, depth), kGroup);
      Piece rest = *this;
      for (int64_t d = 0; d < depth; d += group, rest.accumulate = true) {
        if (rest.accumulate && scale == nullptr) {
          // On top of C, as full blocks do it: a row's bits do not depend on how many others there are.
          for (int r = 0; r < rest.rows; ++r) {
            std::memcpy(sums[r], rest.c + r * rest.c_stride, rest.width * sizeof(float));
          }
          std::memset(sums[rest.rows], 0, (kRows * kSide - rest.rows) * sizeof(sums[0]));
          LoadBlock<kRows, kColumns>(sums, sizeof(sums[0]));
        } else {
          ZeroBlock<kRows, kColumns>();
        }
        const int64_t some = Smaller(depth - d, group);
        AddSteps<Kind::kBf16, kRows, kColumns>(rest, some);
        rest.a += some, rest.panel += some * rest.width;
        StoreBlock<kRows, kColumns>(sums, sizeof(sums[0]));
        for (int r = 0; r < rest.rows; ++r) {
          const F factor = Ops::Set(scale == nullptr ? 1.0F : scale[r * scales.row_stride]);
          for (int column = 0; column < rest.width; column += Ops::kLanes) {
            float* const to = rest.c + r * rest.c_stride + column;
            const F sum = Ops::Load(sums[r] + column);
            const bool add = rest.accumulate && scale != nullptr;
            Ops::Store(to, add ? Ops::Fma(sum, factor, Ops::Load(to)) : Ops::Mul(sum, factor));
          }
        }
        if (scale != nullptr) ++scale;
      }
    }
  };

  // The product of integers: a row's scales hold for `token_groups` groups of the tokens.
  struct Int8Piece : Piece {
    int64_t depth, token_group;
    RowScales scales;
    int64_t token_groups;

    // The sums of each group begin with the tokens' starts, the same for all rows, and are scaled into C as in
    // Int8Product, to the same bits.
    template <int kRows, int kColumns>
    void Multiply() const {
      alignas(64) int32_t sums[kBlock][kBlock];
      const float* scale = scales.values;
      int64_t left = token_groups;
      Piece rest = *this;
      for (int64_t d = 0; d < depth; d += token_group, rest.accumulate = true) {
        const float* const token_scales = reinterpret_cast<const float*>(rest.panel);
        LoadBlock<kRows, kColumns>(token_scales + rest.width, 0);
        rest.panel += kTokenHeader * rest.width;
        const int64_t some = RoundUp(Smaller(depth - d, token_group), kQuad);
        AddSteps<Kind::kInt8, kRows, kColumns>(rest, some);
        rest.a += some, rest.panel += some * rest.width;
        StoreBlock<kRows, kColumns>(sums, sizeof(sums[0]));
        for (int r = 0; r < rest.rows; ++r) {
          const F of_row = Ops::Set(scale[r * scales.row_stride]);
          for (int column = 0; column < rest.width; column += Ops::kLanes) {
            float* const to = rest.c + r * rest.c_stride + column;
            const F sum = Ops::ToFloat(Ops::LoadInts(sums[r] + column));
            const F factor = Ops::Mul(of_row, Ops::Load(token_scales + column));
            Ops::Store(to, rest.accumulate ? Ops::Fma(sum, factor, Ops::Load(to)) : Ops::Mul(sum, factor));
          }
        }
        if (--left == 0) left = token_groups, ++scale;
      }
    }
  };

  // All rows of a product, of which `piece` is the first piece.
  template <class SomePiece>
  static void MultiplyRows(SomePiece piece, int64_t rows) {
    Configure(piece.width);
    for (int64_t left = rows; left > 0; left -= kBlock) {
      piece.rows = static_cast<int>(Smaller(kBlock, left));
      if (piece.rows > kSide) {
        piece.width > kSide ? piece.template Multiply<2, 2>() : piece.template Multiply<2, 1>();
      } else {
        piece.width > kSide ? piece.template Multiply<1, 2>() : piece.template Multiply<1, 1>();
      }
      piece.a += kBlock * piece.a_stride;
      piece.c += kBlock * piece.c_stride;
      if (piece.scales.values != nullptr) piece.scales.values += kBlock * piece.scales.row_stride;
    }
  }

  static void Multiply(const void* a, int64_t a_stride, int64_t rows, const void* panel, int width, int64_t depth,
                       const RowScales& scales, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    const Piece first{static_cast<const char*>(a),
                      a_stride * 2,
                      0,
                      static_cast<const char*>(panel),
                      width,
                      c,
                      c_stride,
                      accumulate,
                      &ahead};
    MultiplyRows(Bf16Piece{first, RoundUp(depth, 2) * 2, {scales.values, scales.row_stride, scales.group * 2}}, rows);
  }

  static void MultiplyInt8(const uint8_t* a, int64_t a_stride, int64_t rows, const void* panel, int width,
                           int64_t depth, int64_t token_group, const RowScales& scales, float* c, int64_t c_stride,
                           bool accumulate, Ahead& ahead) {
    const Piece first{reinterpret_cast<const char*>(a),
                      a_stride,
                      0,
                      static_cast<const char*>(panel),
                      width,
                      c,
                      c_stride,
                      accumulate,
                      &ahead};
    const int64_t token_groups = CeilDiv(Smaller(scales.group, depth), token_group);
    MultiplyRows(Int8Piece{first, depth, token_group, scales, token_groups}, rows);
  }

  // Four products that do not wait for each other, as in Step.
  template <Kind kKind>
  static double RegisterProducts(int64_t steps) {
    EndProducts();
    Configure(kBlock);  // to zeros
    for (int64_t s = 0; s < steps; ++s) {
      MultiplyTiles<kKind, 0, kA, kB>();
      MultiplyTiles<kKind, 1, kA, kB + 1>();
      MultiplyTiles<kKind, 2, kA + 1, kB>();
      MultiplyTiles<kKind, 3, kA + 1, kB + 1>();
    }
    EndProducts();
    const int depth = kKind == Kind::kBf16 ? kStep / 2 : kStep;
    return 2.0 * static_cast<double>(steps) * kBlock * kBlock * depth;
  }

  // The table of these `Ops`, with its products on tiles. A task of four times tile_rows has 64 rows: 256 columns of
  // them, decoded, take 32 KB, and fit into 48 KB of L1 beside a panel's 16. Few rows (dot_rows) stay with the vectors:
  // they wait for memory, not for products.
  static constexpr TierKernels Table(TierKernels table) {
    table.tile_rows = kSide;
    table.multiply = Multiply;
    table.multiply_int8 = MultiplyInt8;
    table.end_products = EndProducts;
    table.register_products = RegisterProducts<Kind::kBf16>;
    table.register_int8_products = RegisterProducts<Kind::kInt8>;
    return table;
  }
};

}  // namespace kt
