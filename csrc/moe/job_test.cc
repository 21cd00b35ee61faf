#include "moe/job.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <stdexcept>

#include "moe/engine.h"
#include "moe/fastest_tier.h"
#include "moe/small_calls.h"
#include "testing.h"

namespace kt {
namespace {

constexpr auto kForward = Job::Direction::kForward;
constexpr auto kBackward = Job::Direction::kBackward;

// What runs jobs without an engine.
struct Runner {
  ThreadPool pool{3, {}, std::chrono::microseconds(0)};
  Pass pass{*KernelsOf(FastestTiers()), pool};

  void Run(Job& job) {
    MakeResults(job, pass, pool);
    Keep(job, &pool);
  }
};

Job JobOf(const Work& work, Job::Direction direction) {
  Job job;
  job.direction = direction;
  job.call = work.call;
  return job;
}

// Every byte is ones, but for the last value.
template <class T>
bool IsSpoilt(const std::vector<T>& values, T last) {
  const auto* const bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < (values.size() - 1) * sizeof(T); ++i) {
    if (bytes[i] != 0xFF) return false;
  }
  return values.back() == last;
}

TEST(DigestsDependOnEveryBitAndNothingElse) {
  std::mt19937 random(1);
  for (const int64_t bytes : {1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 256}) {
    std::vector<char> row(static_cast<size_t>(bytes));
    for (char& byte : row) byte = static_cast<char>(random());
    const uint64_t digest = Digest(row.data(), bytes);
    std::set<uint64_t> all = {digest};
    for (size_t offset = 0; offset < 8; ++offset) {  // any alignment, whatever lies beside
      std::vector<char> moved(row.size() + 16, static_cast<char>(offset));
      std::copy(row.begin(), row.end(), moved.begin() + static_cast<int64_t>(offset));
      CHECK(Digest(moved.data() + offset, bytes) == digest);
    }
    for (size_t bit = 0; bit < row.size() * 8; ++bit) {
      row[bit / 8] = static_cast<char>(row[bit / 8] ^ (1 << bit % 8));
      all.insert(Digest(row.data(), bytes));
      row[bit / 8] = static_cast<char>(row[bit / 8] ^ (1 << bit % 8));
    }
    CHECK(all.size() == row.size() * 8 + 1);
    row.push_back(0);
    CHECK(Digest(row.data(), bytes + 1) != digest);  // one more zero
  }
}

TEST(DigestsDependOnTheOrderOfWords) {
  std::mt19937_64 random(2);
  std::vector<uint64_t> words(24);
  for (uint64_t& word : words) word = random();
  const auto digest = [&] { return Digest(words.data(), static_cast<int64_t>(words.size() * 8)); };
  std::set<uint64_t> all = {digest()};
  size_t made = 1;
  for (size_t i = 0; i < words.size(); ++i) {
    for (size_t j = 0; j < i; ++j, ++made) {
      std::swap(words[i], words[j]);
      all.insert(digest());
      std::swap(words[i], words[j]);
    }
  }
  CHECK(all.size() == made);
}

TEST(SignsThatFlipTogetherDoNotCancelOut) {
  // The top bit of a word is what multiplication spreads least, and it is the sign of a value.
  std::mt19937_64 random(3);
  std::vector<uint64_t> words(12);
  for (uint64_t& word : words) word = random();
  const uint64_t signs[] = {0, uint64_t{1} << 63, uint64_t{1} << 31, (uint64_t{1} << 63) + (uint64_t{1} << 31)};
  std::set<uint64_t> all;
  for (const uint64_t first : signs) {
    for (const uint64_t second : signs) {
      for (const uint64_t third : signs) {
        std::vector<uint64_t> flipped = words;
        flipped[0] ^= first;
        flipped[4] ^= second;
        flipped[8] ^= third;
        all.insert(Digest(flipped.data(), static_cast<int64_t>(flipped.size() * 8)));
      }
    }
  }
  CHECK(all.size() == 64);
}

TEST(EveryTokenGetsItsDigest) {
  const Layer layer;
  Runner runner;
  Work work(layer, 1, 6001);  // several tasks
  Job job = JobOf(work, kForward);
  std::vector<uint64_t> digests(static_cast<size_t>(work.tokens) + 1, 7);
  job.digests = digests.data();
  std::copy_n(work.x.begin(), Layer::kHidden, work.x.end() - Layer::kHidden);  // the last is as the first
  runner.Run(job);
  for (int64_t t = 0; t < work.tokens; ++t) {
    CHECK(digests[static_cast<size_t>(t)] == Digest(work.x.data() + t * Layer::kHidden, Layer::kHidden * 4));
  }
  CHECK(digests[0] == digests[6000] && digests[0] != digests[1] && digests.back() == 7);
  CHECK(std::set<uint64_t>(digests.begin(), digests.end() - 1).size() == 6000);
}

TEST(TokensAreKeptOnceTheResultsAreThere) {
  const Layer layer;
  Work work(layer, 7), plain(layer, 7);
  Engine engine(3, {}, *KernelsOf(FastestTiers()));
  engine.SubmitForward(plain.call)->Wait();
  const std::vector<char> from((1 << 20) + 3, 5);
  std::vector<char> to(from.size() + 1, 1);
  std::vector<float> tokens(work.x.size()), output(work.y.size());
  const int64_t bytes = static_cast<int64_t>(tokens.size() * sizeof(float));
  auto job = std::make_shared<Job>();
  job->call = work.call;
  job->kept = {{tokens.data(), work.x.data(), bytes},
               {output.data(), work.y.data(), bytes},
               {to.data(), from.data(), static_cast<int64_t>(from.size())},
               {nullptr, nullptr, 0}};
  uint32_t word = 0;
  const auto ticket = engine.Prepare(job);
  engine.SetSignal(*ticket, &word, 41);
  engine.Start(ticket);
  ticket->Wait();
  CHECK(__atomic_load_n(&word, __ATOMIC_ACQUIRE) == 41);
  CHECK(tokens == work.x && output == plain.y);
  CHECK(std::equal(from.begin(), from.end(), to.begin()) && to.back() == 1);
}

TEST(RetainedPreActivationsAreUsedForTheRoutingThatTheyAreOf) {
  const Layer layer;
  Runner runner;
  const Work original(layer, 9);
  // All the same, as no forward gives them: it shows whether they are used.
  std::vector<Bf16> retained(static_cast<size_t>(original.tokens * 2 * 2 * Layer::kIntermediate), 0x3F80);
  const auto backward = [&](Work& work, bool given, bool with_routing) {
    Job job = JobOf(work, kBackward);
    if (given) job.call.retained = retained.data();
    if (with_routing) job.retained_routing = Job::RoutingValues{original.index.data(), original.weights.data()};
    runner.Run(job);
    return job.recomputes;
  };
  Work plain(layer, 9), same(layer, 9), unchecked(layer, 9);
  CHECK(backward(plain, false, false));
  CHECK(!backward(same, true, true) && same.dx != plain.dx);
  CHECK(!backward(unchecked, true, false) && unchecked.dx == same.dx);

  for (const bool by_weight : {true, false}) {
    Work expected(layer, 9), other(layer, 9);
    for (Work* const work : {&expected, &other}) {
      if (by_weight) work->weights.back() = 0.75F;
      if (!by_weight) work->index.front() = (work->index.front() + 1) % Layer::kExperts;
    }
    CHECK(backward(expected, false, false));
    CHECK(backward(other, true, true) && other.dx == expected.dx && other.dw == expected.dw);
    other.call.hidden = nullptr;
    CHECK_THROWS(backward(other, true, true), std::invalid_argument);  // nothing to compute them from
  }
}

// Adapters of rank 2 and room for their gradients, with one more value at the end of each.
struct Adapters {
  Adapters(const Layer& layer, float first) {
    const LayerShape& shape = layer.layer.shape();
    const int64_t pre_columns = (shape.gated ? 2 : 1) * shape.intermediate;
    std::mt19937 random(4);
    for (const int64_t width : {shape.hidden, pre_columns, shape.intermediate, shape.hidden}) {
      const int64_t count = shape.experts * 2 * width;
      values.push_back(testing::ToBf16(testing::RandomFloats(count, 0.3F, random)));
      grads.emplace_back(static_cast<size_t>(count), first);
      grads.back().push_back(kAfter);
    }
  }
  void Join(LayerCall& call) {
    call.lora.rank = 2;
    call.lora.gate_up = {values[0].data(), values[1].data()};
    call.lora.down = {values[2].data(), values[3].data()};
    call.lora_grads = {grads[0].data(), grads[1].data(), grads[2].data(), grads[3].data()};
  }
  static constexpr float kAfter = 17.0F;
  std::vector<std::vector<Bf16>> values;
  std::vector<std::vector<float>> grads;
};

TEST(AdaptersGradientsDoNotDependOnWhatWasThere) {
  for (const bool gated : {true, false}) {
    const Layer layer(gated);
    Runner runner;
    Work expected(layer, 20), work(layer, 20);
    Adapters zeros(layer, 0.0F), garbage(layer, 1e9F);
    for (Work* const each : {&expected, &work}) {
      for (int64_t& expert : each->index) expert = expert == 2 ? 0 : expert;  // one without tokens
    }
    zeros.Join(expected.call);
    garbage.Join(work.call);
    runner.pass.Backward(expected.call);
    Job job = JobOf(work, kBackward);
    runner.Run(job);
    CHECK(garbage.grads == zeros.grads && work.dx == expected.dx);
    CHECK(garbage.grads[3].front() != 0 && garbage.grads[3].back() == Adapters::kAfter);
  }
}

TEST(APassThatFailsLeavesNoNumbersAndSignals) {
  const Layer layer;
  Engine engine(2, {}, *KernelsOf(FastestTiers()));
  for (const auto direction : {kForward, kBackward}) {
    Work work(layer, 20);
    Adapters adapters(layer, 0.0F);
    adapters.Join(work.call);
    work.index.back() = 9;
    for (std::vector<float>* const results : {&work.y, &work.dx, &work.dw}) results->push_back(Adapters::kAfter);
    work.call.output = work.y.data();
    work.call.hidden_grad = work.dx.data();
    work.call.weights_grad = work.dw.data();
    float copied = 1;
    auto job = std::make_shared<Job>(JobOf(work, direction));
    if (direction == kForward) job->kept = {{&copied, work.x.data(), sizeof(float)}};
    uint32_t word = 0;
    const auto ticket = engine.Prepare(job);
    engine.SetSignal(*ticket, &word, 5);
    engine.Start(ticket);
    std::string message;
    try {
      ticket->Wait();
    } catch (const std::out_of_range& error) {
      message = error.what();
    }
    CHECK(message == "kt_sft: top_k_index holds 9; valid are 0 to 3, and 4 for no expert");
    CHECK(__atomic_load_n(&word, __ATOMIC_ACQUIRE) == 5);
    CHECK(std::isnan(copied) == (direction == kForward));
    CHECK(IsSpoilt(work.y, Adapters::kAfter) == (direction == kForward));
    CHECK(IsSpoilt(work.dx, Adapters::kAfter) == (direction == kBackward));
    CHECK(IsSpoilt(work.dw, Adapters::kAfter) == (direction == kBackward));
    for (const auto& grads : adapters.grads) CHECK(IsSpoilt(grads, Adapters::kAfter) == (direction == kBackward));
    CHECK(engine.stats().forward.calls == 0 && engine.stats().backward.calls == 0);
  }
}

TEST(CallsWithoutTokensAreFine) {
  const Layer layer;
  Runner runner;
  Work work(layer, 0, 0);
  Job forward = JobOf(work, kForward), backward = JobOf(work, kBackward);
  forward.remembered = Job::Remembered{nullptr, {nullptr, nullptr}, nullptr};
  backward.call.hidden = nullptr;
  backward.retained_routing = Job::RoutingValues{nullptr, nullptr};
  runner.Run(forward);
  runner.Run(backward);
  Spoil(backward);
  CHECK(forward.was_remembered && backward.recomputes);
}

}  // namespace
}  // namespace kt
