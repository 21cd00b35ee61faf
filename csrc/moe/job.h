// One pass with everything around it that depends on the tokens' values: digests, recognising a call that was made
// before, tokens to be kept. The engine's threads do it, so that whoever asked need not see the values.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/thread_pool.h"
#include "moe/pass.h"
#include "moe/ticket.h"

namespace kt {

// Of a token's bytes, at any alignment: it depends on their order, and any flipped bit changes it.
uint64_t Digest(const void* data, int64_t bytes);

struct Job {
  enum class Direction { kForward, kBackward };

  // The routing of a call: [T, K] each.
  struct RoutingValues {
    const int64_t* experts;
    const float* weights;
  };
  // What an earlier forward of the same layer and shape was called with and gave.
  struct Remembered {
    const uint64_t* digests;  // [T], of its hidden states
    RoutingValues routing;
    const void* output;
    std::shared_ptr<Ticket> ticket;  // done when all of that is there; null if it is
  };
  struct Copy {
    void* to;
    const void* from;
    int64_t bytes;
  };

  Direction direction = Direction::kForward;
  LayerCall call;

  // Forward.
  uint64_t* digests = nullptr;           // [T], written: of each token's hidden states; null if not wanted
  std::optional<Remembered> remembered;  // where all is equal, its output is copied and nothing is computed
  std::vector<Copy> kept;                // made after the results

  // Backward: what call.retained is of. It is used only if this call's routing is the same. call.lora_grads are zeroed
  // first.
  std::optional<RoutingValues> retained_routing;

  // Written by MakeResults and Recall.
  bool was_remembered = false;  // the output was copied
  bool recomputes = false;      // backward computes pre-activations again
};

// Makes a job's results, and its digests. Throws what the pass throws, std::out_of_range for a wrong expert index
// included.
void MakeResults(Job& job, Pass& pass, ThreadPool& pool);

// Makes a forward's results where they are those of the remembered call, and its digests in any case; says whether it
// did. Needs no pass, and so may run beside one; waits until the remembered call is done. Without a pool the calling
// thread does it alone.
bool Recall(Job& job, ThreadPool* pool);

// Makes the copies that a forward leaves behind; without a pool the calling thread does it alone.
void Keep(const Job& job, ThreadPool* pool);

// Fills a job's results, and what it was to keep, with bytes of ones, NaN in every type: whoever reads them before
// learning of an error must not take them for numbers.
void Spoil(const Job& job) noexcept;

}  // namespace kt
