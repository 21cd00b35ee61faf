// Scratch: below its bound, without a trace in the results, and never growing.
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "moe/engine.h"
#include "moe/fastest_tier.h"
#include "testing.h"
#include "tiers/tested_tiers.h"

namespace kt {
namespace {

// Skewed routing: most tokens go to a few experts, many experts get a handful of rows or none.
struct Work {
  Work(const LayerShape& shape, int64_t most_tokens, int64_t slots) : layer(shape), slots(slots) {
    std::mt19937 random(9);
    for (int m = shape.gated ? 0 : 1; m < kMatrixCount; ++m) {
      const Matrix matrix = static_cast<Matrix>(m);
      for (int64_t e = 0; e < shape.experts; ++e) {
        const std::vector<float> values =
            testing::RandomFloats(layer.rows(matrix) * layer.columns(matrix), 0.2F, random);
        layer.Write(matrix, e, {values.data(), DType::kF32, layer.columns(matrix), 1});
      }
    }
    x = testing::RandomFloats(most_tokens * shape.hidden, 1.0F, random);
    dy = testing::RandomFloats(most_tokens * shape.hidden, 1.0F, random);
    for (int64_t i = 0; i < most_tokens * slots; ++i) {
      const double u = std::uniform_real_distribution<double>(0, 1)(random);
      experts.push_back(static_cast<int64_t>(u * u * u * static_cast<double>(shape.experts + 1)));
      weights.push_back(std::uniform_real_distribution<float>(-1, 1)(random));
    }
    y.resize(x.size());
    dx.resize(x.size());
    dw.resize(weights.size());
  }

  LayerCall Call(int64_t tokens, int64_t scratch_bytes, Bf16* retained) {
    LayerCall call;
    call.layer = &layer;
    call.tokens = tokens;
    call.slots = slots;
    call.hidden = x.data();
    call.experts = experts.data();
    call.weights = weights.data();
    call.scratch_bytes = scratch_bytes;
    call.retained = retained;
    call.output = y.data();
    call.output_grad = dy.data();
    call.hidden_grad = dx.data();
    call.weights_grad = dw.data();
    return call;
  }

