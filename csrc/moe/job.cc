#include "moe/job.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

namespace kt {
namespace {

// Long enough that handing out tasks costs nothing, short enough that all threads get some.
constexpr int64_t kPieceBytes = int64_t{256} << 10;

// Multiplying by an odd number, and xor with bits above, lose nothing: different words give different states. Two
// multiplications, as after one the top bit of a word would still be the top bit alone.
uint64_t Mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * 0x9FB21C651E98DF25U;
  state ^= state >> 32;
  return state * 0xD6E8FEB86659FD93U;
}

uint64_t LoadWord(const char* data, int64_t bytes = 8) {
  uint64_t word = 0;
  std::memcpy(&word, data, static_cast<size_t>(bytes));
  return word;
}

// function(task) for each, by the pool or, without one, by the calling thread.
template <class Function>
void ForEach(ThreadPool* pool, int64_t tasks, const Function& function) {
  if (pool != nullptr) {
    pool->Run(tasks, [&](int64_t task, int) { function(task); });
  } else {
    for (int64_t task = 0; task < tasks; ++task) function(task);
  }
}

// function(first byte, bytes) for each piece.
template <class Function>
void ForEachPiece(ThreadPool* pool, int64_t bytes, const Function& function) {
  ForEach(pool, CeilDiv(bytes, kPieceBytes), [&](int64_t piece) {
    const int64_t first = piece * kPieceBytes;
    function(first, static_cast<size_t>(std::min(kPieceBytes, bytes - first)));
  });
}

void CopyBytes(ThreadPool* pool, const Job::Copy& copy) {
  ForEachPiece(pool, copy.bytes, [&](int64_t first, size_t bytes) {
    std::memcpy(static_cast<char*>(copy.to) + first, static_cast<const char*>(copy.from) + first, bytes);
  });
}

bool EqualBytes(const void* a, const void* b, int64_t bytes) {
  return bytes == 0 || std::memcmp(a, b, static_cast<size_t>(bytes)) == 0;
}

struct Memory {
  void* data;
  int64_t bytes;
};

int64_t TokenBytes(const LayerCall& call) { return call.layer->shape().hidden * DTypeBytes(call.type); }

std::array<Memory, 4> LoraGradientsOf(const LayerCall& call) {
  const LayerShape& shape = call.layer->shape();
  const int64_t floats = shape.experts * call.lora.rank, pre_columns = (shape.gated ? 2 : 1) * shape.intermediate;
  const int64_t size = static_cast<int64_t>(sizeof(float));
  return {{{call.lora_grads.gate_up_a, floats * shape.hidden * size},
           {call.lora_grads.gate_up_b, floats * pre_columns * size},
           {call.lora_grads.down_a, floats * shape.intermediate * size},
           {call.lora_grads.down_b, floats * shape.hidden * size}}};
}

bool IsRoutedAs(const LayerCall& call, const Job::RoutingValues& other) {
  const int64_t slots = call.tokens * call.slots;
  return EqualBytes(call.experts, other.experts, slots * static_cast<int64_t>(sizeof(int64_t))) &&
         EqualBytes(call.weights, other.weights, slots * static_cast<int64_t>(sizeof(float)));
}

void MakeDigests(const LayerCall& call, uint64_t* digests, ThreadPool* pool) {
  const int64_t row = TokenBytes(call), at_once = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, row));
  const char* const hidden = static_cast<const char*>(call.hidden);
  ForEach(pool, CeilDiv(call.tokens, at_once), [&](int64_t task) {
    const int64_t end = std::min(call.tokens, (task + 1) * at_once);
    for (int64_t token = task * at_once; token < end; ++token) digests[token] = Digest(hidden + token * row, row);
  });
}

void MakeBackward(Job& job, Pass& pass, ThreadPool& pool) {
  LayerCall call = job.call;
  for (const Memory& gradient : LoraGradientsOf(call)) {
    if (gradient.data == nullptr) continue;
    ForEachPiece(&pool, gradient.bytes, [&](int64_t first, size_t bytes) {
      std::memset(static_cast<char*>(gradient.data) + first, 0, bytes);
    });
  }
  if (job.retained_routing && !IsRoutedAs(call, *job.retained_routing)) call.retained = nullptr;
  job.recomputes = call.retained == nullptr;
  if (job.recomputes && call.hidden == nullptr && call.tokens > 0)
    throw std::invalid_argument("kt_sft engine: pre-activations are to be computed again without the hidden states");
  pass.Backward(call);
}

}  // namespace

uint64_t Digest(const void* data, int64_t bytes) {
  constexpr int64_t kLanes = 4, kStep = 8 * kLanes;  // independent of each other: multiplications take some cycles
  const char* next = static_cast<const char*>(data);
  uint64_t lanes[kLanes] = {0x243F6A8885A308D3U, 0x13198A2E03707344U, 0xA4093822299F31D0U, 0x082EFA98EC4E6C89U};
  int64_t left = bytes;
  for (; left >= kStep; left -= kStep, next += kStep) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = Mix(lanes[i], LoadWord(next + 8 * i));
  }
  for (int64_t i = 0; left > 0; ++i, left -= 8, next += 8) lanes[i] = Mix(lanes[i], LoadWord(next, Smaller(8, left)));
  uint64_t digest = static_cast<uint64_t>(bytes);  // zeros at the end count
  for (const uint64_t lane : lanes) digest = Mix(digest, lane);
  return digest ^ digest >> 32;
}

bool Recall(Job& job, ThreadPool* pool) {
  const LayerCall& call = job.call;
  const Job::Remembered* const remembered = job.remembered ? &*job.remembered : nullptr;
  std::vector<uint64_t> own;
  uint64_t* digests = job.digests;
  if (digests == nullptr && remembered != nullptr) {
    own.resize(static_cast<size_t>(call.tokens));
    digests = own.data();
  }
  if (digests != nullptr) MakeDigests(call, digests, pool);
  if (remembered == nullptr) return false;
  try {
    if (remembered->ticket != nullptr) remembered->ticket->Wait();
  } catch (...) {
    return false;  // it gave nothing
  }
  if (!IsRoutedAs(call, remembered->routing) || !std::equal(digests, digests + call.tokens, remembered->digests))
    return false;
  CopyBytes(pool, {call.output, remembered->output, call.tokens * TokenBytes(call)});
  job.was_remembered = true;
  return true;
}

void MakeResults(Job& job, Pass& pass, ThreadPool& pool) {
  if (job.direction == Job::Direction::kBackward) {
    MakeBackward(job, pass, pool);
  } else if (!Recall(job, &pool)) {
    pass.Forward(job.call);
  }
}

void Keep(const Job& job, ThreadPool* pool) {
  for (const Job::Copy& copy : job.kept) CopyBytes(pool, copy);
}

void Spoil(const Job& job) noexcept {
  const auto spoil = [](const Memory& result) {
    if (result.data != nullptr && result.bytes > 0) std::memset(result.data, 0xFF, static_cast<size_t>(result.bytes));
  };
  const LayerCall& call = job.call;
  const int64_t tokens_bytes = call.tokens * TokenBytes(call);
  if (job.direction == Job::Direction::kForward) {
    spoil({call.output, tokens_bytes});
    for (const Job::Copy& copy : job.kept) spoil({copy.to, copy.bytes});  // an index of -1 is none: backward fails, too
    return;
  }
  spoil({call.hidden_grad, tokens_bytes});
  spoil({call.weights_grad, call.tokens * call.slots * static_cast<int64_t>(sizeof(float))});
  for (const Memory& gradient : LoraGradientsOf(call)) spoil(gradient);
}

}  // namespace kt
