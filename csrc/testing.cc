// Runs the tests linked with it: `[--quick] [--best=TIER] [PART...]`, those whose names contain one of the parts, or
// all. With --best it fails where that is not the highest tier of the CPU, as an emulator may fall short of its model.
#include "testing.h"

#include <chrono>
#include <cstring>

#include "tiers/tier.h"

namespace {

bool Wanted(const char* name, const std::vector<const char*>& parts) {
  if (parts.empty()) return true;
  for (const char* const part : parts) {
    if (std::strstr(name, part) != nullptr) return true;
  }
  return false;
}

double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

int main(int argc, char** argv) {
  const std::string best = kt::TierName(kt::BestKernels(kt::Tier::kAmx)->tier);
  std::vector<const char*> parts;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      kt::testing::Quick() = true;
    } else if (argument.rfind("--best=", 0) == 0) {
      CHECK_MESSAGE(argument.substr(7) == best, "the highest tier of this CPU is " + best);
    } else {
      parts.push_back(argv[i]);
    }
  }
  std::printf("tiers up to %s\n", best.c_str());
  int run = 0;
  for (const kt::testing::Case& test : kt::testing::Cases()) {
    if (!Wanted(test.name, parts)) continue;
    ++run;
    const int before = kt::testing::Failures();
    const double start = Seconds();
    test.run();
    std::printf("%s %s %.1f s\n", kt::testing::Failures() == before ? "ok    " : "FAILED", test.name,
                Seconds() - start);
    std::fflush(stdout);
  }
  if (run == 0) std::printf("no test has that name\n");
  return run > 0 && kt::testing::Failures() == 0 ? 0 : 1;
}