  ExpertLayer layer;
  int64_t slots;
  std::vector<float> x, dy, weights, y, dx, dw;
  std::vector<int64_t> experts;
};

int64_t RowValues(const LayerShape& shape) { return shape.intermediate * (shape.gated ? 2 : 1); }

TEST(TheBoundLeavesNoTraceInTheResults) {
  for (const bool gated : {true, false}) {
    for (const Format format : {Format::kBf16, Format::kInt4}) {
      if (testing::Quick() && gated != (format == Format::kInt4)) continue;
      LayerShape shape;
      shape.experts = 20;
      shape.hidden = 70;
      shape.intermediate = 69;
      shape.activation = gated ? Activation::kSilu : Activation::kRelu2;
      shape.gated = gated;
      shape.format = format;
      constexpr int64_t kTokens = 40, kSlots = 3;
      Work whole(shape, kTokens, kSlots), cut(shape, kTokens, kSlots);
      for (const testing::TestedTier& tier : testing::TestedTiers()) {
        ThreadPool pool(2, {});
        Pass pass(*tier.kernels, pool);
        const LayerCall reference = whole.Call(kTokens, int64_t{1} << 30, nullptr);
        pass.Forward(reference);
        pass.Backward(reference);
        for (const int64_t bound : {1, 60000}) {
          for (const bool retain : {true, false}) {
            std::vector<Bf16> retained(static_cast<size_t>(kTokens * kSlots * RowValues(shape)));
            const LayerCall call = cut.Call(kTokens, bound, retain ? retained.data() : nullptr);
            pass.Forward(call);
            pass.Backward(call);
            const std::string where = tier.name + ", at most " + std::to_string(bound) + " bytes";
            CHECK_MESSAGE(cut.y == whole.y, where + ": output");
            CHECK_MESSAGE(cut.dx == whole.dx, where + ": gradient of hidden states");
            CHECK_MESSAGE(cut.dw == whole.dw, where + ": gradient of routing weights");
          }
        }
      }
    }
  }
}

TEST(ScratchStaysBelowItsBound) {
  const struct {
    int64_t experts, hidden, intermediate, tokens, slots;
    bool gated;
  } layers[] = {{4, 256, 96, 4000, 2, true}, {300, 130, 33, 2500, 4, true}, {64, 48, 400, 2000, 3, false}};
  for (const auto& l : layers) {
    if (testing::Quick() && l.gated) continue;
    LayerShape shape;
    shape.experts = l.experts;
    shape.hidden = l.hidden;
    shape.intermediate = l.intermediate;
    shape.activation = Activation::kRelu2;
    shape.gated = l.gated;
    Work work(shape, l.tokens, l.slots);
    for (const Tier tier : {Tier::kPortable, Tier::kAmx}) {
      const TierKernels& kernels = *BestKernels(tier);
      const auto scratch = [&](int64_t tokens, int64_t bound) {
        ThreadPool pool(2, {});
        Pass pass(kernels, pool);
        const LayerCall call = work.Call(tokens, bound, nullptr);
        pass.Forward(call);
        pass.Backward(call);
        return static_cast<int64_t>(pass.scratch_bytes());
      };
      const int64_t least = scratch(1, 1);
      CHECK(least < int64_t{3} << 20);  // the tasks' panels of two threads, and a token
      for (const int64_t bound : {int64_t{3} << 20, int64_t{7} << 20}) {
        const int64_t taken = scratch(l.tokens, bound);
        const std::string figures = std::to_string(taken) + " bytes of " + std::to_string(bound) + " and " +
                                    std::to_string(least) + " for one token";
        // Blocks are whole huge pages.
        CHECK_MESSAGE(taken <= bound + least + (int64_t{2} << 20), figures);
        // And no call is cut much more than it must be: these all need more than the bound.
        CHECK_MESSAGE(2 * taken >= bound, figures);
      }
    }
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // those keep freed memory for themselves
int64_t ResidentBytes() {
  int64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}
#else
int64_t ResidentBytes() { return 0; }
#endif

TEST(NothingGrowsOverAThousandStepsOfChangingBatches) {
  LayerShape shape;
  shape.experts = 16;
  shape.hidden = 64;
  shape.intermediate = 32;
  constexpr int64_t kMostTokens = 2000, kSlots = 2, kLayers = 3, kBound = int64_t{4} << 20;
  Work work(shape, kMostTokens, kSlots);
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  std::mt19937 random(10);
  int64_t settled = 0, most = 0;
  const int steps = testing::Quick() ? 200 : 1000;
  for (int step = 0; step < steps; ++step) {
    // Mostly short batches, a long one now and then. Memory is looked at after two that are as long as any.
    const int64_t longest = random() % 50 == 0 ? kMostTokens : 60;
    const int64_t tokens = step % (steps - 100) == 99 ? kMostTokens : 1 + static_cast<int64_t>(random() % longest);
    std::vector<Block> retained;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      retained.push_back(engine.blocks()->Take(static_cast<size_t>(tokens * kSlots * RowValues(shape)) * sizeof(Bf16)));
      Bf16* const kept = reinterpret_cast<Bf16*>(retained.back().data());
      engine.SubmitForward(work.Call(tokens, kBound, kept))->Wait();
    }
    while (!retained.empty()) {
      Bf16* const kept = reinterpret_cast<Bf16*>(retained.back().data());
      engine.SubmitBackward(work.Call(tokens, kBound, kept))->Wait();
      engine.blocks()->Give(std::move(retained.back()));
      retained.pop_back();
    }
    const EngineStats stats = engine.stats();
    most = std::max(most, stats.scratch_bytes + stats.kept_bytes);
    if (step == 99) settled = ResidentBytes();
  }
  // Scratch: its bound and the tasks' panels. Kept blocks: each layer's, of the two sizes between which a block of one
  // may serve another (twice its size), and those of shorter batches, less than half, less than a quarter, ... of it.
  const int64_t longest = kMostTokens * kSlots * RowValues(shape) * static_cast<int64_t>(sizeof(Bf16));
  CHECK(most <= kBound + (int64_t{5} << 20) + 4 * kLayers * longest);
  // The rest of the process does not grow either: one huge page is allowed for how the heap happens to lie.
  const int64_t grown = ResidentBytes() - settled;
  CHECK_MESSAGE(grown <= (int64_t{2} << 20), "grown by " + std::to_string(grown) + " bytes");
}

}  // namespace
}  // namespace kt
