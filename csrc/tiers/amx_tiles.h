// The shape of AMX tiles, and the interface between the product and the tiles.
//
// TileProduct (amx_product.inl) is written against a class `Tiles`, which is the instructions in amx.cc and plain C++
// in amx_emulated.h. Its members are static: tiles belong to the thread.
//   void Configure(const TileConfig&);  // all tiles become zeros
//   void Release();                     // until the next Configure
//   template <int kTile> void Zero();
//   template <int kTile> void Load(const void* from, int64_t stride);  // bytes from row to row, as in Store
//   template <int kTile> void Store(void* to, int64_t stride);
//   template <int kC, int kA, int kB> void MultiplyBf16();  // C += A * B: rows of pairs times pairs of rows
//   template <int kC, int kA, int kB> void MultiplyInt8();  // the same with quads: unsigned bytes of A, signed of B
#pragma once

#include <cstdint>

namespace kt {

// The operand of LDTILECFG for palette 1: 8 tiles of up to 16 rows of up to 64 bytes.
struct alignas(64) TileConfig {
  static constexpr int kTiles = 8, kMostRows = 16, kMostRowBytes = 64;

  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // entries from kTiles on are reserved, here and below
  uint8_t rows[16] = {};

  void Set(int tile, int tile_rows, int tile_row_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(tile_row_bytes);
  }
};

static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

}  // namespace kt
