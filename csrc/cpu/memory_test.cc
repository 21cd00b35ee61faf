#include "cpu/memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "testing.h"

namespace kt {
namespace {

TEST(BlocksAreZeroedAndMovable) {
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{3} << 20}) {
    Block block(bytes);
    CHECK(block.size() >= bytes);
    CHECK(block.data()[0] == 0 && block.data()[bytes - 1] == 0);
    block.data()[bytes - 1] = 7;
    const Block moved(std::move(block));
    CHECK(moved.data()[bytes - 1] == 7);
  }
  CHECK(Block(0).data() == nullptr);
}

TEST(ABlockNobodyCanHaveIsRefused) { CHECK_THROWS(Block(size_t{1} << 60), std::bad_alloc); }

TEST(LargeBlocksStartAtAHugePage) {
  for (const size_t bytes : {size_t{2} << 20, (size_t{5} << 20) + 1, size_t{64} << 20}) {
    const Block block(bytes);
    CHECK(reinterpret_cast<uintptr_t>(block.data()) % (size_t{2} << 20) == 0);
    std::memset(block.data(), 1, block.size());  // all of it is there
  }
}

TEST(SharedBlocksAreTheSameMemory) {
  for (const size_t bytes : {size_t{1}, size_t{5000}, (size_t{3} << 20) + 1}) {
    Block filled = Block::Shared(bytes);
    CHECK(filled.writable() && filled.descriptor() >= 0 && filled.size() >= bytes);
    const Block mapped = Block::MapShared(filled.descriptor(), bytes);
    CHECK(!mapped.writable() && mapped.descriptor() == -1 && mapped.size() == filled.size());
    filled.data()[bytes - 1] = 7;
    CHECK(mapped.data()[bytes - 1] == 7);
    filled = Block();  // the last mapping keeps the memory
    CHECK(mapped.data()[bytes - 1] == 7);
  }
}

TEST(HugePagesForSharedBlocksChangeNothing) {
  for (const size_t bytes : {size_t{5000}, size_t{5} << 20}) {
    const Block block = Block::Shared(bytes), mapped = Block::MapShared(block.descriptor(), bytes);
    block.PlaceOnNodes({0});
    block.TakeHugePages();
    const auto all = [&](uint8_t value) {
      return std::all_of(mapped.data(), mapped.data() + mapped.size(), [=](uint8_t byte) { return byte == value; });
    };
    CHECK(all(0));
    std::memset(block.data(), 7, block.size());
    CHECK(all(7));
  }
}

