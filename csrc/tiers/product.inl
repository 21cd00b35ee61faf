// The products: tiles of C from panels. Included by kernels.inl.
#pragma once

#include "cpu/numeric.h"
#include "formats/format.h"
#include "tiers/tier.h"

namespace kt {

template <class Ops>
struct Product {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  static constexpr int kLanes = Ops::kLanes, kPair = Ops::kPair;

  // Scales of weight rows, where the product applies them: row r's for the depth's group g is
  // values[r * row_stride + g]. A group spans `steps` steps of the depth.
  struct Scales {
    const float* values = nullptr;
    int64_t row_stride = 0, steps = 0;

    Scales FromRow(int row) const { return {values + row * row_stride, row_stride, steps}; }
  };

  // Asking ahead is left out of the innermost loop, where it would take as many instructions as a step.
  template <int kRows, int kVectors>
  static void AddSteps(const Element* a, int64_t a_stride, const Element* b, int64_t steps, F (&sum)[kRows][kVectors],
                       Ahead& ahead) {
    constexpr int64_t kRun = 8;
    for (int64_t s = 0, end; s < steps; s = end) {
      end = steps;
      if (ahead.lines > 0) {
        end = Smaller(steps, s + kRun);
        AskAhead(ahead, end - s);
      }
      AddRun<kRows, kVectors>(a, a_stride, b, s, end, sum);
    }
  }

  template <int kRows, int kVectors>
  static void AddRun(const Element* a, int64_t a_stride, const Element* b, int64_t s, int64_t end,
                     F (&sum)[kRows][kVectors]) {
    for (; s < end; ++s) {
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
  }

  template <int kRows, int kVectors>
  static void Tile(const Element* a, int64_t a_stride, const Element* b, int64_t steps, const Scales& scales, float* c,
                   int64_t c_stride, bool accumulate, Ahead& ahead) {
    if constexpr (Ops::kScaleProducts) {
      if (scales.values != nullptr) {
        return ScaledTile<kRows, kVectors>(a, a_stride, b, steps, scales, c, c_stride, accumulate, ahead);
      }
    }
    F sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[m][v] = accumulate ? Ops::Load(c + m * c_stride + v * kLanes) : Ops::Zero();
    }
    AddSteps<kRows, kVectors>(a, a_stride, b, steps, sum, ahead);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Ops::Store(c + m * c_stride + v * kLanes, sum[m][v]);
    }
  }

  // Sums of codes, group by group, are scaled into C, which stays in L1.
  template <int kRows, int kVectors>
  static void ScaledTile(const Element* a, int64_t a_stride, const Element* b, int64_t steps, const Scales& scales,
                         float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    const float* scale = scales.values;
    for (; steps > 0; steps -= scales.steps, ++scale, accumulate = true) {
      const int64_t some = Smaller(scales.steps, steps);
      F sum[kRows][kVectors];
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] = Ops::Zero();
      }
      AddSteps<kRows, kVectors>(a, a_stride, b, some, sum, ahead);
      a += some * kPair;
      b += some * kVectors * kLanes * kPair;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const F factor = Ops::Set(scale[m * scales.row_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* const to = c + m * c_stride + v * kLanes;
          Ops::Store(to, accumulate ? Ops::Fma(sum[m][v], factor, Ops::Load(to)) : Ops::Mul(sum[m][v], factor));
        }
      }
    }
  }

  template <int kRows, int kVectors>
  static void TileOf(int64_t rows, const Element* a, int64_t a_stride, const Element* b, int64_t steps,
                     const Scales& scales, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    if (rows == kRows) return Tile<kRows, kVectors>(a, a_stride, b, steps, scales, c, c_stride, accumulate, ahead);
    if constexpr (kRows > 1)
      TileOf<kRows - 1, kVectors>(rows, a, a_stride, b, steps, scales, c, c_stride, accumulate, ahead);
  }

  // As few tiles as possible, and as even: a low tile has too few sums to keep the multipliers busy.
  template <int kVectors>
  static void Rows(const Element* a, int64_t a_stride, int64_t rows, const Element* b, int64_t steps, Scales scales,
                   float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    for (int64_t tiles = CeilDiv(rows, Ops::kTileRows); tiles > 0; --tiles) {
      const int64_t some = CeilDiv(rows, tiles);
      TileOf<Ops::kTileRows, kVectors>(some, a, a_stride, b, steps, scales, c, c_stride, accumulate, ahead);
      rows -= some, a += some * a_stride, c += some * c_stride;
      if (scales.values != nullptr) scales = scales.FromRow(static_cast<int>(some));
    }
  }

  template <int kVectors>
  static void MultiplyWidth(int vectors, const Element* a, int64_t a_stride, int64_t rows, const Element* b,
                            int64_t steps, const Scales& scales, float* c, int64_t c_stride, bool accumulate,
                            Ahead& ahead) {
    if (vectors == kVectors) return Rows<kVectors>(a, a_stride, rows, b, steps, scales, c, c_stride, accumulate, ahead);
    if constexpr (kVectors > 1)
      MultiplyWidth<kVectors - 1>(vectors, a, a_stride, rows, b, steps, scales, c, c_stride, accumulate, ahead);
  }

  static void Multiply(const void* a, int64_t a_stride, int64_t rows, const void* panel, int width, int64_t depth,
                       const RowScales& scales, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
    // Groups are multiples of the pair; one as long as the depth, or longer, is a single run of steps.
    const Scales in_steps{scales.values, scales.row_stride, CeilDiv(Smaller(scales.group, depth), kPair)};
    MultiplyWidth<Ops::kTileVectors>(width / kLanes, static_cast<const Element*>(a), a_stride, rows,
                                     static_cast<const Element*>(panel), CeilDiv(depth, kPair), in_steps, c, c_stride,
                                     accumulate, ahead);
  }
};

}  // namespace kt
