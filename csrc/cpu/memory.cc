#include "cpu/memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <new>
#include <stdexcept>
#include <utility>

namespace kt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t RoundToPages(size_t bytes) {
  const size_t page = bytes >= kHugePage ? kHugePage : 4096;
  return (bytes + page - 1) / page * page;
}

}  // namespace

Block::Block(size_t bytes) {
  if (bytes == 0) return;
  const size_t size = RoundToPages(bytes), spare = size >= kHugePage ? kHugePage : 0;
  void* const mapped = mmap(nullptr, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  uint8_t* data = static_cast<uint8_t*>(mapped);
  if (spare > 0) {
    // Older kernels do not align by themselves, and then no huge page fits the ends.
    const size_t before = -reinterpret_cast<uintptr_t>(data) % kHugePage;
    if (before > 0) munmap(data, before);
    data += before;
    if (before < spare) munmap(data + size, spare - before);
#if defined(MADV_HUGEPAGE)
    madvise(data, size, MADV_HUGEPAGE);  // advice only: small pages work too
#endif
  }
  data_ = data;
  size_ = size;
}

Block::~Block() {
  if (data_ != nullptr) munmap(data_, size_);
}

Block::Block(Block&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Block& Block::operator=(Block&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

bool Block::PlaceOnNodes([[maybe_unused]] const std::vector<int>& nodes) const {
#if defined(SYS_mbind)
  constexpr int kPreferred = 1;  // MPOL_PREFERRED of <linux/mempolicy.h>: other nodes serve when this one is full
  constexpr int kBits = 8 * sizeof(unsigned long);
  // Parts end between huge pages, which lie on one node each.
  const size_t page = size_ >= kHugePage ? kHugePage : 4096, pages = size_ / page;
  bool agreed = !nodes.empty();
  for (size_t n = 0; n < nodes.size(); ++n) {
    const size_t first = pages * n / nodes.size() * page, end = pages * (n + 1) / nodes.size() * page;
    if (first == end) continue;
    std::vector<unsigned long> mask(static_cast<size_t>(nodes[n]) / kBits + 1, 0);
    mask.back() = 1ul << (nodes[n] % kBits);
    // The kernel takes one bit less than it is told.
    agreed &= syscall(SYS_mbind, data_ + first, end - first, kPreferred, mask.data(), mask.size() * kBits + 1, 0) == 0;
  }
  return agreed;
#else
  return false;
#endif
}

Block BlockPool::Take(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.lower_bound(bytes);
    if (found != kept_.end() && found->first <= RoundToPages(bytes) * 2) {
      Block block = std::move(found->second.block);
      kept_bytes_ -= block.size();
      kept_.erase(found);
      return block;
    }
  }
  return Block(bytes);
}

void BlockPool::Give(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++returns_;
  for (auto kept = kept_.begin(); kept != kept_.end();) {
    const bool stale = returns_ - kept->second.returned > kPatience;
    if (stale) kept_bytes_ -= kept->first;
    kept = stale ? kept_.erase(kept) : std::next(kept);
  }
  const size_t size = block.size();
  if (size == 0 || kept_bytes_ + size > kKeptBytes) return;
  kept_bytes_ += size;
  kept_.emplace(size, Kept{std::move(block), returns_});
}

size_t BlockPool::kept_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept_bytes_;
}

void Arena::Reset(size_t bytes) {
  used_ = 0;
  largest_ = std::max(largest_, bytes);
  size_t wanted = std::max(bytes, block_.size());
  if (++jobs_ == kPatience) {
    if (block_.size() / 2 > RoundToPages(largest_)) wanted = largest_;
    jobs_ = 0;
    largest_ = 0;
  }
  if (wanted == block_.size()) return;
  block_ = Block();  // the old block goes first, so that both never exist at once
  block_ = Block(wanted);
}

uint8_t* Arena::TakeBytes(size_t bytes) {
  if (used_ + bytes > block_.size()) throw std::logic_error("kt_sft engine: scratch was measured too small");
  uint8_t* const piece = block_.data() + used_;
  used_ += bytes;
  return piece;
}

}  // namespace kt
