#include "cpu/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <memory>

#include "testing.h"

namespace kt {
namespace {

using NodeCpus = std::vector<std::vector<int>>;

const NodeCpus kTwoNodes(2);  // unpinned, so that any machine will do

// Waits for what another thread is about to do.
template <class Done>
void Await(const Done& done) {
  while (!done()) std::this_thread::yield();
}

TEST(EveryTaskRunsOnce) {
  for (const int threads : {1, 2, 5, 16}) {
    for (const size_t nodes : {0, 1, 2, 3}) {
      ThreadPool pool(threads, NodeCpus(nodes));
      CHECK(pool.threads() == threads && pool.nodes() == std::max(1, static_cast<int>(nodes)));
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
}

TEST(EveryTaskIsProgress) {
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads, {});
    for (const int64_t tasks : {1, 2, 3, 2, 1, 100}) {  // fewer tasks than in the round before must show, too
      const uint64_t before = pool.Progress();
      pool.Run(tasks, [](int64_t, int) {});
      CHECK(pool.Progress() != before);
    }
    const uint64_t before = pool.Progress();
    CHECK(pool.Progress() == before);
  }
}

TEST(TasksMayBeDealtToNodesInAnyShares) {
  ThreadPool pool(3, kTwoNodes);
  for (const std::vector<int64_t>& ends : {std::vector<int64_t>{0, 0}, {0, 9}, {9, 9}, {1, 9}, {8, 9}}) {
    std::vector<std::atomic<int>> counts(9);
    pool.Run(ends, [&](int64_t task, int) { counts[static_cast<size_t>(task)].fetch_add(1); });
    for (int64_t task = 0; task < 9; ++task) {
      CHECK(counts[static_cast<size_t>(task)].load() == (task < ends.back() ? 1 : 0));
    }
  }
}

TEST(WorkersAreDividedByCpus) {
  const auto nodes_of = [](int threads, const NodeCpus& node_cpus) {
    const ThreadPool pool(threads, node_cpus);
    std::vector<int> nodes(static_cast<size_t>(threads));
    for (int worker = 0; worker < threads; ++worker) nodes[static_cast<size_t>(worker)] = pool.NodeOf(worker);
    return nodes;
  };
  CHECK(nodes_of(3, {}) == (std::vector<int>{0, 0, 0}));
  CHECK(nodes_of(4, {{0}, {0}}) == (std::vector<int>{0, 0, 1, 1}));
  CHECK(nodes_of(3, {{0}, {0}}) == (std::vector<int>{0, 0, 1}));
  CHECK(nodes_of(4, {{0}, {0, 0, 0}}) == (std::vector<int>{0, 1, 1, 1}));
  CHECK(nodes_of(1, {{0}, {0}}) == std::vector<int>{0});
  CHECK(nodes_of(2, {{0}, {0}, {0}, {0}}) == (std::vector<int>{0, 2}));
}

TEST(AWorkerTakesItsOwnNodesTasksFirst) {
  ThreadPool pool(2, kTwoNodes);
  for (int round = 0; round < 50; ++round) {
    // Neither can finish its first task before the other has begun one, so each has one.
    std::atomic<int> began{0};
    std::atomic<int> worker_of[2] = {{-1}, {-1}};
    pool.Run({1, 2}, [&](int64_t task, int worker) {
      worker_of[task].store(worker);
      began.fetch_add(1);
      Await([&] { return began.load() == 2; });
    });
    CHECK(worker_of[0].load() == 0 && worker_of[1].load() == 1);
  }
}

TEST(WorkersHelpWhereOneNodeHasAllTheTasks) {
  ThreadPool pool(2, kTwoNodes);
  for (const std::vector<int64_t>& ends : {std::vector<int64_t>{2, 2}, {0, 2}}) {
    // Each task waits until the other has begun: one worker alone would never come to an end.
    std::atomic<int> began{0}, workers{0};
    pool.Run(ends, [&](int64_t, int worker) {
      workers.fetch_add(1 << worker);
      began.fetch_add(1);
      Await([&] { return began.load() == 2; });
    });
    CHECK(workers.load() == 3);
  }
}

TEST(OneLongTaskKeepsNobodyFromTheOthers) {
  ThreadPool pool(3, kTwoNodes);
  constexpr int64_t kTasks = 40;
  std::atomic<int64_t> finished{0};
  pool.Run(kTasks, [&](int64_t task, int) {
    if (task == 0) Await([&] { return finished.load() == kTasks - 1; });  // as long as all the others together
    finished.fetch_add(1);
  });
  CHECK(finished.load() == kTasks);
}

TEST(WritesOfOneRoundAreSeenInTheNext) {
  ThreadPool pool(4, kTwoNodes);
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
  for (const std::chrono::microseconds spin : {std::chrono::microseconds(0), ThreadPool::kSpin}) {
    ThreadPool pool(3, {}, spin);
    for (int round = 0; round < 20; ++round) {
      Await([&] { return pool.sleepers() == 2; });
      // The three tasks need three workers.
      std::atomic<int> began{0};
      pool.Run(3, [&](int64_t, int) {
        began.fetch_add(1);
        Await([&] { return began.load() == 3; });
      });
      CHECK(began.load() == 3);
    }
  }
}

TEST(TheCallerSleepsUntilTheLastTaskIsDone) {
  ThreadPool pool(2, {}, std::chrono::microseconds(0));
  for (int round = 0; round < 200; ++round) {
    // Worker 0 leaves while worker 1 is still at work on the other task, for a while.
    std::atomic<int> began{0};
    int64_t sum = 0;
    pool.Run(2, [&](int64_t, int worker) {
      began.fetch_add(1);
      Await([&] { return began.load() == 2; });
      if (worker == 0) return;
      for (int64_t i = 0; i < 10000; ++i) {
        sum += i;
        Pause();
      }
    });
    CHECK(sum == 49995000);
  }
}

TEST(PoolsStartAndStop) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(4, {{0}});
    if (i % 2 == 0) continue;
    std::atomic<int> count{0};
    pool.Run(7, [&](int64_t, int) { count.fetch_add(1); });
    CHECK(count.load() == 7);
  }
}

TEST(WorkersStayOnTheirNodesCpus) {
#if defined(__linux__)
  cpu_set_t usable;
  CHECK(sched_getaffinity(0, sizeof(usable), &usable) == 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &usable)) cpus.push_back(cpu);
  }
  const NodeCpus nodes = {{cpus.front()}, {cpus.back()}};
  std::thread caller([&] {
    ThreadPool pool(2, nodes);
    pool.PlaceCaller();
    std::atomic<int> began{0};
    pool.Run(2, [&](int64_t, int worker) {
      CHECK(sched_getcpu() == nodes[static_cast<size_t>(pool.NodeOf(worker))][0]);
      began.fetch_add(1);
      Await([&] { return began.load() == 2; });
    });
  });
  caller.join();
#endif
}

TEST(CpusThatAreNotThereAreHarmless) {
  ThreadPool pool(2, {{1023}, {5000}});
  pool.PlaceCaller();
  std::atomic<int> count{0};
  pool.Run(9, [&](int64_t, int) { count.fetch_add(1); });
  CHECK(count.load() == 9);
}

}  // namespace
}  // namespace kt
