#include "cpu/memory.h"

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
