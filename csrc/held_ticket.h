// What Python holds of the engine: tickets, and the engine itself, both harmless in a forked child and after a stall.
#pragma once

#include <pybind11/pybind11.h>

#include <unistd.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "moe/engine.h"

namespace kt {

// A job's ticket together with the Python objects whose memory the work uses: they go only when nothing will use them
// any more, and never where the engine has stopped with them, as it may go on some day. The engine must outlive it.
class HeldTicket {
 public:
  HeldTicket(Engine& engine, std::shared_ptr<Job> job, pybind11::object held)
      : engine_(engine), job_(std::move(job)), ticket_(engine.Prepare(job_)), held_(std::move(held)) {}
  ~HeldTicket() {  // NOLINT(bugprone-exception-escape): releasing the GIL does not throw while Python runs
    if (getpid() != creator_) return;  // a forked child: the engine's threads are not here
    try {
      const pybind11::gil_scoped_release release;
      // A starter of it that is called later does nothing.
      const bool is_cancelled = ticket_->Cancel("kt_sft: the ticket was dropped before it was started");
      if (!is_cancelled && !engine_.stalled()) engine_.Wait(*ticket_);
    } catch (...) {  // NOLINT(bugprone-empty-catch): nobody asked for the result
    }
    if (!ticket_->done()) held_.release();
  }
  HeldTicket(const HeldTicket&) = delete;
  HeldTicket& operator=(const HeldTicket&) = delete;

  void Start() {
    CheckProcess();
    const pybind11::gil_scoped_release release;
    engine_.Start(ticket_);
  }
  // Addresses of a C function and of its argument.
  std::pair<uintptr_t, uintptr_t> Starter() {
    CheckProcess();
    const auto [function, argument] = engine_.Starter(ticket_);
    return {reinterpret_cast<uintptr_t>(function), reinterpret_cast<uintptr_t>(argument)};
  }
  void SetSignal(uintptr_t word, uint32_t value) {
    CheckProcess();
    if (word == 0 || word % alignof(uint32_t) != 0)
      throw std::invalid_argument("kt_sft engine: a signal needs the address of an aligned word");
    engine_.SetSignal(*ticket_, reinterpret_cast<uint32_t*>(word), value);
  }
  void Cancel(const std::string& message) {
    CheckProcess();
    const pybind11::gil_scoped_release release;
    ticket_->Cancel(message);
  }
  // After each interval signals are looked at, so that Ctrl-C ends a wait for an engine that hangs, and `look` is
  // called, if it is not None.
  void Wait(const pybind11::object& look) {
    CheckProcess();
    const pybind11::gil_scoped_release release;
    engine_.Wait(*ticket_, [&look] {
      const pybind11::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
      if (!look.is_none()) look();
    });
  }
  bool done() const { return ticket_->done(); }
  bool remembered() const { return done() && job_->was_remembered; }
  bool recomputed() const { return done() && job_->recomputes; }
  std::pair<double, double> Span() const {
    const auto [started, finished] = ticket_->span();
    return {Seconds(started), Seconds(finished)};
  }
  double submitted() const { return Seconds(ticket_->submitted()); }
  const std::shared_ptr<Ticket>& completion() const { return ticket_; }

 private:
  static double Seconds(Ticket::Clock::time_point time) {
    return std::chrono::duration<double>(time.time_since_epoch()).count();
  }
  void CheckProcess() const {
    if (getpid() == creator_) return;
    throw std::runtime_error(
        "kt_sft: a forked child has none of the threads that work on this; submit it there, or fork before");
  }

  Engine& engine_;
  const std::shared_ptr<Job> job_;
  const std::shared_ptr<Ticket> ticket_;
  pybind11::object held_;
  const pid_t creator_ = getpid();
};

// Leaves an engine alone in a forked child, where its threads do not exist and its locks may never be released, and one
// that has stopped, whose threads would be waited for for ever.
struct EngineDeleter {
  pid_t creator = getpid();
  void operator()(Engine* engine) const {
    if (getpid() == creator && !engine->stalled()) delete engine;
  }
};
using EngineHolder = std::unique_ptr<Engine, EngineDeleter>;

}  // namespace kt
