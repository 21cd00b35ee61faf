// What happens to products: activations, transposes, sums of rows. Included by kernels.inl.
#pragma once

#include "tiers/activations.inl"
#include "tiers/convert.inl"

namespace kt {

template <class Ops>
struct Results {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  using Rows = Convert<Ops>;
  static constexpr int kLanes = Ops::kLanes, kPair = Ops::kPair;

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
      const F act = Act::Forward(Rows::LoadTail(g, DType::kF32, i, count), Rows::LoadTail(u, DType::kF32, i, count));
      Rows::StoreElementsTail(act, static_cast<Element*>(row), i, count);
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
      const F d_act = Rows::LoadTail(reinterpret_cast<const char*>(u), DType::kF32, i, count);
      F dg, du;
      const F act = Act::Backward(Rows::LoadTail(g_src, DType::kBf16, i, count),
                                  Rows::LoadTail(u_src, DType::kBf16, i, count), Ops::Mul(d_act, scale), &dg, &du);
      inner = Ops::Fma(d_act, act, inner);
      if (g_out != nullptr) Rows::StoreElementsTail(dg, g_out, i, count);
      Rows::StoreElementsTail(du, u_out, i, count);
    }
    return Ops::Sum(inner);
  }

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
          Rows::StoreTail(reinterpret_cast<char*>(out + (c + i) * out_stride), DType::kF32, r, rows, block[i]);
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
        sum = Ops::Fma(Ops::Set(weights[j]),
                       Rows::LoadTail(reinterpret_cast<const char*>(rows[j]), DType::kF32, i, count), sum);
      }
      Rows::StoreTail(static_cast<char*>(out), type, i, count, sum);
    }
  }

  static float DotOf(const void* x, DType type, const float* y, int64_t count) {
    F sum = Ops::Zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      sum = Ops::Fma(Rows::LoadTail(static_cast<const char*>(x), type, i, count),
                     Rows::LoadTail(reinterpret_cast<const char*>(y), DType::kF32, i, count), sum);
    }
    return Ops::Sum(sum);
  }
};

}  // namespace kt
