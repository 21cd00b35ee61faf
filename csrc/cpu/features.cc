#include "cpu/features.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kt {
namespace {

constexpr const char* kTierNames[kTierCount] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers Cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return Registers{};
  return r;
}

bool Bit(uint32_t value, int bit) { return (value >> bit) & 1u; }

// The register states that the operating system saves (XCR0): bits 1-2 AVX, 5-7 AVX-512, 17-18 AMX.
uint64_t EnabledStates() {
  if (!Bit(Cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// AMX has 8 tiles of 16 rows of 64 bytes (palette 1), which is what csrc/tiers/amx_product.inl is laid out for.
bool HasTilePalette() {
  const Registers palette = Cpuid(0x1d, 1);
  const uint32_t row_bytes = palette.ebx & 0xffffu, tiles = palette.ebx >> 16, rows = palette.ecx & 0xffffu;
  return row_bytes == 64 && tiles == 8 && rows == 16;
}

// Linux grants the tiles' 8 KB of state to a process that asks for it, for all of its threads. A refusal (an older
// kernel, or a thread whose alternate signal stack could not hold the state) means that there is no AMX.
bool MayUseTiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;

  Features() {
    constexpr uint64_t kAvxStates = 0x6, kAvx512States = 0xe6, kTileStates = 0x60000;
    const uint64_t states = EnabledStates();
    const Registers leaf1 = Cpuid(1, 0), leaf7 = Cpuid(7, 0), leaf7_1 = Cpuid(7, 1);
    const bool fma = Bit(leaf1.ecx, 12), f16c = Bit(leaf1.ecx, 29);
    avx2 = (states & kAvxStates) == kAvxStates && Bit(leaf7.ebx, 5) && fma && f16c;
    const bool foundation = Bit(leaf7.ebx, 16), dq = Bit(leaf7.ebx, 17), bw = Bit(leaf7.ebx, 30),
               vl = Bit(leaf7.ebx, 31);
    avx512 = avx2 && (states & kAvx512States) == kAvx512States && foundation && dq && bw && vl;
    const bool vnni = Bit(leaf7.ecx, 11);  // every CPU with BF16 products has it; a hypervisor may hide it
    avx512_bf16 = avx512 && vnni && Bit(leaf7_1.eax, 5);
    const bool tile = Bit(leaf7.edx, 24), tile_bf16 = Bit(leaf7.edx, 22), tile_int8 = Bit(leaf7.edx, 25);
    amx = avx512_bf16 && (states & kTileStates) == kTileStates && tile && tile_bf16 && tile_int8 && HasTilePalette();
  }
};

#endif

}  // namespace

const char* TierName(Tier tier) { return kTierNames[static_cast<int>(tier)]; }

Tier TierFromName(const std::string& name) {
  for (int i = 0; i < kTierCount; ++i) {
    if (name == kTierNames[i]) return static_cast<Tier>(i);
  }
  throw std::invalid_argument("no instruction tier is named '" + name + "'");
}

bool CpuSupports(Tier tier) {
  if (tier == Tier::kPortable) return true;
#if defined(__x86_64__)
  static const Features features;
  switch (tier) {
    case Tier::kAvx2:
      return features.avx2;
    case Tier::kAvx512:
      return features.avx512;
    case Tier::kAvx512Bf16:
      return features.avx512_bf16;
    case Tier::kAmx: {
      // Asked for once, and only where the tier is wanted: the state makes every thread's signal frames larger.
      static const bool granted = features.amx && MayUseTiles();
      return granted;
    }
    default:
      return false;
  }
#else
  return false;
#endif
}

std::string CpuModel() {
#if defined(__x86_64__)
  char name[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = Cpuid(0x80000002u + i, 0);
    std::memcpy(name + 16 * i, &r, 16);
  }
  return name;
#else
  return "";
#endif
}

}  // namespace kt
