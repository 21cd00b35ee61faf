#include "cpu/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace kt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW;

size_t RoundToPages(size_t bytes) {
  const size_t page = bytes >= kHugePage ? kHugePage : 4096;
  return (bytes + page - 1) / page * page;
}

// Address space for a block of `size` bytes, at a huge page's start where one fits: older kernels do not align by
// themselves, and then no huge page fits the ends.
uint8_t* Reserve(size_t size, int protection, int flags) {
  const size_t spare = size >= kHugePage ? kHugePage : 0;
  void* const mapped = mmap(nullptr, size + spare, protection, flags | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  uint8_t* data = static_cast<uint8_t*>(mapped);
  if (spare == 0) return data;
  const size_t before = -reinterpret_cast<uintptr_t>(data) % kHugePage;
  if (before > 0) munmap(data, before);
  data += before;
  if (before < spare) munmap(data + size, spare - before);
  return data;
}

void AskForHugePages([[maybe_unused]] uint8_t* data, [[maybe_unused]] size_t size) {
#if defined(MADV_HUGEPAGE)
  if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);  // advice only: small pages work too
#endif
}

}  // namespace

uint8_t* MapFile(int descriptor, size_t size, int protection) {
  uint8_t* const data = Reserve(size, PROT_NONE, MAP_NORESERVE);
  if (mmap(data, size, protection, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED) {
    munmap(data, size);
    throw std::bad_alloc();
  }
  AskForHugePages(data, size);
  return data;
}

Block::Block(size_t bytes) {
  if (bytes == 0) return;
  size_ = RoundToPages(bytes);
  data_ = Reserve(size_, PROT_READ | PROT_WRITE, 0);
  AskForHugePages(data_, size_);
}

Block Block::Shared(size_t bytes) {
  Block block;
  block.descriptor_ = memfd_create("kt_sft experts", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (block.descriptor_ < 0)
    throw std::runtime_error(std::string("the system gives no memory to share (memfd_create: ") + std::strerror(errno) +
                             ")");
  const size_t size = RoundToPages(bytes);
  if (ftruncate(block.descriptor_, static_cast<off_t>(size)) != 0) throw std::bad_alloc();
  if (fcntl(block.descriptor_, F_ADD_SEALS, kSeals) != 0)
    throw std::runtime_error(std::string("the system cannot keep shared memory from shrinking: ") +
                             std::strerror(errno));
  block.data_ = MapFile(block.descriptor_, size, PROT_READ | PROT_WRITE);
  block.size_ = size;
  return block;
}

Block Block::MapShared(int descriptor, size_t bytes) {
  const size_t size = RoundToPages(bytes);
  struct stat facts{};
  const int seals = fcntl(descriptor, F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals || fstat(descriptor, &facts) != 0 ||
      facts.st_size != static_cast<off_t>(size))
    throw std::invalid_argument("what another process gave is not its experts' memory");
  Block block;
  block.data_ = MapFile(descriptor, size, PROT_READ);
  block.size_ = size;
  block.writable_ = false;
  return block;
}

Block::~Block() {
  if (data_ != nullptr) munmap(data_, size_);
  if (descriptor_ >= 0) close(descriptor_);
}

Block::Block(Block&& other) noexcept { *this = std::move(other); }

Block& Block::operator=(Block&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(writable_, other.writable_);
  std::swap(descriptor_, other.descriptor_);
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

void Block::TakeHugePages() const {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  if (size_ < kHugePage) return;
  // There must be something to collapse, and it says on which node.
  for (size_t at = 0; at < size_; at += kHugePage) static_cast<volatile uint8_t*>(data_)[at] = 0;
  madvise(data_, size_, kCollapse);  // small pages work too
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