TEST(WhatCouldShrinkUnderItsReadersIsNotMapped) {
  const Block block = Block::Shared(5000);
  CHECK(ftruncate(block.descriptor(), 4096) != 0);
  CHECK_THROWS(Block::MapShared(block.descriptor(), 9000), std::invalid_argument);
  CHECK_THROWS(Block::MapShared(-1, 5000), std::invalid_argument);
  const int unsealed = memfd_create("kt_sft test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(ftruncate(unsealed, static_cast<off_t>(block.size())) == 0);
  CHECK_THROWS(Block::MapShared(unsealed, 5000), std::invalid_argument);
  close(unsealed);
}

TEST(PartsOfABlockAreAskedForOnTheirNodes) {
#if defined(SYS_get_mempolicy)
  // The policy of the page at an address: its mode, and the node it names.
  const auto policy_at = [](const uint8_t* at, unsigned long& node) {
    constexpr unsigned long kOfAddress = 2;  // MPOL_F_ADDR
    unsigned long nodes[16] = {};
    int mode = -1;
    if (syscall(SYS_get_mempolicy, &mode, nodes, 8 * sizeof(nodes), at, kOfAddress) != 0) return -1;
    node = nodes[0];
    return mode;
  };
  Block block(size_t{8} << 20);
  const bool agreed = block.PlaceOnNodes({0, 0});
  unsigned long mask = 0;
  const int mode = policy_at(block.data() + block.size() - 1, mask);
  if (mode >= 0) {  // the kernel knows policies and lets us ask
    CHECK(agreed && mode == 1 && mask == 1);
    CHECK(policy_at(block.data(), mask) == 1 && mask == 1);
  }
#else
  Block block(size_t{8} << 20);
#endif
  CHECK(!block.PlaceOnNodes({}));
  CHECK(!block.PlaceOnNodes({0, 900}));  // no machine has that node
  std::memset(block.data(), 1, block.size());
  Block(1).PlaceOnNodes({0, 0, 0});  // fewer pages than nodes
}

TEST(ThePoolReusesBlocks) {
  BlockPool pool;
  Block block = pool.Take(100000);
  const uint8_t* const data = block.data();
  pool.Give(std::move(block));
  CHECK(pool.kept_bytes() >= 100000);
  CHECK(pool.Take(90000).data() == data);
  CHECK(pool.kept_bytes() == 0);
}

TEST(ThePoolDoesNotSpendALargeBlockOnASmallNeed) {
  BlockPool pool;
  pool.Give(pool.Take(size_t{64} << 20));
  const Block small = pool.Take(4096);
  CHECK(small.size() < (size_t{1} << 20));
  CHECK(pool.kept_bytes() >= (size_t{64} << 20));
}

TEST(ThePoolKeepsABoundedAmount) {
  BlockPool pool;
  for (int i = 0; i < 5; ++i) {
    Block a = pool.Take(size_t{400} << 20), b = pool.Take(size_t{400} << 20), c = pool.Take(size_t{400} << 20);
    pool.Give(std::move(a));
    pool.Give(std::move(b));
    pool.Give(std::move(c));
    CHECK(pool.kept_bytes() <= BlockPool::kKeptBytes);
  }
}

TEST(ThePoolGivesBackWhatNobodyTakes) {
  BlockPool pool;
  pool.Give(pool.Take(size_t{64} << 20));
  for (int64_t i = 0; i < BlockPool::kPatience; ++i) pool.Give(pool.Take(4096));
  CHECK(pool.kept_bytes() > (size_t{64} << 20));
  pool.Give(pool.Take(4096));
  CHECK(pool.kept_bytes() < (size_t{1} << 20));
}

TEST(ArenaGivesBackWhatAFewLongJobsNeeded) {
  Arena arena;
  constexpr size_t kLong = size_t{64} << 20, kShort = size_t{3} << 20;
  const auto run = [&arena](size_t bytes, int jobs) {
    for (int i = 0; i < jobs; ++i) arena.Reset(bytes);
  };
  run(kLong, 1);
  run(kShort, 2 * Arena::kPatience);  // a window that holds the long job, and one without it
  CHECK(arena.capacity() >= kShort && arena.capacity() < 2 * kShort);
  run(kLong, 1);
  CHECK(arena.capacity() >= kLong);
  // While long jobs come every now and then, it stays.
  for (int i = 0; i < 10; ++i) {
    run(kShort, Arena::kPatience - 1);
    run(kLong, 1);
    CHECK(arena.capacity() >= kLong);
  }
  // And while jobs differ by less than half.
  run(kLong / 2, 3 * Arena::kPatience);
  CHECK(arena.capacity() >= kLong);
}

TEST(ArenaPiecesAreAlignedAndApart) {
  Arena arena;
  arena.Reset(Arena::Measure(10) + Arena::Measure(400) + Arena::Measure(0));
  char* const a = arena.Take<char>(10);
  float* const b = arena.Take<float>(100);
  CHECK(reinterpret_cast<uintptr_t>(a) % 64 == 0 && reinterpret_cast<uintptr_t>(b) % 64 == 0);
  CHECK(reinterpret_cast<char*>(b) >= a + 10);
  arena.Take<char>(0);
  CHECK_THROWS(arena.Take<char>(static_cast<int64_t>(arena.capacity())), std::logic_error);
}

}  // namespace
}  // namespace kt
