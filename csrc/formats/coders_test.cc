// Every code, every midpoint between two and its neighbourhood, against the codes' own values.
#include "formats/coders.inl"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "testing.h"

namespace kt {
namespace {

struct Coded {
  double value;
  int code;
};

// `codes` in the order of their values, each value once.
template <class Coder>
void CheckCoder(const Coder& coder, const std::vector<Coded>& codes, bool ties_to_even, const char* name) {
  const auto check = [&](float x, const Coded& expected) {
    // In every lane, beside others.
    for (int lane = 0; lane < kLanes; ++lane) {
      F several = {0.25F, -3.0F, 100.0F, -0.7F};
      several[lane] = x;
      I code;
      const F q = coder.Nearest(several, &code);
      const int got = code[lane] & 0xff;  // the byte that is stored
      CHECK_MESSAGE(q[lane] == static_cast<float>(expected.value), std::string(name) + " at " + std::to_string(x));
      CHECK_MESSAGE(coder.Nearest(several)[lane] == q[lane], std::string(name) + " at " + std::to_string(x));
      // There are two zeros where codes have a sign.
      CHECK_MESSAGE(got == (expected.code & 0xff) || (expected.value == 0 && got == (Coder::kFourBit ? 8 : 128)),
                    std::string(name) + " has code " + std::to_string(got) + " at " + std::to_string(x));
    }
  };
  for (size_t i = 0; i < codes.size(); ++i) {
    check(static_cast<float>(codes[i].value), codes[i]);
    if (i + 1 == codes.size()) break;
    // Exact in FP32 for all formats.
    const auto middle = static_cast<float>((codes[i].value + codes[i + 1].value) / 2);
    check(std::nextafter(middle, -HUGE_VALF), codes[i]);
    check(std::nextafter(middle, HUGE_VALF), codes[i + 1]);
    if (ties_to_even) check(middle, (codes[i].code & 1) == 0 ? codes[i] : codes[i + 1]);
  }
  for (const float far : {1.001F, 2.0F, 0x1p30F, 0x1p100F}) {
    check(static_cast<float>(codes.back().value) * far, codes.back());
    check(static_cast<float>(codes.front().value) * far, codes.front());
  }
}

template <class Decode>
std::vector<Coded> Codes(int count, const Decode& decode) {
  std::vector<Coded> codes;
  for (int code = 0; code < count; ++code) {
    const double value = decode(code);
    if (std::isnan(value) || (value == 0 && std::signbit(value))) continue;
    codes.push_back({value, code});
  }
  std::sort(codes.begin(), codes.end(), [](const Coded& a, const Coded& b) { return a.value < b.value; });
  return codes;
}

TEST(Int8) {
  CheckCoder(IntegerCoder<false>{-127, 127, 0},
             Codes(256, [](int code) { return code == 128 ? NAN : static_cast<double>(static_cast<int8_t>(code)); }),
             true, "int8");
}

TEST(Int4AroundEveryZeroPoint) {
  for (int zero = 0; zero < 16; ++zero) {
    // Ties go to even values; with an odd zero point the code of such a one is odd.
    CheckCoder(IntegerCoder<true>{static_cast<float>(-zero), static_cast<float>(15 - zero), zero},
               Codes(16, [&](int code) { return static_cast<double>(code - zero); }), zero % 2 == 0, "int4");
  }
}

TEST(Nf4) {
  CheckCoder(Nf4Coder{}, Codes(16, [](int code) { return static_cast<double>(kNf4Values[code]); }), false, "nf4");
}

TEST(Fp8) {
  CheckCoder(Fp8Coder{}, Codes(256, [](int code) { return double{FloatFromFp8(static_cast<uint8_t>(code))}; }), true,
             "fp8");
}

TEST(Mxfp4) {
  CheckCoder(Mxfp4Coder{}, Codes(16, [](int code) { return static_cast<double>(kMxfp4Values[code]); }), true, "mxfp4");
}

}  // namespace
}  // namespace kt
