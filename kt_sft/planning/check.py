"""The check that training makes before it loads weights: whether what it certainly needs of host memory is there.

Certain are the weights, adapters with their gradients, and the optimizer's state; too little memory for these is an
error. Activations are predicted, so too little for them is a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from kt_sft.config import local_rank_and_size
from kt_sft.loading.errors import NotEnoughMemoryError
from kt_sft.loading.mapping import ModulePlan
from kt_sft.loading.memory import readable
from kt_sft.planning.activations import ActivationError, Cost, step_cost
from kt_sft.planning.machine import Machine, this_machine
from kt_sft.planning.memory import Memory, breakdown, memory_of
from kt_sft.planning.model import ModelFacts, facts_of, text_config
from kt_sft.planning.plan import Plan, choose_mapped, fits
from kt_sft.planning.setup import RecipeError, TrainingSetup
from kt_sft.planning.suggestion import suggest

logger = logging.getLogger("kt_sft")

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
    """What a training run takes beside its weights.

    Args:
        setup: Of the run.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup

    def host_bytes(self, facts: ModelFacts) -> int:
        """Of host memory: adapters, their gradients and copies, and the optimizer's state, of one process."""
        host = self._memory(facts, this_machine(self.setup.settings.num_threads), Cost(), is_mapped=False).host
        return host.lora + host.optimizer

    def facts(
        self, model: PreTrainedModel, plans: Sequence[ModulePlan], storages: Mapping[str, Mapping[str, Any]]
    ) -> ModelFacts | None:
        """Of a model that is about to be loaded; None for one whose config lacks what they need."""
        try:
            return facts_of(model, plans, storages, self.setup)
        except RecipeError as error:
            logger.debug("memory is not checked: %s", error)
            return None

    def refusal(self, error: NotEnoughMemoryError, facts: ModelFacts) -> NotEnoughMemoryError:
        """The error that says what is needed for what, and what to set instead."""
        machine = this_machine(self.setup.settings.num_threads)
        memory, cost = self._predicted(facts, machine)
        parts = [f"{name} {readable(size)}" for key, name in _NAMES.items() if (size := breakdown(memory)[key])]
        plan = Plan(self.setup, machine, memory, cost, None, facts.formats, ())
        advice = suggest(plan, facts)
        changes = ", ".join(f"{key}: {value}" for key, value in advice["changes"].items())
        return NotEnoughMemoryError(
            f"{error}. Training takes {', '.join(parts)}. {advice['reason'].capitalize()}"
            f"{f' ({changes})' if changes else ''}. check_memory: false in the kt_sft block leaves adapters and "
            "optimizer out of this check"
        )

    def warn(self, facts: ModelFacts, is_mapped: bool) -> None:
        """Says so where what is only predicted, activations above all, may not fit."""
        if local_rank_and_size()[0] != 0:
            return
        machine = this_machine(self.setup.settings.num_threads)
        if self._surely_fits(facts, machine, is_mapped):
            return
        memory, _ = self._predicted(facts, machine, is_mapped)
        for where, need, have in (
            ("host", memory.host_need, machine.host_bytes),
            ("accelerator", memory.device_need, machine.device_bytes),
        ):
            if have is not None and need > have:
                logger.warning(
                    "training may run out of %s memory: about %s are needed, %s of them for activations, and %s are "
                    "there; `kt-sft plan` says what to set",
                    where,
                    readable(need),
                    readable(memory.sum_of("activations")),
                    readable(have),
                )

    def _surely_fits(self, facts: ModelFacts, machine: Machine, is_mapped: bool) -> bool:
        """By a bound that takes no time."""
        config = text_config(facts.model.config)
        layers = len(facts.model.get_submodule(facts.stack))  # type: ignore[arg-type]
        each = layers * config.hidden_size * _LAYER_BYTES + config.vocab_size * _WORD_BYTES
        bound = Cost(peak_bytes=self.setup.tokens * each, heap_bytes=self.setup.tokens * each)
        return fits(self._memory(facts, machine, bound, is_mapped=is_mapped), machine)

    def _predicted(self, facts: ModelFacts, machine: Machine, is_mapped: bool | None = None) -> tuple[Memory, Cost]:
        try:
            cost = step_cost(facts, self.setup)
        except ActivationError as error:
            logger.debug("activations are not predicted: %s", error)
            cost = Cost()
        resident = self._memory(facts, machine, cost, is_mapped=False)
        if is_mapped is None:
            is_mapped = choose_mapped(facts, self.setup, resident, machine)
        return self._memory(facts, machine, cost, is_mapped=is_mapped), cost

    def _memory(self, facts: ModelFacts, machine: Machine, cost: Cost, *, is_mapped: bool) -> Memory:
        # What this process has already is not available any more, so its own base is none.
        processes = local_rank_and_size()[1]
        return memory_of(facts, self.setup, machine, cost, base=0, is_mapped=is_mapped, processes=processes)
