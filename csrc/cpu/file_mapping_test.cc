#include "cpu/file_mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing.h"

namespace kt {
namespace {

class TemporaryFile {
 public:
  explicit TemporaryFile(size_t bytes) {
    char name[] = "/tmp/kt_sft_file_mapping_test_XXXXXX";
    descriptor_ = mkstemp(name);
    path_ = name;
    std::vector<uint8_t> content(bytes);
    for (size_t i = 0; i < bytes; ++i) content[i] = static_cast<uint8_t>(i % 251);
    if (write(descriptor_, content.data(), bytes) != static_cast<ssize_t>(bytes))
      throw std::runtime_error("cannot write the temporary file");
  }
  ~TemporaryFile() {
    close(descriptor_);
    std::remove(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }
  int descriptor() const { return descriptor_; }

 private:
  std::string path_;
  int descriptor_;
};

constexpr size_t kHugePage = size_t{2} << 20;

bool IsTheFile(const FileMapping& mapping, size_t bytes) {
  size_t same = 0;
  while (same < bytes && mapping.data()[same] == same % 251) ++same;
  return mapping.size() == static_cast<int64_t>(bytes) && same == bytes;
}

TEST(AMappingIsTheFile) {
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{4097}, (size_t{5} << 20) + 3}) {
    const TemporaryFile file(bytes);
    const FileMapping mapping(file.path());
    CHECK(bytes < kHugePage || reinterpret_cast<uintptr_t>(mapping.data()) % kHugePage == 0);
    ReadPages(mapping.data() + bytes / 2, mapping.data() + bytes);
    CHECK(IsTheFile(mapping, bytes));
    mapping.CheckUnchanged();
  }
  const TemporaryFile empty(0);
  CHECK(FileMapping(empty.path()).size() == 0);
}

TEST(PagesAreRenewedWithoutAChange) {
  // Dirty and small, as just written; smaller than a huge page; with a middle that is none of the file's last page.
  for (const size_t bytes : {size_t{100}, (size_t{4} << 20) + 5, (size_t{9} << 20) + 3}) {
    const TemporaryFile file(bytes);
    const FileMapping mapping(file.path());
    const bool huge = mapping.RenewPages();
    CHECK(mapping.RenewPages() == huge);
    CHECK(IsTheFile(mapping, bytes));
    mapping.CheckUnchanged();
  }
}

TEST(AFileThatChangesIsNamed) {
  const TemporaryFile file(9000);
  const FileMapping mapping(file.path());
  CHECK(ftruncate(file.descriptor(), 5000) == 0);
  try {
    mapping.CheckUnchanged();
    CHECK(false);
  } catch (const std::runtime_error& error) {
    CHECK(std::string(error.what()).find(file.path() + " has changed") == 0);
  }
}

TEST(AFileThatIsNotThereIsNamed) {
  try {
    const FileMapping mapping("/nonexistent/file");
    CHECK(false);
  } catch (const std::runtime_error& error) {
    CHECK(std::string(error.what()).find("/nonexistent/file") != std::string::npos);
  }
}

}  // namespace
}  // namespace kt
