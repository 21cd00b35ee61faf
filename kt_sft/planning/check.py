"""The check that training makes before it loads weights: whether what it certainly needs of host memory is there.

Certain are the weights, adapters with their gradients, and the optimizer's state; too little memory for these is an
error. Activations are predicted: where they leave experts no room, these stay in the checkpoint's files if they may;
otherwise there is a warning.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel

from kt_sft.config import local_rank_and_size
from kt_sft.loading.errors import NotEnoughMemoryError
from kt_sft.loading.mapping import ModulePlan
from kt_sft.loading.memory import readable
from kt_sft.planning.activations import Cost, step_cost
from kt_sft.planning.machine import this_machine
from kt_sft.planning.memory import Memory, breakdown, memory_of
from kt_sft.planning.model import ModelFacts, facts_of, text_config
from kt_sft.planning.plan import Plan, stays_in_files
from kt_sft.planning.setup import TrainingSetup
from kt_sft.planning.suggestion import suggest

logger = logging.getLogger("kt_sft")

Found = TypeVar("Found")
#: Raises NotEnoughMemoryError where there is no room for so many bytes.
Require = Callable[[int], None]

#: Bytes of activations for a token that no usual model exceeds: values of each hidden column of a layer where nothing
#: is checkpointed, and of each word of the vocabulary. Only where these would not fit is a step followed closely.
_LAYER_BYTES, _WORD_BYTES = 200, 24
_NAMES = {
    "experts_bytes": "experts",
    "dense_bytes": "other weights",
    "lora_bytes": "adapters",
    "optimizer_bytes": "optimizer",
    "activation_bytes": "activations (predicted)",
    "buffer_bytes": "buffers (predicted)",
}


class TrainingCheck:
    """Of a training run, before its model is known.

    Args:
        setup: Of the run.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup

    def of(
        self,
        model: PreTrainedModel,
        plans: Sequence[ModulePlan],
        storages: Mapping[str, Mapping[str, Any]],
        shared: bool,
    ) -> ModelCheck | None:
        """The check of a model that is about to be loaded; None, which the log explains, where it cannot be made.

        Args:
            model: On the meta device, with its experts.
            plans: What is to be loaded.
            storages: How the experts will be stored.
            shared: Whether the processes of this machine hold resident experts once.
        """
        return _tried(
            "memory is not checked before training",
            lambda: ModelCheck(self.setup, facts_of(model, plans, storages, self.setup), shared),
        )


class ModelCheck:
    """What a training run takes beside its weights. What cannot be predicted is said, and never ends a run.

    Args:
        setup: Of the run.
        facts: Of its model.
        shared: Whether the processes of this machine hold resident experts once.
    """

    def __init__(self, setup: TrainingSetup, facts: ModelFacts, shared: bool = True) -> None:
        self.setup, self.facts, self._shared = setup, facts, shared
        self._machine = this_machine(setup.settings.num_threads)
        host = self._memory(Cost(), is_mapped=False).host
        #: Of host memory, in each process: adapters, their gradients and copies, and the optimizer's state.
        self.certain_bytes = host.lora + host.optimizer

    def require_predicted(self, require: Require, *, is_mapped: bool) -> None:
        """Checks that host memory has room for what is only predicted, activations above all.

        Args:
            require: Raises NotEnoughMemoryError where each process cannot take so many bytes beside what is certain.
            is_mapped: Whether the experts stay in the checkpoint's files.

        Raises:
            NotEnoughMemoryError: As `require`.
        """
        if self._bound is not None:
            with contextlib.suppress(NotEnoughMemoryError):  # the bound may be more than is needed
                require(_beside(self._memory(self._bound, is_mapped=is_mapped)))
                return
        require(_beside(self._memory(self._cost, is_mapped=is_mapped)))

    def refusal(self, error: NotEnoughMemoryError) -> NotEnoughMemoryError:
        """The error that says what is needed for what, and what to set instead."""
        return _tried("what to set instead is not known", lambda: self._refusal(error)) or error

    def _refusal(self, error: NotEnoughMemoryError) -> NotEnoughMemoryError:
        cost = self._cost
        resident = self._memory(cost, is_mapped=False)
        is_mapped = stays_in_files(self.facts, self.setup, resident, self._machine)
        memory = self._memory(cost, is_mapped=is_mapped)
        parts = [f"{name} {readable(size)}" for key, name in _NAMES.items() if (size := breakdown(memory)[key])]
        plan = Plan(self.setup, self._machine, memory, cost, None, self.facts.formats, ())
        advice = suggest(plan, self.facts)
        changes = ", ".join(f"{key}: {value}" for key, value in advice["changes"].items())
        return NotEnoughMemoryError(
            f"{error}. Training takes {', '.join(parts)}. {advice['reason'].capitalize()}"
            f"{f' ({changes})' if changes else ''}. check_memory: false in the kt_sft block leaves adapters and "
            "optimizer out of this check"
        )

    def warn(self, require: Require, *, is_mapped: bool) -> None:
        """Says so where what is only predicted, activations above all, may not fit.

        Args:
            require: As in `require_predicted`.
            is_mapped: Whether the experts stay in the checkpoint's files.
        """
        try:
            self.require_predicted(require, is_mapped=is_mapped)
        except NotEnoughMemoryError as error:
            logger.warning("training may run out of host memory: %s; `kt-sft plan` says what to set", error)
        have = self._machine.device_bytes
        if have is None or (self._bound and self._memory(self._bound, is_mapped=is_mapped).device_need <= have):
            return
        memory = self._memory(self._cost, is_mapped=is_mapped)
        if memory.device is not None and memory.device_need > have:
            logger.warning(
                "training may run out of accelerator memory: about %s are needed, %s of them for activations, and %s "
                "are there; `kt-sft plan` says what to set",
                readable(memory.device_need),
                readable(memory.device.activations),
                readable(have),
            )

    @functools.cached_property
    def _bound(self) -> Cost | None:
        """More than a step takes, and worked out at once; None of a model that is not as most are."""
        try:
            layers = len(self.facts.model.get_submodule(self.facts.stack))  # type: ignore[arg-type]
            config = text_config(self.facts.model.config)
            each = layers * config.hidden_size * _LAYER_BYTES + config.vocab_size * _WORD_BYTES
        except (AttributeError, TypeError):
            return None
        return Cost(peak_bytes=self.setup.tokens * each, heap_bytes=self.setup.tokens * each)

    @functools.cached_property
    def _cost(self) -> Cost:
        """Of a step; nothing where it cannot be followed."""
        return (
            _tried("activations are not counted before training", lambda: step_cost(self.facts, self.setup)) or Cost()
        )

    def _memory(self, cost: Cost, *, is_mapped: bool) -> Memory:
        # What this process has already is not available any more, so its own base is none.
        return memory_of(
            self.facts,
            self.setup,
            self._machine,
            cost,
            base=0,
            is_mapped=is_mapped,
            processes=local_rank_and_size()[1],
            shared=self._shared,
        )


def _beside(memory: Memory) -> int:
    return memory.host.activations - memory.spared + memory.host.buffers


def _tried(consequence: str, compute: Callable[[], Found]) -> Found | None:
    """What `compute` finds; None where it fails, which the log says: a prediction is no reason to end a training."""
    try:
        return compute()
    except Exception as error:  # a model's own code may raise anything
        logger.warning("%s: %s", consequence, error if str(error) else repr(error))
        return None
