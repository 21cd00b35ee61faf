#include "moe/engine.h"

#include <algorithm>
#include <chrono>

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

void Ticket::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [this] { return done_; });
  if (error_) std::rethrow_exception(error_);
}

bool Ticket::done() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

void Ticket::Finish(std::exception_ptr error) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    error_ = std::move(error);
    done_ = true;
  }
  finished_.notify_all();
}

Engine::Engine(int threads, const std::vector<int>& cpus, Tier limit)
    : kernels_(*BestKernels(limit)),
      pool_(std::max(1, threads), cpus),
      pass_(kernels_, pool_),
      blocks_(std::make_shared<BlockPool>()),
      thread_([this] { Loop(); }) {}

Engine::~Engine() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Engine::Loop() {
  pool_.PinCaller();
  for (;;) {
    Job job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    std::exception_ptr error;
    try {
      job.work();
    } catch (...) {
      error = std::current_exception();
    }
    job.ticket->Finish(std::move(error));
  }
}

std::shared_ptr<Ticket> Engine::Submit(std::function<void()> work) {
  auto ticket = std::make_shared<Ticket>();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back({std::move(work), ticket});
  }
  wake_.notify_one();
  return ticket;
}

std::shared_ptr<Ticket> Engine::SubmitForward(const LayerCall& call) {
  return Submit([this, call] {
    const Clock::time_point start = Clock::now();
    pass_.Forward(call);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++stats_.forward_calls;
    stats_.forward_tokens += call.tokens;
    stats_.forward_seconds += SecondsSince(start);
    stats_.scratch_bytes = static_cast<int64_t>(pass_.scratch_bytes());
  });
}

std::shared_ptr<Ticket> Engine::SubmitBackward(const LayerCall& call) {
  return Submit([this, call] {
    const Clock::time_point start = Clock::now();
    pass_.Backward(call);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++stats_.backward_calls;
    stats_.backward_tokens += call.tokens;
    stats_.backward_seconds += SecondsSince(start);
    stats_.scratch_bytes = static_cast<int64_t>(pass_.scratch_bytes());
  });
}

EngineStats Engine::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  EngineStats stats = stats_;
  stats.kept_bytes = static_cast<int64_t>(blocks_->kept_bytes());
  return stats;
}

MachinePeak Engine::Peak() {
  std::call_once(peak_measured_, [this] { Submit([this] { peak_ = MeasurePeak(); })->Wait(); });
  return peak_;
}

MachinePeak Engine::MeasurePeak() {
  MachinePeak peak;
  constexpr int kTrials = 5;
  constexpr int64_t kSteps = 200000, kPieces = 64;
  for (int trial = 0; trial < kTrials; ++trial) {
    const Clock::time_point start = Clock::now();
    const double flops = kernels_.register_products(kSteps);
    peak.product_flops = std::max(peak.product_flops, flops / SecondsSince(start));
  }
  // Several times the last-level caches that one process may count on.
  const Block block(size_t{256} << 20);
  const int64_t piece = static_cast<int64_t>(block.size()) / kPieces;
  pool_.Run(kPieces, [&](int64_t p, int) { std::fill_n(block.data() + p * piece, piece, uint8_t{1}); });
  std::vector<float> sums(static_cast<size_t>(kPieces));
  for (int trial = 0; trial < kTrials; ++trial) {
    const Clock::time_point start = Clock::now();
    pool_.Run(kPieces, [&](int64_t p, int) {
      sums[static_cast<size_t>(p)] =
          kernels_.read_sum(reinterpret_cast<const float*>(block.data() + p * piece), piece / 4);
    });
    peak.read_bandwidth = std::max(peak.read_bandwidth, static_cast<double>(block.size()) / SecondsSince(start));
  }
  return peak;
}

}  // namespace kt
