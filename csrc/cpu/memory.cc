#include "cpu/memory.h"

#include <sys/mman.h>

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
  const size_t size = RoundToPages(bytes);
  void* const data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);  // advice only: small pages work too
#endif
  data_ = static_cast<uint8_t*>(data);
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

Block BlockPool::Take(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.lower_bound(bytes);
    if (found != kept_.end() && found->first <= RoundToPages(bytes) * 2) {
      Block block = std::move(found->second);
      kept_bytes_ -= block.size();
      kept_.erase(found);
      return block;
    }
  }
  return Block(bytes);
}

void BlockPool::Give(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t size = block.size();
  if (size == 0 || kept_bytes_ + size > kKeptBytes) return;
  kept_bytes_ += size;
  kept_.emplace(size, std::move(block));
}

size_t BlockPool::kept_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept_bytes_;
}

void Arena::Reset(size_t bytes) {
  used_ = 0;
  if (bytes <= block_.size()) return;
  block_ = Block();  // the old block goes first, so that both never exist at once
  block_ = Block(bytes);
}

uint8_t* Arena::TakeBytes(size_t bytes) {
  if (used_ + bytes > block_.size()) throw std::logic_error("kt_sft engine: scratch was measured too small");
  uint8_t* const piece = block_.data() + used_;
  used_ += bytes;
  return piece;
}

}  // namespace kt
