// The MoE layer's forward and backward, written once: it knows neither weight formats nor instruction sets.
//
// Sizes: T tokens, K slots per token, E experts, H hidden, I intermediate, S <= T * K routed rows (sentinel slots have
// none). All intermediate results are kept in rows sorted by expert. How the work is cut depends on these sizes and the
// tier alone, never on the number of threads, and every sum is formed in a fixed order: the same tokens give the same
// bits with any number of threads, and with any bound on scratch.
#pragma once

#include <cstdint>

#include "cpu/memory.h"
#include "cpu/thread_pool.h"
#include "moe/layer.h"
#include "moe/lora.h"
#include "moe/routing.h"
#include "tiers/tier.h"

namespace kt {

// What forward's products multiply. kInt8 (formats int8 and int4) quantises tokens on the way, a scale for every
// token and group of columns: an approximation. Backward multiplies BF16 (or FP32) in either case, but computes
// pre-activations again as forward did, to the same bits.
enum class Compute { kBf16, kInt8 };

struct LayerCall {
  const ExpertLayer* layer = nullptr;
  int64_t tokens = 0, slots = 0;
  Compute compute = Compute::kBf16;
  DType type = DType::kF32;          // of hidden, output and their gradients
  const void* hidden = nullptr;      // [T, H]
  const int64_t* experts = nullptr;  // [T, K]
  const float* weights = nullptr;    // [T, K]
  ExpertLora lora;                   // not with kInt8; its gradients need `hidden` in any case

  // What routed rows take in scratch at most; long calls are cut into chunks of tokens that need no more (but a token
  // at least). The panels of a task come on top, less than 1 MiB for each thread: they do not count, so that calls are
  // cut alike with any number of threads. Must be the same for a forward that retains and its backward.
  int64_t scratch_bytes = int64_t{1} << 30;

  // [T * K, 2I] ([T * K, I] ungated) pre-activations, gate first, in sorted rows of each chunk. Forward fills it if
  // given; backward uses it if given and else computes it again, to the same bits.
  Bf16* retained = nullptr;

  void* output = nullptr;  // forward: [T, H]

  const void* output_grad = nullptr;  // backward: [T, H]
  void* hidden_grad = nullptr;        // backward: [T, H], null if not wanted
  float* weights_grad = nullptr;      // backward: [T, K], null if not wanted
  LoraGradients lora_grads;           // backward: of `lora`, null if not wanted
};

class Pass {
 public:
  Pass(const TierKernels& kernels, ThreadPool& pool) : kernels_(kernels), pool_(pool) {}

  void Forward(const LayerCall& call);
  void Backward(const LayerCall& call);
  size_t scratch_bytes() const { return arena_.capacity(); }

 private:
  struct Chunk;
  struct Panels;
  struct WeightRows;
  struct Pieces;
  struct WeightColumns;
  struct Group;
  struct LowRank;
  struct OuterSum;

  int64_t TokensAtOnce(const LayerCall& call) const;
  template <class Function>
  void ForEachChunk(const LayerCall& call, const Function& function);
  // function(block, group) for every panel, as tasks of the pool.
  template <class Function>
  void ForEachGroup(const Chunk& chunk, const Function& function);

  void Check(const LayerCall& call) const;  // throws std::invalid_argument for what is not possible
  void ForwardChunk(const Chunk& chunk);
  void BackwardChunk(const Chunk& chunk);

  // Stages, in the order of a pass. Each hands its tasks to the pool.
  void PackHidden(const Chunk& chunk, const Panels& x);
  void GateUp(const Chunk& chunk, const Panels& x, const LowRank& z, const Panels* act);
  void GateUpFew(const Chunk& chunk, const Panels& x, const LowRank& z, const Panels* act, size_t block, int64_t i,
                 int rows, float* c);
  void Down(const Chunk& chunk, const Panels& act, const LowRank& z, float* out_rows);
  void CombineRows(const Chunk& chunk, const float* rows, int64_t stride, bool weighted, void* out);
  void PackRows(const Chunk& chunk, const void* base, char* packed, int64_t stride);  // of a [T, H] tensor
  void DownBackward(const Chunk& chunk, const char* grad, int64_t grad_stride, const LowRank& v, char* d_pre,
                    float* inner);
  void GateUpBackward(const Chunk& chunk, const char* d_pre, const LowRank& v, float* out_rows, int64_t out_stride);
  void CombineWeightsGrad(const Chunk& chunk, const float* inner);

