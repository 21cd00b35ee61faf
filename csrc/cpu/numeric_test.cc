#include "cpu/numeric.h"

#include <cmath>
#include <limits>

#include "testing.h"

namespace kt {
namespace {

// The distance between neighbours at `value` in a format with that many explicit mantissa bits and smallest exponent.
double Spacing(double value, int mantissa_bits, int smallest_exponent) {
  int exponent = 0;
  std::frexp(value, &exponent);
  return std::ldexp(1.0, std::max(exponent - 1, smallest_exponent) - mantissa_bits);
}

TEST(Bf16RoundsToNearestEven) {
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const uint32_t bits = random();
    const float value = FloatFromBits(bits);
    const float rounded = FloatFromBf16(Bf16FromFloat(value));
    if (std::isnan(value)) {
      CHECK(std::isnan(rounded));
      continue;
    }
    if (std::isinf(rounded)) {
      CHECK(std::fabs(value) >= 3.3953138e38F);
      continue;
    }
    CHECK(std::fabs(static_cast<double>(value) - rounded) <= Spacing(value, 7, -126) / 2);
  }
  CHECK(Bf16FromFloat(1.0F + 0x1p-8F) == 0x3f80);      // a tie goes to the even neighbour below
  CHECK(Bf16FromFloat(1.0F + 3 * 0x1p-8F) == 0x3f82);  // and above
}

TEST(EveryF16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = FloatFromF16(static_cast<F16>(bits));
    if (std::isnan(value)) {
      CHECK(std::isnan(FloatFromF16(F16FromFloat(value))));
    } else {
      CHECK(F16FromFloat(value) == bits);
    }
  }
}

TEST(F16RoundsToNearest) {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> exponent(-30.0F, 17.0F);
  for (int i = 0; i < 200000; ++i) {
    const float value = std::exp2(exponent(random)) * ((random() & 1U) != 0 ? 1.0F : -1.0F);
    const float rounded = FloatFromF16(F16FromFloat(value));
    if (std::isinf(rounded)) {
      CHECK(std::fabs(value) >= 65520.0F);
    } else {
      CHECK(std::fabs(static_cast<double>(value) - rounded) <= Spacing(value, 10, -14) / 2);
    }
  }
  CHECK(std::isinf(FloatFromF16(F16FromFloat(std::numeric_limits<float>::infinity()))));
}

TEST(StoreThenLoadKeepsWhatTheTypeCanHold) {
  for (const DType type : {DType::kF32, DType::kBf16, DType::kF16}) {
    char buffer[16] = {};
    StoreFromFloat(buffer, type, 2, -1.5F);
    CHECK(LoadAsFloat(buffer, type, 2) == -1.5F);
    CHECK(LoadAsFloat(buffer, type, 1) == 0.0F);
  }
}

}  // namespace
}  // namespace kt
