#include "moe/engine.h"

#include <algorithm>
#include <ctime>

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Time that this thread ran: unlike a clock it stands still while somebody else has the CPU.
double ThreadSeconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace

void Ticket::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [this] { return done_; });
  if (error_) std::rethrow_exception(error_);
}

bool Ticket::WaitFor(std::chrono::milliseconds patience) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!finished_.wait_for(lock, patience, [this] { return done_; })) return false;
  if (error_) std::rethrow_exception(error_);
  return true;
}

bool Ticket::done() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

std::pair<Clock::time_point, Clock::time_point> Ticket::span() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {started_, finished_at_};
}

void Ticket::Finish(Clock::time_point started, std::exception_ptr error) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    started_ = started;
    finished_at_ = Clock::now();
    error_ = std::move(error);
    done_ = true;
  }
  finished_.notify_all();
}

Engine::Engine(int threads, const std::vector<std::vector<int>>& node_cpus, const TierKernels& kernels,
               std::chrono::microseconds spin)
    : kernels_(kernels),
      pool_(std::max(1, threads), node_cpus, spin),
      pass_(kernels_, pool_),
      blocks_(std::make_shared<BlockPool>()),
      thread_([this] { Loop(); }) {}

Engine::~Engine() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    calls_.fetch_add(1);
  }
  wake_.notify_all();
  thread_.join();
}

void Engine::Loop() {
  pool_.PlaceCaller();
  for (;;) {
    // The next layer's call often follows within the time that waking up would take.
    pool_.SpinUntil([this] { return calls_.load(std::memory_order_relaxed) > 0; });
    Job job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
      calls_.fetch_sub(1);
    }
    turns_.fetch_add(1);
    const Clock::time_point started = Clock::now();
    std::exception_ptr error;
    try {
      job.work();
    } catch (...) {
      error = std::current_exception();
    }
    turns_.fetch_add(1);
    job.ticket->Finish(started, std::move(error));
  }
}

uint64_t Engine::Progress() const { return turns_.load() * 0x9E3779B97F4A7C15U + pool_.Progress(); }

bool Engine::stalled() const { return found_stalled_.load() && stalled_at_.load() == Progress(); }

void Engine::CheckRunning() const {
  if (!stalled()) return;
  throw EngineStalledError(
      "kt_sft: the expert engine stands still: a thread of it may have died, or what mapped experts are read from "
      "hangs; "
      "end this process and start again from the last checkpoint");
}

void Engine::Wait(Ticket& ticket, const std::function<void()>& on_look, const Patience& patience) const {
  uint64_t progress = Progress();
  for (int idle = 0; !ticket.WaitFor(patience.interval);) {
    on_look();
    CheckRunning();
    const uint64_t now = Progress();
    idle = now == progress ? idle + 1 : 0;
    progress = now;
    if (idle < patience.looks) continue;
    stalled_at_.store(now);
    found_stalled_.store(true);
  }
}

void Engine::Wait(Ticket& ticket) const {
  Wait(ticket, [] {}, Patience());
}

std::shared_ptr<Ticket> Engine::Submit(std::function<void()> work) {
  CheckRunning();
  auto ticket = std::make_shared<Ticket>();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back({std::move(work), ticket});
    calls_.fetch_add(1);
  }
  wake_.notify_one();
  return ticket;
}

std::shared_ptr<Ticket> Engine::SubmitForward(const LayerCall& call) {
  return SubmitPass(&Pass::Forward, call, &stats_.forward);
}

std::shared_ptr<Ticket> Engine::SubmitBackward(const LayerCall& call) {
  return SubmitPass(&Pass::Backward, call, &stats_.backward);
}

std::shared_ptr<Ticket> Engine::SubmitPass(void (Pass::*pass)(const LayerCall&), const LayerCall& call,
                                           PassStats* stats) {
  return Submit([this, pass, call, stats] {
    const Clock::time_point start = Clock::now();
    (pass_.*pass)(call);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++stats->calls;
    stats->tokens += call.tokens;
    stats->seconds += SecondsSince(start);
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
  constexpr int kTrials = 9;
  constexpr int64_t kSteps = 50000, kPiece = int64_t{4} << 20;
  const auto rate = [&](double (*products)(int64_t)) {
    std::vector<double> rates;
    std::vector<double> of_thread(static_cast<size_t>(pool_.threads()));
    for (int trial = 0; trial < kTrials; ++trial) {
      // All at once, as they would work: a CPU clocks lower when all its cores multiply.
      pool_.Run(pool_.threads(), [&](int64_t thread, int) {
        const double start = ThreadSeconds();
        const double flops = products(kSteps);
        of_thread[static_cast<size_t>(thread)] = flops / (ThreadSeconds() - start);
      });
      rates.insert(rates.end(), of_thread.begin(), of_thread.end());
    }
    return Median(std::move(rates));
  };
  // Products first: reading memory lets a CPU clock up again that multiplying has brought down.
  const double products = rate(kernels_.register_products), int8_products = rate(kernels_.register_int8_products);
  // More than the last-level caches hold: up to 16 MiB for each core, and some CPUs have plenty for few cores.
  const int64_t pieces = std::clamp<int64_t>(4 * pool_.threads(), 64, 256);
  const Block block(static_cast<size_t>(pieces * kPiece));
  pool_.Run(pieces, [&](int64_t p, int) { std::fill_n(block.data() + p * kPiece, kPiece, uint8_t{1}); });
  std::vector<float> sums(static_cast<size_t>(pieces));
  std::vector<double> bandwidths;
  for (int trial = 0; trial < kTrials; ++trial) {
    const Clock::time_point start = Clock::now();
    pool_.Run(pieces, [&](int64_t p, int) {
      sums[static_cast<size_t>(p)] =
          kernels_.read_sum(reinterpret_cast<const float*>(block.data() + p * kPiece), kPiece / 4);
    });
    bandwidths.push_back(static_cast<double>(block.size()) / SecondsSince(start));
  }
  return {products, int8_products, Median(std::move(bandwidths))};
}

}  // namespace kt
