#include "moe/engine.h"

#include <algorithm>
#include <ctime>
#include <deque>
#include <stdexcept>

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

std::exception_ptr StalledError() {
  return std::make_exception_ptr(EngineStalledError(
      "kt_sft: the expert engine stands still: a thread of it may have died, or what mapped experts are read from "
      "hangs; end this process and start again from the last checkpoint"));
}

}  // namespace

struct Engine::Queue {
  struct Entry {
    uint64_t number;  // in the order of the starts
    std::shared_ptr<Ticket> ticket;
    bool may_be_recalled;
  };

  std::mutex mutex;
  std::condition_variable wake;
  std::deque<Entry> entries;  // by number
  uint64_t started = 0;
  std::shared_ptr<Ticket> running;
  Entry recalling = {};        // by the recaller; without a ticket: none
  bool stopping = false;       // takes no more tickets; `engine` may be gone
  std::atomic<int> calls{0};   // entries, and the call to stop
  const Engine* const engine;  // to ask whether it stands still

  explicit Queue(const Engine* engine) : engine(engine) {}
  // These under the lock.
  bool IsEmpty() const { return entries.empty() && recalling.ticket == nullptr; }
  bool MayRun() const {
    return !entries.empty() && (recalling.ticket == nullptr || entries.front().number < recalling.number);
  }
  // While nothing runs the engine recalls by itself, with all its threads.
  std::deque<Entry>::iterator ToRecall() {
    if (running == nullptr) return entries.end();
    return std::find_if(entries.begin(), entries.end(), [](const Entry& entry) { return entry.may_be_recalled; });
  }

  bool IsPending() {
    const std::lock_guard<std::mutex> lock(mutex);
    return running != nullptr || !IsEmpty();
  }
};

struct Engine::StarterArgument {
  std::shared_ptr<Queue> queue;
  std::shared_ptr<Ticket> ticket;
};

Engine::Engine(int threads, const std::vector<std::vector<int>>& node_cpus, const TierKernels& kernels,
               std::chrono::microseconds spin)
    : kernels_(kernels),
      pool_(std::max(1, threads), node_cpus, spin),
      pass_(kernels_, pool_),
      blocks_(std::make_shared<BlockPool>()),
      queue_(std::make_shared<Queue>(this)),
      thread_([this] { Loop(); }) {}

Engine::~Engine() {
  {
    const std::lock_guard<std::mutex> lock(queue_->mutex);
    queue_->stopping = true;
    queue_->calls.fetch_add(1);
  }
  queue_->wake.notify_all();
  thread_.join();
  if (recaller_.joinable()) recaller_.join();
  {
    const std::lock_guard<std::mutex> lock(watch_mutex_);
    watch_ends_ = true;
  }
  watch_wake_.notify_all();
  if (watch_.joinable()) watch_.join();
}

void Engine::Loop() {
  Queue& queue = *queue_;
  pool_.PlaceCaller();
  for (;;) {
    // The next layer's call often follows within the time that waking up would take.
    pool_.SpinUntil([&queue] { return queue.calls.load(std::memory_order_relaxed) > 0; });
    std::shared_ptr<Ticket> ticket;
    {
      std::unique_lock<std::mutex> lock(queue.mutex);
      queue.wake.wait(lock, [&queue] { return queue.MayRun() || (queue.stopping && queue.IsEmpty()); });
      if (queue.entries.empty()) return;
      ticket = queue.running = std::move(queue.entries.front().ticket);
      queue.entries.pop_front();
      queue.calls.fetch_sub(1);
    }
    queue.wake.notify_all();  // what is left may be recalled meanwhile
    turns_.fetch_add(1);
    ticket->Run();
    {
      const std::lock_guard<std::mutex> lock(queue.mutex);
      queue.running = nullptr;
    }
    turns_.fetch_add(1);  // before it is done: whoever waited must not see an engine that stands still
    ticket->Finish();
  }
}

