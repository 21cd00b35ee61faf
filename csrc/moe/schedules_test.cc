// Randomised schedules of one engine: several threads submit, await, hand over and abandon tickets, in an order that a
// seed decides. Under ThreadSanitizer this is where races of the engine show.
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "moe/engine.h"
#include "moe/fastest_tier.h"
#include "moe/small_calls.h"
#include "testing.h"

namespace kt {
namespace {

constexpr int kSchedules = 200, kKinds = 8;

// What calls give when they are made one after the other: the call's kind is its seed.
struct Expected {
  explicit Expected(const Layer& layer) {
    Engine engine(1, {}, *KernelsOf(FastestTiers()));
    for (int kind = 0; kind < kKinds; ++kind) {
      works.push_back(std::make_unique<Work>(layer, kind));
      engine.SubmitForward(works.back()->call)->Wait();
      engine.SubmitBackward(works.back()->call)->Wait();
    }
  }
  std::vector<std::unique_ptr<Work>> works;
};

// A call that was submitted; its memory lives as long as the schedule, whatever becomes of its ticket.
struct Submitted {
  std::unique_ptr<Work> work;
  int kind = 0;
  bool is_backward = false;
  std::shared_ptr<Ticket> ticket;  // null: abandoned, or awaited

  bool IsRight(const Expected& expected) const {
    const Work& same = *expected.works[static_cast<size_t>(kind)];
    return is_backward ? work->dx == same.dx && work->dw == same.dw : work->y == same.y;
  }
};

// Tickets that one thread leaves for another one to await.
class Shared {
 public:
  void Leave(std::shared_ptr<Ticket> ticket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tickets_.push_back(std::move(ticket));
  }
  std::shared_ptr<Ticket> Take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (tickets_.empty()) return nullptr;
    auto ticket = std::move(tickets_.back());
    tickets_.pop_back();
    return ticket;
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<Ticket>> tickets_;
};

// One thread's part of a schedule.
class Part {
 public:
  Part(const Layer& layer, const Expected& expected, Engine& engine, Shared& shared, uint32_t seed)
      : layer_(layer), expected_(expected), engine_(engine), shared_(shared), random_(seed) {}

  void Run(int steps) {
    for (int i = 0; i < steps; ++i) {
      switch (random_() % 10) {
        case 0:
        case 1:
        case 2:
          Submit();
          break;
        case 3:
        case 4:
          Await();
          break;
        case 5:
          Abandon();
          break;
        case 6:
          HandOver();
          break;
        case 7:
        case 8:
          Look();
          break;
        default:
          Fail();
      }
    }
  }

  // Once the engine is gone.
  bool IsEverythingRight() const {
    bool right = all_right_;
    for (const Submitted& submitted : submitted_) right = right && submitted.IsRight(expected_);
    return right;
  }

 private:
  void Submit() {
    Submitted made;
    made.kind = static_cast<int>(random_() % kKinds);
    made.is_backward = random_() % 2 != 0;
    made.work = std::make_unique<Work>(layer_, made.kind);
    made.ticket = made.is_backward ? engine_.SubmitBackward(made.work->call) : engine_.SubmitForward(made.work->call);
    submitted_.push_back(std::move(made));
  }

  // One of this thread's open tickets; null if there is none.
  Submitted* Pick() {
    std::vector<Submitted*> open;
    for (Submitted& submitted : submitted_) {
      if (submitted.ticket != nullptr) open.push_back(&submitted);
    }
    return open.empty() ? nullptr : open[random_() % open.size()];
  }

  void Await() {
    Submitted* const submitted = Pick();
    if (submitted == nullptr) return;
    engine_.Wait(*submitted->ticket);
    const auto [started, finished] = submitted->ticket->span();
    all_right_ = all_right_ && submitted->ticket->done() && started <= finished && submitted->IsRight(expected_);
    if (random_() % 2 != 0) submitted->ticket = nullptr;  // or it is awaited once more
  }

  void Abandon() {
    Submitted* const submitted = Pick();
    if (submitted != nullptr) submitted->ticket = nullptr;
  }

  // What is done must be right, whoever looks and without waiting.
  void Look() {
    const Submitted* const submitted = Pick();
    if (submitted != nullptr && submitted->ticket->done()) {
      all_right_ = all_right_ && submitted->IsRight(expected_) && !engine_.stalled();
    }
  }

  void HandOver() {
    Submitted* const submitted = Pick();
    if (submitted != nullptr) shared_.Leave(submitted->ticket);
    const std::shared_ptr<Ticket> other = shared_.Take();
    if (other == nullptr) return;
    other->Wait();
    all_right_ = all_right_ && other->done();
  }

  void Fail() {
    const auto ticket = engine_.Submit([] { throw std::bad_alloc(); });
    if (random_() % 2 != 0) return;
    try {
      engine_.Wait(*ticket);
      all_right_ = false;
    } catch (const std::bad_alloc&) {
      all_right_ = all_right_ && engine_.stats().scratch_bytes >= 0;
    }
  }

  const Layer& layer_;
  const Expected& expected_;
  Engine& engine_;
  Shared& shared_;
  std::mt19937 random_;
  std::vector<Submitted> submitted_;
  bool all_right_ = true;
};

TEST(RandomisedSchedulesGiveTheResultsOfOneCallAfterTheOther) {
  const Layer layer;
  const Expected expected(layer);
  for (uint32_t seed = 0; seed < kSchedules; ++seed) {
    std::mt19937 random(seed);
    std::vector<std::unique_ptr<Part>> parts;
    Shared shared;
    {
      const std::chrono::microseconds spin(random() % 2 == 0 ? 0 : 20);
      Engine engine(1 + static_cast<int>(random() % 3), std::vector<std::vector<int>>(random() % 3),
                    *KernelsOf(FastestTiers()), spin);
      const uint32_t count = 2 + random() % 3;
      for (uint32_t t = 0; t < count; ++t) {
        parts.push_back(std::make_unique<Part>(layer, expected, engine, shared, 1000 * seed + t));
      }
      std::vector<std::thread> threads;
      threads.reserve(count);
      for (const auto& part : parts) threads.emplace_back([&part] { part->Run(15); });
      for (std::thread& thread : threads) thread.join();
    }  // the engine finishes what was abandoned
    for (const auto& part : parts) {
      CHECK_MESSAGE(part->IsEverythingRight(), "schedule " + std::to_string(seed) + " gave other results");
    }
  }
}

}  // namespace
}  // namespace kt
