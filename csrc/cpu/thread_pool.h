// A small pool of threads that run numbered tasks, near the memory they read.
//
// The tasks of a round lie in one queue per NUMA node. A worker empties its own node's queue first and then helps with
// the others', so tasks of unequal length keep all workers busy. Who runs a task is left to chance; each writes a place
// of its own, so results do not depend on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kt {

// What a worker does between two looks at a flag.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class ThreadPool {
 public:
  // How long a worker looks for the next round before it sleeps: longer than the gap between the stages of one layer,
  // far shorter than a layer.
  static constexpr std::chrono::microseconds kSpin{60};

  // `threads` workers in all: the caller of Run is worker 0, the pool starts the others. There is a node for each entry
  // of `node_cpus`, the CPUs that its workers may run on (any, where it is empty), and one node without entries.
  // Workers are divided among nodes by their numbers of CPUs. A worker may use all of its node's CPUs instead of being
  // pinned to one, where it would wait behind somebody else's work while other CPUs idle. `spin` is zero where other
  // threads need the CPUs.
  ThreadPool(int threads, std::vector<std::vector<int>> node_cpus, std::chrono::microseconds spin = kSpin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  int nodes() const { return static_cast<int>(node_cpus_.size()); }
  int NodeOf(int worker) const;
  // How far the tasks that a worker takes mostly lie apart.
  int TaskStride() const { return std::max(1, threads_ / nodes()); }
  // Workers that sleep now.
  int sleepers() const { return sleepers_.load(); }

  // A number that changes whenever a worker begins a task: what does not change any more has stopped. It may go back.
  uint64_t Progress() const;

  // Lets the calling thread run where worker 0 may.
  void PlaceCaller() const { Place(0); }

  // Calls function(task, worker) for every task in [0, tasks), each once, and returns when all are done. One caller at
  // a time. `function` must not throw. Each node gets consecutive tasks, as many as its share of the workers.
  template <class Function>
  void Run(int64_t tasks, const Function& function) {
    for (int node = 0; node < nodes(); ++node) queues_[node].end = tasks * FirstWorker(node + 1) / threads();
    RunQueues(Call<Function>, &function);
  }

  // The same for the tasks [0, node_ends.back()), where those of node n end before task node_ends[n].
  template <class Function>
  void Run(const std::vector<int64_t>& node_ends, const Function& function) {
    for (int node = 0; node < nodes(); ++node) queues_[node].end = node_ends[static_cast<size_t>(node)];
    RunQueues(Call<Function>, &function);
  }

  // Looks for `done()` for the pool's spin time; says whether it was done.
  template <class Done>
  bool SpinUntil(const Done& done) const {
    if (spin_.count() == 0) return done();
    const auto deadline = std::chrono::steady_clock::now() + spin_;
    do {
      for (int i = 0; i < 64; ++i) {
        if (done()) return true;
        Pause();
      }
    } while (std::chrono::steady_clock::now() < deadline);
    return done();
  }

 private:
  using Invoke = void (*)(const void* function, int64_t task, int worker);

  template <class Function>
  static void Call(const void* function, int64_t task, int worker) {
    (*static_cast<const Function*>(function))(task, worker);
  }

  // What is left of one node's tasks, on a cache line of its own.
  struct alignas(64) Queue {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  int FirstWorker(int node) const;
  void Place(int worker) const;
  void RunQueues(Invoke invoke, const void* function);
  void DrainQueues(int worker);
  void WorkerLoop(int worker);
  void Stop();

  const int threads_;
  const std::vector<std::vector<int>> node_cpus_;
  const std::chrono::microseconds spin_;
  std::vector<std::thread> workers_;

  // The current round of tasks. Written by Run while no worker is inside; read by workers inside.
  std::unique_ptr<Queue[]> queues_;
  Invoke invoke_ = nullptr;
  const void* function_ = nullptr;

  // Who is inside the current round: kOpen while workers may still enter, plus kWorker for each that is inside, plus
  // the number of the round in the upper bits. Run waits only for workers that entered: one whose CPU somebody else
  // holds just misses the round.
  static constexpr uint64_t kOpen = 1, kWorker = 2, kRound = uint64_t{1} << 20;
  std::atomic<uint64_t> gate_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<int> sleepers_{0};
  std::atomic<uint64_t> alone_{0};  // tasks that the caller ran without a round
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
};

}  // namespace kt
