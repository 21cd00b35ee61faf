// A minimal test harness: TEST registers a function, CHECK reports a failure and goes on, testing.cc runs all.
#pragma once

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cpu/numeric.h"

namespace kt::testing {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& Cases() {
  static std::vector<Case> cases;
  return cases;
}

inline int& Failures() {
  static int failures = 0;
  return failures;
}

// Whether fewer and smaller cases shall do: emulators are hundreds of times slower than what they emulate.
inline bool& Quick() {
  static bool quick = false;
  return quick;
}

struct Registration {
  Registration(const char* name, void (*run)()) { Cases().push_back({name, run}); }
};

inline void Check(bool holds, const char* file, int line, const std::string& what) {
  if (holds) return;
  ++Failures();
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

inline std::vector<float> RandomFloats(int64_t count, float scale, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

inline std::vector<Bf16> ToBf16(const std::vector<float>& values) {
  std::vector<Bf16> rounded;
  rounded.reserve(values.size());
  for (const float value : values) rounded.push_back(Bf16FromFloat(value));
  return rounded;
}

}  // namespace kt::testing

#define TEST(name)                                                         \
  static void name();                                                      \
  static const kt::testing::Registration registration_##name(#name, name); \
  static void name()

#define CHECK(condition) kt::testing::Check((condition), __FILE__, __LINE__, #condition)
#define CHECK_MESSAGE(condition, message) kt::testing::Check((condition), __FILE__, __LINE__, (message))
#define CHECK_THROWS(expression, exception)                                            \
  do {                                                                                 \
    bool thrown = false;                                                               \
    try {                                                                              \
      (void)(expression);                                                              \
    } catch (const exception&) {                                                       \
      thrown = true;                                                                   \
    }                                                                                  \
    kt::testing::Check(thrown, __FILE__, __LINE__, #expression " throws " #exception); \
  } while (false)
