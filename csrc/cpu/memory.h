// Large blocks of memory: page-aligned, in huge pages where the system gives them, and reused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace kt {

// One anonymous mapping. Untouched pages cost nothing.
class Block {
 public:
  Block() = default;
  // Throws std::bad_alloc when the address space or the memory limit refuses.
  explicit Block(size_t bytes);
  ~Block();
  Block(Block&& other) noexcept;
  Block& operator=(Block&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Blocks that come and go with every layer call (retained activations): a returned block is kept for the next taker of
// a similar size, up to `kKeptBytes` in all. Thread-safe.
class BlockPool {
 public:
  static constexpr size_t kKeptBytes = size_t{1} << 30;

  // A block of at least `bytes`, its content undefined.
  Block Take(size_t bytes);
  void Give(Block block);
  size_t kept_bytes() const;

 private:
  mutable std::mutex mutex_;
  std::multimap<size_t, Block> kept_;
  size_t kept_bytes_ = 0;
};

// Memory of one job: grows to the largest job seen and is handed out piece by piece, each piece aligned to a cache
// line.
class Arena {
 public:
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
};

}  // namespace kt
