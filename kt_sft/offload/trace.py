"""A Chrome trace of some steps: torch's own profile of host and accelerator, with lanes of the expert engine added."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kt_sft.offload.metrics import LayerPasses

#: The process of our lanes in the trace; the viewer lists processes by number, host processes have larger ones.
_PROCESS = 1
_ENGINE, _WAITING = 1, 2
_CLOCK = "kt_sft clock"


class Trace:
    """Records from `start` to `stop`.

    Args:
        path: Where to write it, as JSON.

    Raises:
        OSError: Nothing can be written there.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()  # so that what cannot be written is known before the work, not after it
        self._events: list[dict[str, Any]] = []
        self._profile: torch.profiler.profile | None = None
        self._clock = 0.0

    @property
    def is_recording(self) -> bool:
        """Between `start` and `stop`."""
        return self._profile is not None

    def start(self) -> None:
        """Begins to record."""
        self._profile = torch.profiler.profile(
            activities=torch.profiler.supported_activities(), experimental_config=_all_threads()
        )
        self._profile.start()
        with torch.profiler.record_function(_CLOCK):
            self._clock = time.monotonic()

    def add(self, passed: Sequence[LayerPasses]) -> None:
        """Adds passes of the engine that ended while recording."""
        for name, passes in passed:
            for each in passes:
                label = f"{name} {'backward' if each.is_backward else 'forward'}"
                facts = {"tokens": each.tokens, "GFLOP/s": each.flops / max(each.seconds, 1e-9) / 1e9}
                self._events.append(self._span(_ENGINE, label, each.started, each.finished, facts))
                self._events.append(self._span(_WAITING, label, each.awaited, each.returned, {}))

    def _span(self, lane: int, name: str, begin: float, end: float, facts: dict[str, Any]) -> dict[str, Any]:
        times = {"ts": (begin - self._clock) * 1e6, "dur": (end - begin) * 1e6}
        return {"ph": "X", "cat": "kt_sft", "pid": _PROCESS, "tid": lane, "name": name, "args": facts} | times

    def stop(self) -> None:
        """Ends recording and writes the trace."""
        assert self._profile is not None
        self._profile.stop()
        with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
            file = Path(folder, "torch.json")
            self._profile.export_chrome_trace(str(file))
            trace = json.loads(file.read_text(encoding="utf-8"))
            clock = next(event for event in trace["traceEvents"] if event.get("name") == _CLOCK)
            zero = clock["ts"] + clock["dur"] / 2  # when our clock was read, in the trace's time
            for event in self._events:
                event["ts"] += zero
            trace["traceEvents"] += self._lanes() + self._events
            file.write_text(json.dumps(trace), encoding="utf-8")
            os.replace(file, self._path)
        self._profile = None

    @staticmethod
    def _lanes() -> list[dict[str, Any]]:
        def named(what: str, lane: int, name: str) -> dict[str, Any]:
            return {"ph": "M", "pid": _PROCESS, "tid": lane, "name": what, "args": {"name": name}}

        return [
            named("process_name", 0, "kt_sft"),
            named("thread_name", _ENGINE, "CPU engine"),
            named("thread_name", _WAITING, "waiting for the engine"),
            {"ph": "M", "pid": _PROCESS, "tid": 0, "name": "process_sort_index", "args": {"sort_index": -1}},
        ]


def _all_threads() -> Any:
    """What has torch profile all threads: interleaved micro-batches have some of their own."""
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError:  # an older torch, whose profile then lacks their forward
        return None
