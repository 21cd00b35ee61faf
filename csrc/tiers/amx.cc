// AMX (Sapphire Rapids and later): the AVX512-BF16 tier with its products on tiles.
#include "tiers/amx_product.inl"
#include "tiers/avx512_bf16_ops.h"
#include "tiers/kernels.inl"

namespace {

// Written as assembly, because GCC 12's intrinsics do not say which memory they read. Tile registers are numbers in the
// instruction, and no compiler uses any on its own, so the instructions need only stay in order.
struct Tiles {
  static void Configure(const kt::TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  static void Release() { asm volatile("tilerelease"); }

  template <int kTile>
  static void Zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }

  template <int kTile>
  static void Load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }

  template <int kTile>
  static void Store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }

  template <int kC, int kA, int kB>
  static void MultiplyBf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }

  template <int kC, int kA, int kB>
  static void MultiplyInt8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

}  // namespace

namespace kt {
extern const TierKernels kAmxKernels;
constexpr TierKernels kAmxKernels = TileProduct<Avx512Bf16Ops, Tiles>::Table(Kernels<Avx512Bf16Ops>::Table(Tier::kAmx));
}  // namespace kt
