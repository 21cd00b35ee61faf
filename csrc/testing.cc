// Runs the tests linked with it: `[--quick] [PART...]`, those whose names contain one of the parts, or all.
#include "testing.h"

#include <cstring>

namespace {

bool Wanted(const char* name, int count, char** parts) {
  if (count == 0) return true;
  for (int i = 0; i < count; ++i) {
    if (std::strstr(name, parts[i]) != nullptr) return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  int first = 1;
  if (argc > 1 && std::strcmp(argv[1], "--quick") == 0) {
    kt::testing::Quick() = true;
    ++first;
  }
  int run = 0;
  for (const kt::testing::Case& test : kt::testing::Cases()) {
    if (!Wanted(test.name, argc - first, argv + first)) continue;
    ++run;
    const int before = kt::testing::Failures();
    test.run();
    std::printf("%s %s\n", kt::testing::Failures() == before ? "ok    " : "FAILED", test.name);
    std::fflush(stdout);
  }
  if (run == 0) std::printf("no test has that name\n");
  return run > 0 && kt::testing::Failures() == 0 ? 0 : 1;
}
