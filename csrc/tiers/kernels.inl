// The micro-kernels, written once over a tier's vector operations `Ops`. A tier's unit defines `Ops` in an anonymous
// namespace, so every instantiation here has internal linkage and the linker can merge none of them with another
// unit's. No std:: function or class is used for the same reason.
//
// What `Ops` provides:
//  - Element (Bf16 or float), kPair, kLanes, kTileRows, kTileVectors, kScaleProducts (see TierKernels)
//  - F, a vector of kLanes floats; Zero Set Load Store Add Sub Mul Div Fma Min Max Abs Round PowerOfTwo SelectNegative
//  Sum
//  - LoadBf16 LoadF16 StoreBf16 StoreF16: kLanes values in memory from and to F
//  - Panel, LoadPanel, StorePanel, Broadcast(kPair elements), MultiplyAdd(sum, broadcast, panel)
//  - ElementsFromBf16(src, count, out), StoreElements(F, out): elements in a row
//  - StoreActivation(out, width, F even, F odd, has_odd): two depth steps of a B panel
//  - InterleaveRows(out, row0, row1): one panel's width of kPair weight rows
//  - FromInt8(codes): kLanes codes to F; of 2 kLanes codes FromFp8(codes, F* first, F* second), values / 2^8, and
//  LookUp(16 values, codes, F* even, F* odd)
//  - Step, 2 kLanes elements in a row as 2 / kPair Panels: Halves(F, F), Interleaved(F even, F odd),
//  LookUpStep(16 values, codes), StepOfBf16(Bf16*), StoreStep(Step, out)
//  - for few tokens: TakeApart(Panel a, b, Panel* even, odd), the even and odd elements of a and b in a row;
//  LookUpLowest(16 values, I), of the lowest four bits of every 8 * sizeof(Element); ShiftCodes(I), 32 bits down by
//  four; LaneGroups(shift): lane l holds 8 l >> shift; PickLanes(float*, those): one of four values for every lane
//  - what int8_product.inl lists
//  - PackBf16(F even, F odd): lane i holds the BF16 values even[i], odd[i]; Transpose(F[kLanes]); Keep(F&)
#pragma once

#include "formats/bf16.h"
#include "formats/four_bit.h"
#include "formats/fp8.h"
#include "formats/int8.h"
#include "tiers/int8_product.inl"
#include "tiers/operands.inl"
#include "tiers/product.inl"
#include "tiers/results.inl"
#include "tiers/stream.inl"
#include "tiers/tier.h"

namespace kt {

template <class Ops>
struct Kernels {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  static constexpr int kLanes = Ops::kLanes, kPair = Ops::kPair;

  static double RegisterProducts(int64_t steps) {
    constexpr int kSums = Ops::kTileRows * Ops::kTileVectors;
    alignas(64) Element zeros[kLanes * kPair];
    Convert<Ops>::ZeroElements(zeros, kLanes * kPair);
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
    table.scale_products = Ops::kScaleProducts;
    SetFormat<Bf16Format>(table, Format::kBf16);
    SetFormat<Int8Format>(table, Format::kInt8);
    SetFormat<Int4Format>(table, Format::kInt4);
    SetFormat<Nf4Format>(table, Format::kNf4);
    SetFormat<Fp8Format>(table, Format::kFp8);
    SetFormat<Mxfp4Format>(table, Format::kMxfp4);
    table.pack_row = Operands<Ops>::PackRow;
    table.pack_panel = Operands<Ops>::PackPanel;
    table.multiply = Product<Ops>::Multiply;
    table.decode_int8_rows[static_cast<int>(Format::kInt8)] = Int8Product<Ops>::DecodeInt8;
    table.decode_int8_rows[static_cast<int>(Format::kInt4)] = Int8Product<Ops>::DecodeInt4;
    table.pack_int8_panel = Int8Product<Ops>::PackPanel;
    table.multiply_int8 = Int8Product<Ops>::MultiplyAll;
    SetActivation<Gated<Ops, Silu>>(table, 1, Activation::kSilu);
    SetActivation<Gated<Ops, Gelu>>(table, 1, Activation::kGelu);
    SetActivation<Gated<Ops, GeluTanh>>(table, 1, Activation::kGeluTanh);
    SetActivation<Gated<Ops, Relu2>>(table, 1, Activation::kRelu2);
    SetActivation<SwigluOai<Ops>>(table, 1, Activation::kSwigluOai);
    SetActivation<Ungated<Ops, Silu>>(table, 0, Activation::kSilu);
    SetActivation<Ungated<Ops, Gelu>>(table, 0, Activation::kGelu);
    SetActivation<Ungated<Ops, GeluTanh>>(table, 0, Activation::kGeluTanh);
    SetActivation<Ungated<Ops, Relu2>>(table, 0, Activation::kRelu2);
    table.transpose_to_float = Results<Ops>::TransposeToFloat;
    table.transpose_to_bf16 = Results<Ops>::TransposeToBf16;
    table.combine = Results<Ops>::Combine;
    table.dot = Results<Ops>::DotOf;
    table.register_products = RegisterProducts;
    table.register_int8_products = Int8Product<Ops>::RegisterProducts;
    table.read_sum = ReadSum;
    return table;
  }

  template <class Decoder>
  static constexpr void SetFormat(TierKernels& table, Format format) {
    table.in_place[static_cast<int>(format)] = Decoder::template InPlace<Ops>();
    table.decode_rows[static_cast<int>(format)] = Operands<Ops>::template DecodeRows<Decoder>;
    table.decode_panels[static_cast<int>(format)] = Operands<Ops>::template DecodePanels<Decoder>;
    table.dot_rows[static_cast<int>(format)] = Stream<Ops>::template DotRows<Decoder>;
  }

  template <class Act>
  static constexpr void SetActivation(TierKernels& table, int gated, Activation activation) {
    table.activate[gated][static_cast<int>(activation)] = Results<Ops>::template Activate<Act>;
    table.activate_row[gated][static_cast<int>(activation)] = Results<Ops>::template ActivateRow<Act>;
    table.activate_backward[gated][static_cast<int>(activation)] = Results<Ops>::template ActivateBackward<Act>;
  }
};

}  // namespace kt
