// An instruction tier: one table of micro-kernels, all that the MoE algorithm sees of the instruction set.
//
// Products are C[m][n] += sum_d A[m][d] * B[d][n], always over these two operand layouts:
//   A  row-major, `a_stride` elements from row to row, depth padded with zeros to a multiple of `pair`;
//   B  a panel [depth / pair][width][pair], where width is a multiple of `lanes` up to `tile_vectors * lanes`.
// With weights as A and tokens as B (forward), and tokens as A and weights as B (backward), row-major weights serve
// both passes without being transposed.
#pragma once

#include <cstdint>

#include "cpu/features.h"
#include "cpu/numeric.h"
#include "formats/format.h"

namespace kt {

// Products of integers have operands of their own: codes of `kQuad` neighbouring depth values are multiplied at once.
//   A  weights: row-major bytes code + kWeightOffset (from 1 to 255), depth padded to a multiple of kQuad;
//   B  tokens: group after group of the depth, `token_group` columns each (the last may be short), float scale[width],
//      int32_t start[width], int8_t codes[padded group / kQuad][width][kQuad]. A token's codes go from -127 to 127,
//      its start is -kWeightOffset x their sum, which takes the weights' offset out again.
// A group's sums are exact, and exact in FP32, too.
constexpr int64_t kQuad = 4, kTokenHeader = 8;  // bytes of a token's scale and start
constexpr int kWeightOffset = 128;
constexpr int64_t kMostTokenGroup = 256;

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu2, kSwigluOai };
constexpr int kActivationCount = 5;

// One activation's forward: FP32 tiles gate and up, [rows][width], to elements of the next product's B panel, whose
// depth is the tile's row index. An odd last row is paired with zeros. `gate` is null for ungated experts.
using ActivateFn = void (*)(const float* gate, const float* up, int rows, int width, void* panel);

// The same for one routed row: FP32 gate and up of `count` values to a row of elements.
using ActivateRowFn = void (*)(const float* gate, const float* up, int64_t count, void* row);

// One activation's backward for one routed row of `count` values: from the retained pre-activations and
// u = dL/d(act) / routing weight, writes dL/dgate and dL/dup (scaled by `weight`) and returns <u, act>, this row's
// share of the routing weight's gradient. `gate` and `d_gate` are null for ungated experts.
using ActivateBackwardFn = float (*)(const Bf16* gate, const Bf16* up, const float* u, float weight, int64_t count,
                                     void* d_gate, void* d_up);

// Scales that a product applies to the rows of A as it goes along the depth: row r's for depth d is
// values[r * row_stride + d / group]. Groups are a power of two, of at least kLeastGroup, or as long as the depth.
struct RowScales {
  const float* values = nullptr;  // null: no scales
  int64_t row_stride = 0;
  int64_t group = 0;
};

// A piece of a matrix's stored rows that will be needed soon. A product asks for one cache line of it every few
// steps of its depth: a CPU drops most of a burst of prefetches.
struct Ahead {
  const uint8_t* row = nullptr;
  int64_t row_stride = 0;  // bytes
  int64_t lines_per_row = 0;
  int64_t line = 0;   // of the row: the next
  int64_t lines = 0;  // left, in all
  int64_t rate = 0;   // lines for kSteps steps
  int64_t due = 0;    // what the steps so far have not used up of it

  static constexpr int64_t kSteps = 1 << 16;
};

// Asks for what `steps` steps give time for.
static inline void AskAhead(Ahead& ahead, int64_t steps) {
  ahead.due += steps * ahead.rate;
  int64_t count = Smaller(ahead.due / Ahead::kSteps, ahead.lines);
  ahead.due %= Ahead::kSteps;
  while (count > 0) {
    const int64_t some = Smaller(count, ahead.lines_per_row - ahead.line);
    const uint8_t* const first = ahead.row + ahead.line * 64;
    for (int64_t i = 0; i < some; ++i) __builtin_prefetch(first + i * 64, 0, 2);  // into the second-level cache
    count -= some, ahead.lines -= some, ahead.line += some;
    if (ahead.line < ahead.lines_per_row) return;
    ahead.line = 0;
    ahead.row += ahead.row_stride;
  }
}

// Up to so many tokens of an expert are multiplied by its rows as these lie, without being packed into a panel: most of
// that would be empty.
constexpr int MostFewRows(int lanes) { return lanes / 3 > 4 ? lanes / 3 : 4; }

struct TierKernels {
  Tier tier;
  int lanes;          // FP32 values in a vector
  int pair;           // neighbouring depth values that one lane multiplies at once: 2 for BF16 dot products, else 1
  int element_bytes;  // of A and B
  int tile_rows;      // rows of C that one micro-kernel call keeps in registers
  int tile_vectors;   // vectors per row of C, likewise

