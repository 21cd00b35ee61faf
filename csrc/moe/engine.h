// The engine: one queue of layer calls, worked off in order by one pool of threads.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "moe/pass.h"

namespace kt {

// What is thrown where somebody waits for an engine that does nothing any more.
class EngineStalledError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A submitted piece of work. Thread-safe.
class Ticket {
 public:
  // Returns when the work is done; throws what the work threw.
  void Wait();
  // The same for at most that long; says whether the work was done.
  bool WaitFor(std::chrono::milliseconds patience);
  bool done() const;
  // When the engine began and ended the work, on std::chrono::steady_clock; only once it is done.
  using Clock = std::chrono::steady_clock;
  std::pair<Clock::time_point, Clock::time_point> span() const;

 private:
  friend class Engine;
  void Finish(Clock::time_point started, std::exception_ptr error);

  mutable std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
  Clock::time_point started_, finished_at_;
  std::exception_ptr error_;
};

struct PassStats {
  int64_t calls = 0, tokens = 0;
  double seconds = 0;  // the engine at work, waiting not counted
};

struct EngineStats {
  PassStats forward, backward;
  int64_t scratch_bytes = 0, kept_bytes = 0;
};

// Medians of a few trials.
struct MachinePeak {
  double product_flops = 0;   // per second and thread while all are at it: the tier's multiply-add on registers
  double int8_flops = 0;      // the same of its products of integers
  double read_bandwidth = 0;  // bytes per second of all threads together, from memory
};

class Engine {
 public:
  // Threads, nodes and spin time as in ThreadPool.
  Engine(int threads, const std::vector<std::vector<int>>& node_cpus, const TierKernels& kernels,
         std::chrono::microseconds spin = ThreadPool::kSpin);
  // Finishes what was submitted.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const TierKernels& kernels() const { return kernels_; }
  int threads() const { return pool_.threads(); }
  std::shared_ptr<BlockPool> blocks() const { return blocks_; }

  // Queue a pass. What `call` points to must stay alive until the ticket is done; its indices must lie in [0, E].
  std::shared_ptr<Ticket> SubmitForward(const LayerCall& call);
  std::shared_ptr<Ticket> SubmitBackward(const LayerCall& call);

  // Queues anything else that must have the engine's threads to itself.
  // All three throw EngineStalledError where a wait has found that the engine stands still, and it still does.
  std::shared_ptr<Ticket> Submit(std::function<void()> work);

  // How a stalled engine is found: one that has done nothing between any two of `looks` looks. Looks are counted, not
  // time, so that a process that was stopped or a machine that slept is not taken for stalled. Ten minutes: a slow pass
  // begins thousands of tasks in that time, and mapped weights may have to wait for a network's disk.
  struct Patience {
    std::chrono::milliseconds interval{1000};
    int looks = 600;
  };
  // As ticket.Wait(), for a ticket of this engine, and calls `on_look` after each interval. Throws EngineStalledError
  // when patience is at its end; what the work uses must then stay alive, as it may go on.
  void Wait(Ticket& ticket, const std::function<void()>& on_look, const Patience& patience) const;
  void Wait(Ticket& ticket) const;
  // Whether a wait has found that the engine stands still, and it has done nothing since.
  bool stalled() const;

  EngineStats stats() const;
  // Measured on first use, in turn with other work; takes some tens of milliseconds.
  MachinePeak Peak();

 private:
  struct Job {
    std::function<void()> work;
    std::shared_ptr<Ticket> ticket;
  };

  void Loop();
  uint64_t Progress() const;
  void CheckRunning() const;
  std::shared_ptr<Ticket> SubmitPass(void (Pass::*pass)(const LayerCall&), const LayerCall& call, PassStats* stats);
  MachinePeak MeasurePeak();

  const TierKernels& kernels_;
  ThreadPool pool_;
  Pass pass_;
  std::once_flag peak_measured_;
  MachinePeak peak_;
  std::shared_ptr<BlockPool> blocks_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> jobs_;
  bool stopping_ = false;
  std::atomic<int> calls_{0};       // jobs in the queue, and the call to stop
  std::atomic<uint64_t> turns_{0};  // jobs begun and jobs done
  mutable std::atomic<bool> found_stalled_{false};
  mutable std::atomic<uint64_t> stalled_at_{0};  // Progress() then
  EngineStats stats_;
  std::thread thread_;  // last: starts when everything else stands
};

}  // namespace kt