void Engine::RecallLoop() {
  Queue& queue = *queue_;
  std::unique_lock<std::mutex> lock(queue.mutex);
  for (;;) {
    queue.wake.wait(
        lock, [&queue] { return queue.ToRecall() != queue.entries.end() || (queue.stopping && queue.IsEmpty()); });
    const auto entry = queue.ToRecall();
    if (entry == queue.entries.end()) return;
    queue.recalling = *entry;
    queue.entries.erase(entry);
    queue.calls.fetch_sub(1);
    lock.unlock();
    const std::shared_ptr<Ticket> ticket = queue.recalling.ticket;
    const bool is_recalled = ticket->Recall();
    turns_.fetch_add(1);
    if (is_recalled) ticket->Finish();  // before what was started later may run
    lock.lock();
    if (!is_recalled) {
      queue.recalling.may_be_recalled = false;
      const auto place = std::find_if(queue.entries.begin(), queue.entries.end(), [&queue](const Queue::Entry& other) {
        return other.number > queue.recalling.number;
      });
      queue.entries.insert(place, queue.recalling);
      queue.calls.fetch_add(1);
    }
    queue.recalling = {};
    lock.unlock();
    queue.wake.notify_all();
    lock.lock();
  }
}

std::exception_ptr Engine::Enqueue(Queue& queue, const std::shared_ptr<Ticket>& ticket) noexcept {
  try {
    {
      const std::lock_guard<std::mutex> lock(queue.mutex);
      if (queue.stopping) throw std::runtime_error("kt_sft: the expert engine has ended");
      queue.engine->CheckRunning();
      queue.entries.push_back({++queue.started, ticket, ticket->may_be_recalled()});
      if (!ticket->Queue()) {
        queue.entries.pop_back();
        return ticket->error();
      }
      queue.calls.fetch_add(1);
    }
    queue.wake.notify_all();
    return nullptr;
  } catch (...) {
    ticket->Fail(std::current_exception());
    return ticket->error();
  }
}

void Engine::Start(const std::shared_ptr<Ticket>& ticket) {
  ticket->Claim();
  if (const std::exception_ptr error = Enqueue(*queue_, ticket)) std::rethrow_exception(error);
}

std::pair<Engine::Function, void*> Engine::Starter(const std::shared_ptr<Ticket>& ticket) {
  auto argument = std::make_unique<StarterArgument>(StarterArgument{queue_, ticket});
  ticket->Claim();
  const Function start = [](void* given) {
    const std::unique_ptr<StarterArgument> taken(static_cast<StarterArgument*>(given));
    Enqueue(*taken->queue, taken->ticket);
  };
  return {start, argument.release()};
}

void Engine::SetSignal(Ticket& ticket, uint32_t* word, uint32_t value) {
  {
    const std::lock_guard<std::mutex> lock(watch_mutex_);
    if (!watch_.joinable()) watch_ = std::thread([this] { Watch(); });
  }
  ticket.SetSignal(word, value);
}

uint64_t Engine::Progress() const { return turns_.load() * 0x9E3779B97F4A7C15U + pool_.Progress(); }

bool Engine::stalled() const { return found_stalled_.load() && stalled_at_.load() == Progress(); }

void Engine::CheckRunning() const {
  if (stalled()) std::rethrow_exception(StalledError());
}

Engine::Patience Engine::patience() const {
  const std::lock_guard<std::mutex> lock(watch_mutex_);
  return patience_;
}

void Engine::SetPatience(const Patience& patience) {
  if (patience.interval.count() < 1 || patience.looks < 1)
    throw std::invalid_argument("kt_sft engine: patience needs an interval of at least 1 ms, and a look");
  {
    const std::lock_guard<std::mutex> lock(watch_mutex_);
    patience_ = patience;
  }
  watch_wake_.notify_all();
}

