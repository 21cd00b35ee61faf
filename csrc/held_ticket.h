// What Python holds of the engine: tickets, and the engine itself, both harmless in a forked child and after a stall.
#pragma once

#include <pybind11/pybind11.h>

#include <unistd.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <utility>

#include "moe/engine.h"

namespace kt {

// A ticket together with the Python objects whose memory the work uses: they go only after the work is done, and never
// where the engine has stopped, as it may go on some day. The engine must outlive it.
class HeldTicket {
 public:
  HeldTicket(const Engine& engine, std::shared_ptr<Ticket> ticket, pybind11::object held)
      : engine_(engine), ticket_(std::move(ticket)), held_(std::move(held)) {}
  ~HeldTicket() {  // NOLINT(bugprone-exception-escape): releasing the GIL does not throw while Python runs
    if (getpid() != creator_) return;  // a forked child: the engine's threads are not here
    try {
      const pybind11::gil_scoped_release release;
      if (!engine_.stalled()) engine_.Wait(*ticket_);
    } catch (...) {  // NOLINT(bugprone-empty-catch): nobody asked for the result
    }
    if (!ticket_->done()) held_.release();
  }
  HeldTicket(const HeldTicket&) = delete;
  HeldTicket& operator=(const HeldTicket&) = delete;

  // Signals are looked at meanwhile, so that Ctrl-C ends a wait for an engine that hangs.
  void Wait(double interval, int looks) {
    if (getpid() != creator_) {
      throw std::runtime_error(
          "kt_sft: a forked child has none of the threads that work on this; submit it there, or fork before");
    }
    const pybind11::gil_scoped_release release;
    engine_.Wait(*ticket_,
                 [] {
                   const pybind11::gil_scoped_acquire acquire;
                   if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
                 },
                 {std::chrono::milliseconds(static_cast<int64_t>(interval * 1000)), looks});
  }
  bool done() const { return ticket_->done(); }
  std::pair<double, double> Span() const {
    const auto [started, finished] = ticket_->span();
    const auto seconds = [](Ticket::Clock::time_point time) {
      return std::chrono::duration<double>(time.time_since_epoch()).count();
    };
    return {seconds(started), seconds(finished)};
  }

 private:
  const Engine& engine_;
  std::shared_ptr<Ticket> ticket_;
  pybind11::object held_;
  pid_t creator_ = getpid();
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
