#include "cpu/thread_pool.h"

#include <atomic>
#include <chrono>
#include <memory>

#include "testing.h"

namespace kt {
namespace {

TEST(EveryTaskRunsOnce) {
  for (const int threads : {1, 2, 5, 16}) {
    ThreadPool pool(threads, {});
    CHECK(pool.threads() == threads);
    for (const int64_t tasks : {0, 1, 2, 3, 100, 1000}) {
      const auto counts = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(tasks) + 1);
      pool.Run(tasks, [&](int64_t task, int worker) {
        CHECK(worker >= 0 && worker < threads);
        counts[static_cast<size_t>(task)].fetch_add(1);
      });
      for (int64_t task = 0; task < tasks; ++task) CHECK(counts[static_cast<size_t>(task)].load() == 1);
    }
  }
}

TEST(WritesOfOneRoundAreSeenInTheNext) {
  ThreadPool pool(4, {});
  constexpr int64_t kTasks = 64;
  std::vector<int64_t> values(kTasks, 0);  // plain memory: the pool's own ordering must make it safe
  for (int64_t round = 1; round <= 2000; ++round) {
    pool.Run(kTasks, [&](int64_t task, int) {
      const int64_t neighbour = values[static_cast<size_t>(task)];
      values[static_cast<size_t>(task)] = neighbour + 1;
    });
    int64_t sum = 0;
    for (const int64_t value : values) sum += value;
    CHECK(sum == round * kTasks);
  }
}

TEST(WorkersWakeFromSleep) {
  ThreadPool pool(3, {});
  for (int round = 0; round < 20; ++round) {
    // Far longer than workers spin, so that they go to sleep in between.
    std::this_thread::sleep_for(std::chrono::microseconds(round % 2 == 0 ? 2000 : 50));
    std::atomic<int64_t> sum{0};
    pool.Run(10, [&](int64_t task, int) { sum.fetch_add(task); });
    CHECK(sum.load() == 45);
  }
}

TEST(PoolsStartAndStop) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(4, {0});
    if (i % 2 == 0) continue;
    std::atomic<int> count{0};
    pool.Run(7, [&](int64_t, int) { count.fetch_add(1); });
    CHECK(count.load() == 7);
  }
}

TEST(PinningToAMissingCpuIsHarmless) {
  ThreadPool pool(2, {1023, 1022});
  pool.PinCaller();
  std::atomic<int> count{0};
  pool.Run(9, [&](int64_t, int) { count.fetch_add(1); });
  CHECK(count.load() == 9);
}

}  // namespace
}  // namespace kt
