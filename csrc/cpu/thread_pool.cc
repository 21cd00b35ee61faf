#include "cpu/thread_pool.h"

#include <algorithm>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace kt {
namespace {

// An entry without CPUs counts as one.
int64_t Weight(const std::vector<int>& cpus) { return cpus.empty() ? 1 : static_cast<int64_t>(cpus.size()); }

}  // namespace

ThreadPool::ThreadPool(int threads, std::vector<std::vector<int>> node_cpus, std::chrono::microseconds spin)
    : threads_(threads),
      node_cpus_(node_cpus.empty() ? std::vector<std::vector<int>>(1) : std::move(node_cpus)),
      spin_(spin),
      queues_(std::make_unique<Queue[]>(node_cpus_.size())) {
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

int ThreadPool::FirstWorker(int node) const {
  int64_t before = 0, others = 0;  // `others` are this node's and those after it
  for (int n = 0; n < nodes(); ++n) (n < node ? before : others) += Weight(node_cpus_[static_cast<size_t>(n)]);
  const int64_t all = std::max<int64_t>(1, before + others);
  return static_cast<int>((threads_ * before + all / 2) / all);
}

int ThreadPool::NodeOf(int worker) const {
  int node = 0;
  while (worker >= FirstWorker(node + 1)) ++node;
  return node;
}

void ThreadPool::Place([[maybe_unused]] int worker) const {
#if defined(__linux__)
  const std::vector<int>& cpus = node_cpus_[static_cast<size_t>(NodeOf(worker))];
  if (cpus.empty()) return;
  const int most = *std::max_element(cpus.begin(), cpus.end()) + 1;
  cpu_set_t* const set = CPU_ALLOC(most);
  if (set == nullptr) return;
  const size_t bytes = CPU_ALLOC_SIZE(most);
  CPU_ZERO_S(bytes, set);
  for (const int cpu : cpus) CPU_SET_S(cpu, bytes, set);
  pthread_setaffinity_np(pthread_self(), bytes, set);  // where CPUs were taken away meanwhile, it runs anywhere
  CPU_FREE(set);
#endif
}

uint64_t ThreadPool::Progress() const {
  uint64_t begun = alone_.load(std::memory_order_relaxed);
  for (int node = 0; node < nodes(); ++node) {
    begun += static_cast<uint64_t>(queues_[node].next.load(std::memory_order_relaxed));
  }
  // The round in the upper half, so that one more round and as many fewer tasks do not look like standing still.
  return begun + ((gate_.load(std::memory_order_relaxed) / kRound) << 32);
}

void ThreadPool::RunQueues(Invoke invoke, const void* function) {
  const int64_t tasks = queues_[nodes() - 1].end;
  if (tasks <= 0) return;
  if (workers_.empty() || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) {
      alone_.fetch_add(1, std::memory_order_relaxed);
      invoke(function, task, 0);
    }
    return;
  }
  for (int node = 0; node < nodes(); ++node) {
    queues_[node].next.store(node == 0 ? 0 : queues_[node - 1].end, std::memory_order_relaxed);
  }
  invoke_ = invoke;
  function_ = function;
  const uint64_t round = gate_.load(std::memory_order_relaxed) / kRound + 1;
  // Sequentially consistent: a worker sees the open gate, or we see that it sleeps.
  gate_.store(round * kRound + kOpen);
  if (sleepers_.load() > 0) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }
  DrainQueues(0);
  gate_.fetch_sub(kOpen);
  const auto empty = [this] { return gate_.load() % kRound == 0; };
  if (SpinUntil(empty)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_sleeps_.store(true);
  left_.wait(lock, empty);
  caller_sleeps_.store(false);
}

void ThreadPool::DrainQueues(int worker) {
  const int own = NodeOf(worker);
  for (int i = 0; i < nodes(); ++i) {
    Queue& queue = queues_[(own + i) % nodes()];
    for (;;) {
      const int64_t task = queue.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= queue.end) break;
      invoke_(function_, task, worker);
    }
  }
}

void ThreadPool::WorkerLoop(int worker) {
  Place(worker);
  uint64_t last_round = 0;
  const auto called = [this, &last_round] {
    const uint64_t gate = gate_.load();  // sequentially consistent, as in RunQueues
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
    DrainQueues(worker);
    // Sequentially consistent: the caller sees that the last one left, or we see that it sleeps.
    if ((gate_.fetch_sub(kWorker) - kWorker) % kRound != 0 || !caller_sleeps_.load()) continue;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    left_.notify_one();
  }
}

}  // namespace kt
