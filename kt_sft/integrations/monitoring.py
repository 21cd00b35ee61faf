"""Where kt_sft attaches to transformers' Trainer to log what its engine does.

The Trainer makes a callback of each class in `DEFAULT_CALLBACKS`, before those of W&B, TensorBoard and others. So what
ours adds to the logs of a step is in what they report, in the Trainer's own log and in what it prints.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kt_sft.offload.metrics import StepMetrics
    from kt_sft.offload.trace import Trace

logger = logging.getLogger("kt_sft")

_PREFIX = "kt_sft/"

#: A profile covers so many steps, and leaves out so many before them: in the first ones memory is still being taken.
_PROFILED, _SKIPPED = 2, 1


def extend_callbacks(module: ModuleType) -> None:
    """Adds our callback to those of every Trainer; in one without experts in the engine it does nothing.

    Args:
        module: `transformers.trainer`.
    """
    base: Any = module.TrainerCallback

    class EngineCallback(base):
        """Logs what the expert engine does."""

        _metrics: StepMetrics | None = None
        _trace: Trace | None = None
        _logs = False
        _steps = _first_profiled = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            experts = _experts_of(model)
            if not experts:
                return
            from kt_sft.offload.metrics import StepMetrics
            from kt_sft.offload.trace import Trace

            config = experts[0].config
            self._logs = config.metrics != "off"
            if config.profile and state.is_world_process_zero:
                self._trace = Trace(config.profile)
                self._first_profiled = min(_SKIPPED, max(0, state.max_steps - state.global_step - 1))
            if self._logs or self._trace is not None:
                self._metrics = StepMetrics(model, per_layer=config.metrics == "layers")
            self._steps = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self._metrics is None:
                return
            if self._steps == 0:
                self._metrics.begin()
            if self._trace is not None and self._steps == self._first_profiled:
                self._trace.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self._metrics is None:
                return
            passed = self._metrics.end_step()
            self._steps += 1
            if self._trace is None:
                return
            if self._trace.is_recording:
                self._trace.add(passed)
            if self._steps == self._first_profiled + _PROFILED:
                self._finish_trace()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if self._metrics is None or not self._logs or not logs or "loss" not in logs:
                return
            figures = self._metrics.take()
            if not figures:
                return
            named = {_PREFIX + key: value for key, value in figures.items()}
            logs.update(named)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(named)
            if state.is_world_process_zero:
                from kt_sft.offload.metrics import summary

                logger.info("step %d: %s", state.global_step, summary(figures))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._finish_trace()
            if self._metrics is not None:
                self._metrics.close()
            self._metrics = None

        def _finish_trace(self) -> None:
            trace, self._trace = self._trace, None
            if trace is not None and trace.is_recording:
                trace.stop()
                logger.info("profile written; open it in https://ui.perfetto.dev")

    EngineCallback.__qualname__ = "EngineCallback"
    module.DEFAULT_CALLBACKS.append(EngineCallback)


def _experts_of(model: Any) -> list[Any]:
    """Without importing our engine into a process that has no use for it."""
    experts = sys.modules.get("kt_sft.experts")
    return [] if experts is None else [part for part in model.modules() if isinstance(part, experts.CpuExperts)]