  // Runs `tasks_per_block` tasks for each block, on the node where its expert's weights lie.
  template <class Function>
  void RunOnBlocks(const Chunk& chunk, int64_t tasks_per_block, const Function& function);

  // For the products with a matrix.
  Panels LayOutPanels(const Chunk& chunk, Matrix matrix) const;
  Panels LayOutPanels(const Chunk& chunk, int64_t depth, int64_t token_group = 0) const;
  Group GroupOf(const RowBlock& block, int64_t index) const;
  Pieces CutProducts(const WeightRows* matrices, int count, int64_t groups, bool in_place, bool int8) const;
  static constexpr int64_t kFewGroups = 1;  // blocks of so many panels are of few tokens
  // Products of weight rows with all tokens of a block: matrix m's with the group whose first row is r are the FP32
  // tile [rows][group width] at ProductTile(c, m, r), on top of what is there if `add`. `next` (one for each matrix, or
  // null) is what will be multiplied then.
  void MultiplyRows(const WeightRows* matrices, int count, const WeightRows* next, Format format, const Panels& panels,
                    const Chunk& chunk, size_t block, char* scratch, bool add = false) const;
  // What products of integers need besides (int8.cc).
  void ActivateToRows(const Chunk& chunk, const Panels& act, size_t block, const Group& group, int64_t i, int rows,
                      const float* gate, const float* up, char* scratch) const;
  void PackActivations(const Chunk& chunk, const Panels& act);
  static int64_t TokenGroup(const MatrixView& view);
  // Of a token's first `depth` values (a multiple of the group, or all), with their scales.
  static int64_t TokenBytes(int64_t depth, int64_t token_group);
  float* ProductTile(char* scratch, int matrix, int64_t row) const {
    return reinterpret_cast<float*>(scratch) + (matrix * Routing::kBlockRows + row) * task_rows();
  }

  // c (+)= a * weights, for `a_rows` rows of tokens; `next` is what will be multiplied by then, or null.
  void MultiplyColumns(const WeightColumns& w, const WeightColumns* next, Format format, int64_t a_rows, const char* a,
                       int64_t a_stride, float* c, int64_t c_stride, bool accumulate, char* panels) const;

  // Adapters (lora.cc). `z` are low-rank values, scale x A x, of forward's tokens; `v`, scale x B^T dy, of backward's.
  static MatrixView LoraView(const Bf16* matrices, int64_t expert, int64_t rows, int64_t columns);
  LowRank LayOutLowRank(const Chunk& chunk, bool plain) const;
  static size_t MeasureLowRank(const Chunk& chunk, const LowRank& z);
  void TakeLowRank(const Chunk& chunk, LowRank* z);
  char* LowRankRow(const LowRank& v, int64_t row) const;
  void Scale(float factor, int64_t count, float* row) const;
  // `dropped` is room for a copy of x with some values left out, where there is dropout.
  void MultiplyLowRank(const Chunk& chunk, const Panels& x, int of, char* dropped, const Bf16* a, int64_t inputs,
                       const LowRank& z);
  void AddLowRankFew(const Chunk& chunk, const LowRank& z, const Bf16* matrices, int64_t outputs, size_t block,
                     int64_t row, int rows, float* c, int64_t c_stride, float* scratch) const;
  void Reactivate(const Chunk& chunk, char* rows, int64_t stride, const Panels& act);
  // v (+)= grad * B's rows [first_row, first_row + rows).
  void MultiplyByB(const Chunk& chunk, const Bf16* matrices, int64_t outputs, int64_t first_row, int64_t rows,
                   const char* grad, int64_t grad_stride, bool accumulate, const LowRank& v);
  void PackLowRankRows(const Chunk& chunk, const LowRank& v);
  void WeighLowRank(const Chunk& chunk, const LowRank& z);
  void PanelsOfRows(const char* rows, int64_t stride, int64_t count, int64_t columns, char* panels,
                    int64_t panel_elements) const;
  size_t OuterWorkerBytes(int64_t rank) const;
  // c += v * A, columns [column, column + columns) of it.
  void AddLowRankColumns(const Chunk& chunk, size_t block, const LowRank& v, const Bf16* a, int64_t inputs, int of,
                         int64_t column, int64_t columns, float* c, int64_t c_stride, char* panels, float* apart) const;

