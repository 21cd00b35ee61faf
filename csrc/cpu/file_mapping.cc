#include "cpu/file_mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace kt {
namespace {

int64_t TimeOfChange(const struct stat& facts) {
  return int64_t{facts.st_mtim.tv_sec} * 1'000'000'000 + facts.st_mtim.tv_nsec;
}

[[noreturn]] void Fail(const std::string& what, const std::string& path) {
  throw std::runtime_error("cannot " + what + " " + path + ": " + std::strerror(errno));
}

}  // namespace

FileMapping::FileMapping(const std::string& path) : path_(path) {
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) Fail("open", path);
  try {
    struct stat facts{};
    if (fstat(descriptor_, &facts) != 0) Fail("read", path);
    size_ = facts.st_size;
    changed_ = TimeOfChange(facts);
    if (size_ == 0) return;
    // At a huge page's start, so that the file's own huge pages can be mapped as such.
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t bytes = static_cast<size_t>(size_), reserved = bytes + kHugePage;
    void* const space = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) Fail("map", path);
    uint8_t* const start = static_cast<uint8_t*>(space);
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)),
                 before = -reinterpret_cast<uintptr_t>(start) % kHugePage;
    const size_t used = (bytes + page - 1) / page * page;
    if (mmap(start + before, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor_, 0) == MAP_FAILED) {
      munmap(space, reserved);
      Fail("map", path);
    }
    if (before > 0) munmap(start, before);
    if (before + used < reserved) munmap(start + before + used, reserved - before - used);
    data_ = start + before;
#if defined(MADV_HUGEPAGE)
    madvise(start + before, bytes, MADV_HUGEPAGE);  // advice only; file systems with large folios follow it
#endif
  } catch (...) {
    close(descriptor_);
    throw;
  }
}

FileMapping::~FileMapping() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_));
  close(descriptor_);
}

void FileMapping::CheckUnchanged() const {
  struct stat facts{};
  if (fstat(descriptor_, &facts) == 0 && facts.st_size == size_ && TimeOfChange(facts) == changed_) return;
  throw std::runtime_error(path_ +
                           " has changed since it was mapped: the experts' weights are read from it as they are "
                           "needed, so it must stay as it is; load the model anew");
}

void ReadPages(const uint8_t* begin, const uint8_t* end) {
  constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, which older headers lack: Linux 5.14
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / page * page;
  void* const start = reinterpret_cast<void*>(first);
  const size_t bytes = reinterpret_cast<uintptr_t>(end) - first;
  if (madvise(start, bytes, kPopulateRead) != 0 && errno == EINVAL) madvise(start, bytes, MADV_WILLNEED);
}

}  // namespace kt
