"""What a training run needs of host and device memory, term by term.

Shape letters: T tokens of a micro-batch, K experts per token, S = T K routed rows, E experts, H hidden size, I expert
intermediate size, r LoRA rank, P parameters that are trained.

- Experts: E (2 I H + H I) weights a layer, each as the format stores it, scales included; as the loader counts them.
- Dense: every other parameter in the dtype it is loaded in, and buffers.
- LoRA: r (inputs + outputs) parameters for a linear layer, E r (H + 2I) + E r (I + H) for a layer of experts (2I is I
  without gates). Each is a master of 4 bytes (2 with pure_bf16) and a gradient as large; those on experts have a copy
  of 2 bytes in the engine's format, at a rank rounded up to an even number.
- Optimizer: bytes a parameter by its kind, 8 for AdamW (two moments in FP32).
- Activations of the model: the peak of a step without values (activations.py).
- Activations of the experts: gate and up values of every layer, S 2I 2 bytes, with `retain`; where layers are
  checkpointed, also their outputs, T H values. From an accelerator, tokens are copied to the host: T H values for every
  layer, or for one where layers are checkpointed. Interleaved micro-batches count twice, as the model's activations do.
  With adapters on experts, backward holds one layer's gradients twice, as the engine writes them and as the parameters
  have them.
- Buffers: the engine's scratch. A routed row takes 4 H (sums), 2I e (gradients of gate and up, e bytes an element of
  the tier's panels), with `recompute` 2 · 2I, with trained adapters 2 I e and three low-rank rows; long batches are cut
  to stay within scratch_mb. Each thread has up to 1 MiB besides. Loading comes before all that, and takes what
  quantised matrices are turned or dequantised in, for each of its readers; it counts where it is more than activations
  and scratch.
- Base: the process with what it imports, measured where it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kt_sft.loading.layout import ExpertLayout
from kt_sft.planning.activations import Cost
from kt_sft.planning.machine import Machine
from kt_sft.planning.model import ModelFacts, targets_of
from kt_sft.planning.setup import TrainingSetup

#: Bytes of state for each trained parameter, by the Trainer's name of the optimizer.
OPTIMIZER_BYTES: dict[str, float] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_anyprecision"), 8.0),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw", "ademamix"), 8.0),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2.1),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop", "adagrad", "use_muon", "use_adam_mini"), 4.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), 1.05),
    "adafactor": 0.1,  # a row and a column for each matrix
    "sgd": 0.0,
}
#: What a CUDA context, its libraries' workspaces and an allocator's rounding take, roughly.
DEVICE_BASE = 700 << 20
_THREAD_SCRATCH = 1 << 20
#: As loading/streaming.py has them.
_MOST_READERS = 16
_MASTER = 4


@dataclasses.dataclass(frozen=True)
class Terms:
    """Bytes of one process, on one side."""

    experts: int = 0
    dense: int = 0
    lora: int = 0
    optimizer: int = 0
    activations: int = 0
    buffers: int = 0
    base: int = 0

    @property
    def total(self) -> int:
        """Of all."""
        return sum(dataclasses.astuple(self))

    @property
    def certain(self) -> int:
        """What is known before anything runs: all but activations, buffers and the process's own."""
        return self.experts + self.dense + self.lora + self.optimizer


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of a run.

    Args:
        host: Of one process, what of the experts stays in the checkpoint's files left out.
        device: Of one accelerator; None where the host does everything.
        experts_bytes: Whether in memory or in the files.
        is_mapped: Whether the experts stay in the checkpoint's files.
        processes: On this machine.
        trained: P of one process.
        shared: Whether they hold resident experts once. What of mapped ones is in memory, each has for itself.
        spared: Of the host's activations in one process, what is given up, and computed again, where memory is short.
    """

    host: Terms
    device: Terms | None
    experts_bytes: int
    is_mapped: bool
    processes: int
    trained: int
    shared: bool = True
    spared: int = 0

    @property
    def host_need(self) -> int:
        """Of all processes."""
        return self._of_all(self.host.total)

    @property
    def host_least(self) -> int:
        """Of that, what cannot be given up: a run that has no more than this is slower, and does not end."""
        return self._of_all(self.host.total - self.spared)

    @property
    def weights_need(self) -> int:
        """Of that, what is weights or the processes' own."""
        return self._of_all(self.host.experts + self.host.dense + self.host.base)

    def _of_all(self, each: int) -> int:
        once = self.host.experts if self.shared and not self.is_mapped else 0
        return (each - once) * self.processes + once

    @property
    def device_need(self) -> int:
        """Of one accelerator."""
        return 0 if self.device is None else self.device.total

    def sum_of(self, name: str) -> int:
        """A term of host and device together, of one process."""
        return getattr(self.host, name) + (0 if self.device is None else getattr(self.device, name))


