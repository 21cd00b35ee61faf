// AMX tiles in plain C++, for tests: what the instructions do as Intel's manual documents it (Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2, LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS, TDPBUSD), and an
// abort where they would fault. Not modelled: which of several NaNs' payloads survives, and a result that rounds up to
// the smallest normal number, which the hardware may have taken for a denormal one.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/numeric.h"
#include "tiers/amx_tiles.h"

namespace {

class EmulatedTiles {
 public:
  static void Configure(const kt::TileConfig& config) {
    AbortOn(ConfigFault(config));
    config_ = config;
    std::memset(data_, 0, sizeof(data_));
  }

  static void Release() { config_ = kNone; }

  static void Zero(int tile) {
    AbortOn(TileFault(config_, tile));
    std::memset(data_[tile], 0, sizeof(data_[tile]));
  }

  static void Load(int tile, const void* from, int64_t stride) {
    Zero(tile);  // rows and bytes beyond the tile's shape
    for (int r = 0; r < config_.rows[tile]; ++r)
      std::memcpy(data_[tile][r], static_cast<const char*>(from) + r * stride, config_.row_bytes[tile]);
  }

  static void Store(int tile, void* to, int64_t stride) {
    AbortOn(TileFault(config_, tile));
    for (int r = 0; r < config_.rows[tile]; ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, data_[tile][r], config_.row_bytes[tile]);
  }

  // TDPBF16PS: the products of the even halves of all pairs are summed, and those of the odd halves, each with one
  // rounding; then the two sums together, and that to C.
  static void MultiplyBf16(int c_tile, int a_tile, int b_tile) {
    AbortOn(MultiplyFault(config_, c_tile, a_tile, b_tile));
    const int rows = config_.rows[c_tile], columns = config_.row_bytes[c_tile] / 4, pairs = config_.rows[b_tile];
    float b[kt::TileConfig::kMostRows][2][kMostColumns] = {};
    for (int k = 0; k < pairs; ++k) {
      for (int i = 0; i < 2 * columns; ++i) b[k][i % 2][i / 2] = Bf16At(data_[b_tile][k], i);
    }
    for (int m = 0; m < rows; ++m) {
      float sum[2][kMostColumns] = {};
      for (int k = 0; k < pairs; ++k) {
        for (int half = 0; half < 2; ++half) {
          const float a = Bf16At(data_[a_tile][m], 2 * k + half);
          for (int n = 0; n < kMostColumns; ++n) sum[half][n] = Flush(__builtin_fmaf(a, b[k][half][n], sum[half][n]));
        }
      }
      for (int n = 0; n < columns; ++n) {
        const float c = Flush(kt::LoadAsFloat(data_[c_tile][m], kt::DType::kF32, n));
        kt::StoreFromFloat(data_[c_tile][m], kt::DType::kF32, n, Flush(c + Flush(sum[0][n] + sum[1][n])));
      }
    }
  }

  // TDPBUSD: unsigned bytes of A times signed bytes of B; sums wrap around.
  static void MultiplyInt8(int c_tile, int a_tile, int b_tile) {
    AbortOn(MultiplyFault(config_, c_tile, a_tile, b_tile));
    const int columns = config_.row_bytes[c_tile] / 4, depth = config_.rows[b_tile] * 4;
    for (int m = 0; m < config_.rows[c_tile]; ++m) {
      for (int n = 0; n < columns; ++n) {
        uint32_t sum;
        std::memcpy(&sum, data_[c_tile][m] + n * 4, 4);
        for (int k = 0; k < depth; ++k) {
          const int b = static_cast<int8_t>(data_[b_tile][k / 4][n * 4 + k % 4]);
          sum += static_cast<uint32_t>(data_[a_tile][m][k] * b);
        }
        std::memcpy(data_[c_tile][m] + n * 4, &sum, 4);
      }
    }
  }

  template <int kTile>
  static void Zero() {
    Zero(kTile);
  }
  template <int kTile>
  static void Load(const void* from, int64_t stride) {
    Load(kTile, from, stride);
  }
  template <int kTile>
  static void Store(void* to, int64_t stride) {
    Store(kTile, to, stride);
  }
  template <int kC, int kA, int kB>
  static void MultiplyBf16() {
    MultiplyBf16(kC, kA, kB);
  }
  template <int kC, int kA, int kB>
  static void MultiplyInt8() {
    MultiplyInt8(kC, kA, kB);
  }

  // Why the instruction would fault, or null. LDTILECFG:
  static const char* ConfigFault(const kt::TileConfig& config) {
    using Limits = kt::TileConfig;
    if (config.palette != 1) return "the palette is not 1";
    if (config.start_row != 0) return "an interrupted load is continued";
    for (const uint8_t byte : config.reserved) {
      if (byte != 0) return "a reserved byte is set";
    }
    for (int i = 0; i < 16; ++i) {
      const int rows = config.rows[i], bytes = config.row_bytes[i];
      if (i >= Limits::kTiles && (rows != 0 || bytes != 0)) return "there are 8 tiles";
      if (rows > Limits::kMostRows) return "a tile has more than 16 rows";
      if (bytes > Limits::kMostRowBytes) return "a tile's row has more than 64 bytes";
      if ((rows == 0) != (bytes == 0)) return "a tile has rows without bytes, or bytes without rows";
    }
    return nullptr;
  }

  // Any use of a tile:
  static const char* TileFault(const kt::TileConfig& config, int tile) {
    return config.rows[tile] == 0 ? "a tile is used that is not configured" : nullptr;
  }

  // TDPBF16PS and TDPBUSD:
  static const char* MultiplyFault(const kt::TileConfig& config, int c, int a, int b) {
    if (c == a || c == b || a == b) return "a tile is used twice";
    const int tiles[] = {c, a, b};
    for (const int tile : tiles) {
      if (const char* const fault = TileFault(config, tile)) return fault;
      if (config.row_bytes[tile] % 4 != 0) return "a tile's row ends within a pair or quad";
    }
    if (config.rows[c] != config.rows[a]) return "C and A differ in rows";
    if (config.row_bytes[c] != config.row_bytes[b]) return "C and B differ in columns";
    if (config.row_bytes[a] != 4 * config.rows[b]) return "A and B differ in depth";
    return nullptr;
  }

 private:
  static constexpr int kMostColumns = kt::TileConfig::kMostRowBytes / 4;

  static float Bf16At(const uint8_t* row, int i) { return Flush(kt::LoadAsFloat(row, kt::DType::kBf16, i)); }

  // Denormals are zeros, as input and as output.
  static float Flush(float x) { return __builtin_fabsf(x) < 0x1p-126F ? __builtin_copysignf(0.0F, x) : x; }

  static void AbortOn(const char* fault) {
    if (fault == nullptr) return;
    std::fprintf(stderr, "an AMX instruction would fault: %s\n", fault);
    std::abort();
  }

  static constexpr kt::TileConfig kNone = {};  // no tile has any rows
  static inline thread_local kt::TileConfig config_ = kNone;
  static inline thread_local uint8_t data_[kt::TileConfig::kTiles][kt::TileConfig::kMostRows]
                                          [kt::TileConfig::kMostRowBytes] = {};
};

}  // namespace
