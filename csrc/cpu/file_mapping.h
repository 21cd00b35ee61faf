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

 private:
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
