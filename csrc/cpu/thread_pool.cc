#include "cpu/thread_pool.h"

#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace kt {
namespace {

// How long a worker looks for the next round before it sleeps: longer than the gap between the stages of one layer, far
// shorter than a layer.
constexpr std::chrono::microseconds kSpin(60);

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins until `done()` or until kSpin has passed; says whether it was done.
template <class Done>
bool SpinUntil(const Done& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

}  // namespace

ThreadPool::ThreadPool(int threads, std::vector<int> cpus) : cpus_(std::move(cpus)) {
  try {
    for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { WorkerLoop(worker); });
  } catch (...) {  // the system grants no more threads
    Stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { Stop(); }

void ThreadPool::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::PinCaller() const { Pin(0); }

void ThreadPool::Pin([[maybe_unused]] int worker) const {
#if defined(__linux__)
  if (cpus_.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus_[worker % cpus_.size()], &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // a CPU taken away meanwhile leaves the thread unpinned
#endif
}

void ThreadPool::RunErased(int64_t tasks, Invoke invoke, const void* function) {
  if (tasks <= 0) return;
  if (workers_.empty() || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) invoke(function, task, 0);
    return;
  }
  tasks_ = tasks;
  invoke_ = invoke;
  function_ = function;
  next_task_.store(0, std::memory_order_relaxed);
  const uint64_t round = gate_.load(std::memory_order_relaxed) / kRound + 1;
  gate_.store(round * kRound +
              kOpen);  // sequentially consistent: a worker sees the open gate, or we see that it sleeps
  if (sleepers_.load() > 0) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }
  DrainTasks(0);
  gate_.fetch_sub(kOpen);
  const auto empty = [this] { return gate_.load(std::memory_order_acquire) % kRound == 0; };
  while (!SpinUntil(empty)) std::this_thread::yield();
}

void ThreadPool::DrainTasks(int worker) {
  for (;;) {
    const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks_) return;
    invoke_(function_, task, worker);
  }
}

void ThreadPool::WorkerLoop(int worker) {
  Pin(worker);
  uint64_t last_round = 0;
  const auto called = [this, &last_round] {
    const uint64_t gate = gate_.load();  // sequentially consistent, as in RunErased
    return ((gate & kOpen) != 0 && gate / kRound != last_round) || stopping_.load();
  };
  for (;;) {
    if (!SpinUntil(called)) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, called);
      sleepers_.fetch_sub(1);
    }
    if (stopping_.load()) return;
    uint64_t gate = gate_.load(std::memory_order_acquire);
    while ((gate & kOpen) != 0 && !gate_.compare_exchange_weak(gate, gate + kWorker, std::memory_order_acq_rel)) {
    }
    last_round = gate / kRound;
    if ((gate & kOpen) == 0) continue;  // over before we were there
    DrainTasks(worker);
    gate_.fetch_sub(kWorker, std::memory_order_release);
  }
}

}  // namespace kt
