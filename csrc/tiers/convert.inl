// Vectors and rows of values, from and to FP32, BF16, FP16 and elements. Included by kernels.inl.
#pragma once

#include "cpu/numeric.h"

namespace kt {

template <class Ops>
struct Convert {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  static constexpr int kLanes = Ops::kLanes;

  static F LoadVector(const char* src, DType type) {
    switch (type) {
      case DType::kF32:
        return Ops::Load(reinterpret_cast<const float*>(src));
      case DType::kBf16:
        return Ops::LoadBf16(reinterpret_cast<const Bf16*>(src));
      case DType::kF16:
        break;
    }
    return Ops::LoadF16(reinterpret_cast<const F16*>(src));
  }

  static void StoreVector(char* dst, DType type, F value) {
    switch (type) {
      case DType::kF32:
        return Ops::Store(reinterpret_cast<float*>(dst), value);
      case DType::kBf16:
        return Ops::StoreBf16(reinterpret_cast<Bf16*>(dst), value);
      case DType::kF16:
        break;
    }
    Ops::StoreF16(reinterpret_cast<F16*>(dst), value);
  }

  // The vector at position i of `count` values, the tail filled with zeros.
  static F LoadTail(const char* src, DType type, int64_t i, int64_t count) {
    const int64_t size = DTypeBytes(type), left = count - i;
    if (left >= kLanes) return LoadVector(src + i * size, type);
    alignas(64) char buffer[kLanes * 4] = {};
    std::memcpy(buffer, src + i * size, left * size);
    return LoadVector(buffer, type);
  }

  static void StoreTail(char* dst, DType type, int64_t i, int64_t count, F value) {
    const int64_t size = DTypeBytes(type), left = count - i;
    if (left >= kLanes) return StoreVector(dst + i * size, type, value);
    alignas(64) char buffer[kLanes * 4];
    StoreVector(buffer, type, value);
    std::memcpy(dst + i * size, buffer, left * size);
  }

  static void ConvertRow(const char* src, DType type, int64_t count, Element* out) {
    if (type == DType::kBf16) return Ops::ElementsFromBf16(reinterpret_cast<const uint8_t*>(src), count, out);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Ops::StoreElements(LoadVector(src + i * DTypeBytes(type), type), out + i);
    if (i == count) return;
    alignas(64) Element buffer[kLanes];
    Ops::StoreElements(LoadTail(src, type, i, count), buffer);
    std::memcpy(out + i, buffer, (count - i) * sizeof(Element));
  }

  static void ZeroElements(Element* out, int64_t count) { std::memset(out, 0, count * sizeof(Element)); }

  static void StoreElementsTail(F value, Element* out, int64_t i, int64_t count) {
    if (count - i >= kLanes) return Ops::StoreElements(value, out + i);
    alignas(64) Element buffer[kLanes];
    Ops::StoreElements(value, buffer);
    std::memcpy(out + i, buffer, (count - i) * sizeof(Element));
  }
};

}  // namespace kt
