// Calls whose results are remembered: recognised, and done beside what the engine works on.
#include <algorithm>
#include <cmath>
#include <future>
#include <new>
#include <thread>
#include <utility>

#include "moe/engine.h"
#include "moe/fastest_tier.h"
#include "moe/small_calls.h"
#include "testing.h"

namespace kt {
namespace {

// A call and what is remembered of it: an output that no computation gives.
struct RememberedCall {
  explicit RememberedCall(const Layer& layer)
      : work(layer, 11), plain(layer, 11), output(work.y.size(), 3.0F), experts(work.index), weights(work.weights) {
    for (int64_t t = 0; t < work.tokens; ++t)
      digests.push_back(Digest(work.x.data() + t * Layer::kHidden, Layer::kHidden * 4));
    retained.assign(static_cast<size_t>(work.tokens * 2 * 2 * Layer::kIntermediate), kUntouched);
    job->call = work.call;
    job->call.retained = retained.data();
    RememberWhenDone(nullptr);
  }
  void RememberWhenDone(std::shared_ptr<Ticket> ticket) const {
    job->remembered =
        Job::Remembered{digests.data(), {experts.data(), weights.data()}, output.data(), std::move(ticket)};
  }
  static constexpr Bf16 kUntouched = 0x4242;
  bool IsRetained() const {
    return std::any_of(retained.begin(), retained.end(), [](Bf16 value) { return value != kUntouched; });
  }

