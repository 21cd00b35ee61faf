// The AMX tier with emulated tiles and portable vectors, for tests on any CPU.
#include "tiers/amx_emulated.h"
#include "tiers/amx_product.inl"
#include "tiers/kernels.inl"
#include "tiers/portable_ops.h"

namespace {

// BF16 elements in pairs, as in the AVX512-BF16 tier, four lanes wide.
struct Ops : PortableVectors {
  using Element = kt::Bf16;
  using Panel = F;  // bits of pairs
  static constexpr int kPair = 2;
  static constexpr bool kScaleProducts = true;
  static constexpr int kTileRows = 4, kTileVectors = 8;

  static Panel LoadPanel(const Element* p) { return Load(reinterpret_cast<const float*>(p)); }
  static void StorePanel(Element* p, Panel x) { Store(reinterpret_cast<float*>(p), x); }
  static Panel Broadcast(const Element* p) {
    float pair;
    std::memcpy(&pair, p, sizeof(pair));
    return Set(pair);
  }
  static F MultiplyAdd(F sum, Panel a, Panel b) { return sum + (Half(a, 0) * Half(b, 0) + Half(a, 1) * Half(b, 1)); }
  static F Half(Panel pairs, int half) {
    return Each([&](int i) {
      const uint32_t bits = kt::BitsFromFloat(pairs[i]);
      return kt::FloatFromBits(half == 0 ? bits << 16 : bits & 0xffff0000u);
    });
  }

  static void ElementsFromBf16(const uint8_t* src, int64_t count, Element* out) { std::memcpy(out, src, count * 2); }
  static void StoreElements(F x, Element* out) { StoreBf16(out, x); }
  struct Step {
    Panel panels[1];
  };
  static Step Halves(F first, F second) {
    Element elements[2 * kLanes];
    StoreBf16(elements, first);
    StoreBf16(elements + kLanes, second);
    return {{LoadPanel(elements)}};
  }
  static Step StepOfBf16(const Element* p) { return {{LoadPanel(p)}}; }
  static Step Interleaved(F even, F odd) { return {{PackBf16(even, odd)}}; }
  static Step LookUpStep(const float* values, const uint8_t* codes) {
    F even, odd;
    LookUp(values, codes, &even, &odd);
    return Interleaved(even, odd);
  }
  static Panel LookUpLowest(const float* values, I codes) {
    return PackBf16(PortableVectors::LookUpLowest(values, codes), PortableVectors::LookUpLowest(values, codes >> 16));
  }
  static void TakeApart(Panel a, Panel b, Panel* even, Panel* odd) {
    F low, high;
    PortableVectors::TakeApart(Half(a, 0), Half(b, 0), &low, &high);
    F low_odd, high_odd;
    PortableVectors::TakeApart(Half(a, 1), Half(b, 1), &low_odd, &high_odd);
    *even = PackBf16(low, high), *odd = PackBf16(low_odd, high_odd);
  }
  static void StoreStep(const Step& step, Element* out) { Store(reinterpret_cast<float*>(out), step.panels[0]); }
  static void StoreActivation(Element* out, int, F even, F odd, bool) { StoreStep(Interleaved(even, odd), out); }
  static void InterleaveRows(Element* out, const Element* row0, const Element* row1) {
    for (int i = 0; i < kLanes * kTileVectors; ++i) {
      out[2 * i] = row0[i];
      out[2 * i + 1] = row1[i];
    }
  }
};

}  // namespace

namespace kt {
extern const TierKernels kEmulatedAmxPortableKernels;
constexpr TierKernels kEmulatedAmxPortableKernels =
    TileProduct<Ops, EmulatedTiles>::Table(Kernels<Ops>::Table(Tier::kAmx));
}  // namespace kt
