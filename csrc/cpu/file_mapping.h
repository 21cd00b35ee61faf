// A file's bytes as memory: read by the system when they are touched, kept while there is room, and shared by all
// processes that map the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace kt {

class FileMapping {
 public:
  // Maps the whole file, read only. Throws std::runtime_error, naming it, when it cannot be opened or mapped.
  explicit FileMapping(const std::string& path);
  ~FileMapping();
  FileMapping(const FileMapping&) = delete;
  FileMapping& operator=(const FileMapping&) = delete;

  const uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }

  // Throws std::runtime_error, naming the file, when it has another size or time of change than when it was mapped: its
  // bytes may be others, and reading beyond a new end would be a bus error. A file that another one took the name of
  // stays what it was. Takes about a microsecond.
  void CheckUnchanged() const;

  // Sees that the file's pages come in huge ones, where the file system and the kernel have them (ext4 since
  // Linux 6.16, xfs; asked about since 6.7). They come so when they are read by touching the mapping, but pages that
  // were in memory before, as of a file that was written or copied just now, are small: those are dropped, to be read
  // again. Looks at one place in the middle. Before the mapping is used. Returns whether huge pages are there to be
  // had.
  bool RenewPages() const;

 private:
  // Takes [offset, offset + bytes) out of memory.
  void Drop(int64_t offset, int64_t bytes) const;

  const std::string path_;
  int descriptor_ = -1;
  const uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  int64_t changed_ = 0;  // nanoseconds
};

// Reads the pages of [begin, end) of a mapping, unless they are in memory, and returns when they are; a failure to do
// so is left to who reads them.
void ReadPages(const uint8_t* begin, const uint8_t* end);

}  // namespace kt
