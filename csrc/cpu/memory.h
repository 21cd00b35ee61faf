// Large blocks of memory: page-aligned, in huge pages where the system gives them, and reused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace kt {

// A file's first `size` bytes, whole pages, as all processes see them; at a huge page's start where one fits, so that
// the file's own huge pages can be mapped as such. Throws std::bad_alloc, with errno as the system has it.
uint8_t* MapFile(int descriptor, size_t size, int protection);

// One mapping of memory. Untouched pages cost nothing. The pages the system reserves for MAP_HUGETLB are left alone:
// few machines have any, and MADV_HUGEPAGE gives the same without.
class Block {
 public:
  Block() = default;
  // This process's own. Throws std::bad_alloc when the address space or the memory limit refuses.
  explicit Block(size_t bytes);
  // Memory that other processes can map: a file without a name, nowhere mounted (so that the size of /dev/shm does not
  // matter), which goes with the last process that has it, however they end. Throws std::bad_alloc as above, and
  // std::runtime_error when the system has no such files.
  static Block Shared(size_t bytes);
  // The same memory in another process, to be read only; `descriptor` is that block's, as it came over a socket, and
  // stays the caller's. Throws std::invalid_argument for anything else than `bytes` of memory that cannot shrink, for
  // which a read could be a bus error.
  static Block MapShared(int descriptor, size_t bytes);
  ~Block();
  Block(Block&& other) noexcept;
  Block& operator=(Block&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  bool writable() const { return writable_; }
  // Of a Shared block, open as long as it lives; -1 for others.
  int descriptor() const { return descriptor_; }

  // Asks for the pages of the n-th of nodes.size() equal parts to lie on NUMA node nodes[n], where it has room; before
  // they are first touched. Does nothing without nodes. Says whether the kernel agreed: one without NUMA, or a
  // container that may not say or not use a node, does not, and then pages lie where they are first touched.
  bool PlaceOnNodes(const std::vector<int>& nodes) const;

  // Takes the memory of a Shared block, in huge pages where the system has them, which must not be in use yet. Most
  // systems give shared memory no huge pages by themselves (/sys/kernel/mm/transparent_hugepage/shmem_enabled), but do
  // when asked like this: since Linux 6.1.
  void TakeHugePages() const;

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  bool writable_ = true;
  int descriptor_ = -1;
};

// Blocks that come and go with every layer call (retained activations): a returned block is kept for the next taker of
// a similar size, up to `kKeptBytes` in all and until `kPatience` blocks were returned after it. Thread-safe.
class BlockPool {
 public:
  static constexpr size_t kKeptBytes = size_t{1} << 30;
  static constexpr int64_t kPatience = 512;

  // A block of at least `bytes`, its content undefined.
  Block Take(size_t bytes);
  void Give(Block block);
  size_t kept_bytes() const;

 private:
  struct Kept {
    Block block;
    int64_t returned;  // when, counted in returns
  };

  mutable std::mutex mutex_;
  std::multimap<size_t, Kept> kept_;  // by size
  size_t kept_bytes_ = 0;
  int64_t returns_ = 0;
};

// Memory of one job, handed out piece by piece, each piece aligned to a cache line. It grows to the largest job, and
// shrinks to the largest of the last `kPatience` when they needed less than half of it.
class Arena {
 public:
  static constexpr int kPatience = 256;

  // Forgets all pieces; makes room for `bytes`, measured with Measure.
  void Reset(size_t bytes);
  // `count` values of type T, uninitialised.
  template <class T>
  T* Take(int64_t count) {
    return reinterpret_cast<T*>(TakeBytes(Measure(count * sizeof(T))));
  }
  // The room that a piece of that many bytes occupies.
  static size_t Measure(size_t bytes) { return (bytes + 127) / 64 * 64; }
  size_t capacity() const { return block_.size(); }

 private:
  uint8_t* TakeBytes(size_t bytes);

  Block block_;
  size_t used_ = 0;
  // Since the last look at whether to shrink.
  int jobs_ = 0;
  size_t largest_ = 0;
};

}  // namespace kt
