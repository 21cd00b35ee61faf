// A piece of work for the engine: prepared, handed over, and done.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace kt {

// What is thrown where somebody waits for an engine that does nothing any more.
class EngineStalledError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A piece of work and what became of it. Thread-safe. Its states follow one another: prepared, queued, running, done;
// one that cannot be handed over, or is cancelled before, is done at once.
class Ticket {
 public:
  using Clock = std::chrono::steady_clock;

  // What a ticket stands for.
  struct Work {
    std::function<void()> make_results;  // in the engine; what it throws reaches whoever waits
    // Makes results that are known already, and says whether it did; may be empty. By any thread beside the engine.
    std::function<bool()> recall;
    // Once the results were signalled, by whoever made them: the engine, or another thread; may be empty.
    std::function<void(bool in_engine)> keep;
    // Makes the memory of results unusable where there will be none; may be empty. Called by any thread, and must
    // neither throw nor need the engine.
    std::function<void()> spoil;
  };

  explicit Ticket(Work work) : work_(std::move(work)), may_be_recalled_(work_.recall != nullptr) {}

  // Returns when the work is done; throws what the work threw, and EngineStalledError where the engine was found to
  // stand still while somebody was to be told of the results: what then comes, comes too late.
  void Wait();
  // The same for at most that long; says whether the work was done.
  bool WaitFor(std::chrono::milliseconds patience);

  // Makes sure that a ticket which is not queued yet never will be: it is done, with a std::runtime_error of that
  // message. Says whether it was so.
  bool Cancel(const std::string& message);

  bool done() const;
  // Whether the engine has taken it.
  bool started() const;
  // When the engine began and ended the work, on Clock; only once it is done.
  std::pair<Clock::time_point, Clock::time_point> span() const;
  // When it was queued, or failed before.
  Clock::time_point submitted() const;

 private:
  friend class Engine;
  enum class State { kPrepared, kQueued, kRunning, kDone };

  void SetSignal(uint32_t* word, uint32_t value);
  // Whoever is first may queue it; throws std::logic_error for all others.
  void Claim();
  // Prepared to queued; false where it was cancelled.
  bool Queue();
  // Prepared to done, with that error; false where it is no longer prepared.
  bool Fail(const std::exception_ptr& error);
  // Queued to running, and all of the work, whose error is kept for Finish.
  void Run();
  bool may_be_recalled() const { return may_be_recalled_; }
  // The same by another thread, where results can be recalled. Where not the ticket is queued again, and false given.
  bool Recall();
  // Running to done.
  void Finish();
  // Signals although there are no results, if that is still to be done: whoever waits gets the error. A queued ticket
  // will not run any more.
  void Release(const std::exception_ptr& error);
  std::exception_ptr error() const;

  bool Begin();
  void Signal(std::exception_ptr error, bool in_engine);
  void RaiseSignal();             // once; under the lock
  void SpoilIfWaitedFor() const;  // under the lock

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Work work_;
  const bool may_be_recalled_;
  State state_ = State::kPrepared;
  bool claimed_ = false, started_ = false, released_ = false;
  uint32_t* signal_ = nullptr;  // null: none, or raised
  uint32_t signal_value_ = 0;
  Clock::time_point submitted_, began_, ended_;
  std::exception_ptr error_;
};

}  // namespace kt
