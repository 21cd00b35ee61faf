// Scales and zero points that come from a checkpoint: checked, and stored beside codes in memory or in files.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "moe/layer.h"

namespace kt {
namespace {

// The largest magnitude of a code, zero point included.
float LargestCode(Format format) {
  switch (format) {
    case Format::kInt8:
      return 127.0F;
    case Format::kInt4:
      return 16.0F;
    case Format::kFp8:
      return 448.0F;
    case Format::kMxfp4:
      return 6.0F;
    case Format::kNf4:
    case Format::kBf16:
      break;
  }
  return 1.0F;
}

// Whether all are numbers from 0 (or, if they may be negative, -largest) to largest. As integers, for vectors: NaN and
// Inf are above any largest one.
bool ScalesFit(const float* scales, int64_t count, uint32_t largest, uint32_t ignored) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, scales + i, sizeof(bits));
    bad |= static_cast<uint32_t>((bits & ~ignored) > largest);
  }
  return bad == 0;
}

void CheckScales(const MatrixView& w, Format format, int64_t rows, int64_t groups) {
  constexpr float kLargestBf16 = 0x1.fep127F;
  const float largest = kLargestBf16 / LargestCode(format);
  // Where codes reach further on one side, a negative scale turns them round.
  const bool signed_scales = format == Format::kInt4 || format == Format::kNf4;
  uint32_t largest_bits;
  std::memcpy(&largest_bits, &largest, sizeof(largest_bits));
  std::vector<float> scales(static_cast<size_t>(groups));
  for (int64_t row = 0; row < rows; row += w.group_rows) {
    LoadScales(w, row, 0, groups, scales.data());
    if (ScalesFit(scales.data(), groups, largest_bits, signed_scales ? 0x80000000U : 0U)) continue;
    const int64_t band = row / w.group_rows;
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = scales[static_cast<size_t>(g)];
      const bool number = w.scale_type != ScaleType::kE8M0 || w.scales[band * w.scale_stride + g] != 255;
      if (number && std::fabs(scale) <= largest && (signed_scales || !std::signbit(scale))) continue;
      throw std::invalid_argument("the scale at row " + std::to_string(band) + ", column " + std::to_string(g) +
                                  " is " + (number ? std::to_string(scale) : "no number"));
    }
  }
}

}  // namespace

void ExpertLayer::CheckKind(const SourceCodes& source) const {
  if (storage_.scale_type != ScaleType::kNone && (source.zeros != nullptr) == storage_.zero_point) return;
  throw std::invalid_argument("these are not the codes, scales and zero points of " +
                              std::string(FormatName(shape_.format)));
}

void ExpertLayer::TakeScales(Matrix matrix, const SourceCodes& source, const MatrixView& w, uint8_t* scales,
                             uint8_t* zeros) const {
  const int64_t height = rows(matrix), bands = CeilDiv(height, w.group_rows),
                groups = CeilDiv(columns(matrix), w.group);
  std::memcpy(scales, source.scales, static_cast<size_t>(bands * w.scale_stride));
  CheckScales(w, shape_.format, height, groups);
  if (!storage_.zero_point) return;
  for (int64_t i = 0; i < bands * groups; ++i) {
    // 16, one above the codes, is what some packers have for groups without positive weights.
    if (source.zeros[i] > 16)
      throw std::invalid_argument("the zero point at row " + std::to_string(i / groups) + ", column " +
                                  std::to_string(i % groups) + " is " + std::to_string(source.zeros[i]));
  }
  std::memcpy(zeros, source.zeros, static_cast<size_t>(bands * groups));
}

}  // namespace kt
