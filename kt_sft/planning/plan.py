"""A plan: what a training run needs, whether it fits a machine, how fast it is, and what to set instead."""

from __future__ import annotations

import dataclasses
from typing import Any

from kt_sft.loading.mapped import refusal
from kt_sft.planning.activations import ActivationError, Cost, step_cost
from kt_sft.planning.machine import Machine
from kt_sft.planning.memory import Memory, breakdown, memory_of, unmodelled
from kt_sft.planning.model import ModelFacts
from kt_sft.planning.rates import StepRates, measure_rates, usual_rates
from kt_sft.planning.setup import TrainingSetup
from kt_sft.planning.speed import Speed, speed_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found.

    Args:
        setup: Of the run.
        machine: For which.
        memory: Needed.
        cost: Of a micro-batch, without the experts.
        speed: None where nothing is known of the machine's.
        formats: Of the experts.
        warnings: What is not modelled, or was taken for something else.
    """

    setup: TrainingSetup
    machine: Machine
    memory: Memory
    cost: Cost
    speed: Speed | None
    formats: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether host and device have what is needed; what nobody knows is taken to be enough."""
        return fits(self.memory, self.machine)


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether a machine has what a run needs."""
    host = machine.host_bytes is None or memory.host_need <= machine.host_bytes
    device = machine.device_bytes is None or memory.device_need <= machine.device_bytes
    return host and device


def choose_mapped(facts: ModelFacts, setup: TrainingSetup, resident: Memory, machine: Machine) -> bool:
    """Whether the experts stay in the checkpoint's files, as the loader decides.

    Raises:
        ConfigError: They should, but cannot.
    """
    store = setup.settings.store
    if store == "mapped" and facts.obstacle is not None:
        raise refusal(facts.obstacle)
    if store != "auto":
        return store == "mapped"
    have = machine.host_bytes
    return facts.obstacle is None and have is not None and resident.host_need > have


def make_plan(
    facts: ModelFacts, setup: TrainingSetup, machine: Machine, *, base: int, processes: int = 1, measures: bool = True
) -> Plan:
    """Plans a run.

    Args:
        facts: Of its model.
        setup: Of the training.
        machine: Where it is to run.
        base: Bytes of a process without a model.
        processes: On the machine.
        measures: Whether this machine's speeds are measured, which takes seconds; else its peaks must do.

    Raises:
        ConfigError: `store: mapped` is not possible.
    """
    warnings = [*facts.notes, *(f"not modelled: {what}" for what in unmodelled(setup, machine))]
    try:
        cost = step_cost(facts, setup)
    except ActivationError as error:
        cost = Cost()
        warnings.append(f"the model's own activations are not counted, and its speed is not predicted: {error}")

    def memory(is_mapped: bool) -> Memory:
        return memory_of(facts, setup, machine, cost, base=base, is_mapped=is_mapped, processes=processes)

    mapped = choose_mapped(facts, setup, memory(False), machine)
    found = memory(mapped)
    if mapped:
        warnings.append(
            "the experts stay in the checkpoint's files: what of them memory has no room for is read again in every "
            "step, which the predicted time leaves out"
        )
    on_device = machine.device is not None and not setup.on_cpu
    rates = _rates(facts, setup, machine, on_device=on_device, measures=measures) if cost.operations else None
    speed = None if rates is None else speed_of(facts, setup, cost, found, rates)
    if rates is not None and not rates.is_measured:
        warnings.append("speeds were not measured at these sizes: the time is an estimate from the machine's peaks")
    if speed is None and cost.operations:
        warnings.append("nothing is known of the machine's speed, so no time is predicted")
    return Plan(setup, machine, found, cost, speed, facts.formats, tuple(warnings))


def _rates(
    facts: ModelFacts, setup: TrainingSetup, machine: Machine, *, on_device: bool, measures: bool
) -> StepRates | None:
    if not (machine.is_here and measures):
        return usual_rates(machine, on_device=on_device)
    name, layout = next(iter(facts.layouts.items()))
    return measure_rates(layout, dict(facts.storages[name]), facts.slots, setup, on_device=on_device)


def as_json(plan: Plan, suggestion: dict[str, Any]) -> dict[str, Any]:
    """A plan as plain values. Bytes are of one process but in `host_need_bytes`, which is of all of them."""
    memory, speed = plan.memory, plan.speed
    return {
        **breakdown(memory),
        "host_need_bytes": memory.host_need,
        "host_have_bytes": plan.machine.host_bytes,
        "device_need_bytes": memory.device_need,
        "device_have_bytes": plan.machine.device_bytes if memory.device is not None else None,
        "step_seconds": None if speed is None else speed.step,
        "tokens_per_second": None if speed is None else speed.tokens_per_second,
        "shares": None if speed is None else speed.shares(),
        "fits": plan.fits,
        "suggestion": suggestion,
        "experts_mapped": memory.is_mapped,
        "expert_formats": [*plan.formats],
        "host_terms": dataclasses.asdict(memory.host),
        "device_terms": None if memory.device is None else dataclasses.asdict(memory.device),
        "trained_parameters": memory.trained,
        "processes": memory.processes,
        "tokens_per_micro_batch": plan.setup.tokens,
        "machine": plan.machine.name,
        "accelerator": plan.machine.device if memory.device is not None else None,
        "warnings": [*plan.warnings],
    }
