// What Python calls the native module with, names and addresses, as the engine has it.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "moe/job.h"

namespace kt {

template <class T>
T* Pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType DTypeFromName(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBf16;
  if (name == "float16") return DType::kF16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

inline Activation ActivationFromName(const std::string& name) {
  constexpr const char* kNames[kActivationCount] = {"silu", "gelu", "gelu_pytorch_tanh", "relu2", "swiglu_oai"};
  for (int i = 0; i < kActivationCount; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  throw std::invalid_argument("activation must be silu, gelu, gelu_pytorch_tanh, relu2 or swiglu_oai, got " + name);
}

inline Matrix MatrixFromName(const std::string& name) {
  constexpr const char* kNames[kMatrixCount] = {"gate", "up", "down"};
  for (int i = 0; i < kMatrixCount; ++i) {
    if (name == kNames[i]) return static_cast<Matrix>(i);
  }
  throw std::invalid_argument("matrix must be gate, up or down, got " + name);
}

// "": the format's own.
inline ScaleType ScaleTypeFromName(const std::string& name) {
  if (name.empty()) return ScaleType::kNone;
  if (name == "float32") return ScaleType::kF32;
  if (name == "bfloat16") return ScaleType::kBf16;
  if (name == "float16") return ScaleType::kF16;
  throw std::invalid_argument("scales must be float32, bfloat16 or float16, got " + name);
}

inline Compute ComputeFromName(const std::string& name) {
  if (name == "bf16") return Compute::kBf16;
  if (name == "int8") return Compute::kInt8;
  throw std::invalid_argument("compute must be bf16 or int8, got " + name);
}

// Adapters in the engine's own format (moe/lora.h), as Python holds them: the padded rank, the scale, four addresses,
// and dropout's seed and share of 2^32.
using LoraAddresses = std::tuple<int64_t, float, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uint64_t, uint32_t>;
// FP32 gradients of gate_up's A and B, and of down's.
using LoraGradientAddresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

// Experts and weights of a call: moe/job.h.
using RoutingAddresses = std::tuple<uintptr_t, uintptr_t>;
// The completion of an earlier call; its digests, experts, weights and output.
using RememberedAddresses = std::tuple<std::shared_ptr<Ticket>, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
// To, from, and how many bytes.
using CopyAddresses = std::tuple<uintptr_t, uintptr_t, int64_t>;

inline ExpertLora MakeLora(const std::optional<LoraAddresses>& given) {
  ExpertLora lora;
  if (!given) return lora;
  const auto& [rank, scale, gate_up_a, gate_up_b, down_a, down_b, seed, below] = *given;
  lora.rank = rank;
  lora.scale = scale;
  lora.dropout = {seed, below};
  lora.gate_up = {Pointer<Bf16>(gate_up_a), Pointer<Bf16>(gate_up_b)};
  lora.down = {Pointer<Bf16>(down_a), Pointer<Bf16>(down_b)};
  return lora;
}

inline LoraGradients MakeLoraGradients(const std::optional<LoraGradientAddresses>& given) {
  if (!given) return {};
  const auto& [gate_up_a, gate_up_b, down_a, down_b] = *given;
  return {Pointer<float>(gate_up_a), Pointer<float>(gate_up_b), Pointer<float>(down_a), Pointer<float>(down_b)};
}

inline std::optional<Job::Remembered> MakeRemembered(const std::optional<RememberedAddresses>& given) {
  if (!given) return std::nullopt;
  const auto& [ticket, digests, experts, weights, output] = *given;
  return Job::Remembered{
      Pointer<uint64_t>(digests), {Pointer<int64_t>(experts), Pointer<float>(weights)}, Pointer<void>(output), ticket};
}

inline std::optional<Job::RoutingValues> MakeRouting(const std::optional<RoutingAddresses>& given) {
  if (!given) return std::nullopt;
  const auto& [experts, weights] = *given;
  return Job::RoutingValues{Pointer<int64_t>(experts), Pointer<float>(weights)};
}

inline std::vector<Job::Copy> MakeCopies(const std::vector<CopyAddresses>& given) {
  std::vector<Job::Copy> copies;
  copies.reserve(given.size());
  for (const auto& [to, from, bytes] : given) copies.push_back({Pointer<void>(to), Pointer<void>(from), bytes});
  return copies;
}

}  // namespace kt
