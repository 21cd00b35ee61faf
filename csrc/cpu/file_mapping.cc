#include "cpu/file_mapping.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>

#include "cpu/memory.h"
#include "cpu/numeric.h"

namespace kt {
namespace {

int64_t TimeOfChange(const struct stat& facts) {
  return int64_t{facts.st_mtim.tv_sec} * 1'000'000'000 + facts.st_mtim.tv_nsec;
}

constexpr size_t kHugePage = size_t{2} << 20;

// Whether a huge page is mapped at `at`; false where the kernel does not say.
bool IsHugePage(const uint8_t* at) {
  // PAGEMAP_SCAN of <linux/fs.h>, which older headers lack.
  struct Scan {
    uint64_t size, flags, start, end, walk_end, regions, region_count, most_pages;
    uint64_t inverted, all_of, any_of, returned;
  };
  struct Region {
    uint64_t start, end, categories;
  };
  constexpr uint64_t kHuge = 1 << 6;
  const int pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pages < 0) return false;
  Region region{};
  Scan scan{};
  scan.size = sizeof(scan);
  scan.start = reinterpret_cast<uint64_t>(at);
  scan.end = scan.start + kHugePage;
  scan.regions = reinterpret_cast<uint64_t>(&region);
  scan.region_count = 1;
  scan.all_of = scan.returned = kHuge;
  const int found = ioctl(pages, _IOWR('f', 16, Scan), &scan);
  close(pages);
  return found == 1 && region.end - region.start == kHugePage;
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
    data_ = MapFile(descriptor_, static_cast<size_t>(RoundUp(size_, sysconf(_SC_PAGESIZE))), PROT_READ);
  } catch (const std::bad_alloc&) {
    close(descriptor_);
    Fail("map", path);
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

void FileMapping::Drop(int64_t offset, int64_t bytes) const {
  madvise(const_cast<uint8_t*>(data_) + offset, static_cast<size_t>(bytes), MADV_DONTNEED);  // what is mapped stays
#if defined(SYNC_FILE_RANGE_WRITE)
  sync_file_range(descriptor_, offset, bytes,
                  SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);  // and what is new
#endif
  posix_fadvise(descriptor_, offset, bytes, POSIX_FADV_DONTNEED);
}

bool FileMapping::RenewPages() const {
  constexpr int64_t kPage = kHugePage;
  if (size_ < 2 * kPage) return true;  // too small to tell, and to matter
  const int64_t middle = size_ / 2 / kPage * kPage;
  const uint8_t* const at = data_ + middle;
  ReadPages(at, at + kPage);
  if (IsHugePage(at)) return true;
  Drop(middle, kPage);
  ReadPages(at, at + kPage);
  if (!IsHugePage(at)) return false;
  Drop(0, size_);
  return true;
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
