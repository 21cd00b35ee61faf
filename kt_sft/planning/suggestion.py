"""What to change, or to keep, with the reason: the experts' format, what is kept for backward, the micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from kt_sft.planning.machine import Machine
from kt_sft.planning.memory import Memory, memory_of
from kt_sft.planning.model import ModelFacts
from kt_sft.planning.plan import Plan, fits
from kt_sft.planning.setup import TrainingSetup, sequences_of

#: Formats that need less than the one before, with what they lose (docs/settings.md has the errors).
_SMALLER = ("int8", "int4")
_BITS = {"bf16": 16, "int8": 8, "fp8": 8, "int4": 4, "nf4": 4, "mxfp4": 4}
#: A larger micro-batch must leave this part of the memory free, for what a prediction does not know.
_MARGIN = 0.15


def suggest(plan: Plan, facts: ModelFacts) -> dict[str, Any]:
    """What to set.

    Returns:
        `expert_format`, `activation_policy`, `per_device_train_batch_size` and `gradient_accumulation_steps` as they
        should be, `changes` (the recipe's keys to change, `kt_sft.` before those of its block), whether that `fits`,
        and `reason`.
    """
    if not plan.fits:
        return _smaller(plan, facts)
    setup = plan.setup
    if setup.settings.activation_policy == "recompute":
        retaining = _with(setup, settings={"activation_policy": "retain"})
        if _roomy(_memory(plan, facts, retaining), plan.machine):
            return _as_dict(
                plan, retaining, True, "there is room to retain the experts' activations, which spares a forward pass"
            )
    larger = setup
    while larger.accumulation % 2 == 0:
        more = _with(larger, batch=larger.batch * 2, accumulation=larger.accumulation // 2)
        if not _roomy(_memory(plan, facts, more), plan.machine):
            break
        larger = more
    if larger is not setup:
        experts = max(layout.num_experts for layout in facts.layouts.values())
        rows, before = (each.tokens * facts.slots / experts for each in (larger, setup))
        return _as_dict(
            plan,
            larger,
            True,
            f"larger micro-batches of the same step give each expert {rows:.0f} rows at a time, not {before:.0f}",
        )
    return _as_dict(plan, setup, True, "it fits, and nothing that is looked at here would be faster; keep it as it is")


def _smaller(plan: Plan, facts: ModelFacts) -> dict[str, Any]:
    """The first of what can be changed that fits, what changes the results least before what changes them more."""
    for setup, reason in _candidates(plan, facts):
        if fits(_memory(plan, facts, setup), plan.machine):
            return _as_dict(plan, setup, True, reason)
    over = []
    if plan.machine.host_bytes is not None and plan.memory.host_least > plan.machine.host_bytes:
        over.append("host")
    if plan.machine.device_bytes is not None and plan.memory.device_need > plan.machine.device_bytes:
        over.append("accelerator")
    reason = (
        f"nothing that a recipe can set makes it fit the memory of the {' and the '.join(over)}; take a machine with "
    )
    return _as_dict(plan, plan.setup, False, reason + "more, or a smaller model")


def _candidates(plan: Plan, facts: ModelFacts) -> Iterator[tuple[TrainingSetup, str]]:
    setup = plan.setup
    bits = max(_BITS[name] for name in facts.formats)
    formats = ["", *(name for name in _SMALLER if _BITS[name] < bits)]
    for name in formats:
        formatted = _with(setup, settings=_as_format(setup, name)) if name else setup
        said = [f"experts in {name}"] if name else []
        for policy in dict.fromkeys((setup.settings.activation_policy, "recompute")):
            kept = _with(formatted, settings={"activation_policy": policy})
            recomputes = ["recomputed activations"] if policy != setup.settings.activation_policy else []
            fewer = kept
            while True:
                batch = ["smaller micro-batches"] if fewer.batch != setup.batch else []
                if changes := said + recomputes + batch:
                    yield fewer, f"with {' and '.join(changes)} it fits"
                if fewer.batch % 2 or fewer.batch // 2 < sequences_of(setup.stage):
                    break
                fewer = _with(fewer, batch=fewer.batch // 2, accumulation=fewer.accumulation * 2)
        if setup.settings.lora_experts and setup.settings.lora_memory != "host" and plan.memory.device is not None:
            hosted = _with(formatted, settings={"lora_memory": "host"})
            yield hosted, f"with {' and '.join([*said, 'adapters on experts in host memory'])} it fits"
    if facts.obstacle is None and setup.settings.store == "resident":
        mapped = _with(setup, settings={"store": "mapped"})
        yield mapped, "the experts can stay in the checkpoint's files, from which they are read again in every step"


def _as_format(setup: TrainingSetup, name: str) -> dict[str, Any]:
    compute = setup.settings.compute if name in ("int8", "int4") else "bf16"
    store = "auto" if setup.settings.store == "mapped" else setup.settings.store
    return {"expert_format": name, "group_size": None, "zero_point": False, "compute": compute, "store": store}


def _with(setup: TrainingSetup, settings: dict[str, Any] | None = None, **changes: Any) -> TrainingSetup:
    if settings:
        changes["settings"] = dataclasses.replace(setup.settings, **settings)
    return dataclasses.replace(setup, **changes)


def _memory(plan: Plan, facts: ModelFacts, setup: TrainingSetup) -> Memory:
    """Of another setup: the model's activations grow with the batch."""
    if setup.settings.expert_format != plan.setup.settings.expert_format:
        facts = dataclasses.replace(facts, storages=dict.fromkeys(facts.storages, setup.settings.storage))
    is_mapped = setup.settings.store == "mapped" or (
        plan.memory.is_mapped and setup.settings.expert_format == plan.setup.settings.expert_format
    )
    return memory_of(
        facts,
        setup,
        plan.machine,
        plan.cost.times(setup.batch / plan.setup.batch),
        base=plan.memory.host.base,
        is_mapped=is_mapped,
        processes=plan.memory.processes,
        shared=plan.memory.shared,
    )


def _roomy(memory: Memory, machine: Machine) -> bool:
    """Whether it fits with a margin."""

    def below(need: int, have: int | None) -> bool:
        return have is None or need <= have * (1 - _MARGIN)

    return below(memory.host_need, machine.host_bytes) and below(memory.device_need, machine.device_bytes)


def _as_dict(plan: Plan, setup: TrainingSetup, fits: bool, reason: str) -> dict[str, Any]:
    sequences = sequences_of(setup.stage)

    def keys(of: TrainingSetup) -> dict[str, Any]:
        return {
            "kt_sft.expert_format": of.settings.expert_format,
            "kt_sft.activation_policy": of.settings.activation_policy,
            "kt_sft.lora_memory": of.settings.lora_memory,
            "kt_sft.store": of.settings.store,
            "kt_sft.group_size": of.settings.group_size,
            "kt_sft.zero_point": of.settings.zero_point,
            "per_device_train_batch_size": of.batch // sequences,
            "gradient_accumulation_steps": of.accumulation,
        }

    new, old = keys(setup), keys(plan.setup)
    return {
        "expert_format": setup.settings.expert_format,
        "activation_policy": setup.settings.activation_policy,
        "per_device_train_batch_size": new["per_device_train_batch_size"],
        "gradient_accumulation_steps": setup.accumulation,
        "changes": {key: value for key, value in new.items() if value != old[key]},
        "fits": fits,
        "reason": reason,
    }
