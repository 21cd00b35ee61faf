// Randomised schedules of one engine: several threads submit, await, cancel, hand over and abandon tickets, and start
// each other's, in an order that a seed decides. Under ThreadSanitizer this is where races of the engine show.
#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

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
      const Work& work = *works.back();
      engine.SubmitForward(work.call)->Wait();
      engine.SubmitBackward(work.call)->Wait();
      for (int64_t t = 0; t < work.tokens; ++t)
        digests[kind].push_back(Digest(work.x.data() + t * Layer::kHidden, Layer::kHidden * 4));
    }
  }
  Job::Remembered Remembered(int kind) const {
    const Work& work = *works[static_cast<size_t>(kind)];
    return {digests[kind].data(), {work.index.data(), work.weights.data()}, work.y.data(), nullptr};
  }
  std::vector<std::unique_ptr<Work>> works;
  std::vector<uint64_t> digests[kKinds];
};

// A call that was prepared; its memory lives as long as the schedule, whatever becomes of its ticket.
struct Prepared {
  static constexpr uint32_t kSignal = 77;

  std::unique_ptr<Work> work;
  int kind = 0;
  bool is_backward = false, is_cancelled = false;
  std::unique_ptr<uint32_t> word;  // null: without a signal
  std::shared_ptr<Ticket> ticket;  // null: abandoned, or awaited

  bool IsRight(const Expected& expected) const {
    const Work& same = *expected.works[static_cast<size_t>(kind)];
    return is_backward ? work->dx == same.dx && work->dw == same.dw : work->y == same.y;
  }
  bool IsSignalled() const { return word != nullptr && __atomic_load_n(word.get(), __ATOMIC_ACQUIRE) == kSignal; }
  // Once nothing can happen any more.
  bool IsAsItMustBe(const Expected& expected) const {
    if (word != nullptr && !IsSignalled()) return false;
    if (ticket == nullptr || ticket->started()) return IsRight(expected) && !is_cancelled;
    try {
      ticket->Wait();
      return false;
    } catch (const std::runtime_error& error) {
      return is_cancelled == (error.what() == std::string("cancelled"));
    }
  }
};

// What one thread leaves for another: tickets to await, and starters to call.
class Shared {
 public:
  using Starter = std::pair<Engine::Function, void*>;

  void Leave(std::shared_ptr<Ticket> ticket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tickets_.push_back(std::move(ticket));
  }
  void Leave(const Starter& starter) {
    const std::lock_guard<std::mutex> lock(mutex_);
    starters_.push_back(starter);
  }
  std::shared_ptr<Ticket> Take() { return TakeFrom(tickets_); }
  // Calls a starter that was left; says whether there was one.
  bool StartOne() {
    const auto [start, argument] = TakeFrom(starters_);
    if (start != nullptr) start(argument);
    return start != nullptr;
  }

 private:
  template <class T>
  T TakeFrom(std::vector<T>& left) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (left.empty()) return T();
    T taken = std::move(left.back());
    left.pop_back();
    return taken;
  }

  std::mutex mutex_;
  std::vector<std::shared_ptr<Ticket>> tickets_;
  std::vector<Starter> starters_;
};

// One thread's part of a schedule.
class Part {
 public:
  Part(const Layer& layer, const Expected& expected, Engine& engine, Shared& shared, uint32_t seed)
      : layer_(layer), expected_(expected), engine_(engine), shared_(shared), random_(seed) {}

  void Run(int steps) {
    for (int i = 0; i < steps; ++i) {
      switch (random_() % 14) {
        case 0:
        case 1:
        case 2:
        case 3:
          Prepare();
          break;
        case 4:
        case 5:
          Await();
          break;
        case 6:
          Abandon();
          break;
        case 7:
          HandOver();
          break;
        case 8:
        case 9:
          shared_.StartOne();
          break;
        case 10:
          Cancel();
          break;
        case 11:
        case 12:
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
    for (const Prepared& prepared : prepared_) right = right && prepared.IsAsItMustBe(expected_);
    return right;
  }

 private:
  void Prepare() {
    Prepared made;
    made.kind = static_cast<int>(random_() % kKinds);
    made.is_backward = random_() % 2 != 0;
    made.work = std::make_unique<Work>(layer_, made.kind);
    const auto job = std::make_shared<Job>();
    job->direction = made.is_backward ? Job::Direction::kBackward : Job::Direction::kForward;
    job->call = made.work->call;
    if (!made.is_backward && random_() % 2 != 0) {  // of its own kind, or of another one, which differs
      job->remembered = expected_.Remembered(random_() % 2 != 0 ? made.kind : std::min(made.kind + 1, kKinds - 1));
    }
    made.ticket = engine_.Prepare(job);
    if (random_() % 2 != 0) {
      made.word = std::make_unique<uint32_t>(0);
      engine_.SetSignal(*made.ticket, made.word.get(), Prepared::kSignal);
    }
    if (random_() % 2 != 0) {
      engine_.Start(made.ticket);
    } else {
      shared_.Leave(engine_.Starter(made.ticket));
    }
    prepared_.push_back(std::move(made));
  }

  // One of this thread's open tickets; null if there is none.
  Prepared* Pick(bool only_started) {
    std::vector<Prepared*> open;
    for (Prepared& prepared : prepared_) {
      if (prepared.ticket != nullptr && (!only_started || prepared.ticket->started())) open.push_back(&prepared);
    }
    return open.empty() ? nullptr : open[random_() % open.size()];
  }

  void Await() {
    Prepared* const prepared = Pick(true);
    if (prepared == nullptr) return;
    engine_.Wait(*prepared->ticket);
    const auto [started, finished] = prepared->ticket->span();
    all_right_ = all_right_ && prepared->ticket->done() && started <= finished && prepared->IsRight(expected_);
    if (random_() % 2 != 0) prepared->ticket = nullptr;  // or it is awaited once more
  }

  void Abandon() {
    Prepared* const prepared = Pick(true);
    if (prepared != nullptr) prepared->ticket = nullptr;
  }

  void Cancel() {
    Prepared* const prepared = Pick(false);
    if (prepared == nullptr) return;
    const bool was_started = prepared->ticket->started(), was_done = prepared->ticket->done();
    if (!prepared->ticket->Cancel("cancelled")) {
      all_right_ = all_right_ && (prepared->ticket->started() || was_done);
      return;
    }
    prepared->is_cancelled = true;
    all_right_ = all_right_ && !was_started && !was_done && prepared->ticket->done();
  }

  // What is done, or was signalled, must be right, whoever looks and without waiting.
  void Look() {
    const Prepared* const prepared = Pick(true);
    if (prepared != nullptr && (prepared->ticket->done() || prepared->IsSignalled())) {
      all_right_ = all_right_ && prepared->IsRight(expected_) && !engine_.stalled();
    }
  }

  void HandOver() {
    Prepared* const prepared = Pick(true);
    if (prepared != nullptr) shared_.Leave(prepared->ticket);
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
  std::vector<Prepared> prepared_;
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
      for (const auto& part : parts) threads.emplace_back([&part] { part->Run(20); });
      for (std::thread& thread : threads) thread.join();
      if (random() % 2 == 0) shared.StartOne();
    }  // the engine finishes what was abandoned
    while (shared.StartOne()) {  // too late
    }
    for (const auto& part : parts) {
      CHECK_MESSAGE(part->IsEverythingRight(), "schedule " + std::to_string(seed) + " gave other results");
    }
  }
}

}  // namespace
}  // namespace kt
