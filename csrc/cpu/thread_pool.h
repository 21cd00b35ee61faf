// A small pool of pinned threads that run numbered tasks.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace kt {

class ThreadPool {
 public:
  // `threads` workers in all: the caller of Run is worker 0, the pool starts the others. Worker i is pinned to cpus[i %
  // cpus.size()]; no pinning if `cpus` is empty.
  ThreadPool(int threads, std::vector<int> cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Pins the calling thread as worker 0.
  void PinCaller() const;

  // Calls function(task, worker) for every task in [0, tasks), each once, on whichever worker is free next, and returns
  // when all are done. One caller at a time. `function` must not throw.
  template <class Function>
  void Run(int64_t tasks, const Function& function) {
    RunErased(
        tasks, [](const void* f, int64_t task, int worker) { (*static_cast<const Function*>(f))(task, worker); },
        &function);
  }

 private:
  using Invoke = void (*)(const void* function, int64_t task, int worker);

  void RunErased(int64_t tasks, Invoke invoke, const void* function);
  void Stop();
  void WorkerLoop(int worker);
  void Pin(int worker) const;
  void DrainTasks(int worker);

  const std::vector<int> cpus_;
  std::vector<std::thread> workers_;

  // The current round of tasks. Written by Run while no worker is inside; read by workers inside.
  int64_t tasks_ = 0;
  Invoke invoke_ = nullptr;
  const void* function_ = nullptr;
  std::atomic<int64_t> next_task_{0};

  // Who is inside the current round: kOpen while workers may still enter, plus kWorker for each that is inside, plus
  // the number of the round in the upper bits. Run waits only for workers that entered: one whose CPU somebody else
  // holds just misses the round.
  static constexpr uint64_t kOpen = 1, kWorker = 2, kRound = uint64_t{1} << 20;
  std::atomic<uint64_t> gate_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace kt