  // Whether decode_rows leaves codes as they are, for `multiply` to apply the scales to its sums. Else elements are
  // FP32 and have them in already.
  bool scale_products;

  // Whether stored rows are A rows as they stand.
  bool in_place[kFormatCount];

  // Decodes weight rows [row, row + rows), columns [column, column + columns), as A rows: code x scale, or codes.
  void (*decode_rows[kFormatCount])(const MatrixView& w, int64_t row, int rows, int64_t column, int64_t columns,
                                    void* a, int64_t a_stride);

  // Decodes weight rows [row, row + rows), columns [column, column + columns), as B panels: depth runs over rows.
  // Elements are code x scale. Columns are cut into panels of tile_vectors * lanes, one after the other, `panel_stride`
  // elements apart; the last is padded with zeros.
  void (*decode_panels[kFormatCount])(const MatrixView& w, int64_t row, int rows, int64_t column, int columns,
                                      void* panels, int64_t panel_stride);

  // c[t][r] = <weight row `row` + r, x row t>: for few tokens, straight from the stored rows. `x` holds `tokens` rows
  // of elements, `x_stride` elements apart; c is FP32, `c_stride` values from token to token. `expert_rows` is how many
  // the whole call has for this expert: it may decide in which order sums are formed, `tokens` may not.
  void (*dot_rows[kFormatCount])(const MatrixView& w, int64_t row, int rows, int64_t columns, const void* x,
                                 int64_t x_stride, int tokens, int64_t expert_rows, float* c, int64_t c_stride);

  // Converts a row of `count` values to elements, padded with zeros up to a multiple of `pair`.
  void (*pack_row)(const void* row, DType type, int64_t count, void* a);

  // Packs `tokens` rows as the columns of one B panel of the given width; columns beyond `tokens` are zero.
  void (*pack_panel)(const void* const* rows, DType type, int tokens, int width, int64_t count, void* panel);

  // The product. `rows` is any number; `depth` counts unpadded values; C is FP32 with `c_stride` values from row to
  // row. Without `accumulate` C is overwritten. Writes all of `width` columns. Only a tier with scale_products takes
  // scales. A step of the depth is `pair` values, for tile_rows rows.
  void (*multiply)(const void* a, int64_t a_stride, int64_t rows, const void* panel, int width, int64_t depth,
                   const RowScales& scales, float* c, int64_t c_stride, bool accumulate, Ahead& ahead);

  // The products of integers, as above, for formats whose codes are integers; null for the others. `scales.group` is a
  // multiple of `token_group`, or as long as the depth; `token_group` is a multiple of kQuad.
  void (*decode_int8_rows[kFormatCount])(const MatrixView& w, int64_t row, int rows, int64_t column, int64_t columns,
                                         uint8_t* a, int64_t a_stride);
  void (*pack_int8_panel)(const void* const* rows, DType type, int tokens, int width, int64_t count,
                          int64_t token_group, void* panel);
  void (*multiply_int8)(const uint8_t* a, int64_t a_stride, int64_t rows, const void* panel, int width, int64_t depth,
                        int64_t token_group, const RowScales& scales, float* c, int64_t c_stride, bool accumulate,
                        Ahead& ahead);

  // Gives up what products leave configured in the calling thread, for its next product to set up again; null where
  // there is nothing. To be called before the thread does other things.
  void (*end_products)();

  ActivateFn activate[2][kActivationCount];  // [gated][activation]; null where there is no such expert
  ActivateRowFn activate_row[2][kActivationCount];
  ActivateBackwardFn activate_backward[2][kActivationCount];

  // out[column][row] = tile[row][column]: FP32 tile of `rows` x `columns`, to FP32 or BF16.
  void (*transpose_to_float)(const float* tile, int64_t tile_stride, int rows, int columns, float* out,
                             int64_t out_stride);
  void (*transpose_to_bf16)(const float* tile, int64_t tile_stride, int rows, int columns, Bf16* out,
                            int64_t out_stride);

  // out[i] = sum over j of weights[j] * rows[j][i], added in the order of j, for i < count; null rows are skipped.
  void (*combine)(const float* const* rows, const float* weights, int terms, int64_t count, void* out, DType type);

  // <x, y>, summed in a fixed order.
  float (*dot)(const void* x, DType type, const float* y, int64_t count);

  // For measuring the machine: the product's multiply-adds on registers alone (returns how many FLOPs it did), and the
  // sum of `count` values (a multiple of 64), which reads memory as fast as this tier's loads can.
  double (*register_products)(int64_t steps);
  double (*register_int8_products)(int64_t steps);
  float (*read_sum)(const float* values, int64_t count);
};

// The kernels of a tier, null where this build does not have it.
const TierKernels* KernelsOf(Tier tier);

// The highest tier that this build and this CPU have, not above `limit`.
const TierKernels* BestKernels(Tier limit);

}  // namespace kt
