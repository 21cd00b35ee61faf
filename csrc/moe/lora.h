// Low-rank adapters on a layer's experts (Hu et al. 2021, "LoRA"): W x becomes W x + scale * B (A x), for gate and up
// together, which share A, and for down.
#pragma once

#include <cstdint>

#include "cpu/numeric.h"
#include "moe/dropout.h"

namespace kt {

// The engine's own copies, one expert after the other. The rank is padded to a multiple of kRankStep, with zeros in A's
// rows and in B's columns that are not there.
struct LoraPair {
  const Bf16* a = nullptr;  // [E, rank, inputs]
  const Bf16* b = nullptr;  // [E, outputs, rank]
};

struct ExpertLora {
  static constexpr int64_t kRankStep = 2;

  int64_t rank = 0;  // padded; 0: none
  float scale = 1.0F;
  Dropout dropout;   // of what A multiplies; to keep its mean, `scale` must make up for it
  LoraPair gate_up;  // outputs: 2I, gate first, or I for ungated experts
  LoraPair down;
};

// What backward adds the matrices' gradients to, FP32 in their shapes; all of them, or none if they are not wanted.
// Experts without tokens are left alone.
struct LoraGradients {
  float* gate_up_a = nullptr;
  float* gate_up_b = nullptr;
  float* down_a = nullptr;
  float* down_b = nullptr;
};

}  // namespace kt
