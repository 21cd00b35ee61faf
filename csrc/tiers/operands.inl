// The operands of the products: weight rows and panels, token rows and panels. Included by kernels.inl.
#pragma once

#include "formats/format.h"
#include "tiers/convert.inl"

namespace kt {

template <class Ops>
struct Operands {
  using Element = typename Ops::Element;
  using F = typename Ops::F;
  using Rows = Convert<Ops>;
  static constexpr int kLanes = Ops::kLanes, kPair = Ops::kPair, kWidth = Ops::kLanes * Ops::kTileVectors;
  static constexpr int kChunk = 256;  // columns decoded at a time on the way to a panel; a multiple of every kWidth
  static_assert(kChunk % kWidth == 0, "chunks must hold whole panels");

  static void PackRow(const void* row, DType type, int64_t count, void* a) {
    Element* out = static_cast<Element*>(a);
    Rows::ConvertRow(static_cast<const char*>(row), type, count, out);
    Rows::ZeroElements(out + count, RoundUp(count, kPair) - count);
  }

  // Rows are converted piece by piece and turned in registers, kLanes tokens and kLanes lanes' worth of depth at a
  // time.
  static void PackPanel(const void* const* rows, DType type, int tokens, int width, int64_t count, void* panel) {
    constexpr int kPiece = kLanes * kPair;
    static_assert(sizeof(Element) * kPair == sizeof(float), "a lane holds kPair elements");
    float* const out = static_cast<float*>(panel);
    for (int64_t k = 0; k < count; k += kPiece) {
      const int64_t depth = Smaller(kPiece, count - k), steps = CeilDiv(depth, kPair);
      for (int first = 0; first < width; first += kLanes) {
        F block[kLanes];
        for (int t = 0; t < kLanes; ++t) {
          if (first + t >= tokens) {
            block[t] = Ops::Zero();
            continue;
          }
          const char* const source = static_cast<const char*>(rows[first + t]) + k * DTypeBytes(type);
          if (kPair == 2 && type == DType::kBf16 && depth == kPiece) {
            block[t] = Ops::Load(reinterpret_cast<const float*>(source));
            continue;
          }
          alignas(64) Element piece[kPiece];
          if (depth < kPiece) Rows::ZeroElements(piece, kPiece);
          Rows::ConvertRow(source, type, depth, piece);
          block[t] = Ops::Load(reinterpret_cast<const float*>(piece));
        }
        Ops::Transpose(block);
        for (int64_t s = 0; s < steps; ++s) Ops::Store(out + (k / kPair + s) * width + first, block[s]);
      }
    }
  }

  // FP32 elements take the scales in; BF16 elements would have to be rounded, so that the product applies them.
  template <class Format>
  static void DecodeRows(const MatrixView& w, int64_t row, int rows, int64_t column, int64_t columns, void* a,
                         int64_t a_stride) {
    Element* out = static_cast<Element*>(a);
    for (int r = 0; r < rows; ++r, out += a_stride) {
      Format::template DecodeRow<Ops, !Ops::kScaleProducts>(w, row + r, column, columns, out);
      Rows::ZeroElements(out + columns, RoundUp(columns, kPair) - columns);
    }
  }

  // Short runs of many rows are more than the hardware foresees: each row is asked for this many rows ahead.
  static constexpr int kAhead = 16;

  template <class Format>
  static void Prefetch(const MatrixView& w, int64_t row, int64_t column, int64_t count) {
    const uint8_t* const end = Format::Address(w, row, column + count);
    for (const uint8_t* line = Format::Address(w, row, column); line < end; line += 64) __builtin_prefetch(line);
  }

  template <class Format>
  static void DecodePanels(const MatrixView& w, int64_t row, int rows, int64_t column, int columns, void* panels,
                           int64_t panel_stride) {
    alignas(64) Element chunk[kPair][kChunk];
    for (int first = 0; first < columns; first += kChunk) {
      const int count = static_cast<int>(Smaller(kChunk, columns - first));
      const int padded = static_cast<int>(RoundUp(count, kWidth));
      for (int r = 0; r < rows; r += kPair) {
        Element* out = static_cast<Element*>(panels) + first / kWidth * panel_stride + static_cast<int64_t>(r) * kWidth;
        if constexpr (Format::kScales && kPair == 2) {
          if (count == padded && r + 1 < rows) {
            for (int p = 0; p < kPair && r + p + kAhead < rows; ++p)
              Prefetch<Format>(w, row + r + p + kAhead, column + first, count);
            Format::template DecodePair<Ops>(w, row + r, column + first, count, out, panel_stride);
            continue;
          }
        }
        const Element* source[kPair];
        for (int p = 0; p < kPair; ++p) {
          const int decoded = r + p < rows ? count : 0;
          if (r + p + kAhead < rows) Prefetch<Format>(w, row + r + p + kAhead, column + first, count);
          if constexpr (Format::template InPlace<Ops>()) {
            source[p] = reinterpret_cast<const Element*>(Format::Address(w, row + r + p, column + first));
            if (decoded == padded) continue;
          }
          source[p] = chunk[p];
          if (decoded > 0) Format::template DecodeRow<Ops, true>(w, row + r + p, column + first, decoded, chunk[p]);
          Rows::ZeroElements(chunk[p] + decoded, padded - decoded);
        }
        for (int c = 0; c < padded; c += kWidth, out += panel_stride) {
          Ops::InterleaveRows(out, source[0] + c, source[kPair - 1] + c);
        }
      }
    }
  }
};

}  // namespace kt
