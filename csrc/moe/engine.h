// The engine: one queue of layer calls, worked off in order by one pool of threads.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "moe/job.h"
#include "moe/pass.h"
#include "moe/ticket.h"

namespace kt {

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

  // A ticket for a job, or for anything else that must have the engine's threads to itself. What it points to must stay
  // alive until the ticket is done.
  std::shared_ptr<Ticket> Prepare(const std::shared_ptr<Job>& job);
  std::shared_ptr<Ticket> Prepare(std::function<void()> work);

  // Sets the word to that value, unless it is ahead of it modulo 2^32, once, when a ticket's results are in their place
  // or it is sure that there will be none; the ticket must not be started yet. Nobody on this side may be waiting while
  // a device waits for the word, so a thread of the engine watches whether it stands still from now on: if so, the
  // words of all tickets that are queued or running are set.
  void SetSignal(Ticket& ticket, uint32_t* word, uint32_t value);

  // Hands a ticket to the engine, which does one after the other. One whose results are remembered may be done before
  // those that were started before it; those that are started after it come later in any case. Throws std::logic_error
  // for one that was started or given a starter before, EngineStalledError where the engine was found to stand still
  // and still does, and its error for one that was cancelled.
  void Start(const std::shared_ptr<Ticket>& ticket);

  // The same for whoever can call a C function alone, as a device's driver can: it must be called exactly once, with
  // that argument, by any thread and at any time, also after the engine is gone. Instead of throwing, the ticket is
  // done with the error.
  using Function = void (*)(void* argument);
  std::pair<Function, void*> Starter(const std::shared_ptr<Ticket>& ticket);

  // Prepare and Start.
  std::shared_ptr<Ticket> SubmitForward(const LayerCall& call);
  std::shared_ptr<Ticket> SubmitBackward(const LayerCall& call);
  std::shared_ptr<Ticket> Submit(std::function<void()> work);

  // How a stalled engine is found: one that has done nothing between any two of `looks` looks. Looks are counted, not
  // time, so that a process that was stopped or a machine that slept is not taken for stalled. Ten minutes: a slow pass
  // begins thousands of tasks in that time, and mapped weights may have to wait for a network's disk.
  struct Patience {
    std::chrono::milliseconds interval{1000};
    int looks = 600;
  };
  // Throws std::invalid_argument for one that never ends or has no intervals.
  void SetPatience(const Patience& patience);
  // As ticket.Wait(), for a ticket of this engine, and calls `on_look` after each interval. Throws EngineStalledError
  // when patience is at its end; what the work uses must then stay alive, as it may go on. While a ticket is not
  // started nobody loses patience because of it.
  void Wait(Ticket& ticket, const std::function<void()>& on_look);
  void Wait(Ticket& ticket);
  // Whether the engine was found to stand still, and has done nothing since.
  bool stalled() const;

  EngineStats stats() const;
  // Measured on first use, in turn with other work; takes some tens of milliseconds.
  MachinePeak Peak();

 private:
  struct Queue;  // what starters share with the engine, and outlives it with them
  struct StarterArgument;

  // What one who looks at the engine from time to time remembers of the last look.
  struct Looks {
    bool pending = false;
    uint64_t progress = 0;
    int idle = 0;  // looks in a row that found work and no progress
  };

  void Loop();
  void RecallLoop();
  void Watch();
  // Looks whether the engine has gone on since the last look, and finds it stalled when patience is at its end.
  void Look(Looks& looks, bool pending);
  void FindStalled(uint64_t progress);
  uint64_t Progress() const;
  void CheckRunning() const;
  Patience patience() const;
  // Queues a ticket; one that cannot be queued is done, with the error that is returned.
  static std::exception_ptr Enqueue(Queue& queue, const std::shared_ptr<Ticket>& ticket) noexcept;
  std::shared_ptr<Ticket> SubmitPass(Job::Direction direction, const LayerCall& call);
  void RunJob(Job& job);
  MachinePeak MeasurePeak();

  const TierKernels& kernels_;
  ThreadPool pool_;
  Pass pass_;
  std::once_flag peak_measured_;
  MachinePeak peak_;
  std::shared_ptr<BlockPool> blocks_;

  const std::shared_ptr<Queue> queue_;
  std::atomic<uint64_t> turns_{0};  // tickets begun and tickets done with
  std::atomic<bool> found_stalled_{false};
  std::atomic<uint64_t> stalled_at_{0};  // Progress() then
  mutable std::mutex stats_mutex_;
  EngineStats stats_;

  mutable std::mutex watch_mutex_;
  std::condition_variable watch_wake_;
  Patience patience_;
  bool watch_ends_ = false;
  std::thread watch_;  // from the first signal on
  std::once_flag recalls_;
  std::thread recaller_;  // from the first job on that remembers a call
  std::thread thread_;    // last: starts when everything else stands
};

}  // namespace kt