  // Dropout (dropout.cc) of hidden states or activations, by `of` (DropoutRow).
  static DropoutRow DropoutOf(const Chunk& chunk, int of, int64_t row);
  static int64_t DroppedBytes(const Chunk& chunk, const Panels& x, const Panels& act);
  void DropFromPanels(const Chunk& chunk, int of, int64_t columns, const Panels& from, const Panels& to);
  void DropFromRow(const Chunk& chunk, int of, int64_t columns, int64_t row, char* elements) const;
  // sums += values, but for those left out, which become zeros.
  static void AddKept(const Chunk& chunk, int of, int64_t row, int64_t column, int64_t columns, float* values,
                      float* sums);
  void AddOuter(const Chunk& chunk, const LowRank& left, const char* right, int64_t right_stride, int64_t columns,
                const OuterSum& to);

  void EndProducts() const {
    if (kernels_.end_products != nullptr) kernels_.end_products();
  }

  // A forward task decodes this many tiles of weight rows, for all tokens of its block. In rows that is a multiple of
  // every tier's vector length, so that transposed results are stored in whole vectors.
  static constexpr int64_t kTilesPerTask = 4;
  int64_t task_rows() const { return kTilesPerTask * kernels_.tile_rows; }
  // Blocks of few rows are multiplied along the depth, straight from the stored rows. The rows of the whole call
  // decide: sums are formed in another order, and a token's bits must not depend on how the call is cut.
  bool Few(const RowBlock& block) const { return block.expert_rows <= MostFewRows(kernels_.lanes); }

  // Products are cut along the depth so that a task's decoded rows and what one panel contributes both stay in L1.
  static constexpr int64_t kPanelChunkBytes = 16384;
  int64_t depth_step(bool int8 = false) const {
    return kPanelChunkBytes / (width() * (int8 ? 1 : kernels_.element_bytes));
  }
  size_t ForwardWorkerBytes() const;

  // Every worker has one piece of the arena of its own.
  size_t MeasureWorkers(size_t bytes) const { return pool_.threads() * Arena::Measure(bytes); }
  void TakeWorkers(size_t bytes);
  char* Worker(int worker) const { return workers_ + worker * worker_bytes_; }

  static constexpr int kWidestPanel = 64;
  int64_t width() const { return int64_t{kernels_.lanes} * kernels_.tile_vectors; }
  int64_t Padded(int64_t depth) const { return RoundUp(depth, kernels_.pair); }
  // Elements from one A row to the next: a cache line more than the row, so that rows a power of two long do not share
  // cache sets.
  int64_t RowStride(int64_t depth) const { return RoundUp(depth, kernels_.pair) + 64 / kernels_.element_bytes; }

  // The same for rows of FP32 results, written in whole vectors.
  int64_t ResultStride(int64_t columns) const { return RoundUp(columns, width()) + 16; }

  const TierKernels& kernels_;
  ThreadPool& pool_;
  Arena arena_;
  char* workers_ = nullptr;
  size_t worker_bytes_ = 0;
};

}  // namespace kt
