#include "moe/engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <future>
#include <new>
#include <stdexcept>

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
  engine.SetPatience({std::chrono::milliseconds(1), 5});
  const auto wait = [&](Ticket& other) { engine.Wait(other); };
  CHECK_THROWS(wait(*ticket), EngineStalledError);
  CHECK(engine.stalled());
  CHECK_THROWS(wait(*ticket), EngineStalledError);  // at once
  CHECK_THROWS(engine.SubmitForward(work.call), EngineStalledError);
  released.set_value();
  ticket->Wait();
  CHECK(!engine.stalled());
  wait(*engine.SubmitForward(work.call));  // and it works on
}

// Work that begins and then stands still until it is let go on.
struct Obstacle {
  std::promise<void> begun, released;

  std::function<void()> work() {
    return [this] {
      begun.set_value();
      released.get_future().wait();
    };
  }
};

// A forward of which a device is told.
struct Signalled {
  static constexpr uint32_t kValue = 3;
  Signalled(const Layer& layer, Engine& engine, int seed) : work(layer, seed) {
    const auto job = std::make_shared<Job>();
    job->call = work.call;
    ticket = engine.Prepare(job);
    engine.SetSignal(*ticket, &word, kValue);
  }
  bool IsSignalled() const { return __atomic_load_n(&word, __ATOMIC_ACQUIRE) == kValue; }
  bool IsSpoilt() const {
    return std::all_of(work.y.begin(), work.y.end(), [](float y) { return std::isnan(y); });
  }
  bool IsUntouched() const {
    return std::all_of(work.y.begin(), work.y.end(), [](float y) { return y == 0; });
  }

  Work work;
  uint32_t word = 0;
  std::shared_ptr<Ticket> ticket;
};

void AwaitSignal(const Signalled& signalled) {
  while (!signalled.IsSignalled()) std::this_thread::yield();
}

