#include "moe/ticket.h"

namespace kt {

void Ticket::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return state_ == State::kDone || released_; });
  if (error_) std::rethrow_exception(error_);
}

bool Ticket::WaitFor(std::chrono::milliseconds patience) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!changed_.wait_for(lock, patience, [this] { return state_ == State::kDone || released_; })) return false;
  if (error_) std::rethrow_exception(error_);
  return true;
}

bool Ticket::Cancel(const std::string& message) { return Fail(std::make_exception_ptr(std::runtime_error(message))); }

bool Ticket::done() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return state_ == State::kDone;
}

bool Ticket::started() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return started_;
}

std::pair<Ticket::Clock::time_point, Ticket::Clock::time_point> Ticket::span() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {began_, ended_};
}

Ticket::Clock::time_point Ticket::submitted() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return submitted_;
}

std::exception_ptr Ticket::error() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void Ticket::SetSignal(uint32_t* word, uint32_t value) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (started_) throw std::logic_error("kt_sft: a ticket's signal must be set before the ticket is started");
  signal_ = word;
  signal_value_ = value;
  if (state_ == State::kDone) RaiseSignal();  // cancelled meanwhile
}

void Ticket::Claim() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (claimed_) throw std::logic_error("kt_sft: this ticket was started, or given a starter, before");
  claimed_ = true;
}

bool Ticket::Queue() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (state_ != State::kPrepared) return false;
  state_ = State::kQueued;
  started_ = true;
  submitted_ = Clock::now();
  return true;
}

bool Ticket::Fail(const std::exception_ptr& error) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state_ != State::kPrepared) return false;
    SpoilIfWaitedFor();
    RaiseSignal();
    error_ = error;
    state_ = State::kDone;
    submitted_ = began_ = ended_ = Clock::now();
    work_ = {};
  }
  changed_.notify_all();
  return true;
}

bool Ticket::Begin() {
  const std::lock_guard<std::mutex> lock(mutex_);
  began_ = Clock::now();
  state_ = State::kRunning;
  return !released_;
}

void Ticket::Run() {
  if (!Begin()) return;
  std::exception_ptr error;
  try {
    work_.make_results();
  } catch (...) {
    error = std::current_exception();
    if (work_.spoil) work_.spoil();
  }
  Signal(std::move(error), true);
}

bool Ticket::Recall() {
  if (!Begin()) return true;  // nobody needs it any more
  bool is_recalled = false;
  try {
    is_recalled = work_.recall();
  } catch (...) {  // NOLINT(bugprone-empty-catch): the engine will see
  }
  if (!is_recalled) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (released_ && work_.spoil) work_.spoil();  // a device has gone on meanwhile, and nobody will compute this
    state_ = State::kQueued;
    return false;
  }
  Signal(nullptr, false);
  return true;
}

void Ticket::Signal(std::exception_ptr error, bool in_engine) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    RaiseSignal();
  }
  try {
    if (!error && work_.keep) work_.keep(in_engine);
  } catch (...) {
    error = std::current_exception();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) error_ = std::move(error);
}

void Ticket::Finish() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = Clock::now();
    state_ = State::kDone;
    work_ = {};
  }
  changed_.notify_all();
}

void Ticket::Release(const std::exception_ptr& error) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (signal_ == nullptr || state_ == State::kDone) return;
    // Memory that the engine may write at any moment is left to it.
    if (state_ == State::kQueued) SpoilIfWaitedFor();
    RaiseSignal();
    error_ = error;
    released_ = true;
  }
  changed_.notify_all();
}

void Ticket::RaiseSignal() {
  if (signal_ == nullptr) return;
  // A device, or another process, looks at this word: results must be visible before it. Values count up, and a word
  // may serve one ticket after the other: that of an older one, which was dropped late, must not take it back.
  uint32_t now = __atomic_load_n(signal_, __ATOMIC_RELAXED);
  while (static_cast<int32_t>(signal_value_ - now) > 0 &&
         !__atomic_compare_exchange_n(signal_, &now, signal_value_, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
  }
  signal_ = nullptr;
}

void Ticket::SpoilIfWaitedFor() const {
  if (signal_ != nullptr && work_.spoil) work_.spoil();
}

}  // namespace kt
