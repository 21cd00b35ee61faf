#include "moe/engine.h"

#include <atomic>
#include <future>
#include <new>

#include "moe/fastest_tier.h"
#include "moe/small_calls.h"
#include "testing.h"

namespace kt {
namespace {

TEST(TicketsFromManyThreadsGiveTheResultsOfOne) {
  const Layer layer;
  constexpr int kThreads = 4, kCalls = 20;
  std::vector<std::unique_ptr<Work>> expected;
  {
    Engine engine(1, {}, *KernelsOf(FastestTiers()));
    for (int i = 0; i < kThreads * kCalls; ++i) {
      expected.push_back(std::make_unique<Work>(layer, i));
      engine.SubmitForward(expected.back()->call)->Wait();
      engine.SubmitBackward(expected.back()->call)->Wait();
    }
  }
  for (const size_t nodes : {0, 2, 5}) {  // more than there are workers, and experts, too
    Engine engine(3, std::vector<std::vector<int>>(nodes), *KernelsOf(FastestTiers()));
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    threads.reserve(kThreads);
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < kCalls; ++i) {
          Work work(layer, t * kCalls + i);
          const auto forward = engine.SubmitForward(work.call), backward = engine.SubmitBackward(work.call);
          backward->Wait();
          forward->Wait();
          forward->Wait();  // waiting twice is fine
          const Work& same = *expected[static_cast<size_t>(t * kCalls + i)];
          if (work.y != same.y || work.dx != same.dx || work.dw != same.dw) wrong.fetch_add(1);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong.load() == 0);
    const EngineStats stats = engine.stats();
    CHECK(stats.forward.calls == kThreads * kCalls && stats.backward.calls == kThreads * kCalls);
    CHECK(stats.forward.tokens == stats.backward.tokens && stats.forward.seconds > 0 && stats.scratch_bytes > 0);
  }
}

TEST(WhatWasSubmittedIsFinishedBeforeTheEngineGoes) {
  const Layer layer;
  Work work(layer, 11);
  std::shared_ptr<Ticket> ticket;
  {
    Engine engine(2, {}, *BestKernels(Tier::kPortable));
    CHECK(engine.kernels().tier == Tier::kPortable && engine.threads() == 2);
    for (int i = 0; i < 20; ++i) ticket = engine.SubmitForward(work.call);
  }
  CHECK(ticket->done());
}

TEST(ATicketSaysWhenItsWorkWasDone) {
  const Layer layer;
  Work work(layer, 5);
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  const auto before = Ticket::Clock::now();
  const auto first = engine.SubmitForward(work.call), second = engine.Submit([] { throw std::bad_alloc(); });
  CHECK_THROWS(second->Wait(), std::bad_alloc);
  const auto after = Ticket::Clock::now();
  const auto [first_start, first_end] = first->span();
  const auto [second_start, second_end] = second->span();
  CHECK(before <= first_start && first_start < first_end && first_end <= second_start);  // one after the other
  CHECK(second_start <= second_end && second_end <= after);
}

TEST(AFailureReachesWhoeverWaits) {
  const Layer layer;
  Work work(layer, 5);
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  const auto ticket = engine.Submit([] { throw std::bad_alloc(); });
  CHECK_THROWS(ticket->Wait(), std::bad_alloc);
  CHECK_THROWS(ticket->Wait(), std::bad_alloc);
  engine.SubmitForward(work.call)->Wait();  // and the engine works on
}

TEST(AnEngineThatStandsStillIsFound) {
  const Layer layer;
  Work work(layer, 5);
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  std::promise<void> begun, released;
  const auto ticket = engine.Submit([&] {
    begun.set_value();
    released.get_future().wait();
  });
  begun.get_future().wait();
  CHECK(!engine.stalled());
  const auto wait = [&](Ticket& other) { engine.Wait(other, [] {}, {std::chrono::milliseconds(1), 5}); };
  CHECK_THROWS(wait(*ticket), EngineStalledError);
  CHECK(engine.stalled());
  CHECK_THROWS(wait(*ticket), EngineStalledError);  // at once
  CHECK_THROWS(engine.SubmitForward(work.call), EngineStalledError);
  released.set_value();
  ticket->Wait();
  CHECK(!engine.stalled());
  wait(*engine.SubmitForward(work.call));  // and it works on
}

TEST(ASlowEngineIsNotTakenForOneThatStandsStill) {
  constexpr int kJobs = 30;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  std::vector<std::promise<void>> released(kJobs);
  std::vector<std::shared_ptr<Ticket>> tickets;
  tickets.reserve(kJobs);
  for (int i = 0; i < kJobs; ++i) tickets.push_back(engine.Submit([&, i] { released[i].get_future().wait(); }));
  size_t next = 0;  // each look finds one more job done, far more of them than patience lasts
  const auto go_on = [&] {
    if (next == tickets.size()) return;
    released[next].set_value();
    tickets[next++]->Wait();
  };
  engine.Wait(*tickets.back(), go_on, {std::chrono::milliseconds(1), 2});
  CHECK(tickets.back()->done() && !engine.stalled());
}

TEST(ScratchDoesNotGrowWithRepetition) {
  const Layer layer;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  for (int i = 0; i < 40; ++i) engine.SubmitBackward(Work(layer, i).call)->Wait();
  const int64_t before = engine.stats().scratch_bytes;
  for (int i = 0; i < 400; ++i) engine.SubmitBackward(Work(layer, i).call)->Wait();
  CHECK(engine.stats().scratch_bytes == before);
}

TEST(TheMachinesPeakIsMeasured) {
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  const MachinePeak peak = engine.Peak();
  CHECK(engine.Peak().product_flops == peak.product_flops);  // once
  CHECK(engine.Peak().int8_flops == peak.int8_flops && peak.int8_flops > 0);
  CHECK(peak.product_flops > 0 && peak.read_bandwidth > 0);
}

}  // namespace
}  // namespace kt