void Engine::Look(Looks& looks, bool pending) {
  const uint64_t progress = Progress();
  const bool idles = pending && looks.pending && progress == looks.progress;
  looks = {pending, progress, idles ? looks.idle + 1 : 0};
  if (looks.idle >= patience().looks) FindStalled(progress);
}

void Engine::FindStalled(uint64_t progress) {
  stalled_at_.store(progress);
  found_stalled_.store(true);
  std::vector<std::shared_ptr<Ticket>> pending;
  {
    const std::lock_guard<std::mutex> lock(queue_->mutex);
    if (!stalled()) return;  // it has gone on
    for (const Queue::Entry& entry : queue_->entries) pending.push_back(entry.ticket);
    for (const auto& ticket : {queue_->running, queue_->recalling.ticket}) {
      if (ticket != nullptr) pending.push_back(ticket);
    }
  }
  for (const auto& ticket : pending) ticket->Release(StalledError());
}

void Engine::Watch() {
  std::unique_lock<std::mutex> lock(watch_mutex_);
  for (Looks looks; !watch_ends_;) {
    const std::chrono::milliseconds interval = patience_.interval;
    if (watch_wake_.wait_for(lock, interval, [&] { return watch_ends_ || patience_.interval != interval; })) {
      looks = {};
      continue;
    }
    lock.unlock();
    Look(looks, queue_->IsPending());
    lock.lock();
  }
}

void Engine::Wait(Ticket& ticket, const std::function<void()>& on_look) {
  Looks looks;
  for (Look(looks, ticket.started()); !ticket.WaitFor(patience().interval); Look(looks, ticket.started())) {
    on_look();
    CheckRunning();
  }
}

void Engine::Wait(Ticket& ticket) {
  Wait(ticket, [] {});
}

std::shared_ptr<Ticket> Engine::Prepare(std::function<void()> work) {
  return std::make_shared<Ticket>(Ticket::Work{std::move(work), {}, {}, {}});
}

std::shared_ptr<Ticket> Engine::Prepare(const std::shared_ptr<Job>& job) {
  Ticket::Work work;
  work.make_results = [this, job] { RunJob(*job); };
  work.keep = [this, job](bool in_engine) { Keep(*job, in_engine ? &pool_ : nullptr); };
  work.spoil = [job] { Spoil(*job); };
  if (job->remembered) {
    std::call_once(recalls_, [this] { recaller_ = std::thread([this] { RecallLoop(); }); });
    work.recall = [job] { return Recall(*job, nullptr); };
  }
  return std::make_shared<Ticket>(std::move(work));
}

std::shared_ptr<Ticket> Engine::Submit(std::function<void()> work) {
  auto ticket = Prepare(std::move(work));
  Start(ticket);
  return ticket;
}

std::shared_ptr<Ticket> Engine::SubmitForward(const LayerCall& call) {
  return SubmitPass(Job::Direction::kForward, call);
}

std::shared_ptr<Ticket> Engine::SubmitBackward(const LayerCall& call) {
  return SubmitPass(Job::Direction::kBackward, call);
}

std::shared_ptr<Ticket> Engine::SubmitPass(Job::Direction direction, const LayerCall& call) {
  const auto job = std::make_shared<Job>();
  job->direction = direction;
  job->call = call;
  auto ticket = Prepare(job);
  Start(ticket);
  return ticket;
}

void Engine::RunJob(Job& job) {
  const Clock::time_point start = Clock::now();
  MakeResults(job, pass_, pool_);
  if (job.was_remembered) return;
  const std::lock_guard<std::mutex> lock(stats_mutex_);
  PassStats& stats = job.direction == Job::Direction::kForward ? stats_.forward : stats_.backward;
  ++stats.calls;
  stats.tokens += job.call.tokens;
  stats.seconds += SecondsSince(start);
  stats_.scratch_bytes = static_cast<int64_t>(pass_.scratch_bytes());
}

EngineStats Engine::stats() const {
  const std::lock_guard<std::mutex> lock(stats_mutex_);
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
