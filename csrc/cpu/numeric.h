// Scalar number formats: BF16 and FP16 as their bit patterns.
//
// Everything here has internal linkage, because units built with raised instruction flags include it too: a function
// the linker could merge across units might bring an instruction to a CPU that lacks it.
#pragma once

#include <cstdint>
#include <cstring>

namespace kt {

using Bf16 = uint16_t;
using F16 = uint16_t;

// Element types of tensors at the engine's border.
enum class DType { kF32, kBf16, kF16 };

static inline int64_t DTypeBytes(DType type) { return type == DType::kF32 ? 4 : 2; }

static inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t BitsFromFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float FloatFromBf16(Bf16 value) { return FloatFromBits(static_cast<uint32_t>(value) << 16); }

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
static inline Bf16 Bf16FromFloat(float value) {
  const uint32_t bits = BitsFromFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bf16>((bits >> 16) | 0x40u);
  return static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float FloatFromF16(F16 value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t exponent = (value >> 10) & 0x1fu;
  const uint32_t mantissa = value & 0x3ffu;
  if (exponent == 0x1fu) return FloatFromBits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return FloatFromBits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  // Zero or denormal: the mantissa counts units of 2^-24, exactly representable in FP32.
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return FloatFromBits(sign | BitsFromFloat(magnitude));
}

// Rounds to nearest, ties to even; overflow becomes infinity, a NaN stays a NaN.
static inline F16 F16FromFloat(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<F16>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<F16>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below the smallest normal, 2^-14: adding 0.5 aligns the mantissa so that its last bit weighs 2^-24.
    const float shifted = FloatFromBits(magnitude) + 0.5f;
    return static_cast<F16>(sign | (BitsFromFloat(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<F16>(sign | ((rounded - 0x38000000u) >> 13));
}

// E4M3: exponent bias 7, no infinity; 0x7f and 0xff are NaN.
static inline float FloatFromFp8(uint8_t value) {
  if ((value & 0x7fu) == 0x7fu) return FloatFromBits(0x7fc00000u);
  // As FP16 the bits, moved up by 7, are the value / 2^8, denormals included.
  return FloatFromF16(static_cast<F16>((value & 0x80u) << 8 | (value & 0x7fu) << 7)) * 256.0f;
}

static inline float LoadAsFloat(const void* base, DType type, int64_t index) {
  switch (type) {
    case DType::kF32: {
      float value;
      std::memcpy(&value, static_cast<const char*>(base) + index * 4, 4);
      return value;
    }
    case DType::kBf16:
    case DType::kF16:
      break;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(base) + index * 2, 2);
  return type == DType::kBf16 ? FloatFromBf16(bits) : FloatFromF16(bits);
}

static inline void StoreFromFloat(void* base, DType type, int64_t index, float value) {
  if (type == DType::kF32) {
    std::memcpy(static_cast<char*>(base) + index * 4, &value, 4);
    return;
  }
  const uint16_t bits = type == DType::kBf16 ? Bf16FromFloat(value) : F16FromFloat(value);
  std::memcpy(static_cast<char*>(base) + index * 2, &bits, 2);
}

static inline int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
static inline int64_t CeilDiv(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
static inline int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace kt