def lora_parameters(facts: ModelFacts, setup: TrainingSetup) -> tuple[int, int]:
    """(on linear layers, on routed experts)."""
    linear = targets_of(facts.model, setup, [*facts.layouts])
    dense = sum(setup.rank * (module.in_features + module.out_features) for module in linear.values())
    experts = sum(_of_experts(layout, setup.rank) for layout in facts.layouts.values())
    return dense, experts if setup.settings.lora_experts else 0


def _of_experts(layout: ExpertLayout, rank: int) -> int:
    hidden, inner = layout.hidden_size, layout.intermediate_size
    return layout.num_experts * rank * (hidden + _columns(layout) + inner + hidden)


def _columns(layout: ExpertLayout) -> int:
    """Of gate and up together."""
    return layout.intermediate_size * (2 if layout.gated else 1)


def memory_of(
    facts: ModelFacts,
    setup: TrainingSetup,
    machine: Machine,
    cost: Cost,
    *,
    base: int,
    is_mapped: bool,
    processes: int = 1,
    shared: bool = True,
) -> Memory:
    """The terms of a run.

    Args:
        facts: Of the model.
        setup: Of the training.
        machine: Where it runs.
        cost: Of a micro-batch.
        base: Of the process without a model.
        is_mapped: Whether the experts stay in the checkpoint's files.
        processes: On this machine.
        shared: Whether they hold resident experts once.
    """
    on_device = machine.device is not None and not setup.on_cpu
    linear, routed = lora_parameters(facts, setup)
    master = 2 if setup.pure_bf16 else _MASTER
    exchanged = master if processes > 1 else 0  # DDP's buckets of gradients
    state = OPTIMIZER_BYTES.get(setup.optimizer, 8.0)
    lora = {"linear": linear * (2 * master + exchanged), "routed": routed * (2 * master + exchanged)}
    optimizer = {"linear": int(linear * state), "routed": int(routed * state)}
    copies = sum(2 * _of_experts(layout, setup.rank + setup.rank % 2) for layout in facts.layouts.values())
    kept, spared = host_activations(facts, setup, on_device=on_device)
    heap = 0 if on_device else int(cost.heap_bytes)
    loading = 0 if is_mapped else facts.staged_bytes * min(_MOST_READERS, 2 * machine.threads)
    host = Terms(
        experts=facts.bytes_beside_files if is_mapped else facts.experts_bytes,
        lora=copies if routed else 0,
        activations=kept,
        buffers=max(
            *(scratch_bytes(layout, facts.slots, setup, machine) for layout in facts.layouts.values()),
            loading - kept - heap,
        ),
        base=base,
    )
    spared = min(spared, kept + heap + host.buffers - loading)  # what loading takes cannot be given up
    model = Terms(dense=facts.dense_bytes, lora=lora["linear"], optimizer=optimizer["linear"])
    model = dataclasses.replace(
        model, activations=int((cost.peak_bytes if on_device else cost.heap_bytes) * in_flight(setup, on_device))
    )
    experts_side = Terms(lora=lora["routed"], optimizer=optimizer["routed"])

    def found(host: Terms, device: Terms | None) -> Memory:
        return Memory(host, device, facts.experts_bytes, is_mapped, processes, linear + routed, shared, spared)

    if not on_device:
        return found(_sum(host, model, experts_side), None)
    device = dataclasses.replace(model, base=DEVICE_BASE)
    if setup.settings.lora_memory == "host":
        host = _sum(host, experts_side)
    else:
        device = _sum(device, experts_side)
    return found(host, device)