std::string ErrorOf(Ticket& ticket) {
  try {
    ticket.Wait();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

TEST(AStarterHandsATicketOverFromAnyThread) {
  const Layer layer;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  Work plain(layer, 5);
  engine.SubmitForward(plain.call)->Wait();
  Signalled call(layer, engine, 5);
  CHECK(!call.ticket->started() && !call.ticket->done() && call.IsUntouched());
  const auto [start, argument] = engine.Starter(call.ticket);
  std::thread driver(start, argument);
  AwaitSignal(call);
  CHECK(call.work.y == plain.y);  // before anybody waited
  driver.join();
  call.ticket->Wait();
  CHECK(call.ticket->started() && call.ticket->done() && !call.ticket->Cancel("late"));
}

TEST(ASignalComesAfterTheResultsAndBeforeWhatIsKept) {
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  uint32_t word = 0, then = 1, later = 0;
  const auto look = [&word] { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); };
  Ticket::Work work;
  work.make_results = [&] { then = look(); };
  work.keep = [&](bool in_engine) { later = in_engine ? look() : 0; };
  const auto ticket = std::make_shared<Ticket>(std::move(work));
  engine.SetSignal(*ticket, &word, 9);
  engine.Start(ticket);
  ticket->Wait();
  CHECK(then == 0 && later == 9);
}

TEST(ATicketIsStartedOnce) {
  const Layer layer;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  Signalled first(layer, engine, 1), second(layer, engine, 2);
  engine.Start(first.ticket);
  CHECK_THROWS(engine.Start(first.ticket), std::logic_error);
  CHECK_THROWS(engine.Starter(first.ticket), std::logic_error);
  CHECK_THROWS(engine.SetSignal(*first.ticket, &first.word, 1), std::logic_error);
  const auto [start, argument] = engine.Starter(second.ticket);
  CHECK_THROWS(engine.Start(second.ticket), std::logic_error);
  CHECK_THROWS(engine.Starter(second.ticket), std::logic_error);
  start(argument);
  first.ticket->Wait();
  second.ticket->Wait();
  CHECK(engine.stats().forward.calls == 2);
}

TEST(AStarterMayComeAfterTheEngineIsGone) {
  const Layer layer;
  auto engine = std::make_unique<Engine>(2, std::vector<std::vector<int>>(), *KernelsOf(FastestTiers()));
  Signalled call(layer, *engine, 5);
  const auto [start, argument] = engine->Starter(call.ticket);
  engine.reset();
  CHECK(!call.ticket->done() && !call.IsSignalled());
  start(argument);
  CHECK(call.ticket->done() && !call.ticket->started() && call.IsSignalled() && call.IsSpoilt());
  CHECK(ErrorOf(*call.ticket) == "kt_sft: the expert engine has ended");
}

TEST(ATicketThatWasCancelledIsNotStarted) {
  const Layer layer;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  Signalled call(layer, engine, 5), other(layer, engine, 6);
  const auto [start, argument] = engine.Starter(call.ticket);
  CHECK(call.ticket->Cancel("no longer") && !call.ticket->Cancel("twice"));
  CHECK(call.ticket->done() && call.IsSignalled() && call.IsSpoilt());
  uint32_t word = 0;
  engine.SetSignal(*call.ticket, &word, 8);  // there will be no results: at once
  CHECK(word == 8);
  start(argument);
  CHECK(other.ticket->Cancel("nor this"));
  CHECK_THROWS(engine.Start(other.ticket), std::runtime_error);
  engine.Submit([] {})->Wait();
  CHECK(ErrorOf(*call.ticket) == "no longer" && ErrorOf(*other.ticket) == "nor this");
  CHECK(!call.ticket->started() && engine.stats().forward.calls == 0);
}

TEST(ATicketThatWasStartedIsNotCancelled) {
  const Layer layer;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  Obstacle obstacle;
  engine.Submit(obstacle.work());
  Signalled queued(layer, engine, 5);
  engine.Start(queued.ticket);
  CHECK(!queued.ticket->Cancel("too late") && !queued.ticket->done());
  obstacle.released.set_value();
  queued.ticket->Wait();
  CHECK(!queued.IsUntouched() && !queued.IsSpoilt());
}

TEST(DevicesGoOnWhereTheEngineStandsStill) {
  const Layer layer;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  Obstacle obstacle;
  uint32_t word = 0;
  const auto running = engine.Prepare(obstacle.work());
  engine.SetSignal(*running, &word, 1);
  engine.Start(running);
  obstacle.begun.get_future().wait();
  Work unsignalled(layer, 4);
  const auto without_signal = engine.SubmitForward(unsignalled.call);
  Signalled queued(layer, engine, 5), late(layer, engine, 6), later(layer, engine, 7);
  engine.Start(queued.ticket);
  engine.SetPatience({std::chrono::milliseconds(1), 5});
  AwaitSignal(queued);  // nobody waits for a ticket
  while (__atomic_load_n(&word, __ATOMIC_ACQUIRE) == 0) std::this_thread::yield();
  CHECK(engine.stalled() && !running->done() && !queued.ticket->done() && queued.IsSpoilt());
  CHECK_THROWS(engine.Wait(*running), EngineStalledError);
  CHECK_THROWS(engine.Wait(*queued.ticket), EngineStalledError);
  CHECK_THROWS(engine.Start(late.ticket), EngineStalledError);
  const auto [start, argument] = engine.Starter(later.ticket);
  start(argument);
  for (const Signalled* const call : {&late, &later}) {
    CHECK(call->ticket->done() && call->IsSignalled() && call->IsSpoilt());
    CHECK_THROWS(call->ticket->Wait(), EngineStalledError);
  }

  engine.SetPatience(Engine::Patience());
  word = 0;
  obstacle.released.set_value();
  without_signal->Wait();
  CHECK(!engine.stalled() && running->done());
  CHECK_THROWS(running->Wait(), EngineStalledError);  // it came too late
  Signalled next(layer, engine, 8);
  engine.Start(next.ticket);
  next.ticket->Wait();
  CHECK_THROWS(queued.ticket->Wait(), EngineStalledError);
  CHECK(queued.ticket->done() && queued.IsSpoilt());
  CHECK(next.IsSignalled() && word == 0 && engine.stats().forward.calls == 2);  // nothing is signalled twice
}

TEST(NobodyLosesPatienceWithWhatWasNotStarted) {
  const Layer layer;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  engine.SetPatience({std::chrono::milliseconds(1), 2});
  Signalled call(layer, engine, 5);
  int looks = 0;
  engine.Wait(*call.ticket, [&] {
    if (++looks != 30) return;
    CHECK(!engine.stalled());
    engine.SetPatience({std::chrono::milliseconds(1), 1000000});
    engine.Start(call.ticket);
  });
  CHECK(looks >= 30 && call.IsSignalled());
}

TEST(WhatIsThrownAtALookEndsTheWait) {
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  engine.SetPatience({std::chrono::milliseconds(1), 1000000});
  const auto ticket = engine.Prepare([] {});
  CHECK_THROWS(engine.Wait(*ticket, [] { throw std::bad_alloc(); }), std::bad_alloc);
  CHECK_THROWS(engine.SetPatience({std::chrono::milliseconds(0), 5}), std::invalid_argument);
  CHECK_THROWS(engine.SetPatience({std::chrono::milliseconds(5), 0}), std::invalid_argument);
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
  engine.SetPatience({std::chrono::milliseconds(1), 2});
  engine.Wait(*tickets.back(), go_on);
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