  Work work, plain;
  std::vector<float> output;
  std::vector<uint64_t> digests;
  std::vector<int64_t> experts;
  std::vector<float> weights;
  std::vector<Bf16> retained;
  std::shared_ptr<Job> job = std::make_shared<Job>();
};

TEST(ARememberedCallIsCopiedAndNotComputed) {
  const Layer layer;
  RememberedCall call(layer);
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  call.work.index[3] = call.experts[3] = 99;  // equal: nobody looks at it
  const auto ticket = engine.Prepare(call.job);
  engine.Start(ticket);
  ticket->Wait();
  CHECK(call.job->was_remembered && call.work.y == call.output && !call.IsRetained());
  CHECK(engine.stats().forward.calls == 0 && engine.stats().forward.tokens == 0);
}

TEST(ACallThatDiffersFromTheRememberedOneIsComputed) {
  const Layer layer;
  const std::vector<void (*)(Work&)> changes = {
      [](Work& work) { work.x.back() = -work.x.back(); },
      [](Work& work) { work.index.back() = (work.index.back() + 1) % Layer::kExperts; },
      [](Work& work) { work.weights.front() = 0.25F; },
  };
  for (const auto& change : changes) {
    RememberedCall call(layer);
    Engine engine(2, {}, *KernelsOf(FastestTiers()));
    change(call.work);
    change(call.plain);
    engine.SubmitForward(call.plain.call)->Wait();
    const auto ticket = engine.Prepare(call.job);
    engine.Start(ticket);
    ticket->Wait();
    CHECK(!call.job->was_remembered && call.work.y == call.plain.y && call.IsRetained());
    CHECK(engine.stats().forward.calls == 2);
  }
}

// An engine in the middle of a piece of work, until it is told to go on.
struct Busy {
  Busy() {
    ticket = engine.Submit([this] {
      begun.set_value();
      released.get_future().wait();
    });
    begun.get_future().wait();
  }
  std::promise<void> begun, released;
  Engine engine{2, {}, *KernelsOf(FastestTiers())};
  std::shared_ptr<Ticket> ticket;
};

TEST(ARememberedCallDoesNotWaitForWhatTheEngineWorksOn) {
  const Layer layer;
  Busy busy;
  RememberedCall first(layer), second(layer);
  std::vector<float> kept(first.work.x.size());
  first.job->kept = {{kept.data(), first.work.x.data(), static_cast<int64_t>(kept.size() * sizeof(float))}};
  for (RememberedCall* const call : {&first, &second}) {
    const auto ticket = busy.engine.Prepare(call->job);
    busy.engine.Start(ticket);
    ticket->Wait();
    CHECK(call->job->was_remembered && call->work.y == call->output && !call->IsRetained());
  }
  CHECK(kept == first.work.x && !busy.ticket->done());
  busy.released.set_value();
  busy.ticket->Wait();
}

TEST(ACallThatDiffersKeepsItsPlace) {
  const Layer layer;
  Busy busy;
  RememberedCall call(layer);
  call.work.x.back() = call.plain.x.back() = 3.0F;
  std::vector<int> order;
  const auto before = busy.engine.Submit([&] { order.push_back(0); });
  const auto ticket = busy.engine.Prepare(call.job);
  busy.engine.Start(ticket);
  const auto after = busy.engine.Submit([&] { order.push_back(ticket->done() ? 1 : 2); });
  CHECK(!ticket->WaitFor(std::chrono::milliseconds(30)));
  busy.released.set_value();
  after->Wait();
  CHECK(order == (std::vector<int>{0, 1}) && !call.job->was_remembered && call.IsRetained());
  busy.engine.SubmitForward(call.plain.call)->Wait();
  CHECK(call.work.y == call.plain.y);
}

TEST(WhatIsStartedLaterWaitsForARememberedCall) {
  const Layer layer;
  Busy busy, other;
  RememberedCall call(layer);
  call.RememberWhenDone(other.ticket);  // whose output is not there yet
  const auto ticket = busy.engine.Prepare(call.job);
  busy.engine.Start(ticket);
  const auto after = busy.engine.Submit([] {});
  CHECK(!ticket->WaitFor(std::chrono::milliseconds(30)));  // the other thread has it by now
  busy.released.set_value();
  busy.ticket->Wait();
  CHECK(!after->WaitFor(std::chrono::milliseconds(30)) && !ticket->done());
  other.released.set_value();
  after->Wait();
  CHECK(ticket->done() && call.job->was_remembered && call.work.y == call.output);
}

TEST(ACallWhoseRememberedOneFailedIsComputed) {
  const Layer layer;
  for (const bool is_busy : {false, true}) {
    Busy busy;
    RememberedCall call(layer);
    Engine other(1, {}, *KernelsOf(FastestTiers()));
    call.RememberWhenDone(other.Submit([] { throw std::bad_alloc(); }));
    if (!is_busy) {
      busy.released.set_value();
      busy.ticket->Wait();
    }
    const auto ticket = busy.engine.Prepare(call.job);
    busy.engine.Start(ticket);
    if (is_busy) {
      CHECK(!ticket->WaitFor(std::chrono::milliseconds(30)));
      busy.released.set_value();
    }
    ticket->Wait();
    busy.engine.SubmitForward(call.plain.call)->Wait();
    CHECK(!call.job->was_remembered && call.work.y == call.plain.y && call.IsRetained());
  }
}

TEST(ACallThatWasGivenUpWhileItWasRecalledLeavesNoNumbers) {
  const Layer layer;
  Busy busy, other;
  RememberedCall call(layer);
  call.work.x.back() = 3.0F;  // so that it would be computed
  call.RememberWhenDone(other.ticket);
  uint32_t word = 0;
  const auto ticket = busy.engine.Prepare(call.job);
  busy.engine.SetSignal(*ticket, &word, 1);
  busy.engine.Start(ticket);
  CHECK(!ticket->WaitFor(std::chrono::milliseconds(30)));
  busy.engine.SetPatience({std::chrono::milliseconds(1), 5});
  CHECK_THROWS(ticket->Wait(), EngineStalledError);
  CHECK(__atomic_load_n(&word, __ATOMIC_ACQUIRE) == 1);
  other.released.set_value();
  busy.released.set_value();
  busy.ticket->Wait();
  while (!ticket->done()) std::this_thread::yield();
  CHECK(std::isnan(call.work.y.front()) && std::isnan(call.work.y.back()) && !call.IsRetained());
}

}  // namespace
}  // namespace kt