def _sum(*parts: Terms) -> Terms:
    return Terms(*(sum(values) for values in zip(*(dataclasses.astuple(part) for part in parts), strict=True)))


def host_activations(facts: ModelFacts, setup: TrainingSetup, *, on_device: bool) -> tuple[int, int]:
    """What the experts keep for backward in host memory; and what of that is given up where memory is short.

    Without `retained_mb` that is all gate and up values: they get no more than half of what is free (retention.py).
    """
    tokens = setup.tokens * in_flight(setup, on_device)
    rows = tokens * facts.slots
    settings, layouts = setup.settings, facts.layouts.values()
    value = 2 if setup.autocast else next(facts.model.parameters()).element_size()
    retained = outputs = inputs = 0
    if on_device:
        copies = [tokens * layout.hidden_size * value for layout in layouts]
        inputs = max(copies, default=0) if setup.checkpointing else sum(copies)
    if settings.activation_policy == "retain":
        retained = sum(2 * rows * _columns(layout) for layout in layouts)
        if setup.checkpointing:
            outputs = sum(tokens * layout.hidden_size * value for layout in layouts)
        if settings.retained_mb is not None:
            retained = min(retained, max(0, (settings.retained_mb << 20) - outputs - inputs))
    gradients = max((2 * 4 * _of_experts(layout, setup.rank) for layout in layouts), default=0)
    kept = retained + outputs + inputs + (gradients if settings.lora_experts else 0)
    return kept, retained if settings.retained_mb is None else 0


def in_flight(setup: TrainingSetup, on_device: bool) -> int:
    """Micro-batches that are computed at a time: two where they are interleaved, or the two halves of one."""
    return 2 if interleaves(setup, on_device) and setup.accumulation > 1 else 1


def interleaves(setup: TrainingSetup, on_device: bool) -> bool:
    """Whether the Trainer computes two at a time; not where dropout draws random numbers."""
    wanted = setup.settings.interleave_micro_batches
    return (on_device if wanted is None else wanted) and setup.dropout == 0


def scratch_bytes(layout: ExpertLayout, slots: int, setup: TrainingSetup, machine: Machine) -> int:
    """The engine's, of backward, which needs more of it than forward."""
    hidden, inner, columns, element = (
        layout.hidden_size,
        layout.intermediate_size,
        _columns(layout),
        machine.element_bytes,
    )
    row = 4 * hidden + columns * element
    if setup.settings.activation_policy == "recompute":
        row += 2 * columns
    if setup.settings.lora_experts:
        row += 2 * inner * element + 3 * setup.rank * (4 + element)
    return min(setup.tokens * slots * row, setup.settings.scratch_mb << 20) + machine.threads * _THREAD_SCRATCH


def unmodelled(setup: TrainingSetup, machine: Machine) -> list[str]:
    """What is not worked out, in words."""
    found = [*setup.unmodelled]
    if setup.optimizer not in OPTIMIZER_BYTES:
        found.append(f"the state of optimizer {setup.optimizer}, which is taken to be AdamW's 8 bytes a parameter")
    if machine.device is not None and not setup.on_cpu:
        found.append("the driver's own memory beside a model, for which 0.7 GiB are taken on the device")
    return found


def breakdown(memory: Memory) -> Mapping[str, int]:
    """The terms under the names that a plan gives them, of one process."""
    return {
        "experts_bytes": memory.experts_bytes,
        "dense_bytes": memory.sum_of("dense"),
        "lora_bytes": memory.sum_of("lora"),
        "optimizer_bytes": memory.sum_of("optimizer"),
        "activation_bytes": memory.sum_of("activations"),
        "buffer_bytes": memory.sum_of("buffers"),
        "base_bytes": memory.sum_of("base"),
    }
