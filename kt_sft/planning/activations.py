"""One training step without values: what memory it needs at its peak, and how much work it is.

A step runs forward and backward on fake tensors (torch's own, which know shapes and dtypes and hold no memory), with
the model's own classes, PEFT's layers, autocast, checkpointing and loss. Every storage is counted from the operation
that makes it to its release, which is what an allocator would have to give. Nothing here knows a model family.

Layers of one kind are alike, so a step runs on one layer of each kind, and once more with one of them twice: what that
adds is what each further layer adds. For L_k layers of kind k, with p(n_1, n_2, ...) what is found for n_k of each,
p = p(1, 1, ...) + sum (L_k - 1) (p(.., 2, ..) - p(1, 1, ...)), which is exact as long as the peak stays at the same
place of a step.

Routed experts stand in as a function that keeps what the engine's autograd nodes keep: hidden states and routing. What
the engine itself needs is worked out in memory.py.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kt_sft.planning.model import ModelFacts, targets_of, text_config
from kt_sft.planning.setup import TrainingSetup

#: glibc's DEFAULT_MMAP_THRESHOLD_MAX: https://man7.org/linux/man-pages/man3/mallopt.3.html (M_MMAP_THRESHOLD).
_LARGEST_KEPT = 32 << 20
#: Taken for small blocks, by what is alive of them: 1.4 to 1.8 measured (glibc 2.36, two models, docs/plan.md).
_FRAGMENTATION = 1.6
#: Attributes that the layers of a stack differ in without differing in kind.
_NUMBERED = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one micro-batch, forward and backward, without the routed experts.

    Args:
        peak_bytes: What is alive at the peak beyond parameters and their gradients.
        heap_bytes: What the C library's allocator has taken by then. Blocks of more than 32 MiB go back to the system
            when they are freed; smaller ones stay, so that it is the most of the former plus the most of the latter.
            Of the latter more is taken than is ever alive: torch asks for aligned blocks, for which a freed block of
            the same size is too short unless its neighbour is free as well.
        flops: Of products, attention included.
        moved_bytes: What the other operations read and write.
        operations: How many there are that compute something.
    """

    peak_bytes: float = 0.0
    heap_bytes: float = 0.0
    flops: float = 0.0
    moved_bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: float) -> Cost:
        """Of `count` such parts."""
        return Cost(*(value * count for value in dataclasses.astuple(self)))


class ActivationError(RuntimeError):
    """The step of a model cannot be run without values; the message says what stopped it."""


def step_cost(facts: ModelFacts, setup: TrainingSetup) -> Cost:
    """What one micro-batch takes.

    Raises:
        ActivationError: The model's code needs values, or is not to be run.
    """
    stack = facts.model.get_submodule(facts.stack)
    assert isinstance(stack, nn.ModuleList)
    kinds: dict[Any, list[int]] = collections.defaultdict(list)
    for number, layer in enumerate(stack):
        kinds[_kind(facts, number, layer)].append(number)
    first = [numbers[0] for numbers in kinds.values()]
    total = base = _run(facts, setup, first)
    for place, numbers in enumerate(kinds.values()):
        if len(numbers) > 1:
            more = _run(facts, setup, [*first[:place], numbers[0], *first[place:]])
            total = total + (more + base.times(-1)).times(len(numbers) - 1)
    return total


def _kind(facts: ModelFacts, number: int, layer: nn.Module) -> Any:
    names = [(type(part).__name__, _NUMBERED.sub("#", name)) for name, part in layer.named_modules()]
    shapes = [(name, tuple(value.shape)) for name, value in layer.named_parameters()]
    types = getattr(text_config(facts.model.config), "layer_types", None) or ()
    return str((type(layer).__name__, names, shapes, types[number] if number < len(types) else None))


def _run(facts: ModelFacts, setup: TrainingSetup, numbers: list[int]) -> Cost:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    model = _excerpt(facts, setup, numbers)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with warnings.catch_warnings(), mode, _quiet_random():
            warnings.simplefilter("ignore")
            _make_fake(model)
            recorder = _Recorder(model)
            _step(model, setup, recorder)
    except (DataDependentOutputException, DynamicOutputShapeException, RuntimeError, TypeError, ValueError) as error:
        raise ActivationError(f"{type(facts.model).__name__} cannot be followed without values: {error}") from error
    except (AttributeError, NotImplementedError, IndexError, KeyError) as error:
        raise ActivationError(f"{type(facts.model).__name__} cannot be followed without values: {error!r}") from error
    return recorder.cost()


def _excerpt(facts: ModelFacts, setup: TrainingSetup, numbers: list[int]) -> nn.Module:
    """A copy of some layers of the model and what is around them, with adapters, ready to train."""
    from peft import LoraConfig, get_peft_model

    model: Any = facts.model
    stack = model.get_submodule(facts.stack)
    assert isinstance(stack, nn.ModuleList)
    try:
        model.set_submodule(facts.stack, nn.ModuleList([stack[number] for number in numbers]))
        excerpt: Any = copy.deepcopy(model)
    finally:
        model.set_submodule(facts.stack, stack)
    for name, module in [*excerpt.named_modules()]:
        if all(hasattr(module, mark) for mark in ("has_gate", "has_bias", "is_transposed")):
            excerpt.set_submodule(name, _Experts())
    excerpt.config.use_cache = False
    if setup.checkpointing and getattr(excerpt, "supports_gradient_checkpointing", False):
        excerpt.gradient_checkpointing_enable({"use_reentrant": setup.reentrant, "preserve_rng_state": False})
    targets = targets_of(excerpt, setup, [])
    if targets:
        config = LoraConfig(r=setup.rank, lora_dropout=setup.dropout, target_modules=[*targets], task_type="CAUSAL_LM")
        excerpt = get_peft_model(excerpt, config)
    dtype = torch.bfloat16 if setup.pure_bf16 else torch.float32
    for parameter in excerpt.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return excerpt.train()


class _Experts(nn.Module):
    """In place of routed experts."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _Engine.apply(hidden_states, top_k_index, top_k_weights)


class _Engine(torch.autograd.Function):
    """Keeps what the autograd nodes of a call keep on the side of the model."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, idx_TK: Tensor, w_TK: Tensor) -> Tensor:
        ctx.weights_dtype = w_TK.dtype
        ctx.save_for_backward(x_TH, idx_TK.to(torch.int64), w_TK.float())
        return torch.empty_like(x_TH)

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor, None, Tensor]:
        x_TH, _, w_TK = ctx.saved_tensors
        return torch.empty_like(x_TH), None, torch.empty_like(w_TK).to(ctx.weights_dtype)


def _make_fake(model: nn.Module) -> None:
    """Gives every parameter and buffer, which are on the meta device, a place on the CPU without memory."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is None:
                    continue
                if id(value) not in made:
                    fake: Any = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    if isinstance(value, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=value.requires_grad)
                        if value.requires_grad:
                            fake.grad = torch.empty_like(fake)
                    made[id(value)] = fake
                values[name] = made[id(value)]


def _step(model: nn.Module, setup: TrainingSetup, recorder: _Recorder) -> None:
    """Forward, loss and backward as the Trainer runs them."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    tokens = torch.zeros(setup.batch, setup.cutoff, dtype=torch.long)
    # Only sequences of several lengths are padded; without padding transformers drops the mask.
    mask = torch.ones_like(tokens) if setup.batch > 1 and not setup.packed else None
    forward: Callable[..., Any] = model.forward
    if setup.autocast is not None:
        dtype = getattr(torch, setup.autocast)

        def forward(**inputs: Any) -> Any:
            with torch.autocast("cpu", dtype=dtype):
                return model.__class__.forward(model, **inputs)

        forward = convert_outputs_to_fp32(forward)
    with recorder:
        loss = forward(input_ids=tokens, attention_mask=mask, labels=tokens)["loss"]
        loss.backward()


@contextmanager
def _quiet_random() -> Iterator[None]:
    """Nothing is drawn for tensors without values, so the generator is put back as it was."""
    state = torch.random.default_generator.get_state()
    with nullcontext():
        try:
            yield
        finally:
            torch.random.default_generator.set_state(state)


class _Recorder(TorchDispatchMode):
    """Follows every operation of a step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        grads = [value.grad for value in tensors if value.grad is not None]
        self._known = {value.untyped_storage()._cdata: 0 for value in (*tensors, *grads)}
        self._live, self._peak = [0, 0], [0, 0]  # small blocks, large ones
        self._together = 0
        self._flops = self._moved = self._operations = 0.0

    def cost(self) -> Cost:
        """What was found."""
        return Cost(
            self._together, self._peak[0] * _FRAGMENTATION + self._peak[1], self._flops, self._moved, self._operations
        )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        places = {value.untyped_storage()._cdata for value in inputs}
        fresh = False
        for output in outputs:
            storage = output.untyped_storage()
            fresh = fresh or storage._cdata not in places
            if storage._cdata not in self._known:
                self._take(storage)
        if fresh or function._schema.is_mutable:
            self._operations += 1
            flops = _flops(function, inputs, outputs)
            self._flops += flops
            if not flops:
                self._moved += sum(value.numel() * value.element_size() for value in (*inputs, *outputs))
        return result

    def _take(self, storage: Any) -> None:
        size = storage.nbytes()
        self._known[storage._cdata] = size
        large = size > _LARGEST_KEPT
        self._live[large] += size
        self._peak[large] = max(self._peak[large], self._live[large])
        self._together = max(self._together, sum(self._live))
        weakref.finalize(storage, self._release, storage._cdata).atexit = False

    def _release(self, key: int) -> None:
        size = self._known.pop(key, 0)
        self._live[size > _LARGEST_KEPT] -= size


def _flops(function: Any, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Of a product; 0 for whatever is none."""
    name = function._schema.name.removeprefix("aten::")
    shapes = [tuple(value.shape) for value in inputs]
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        first, second = shapes[-2:]
        return 2.0 * outputs[0].numel() * first[-1] if first[-1] == second[-2] else 0.0
    if name.startswith("_scaled_dot_product"):
        query, key, value = shapes[:3] if "backward" not in name else shapes[1:4]
        batch, heads, rows, size = query
        causal = 0.5  # every mask of a language model leaves out half
        product = 2.0 * batch * heads * rows * key[-2] * causal
        return product * (size + value[-1]) * (2.5 if "backward" in name else 1.0)
    if name == "convolution":
        return 2.0 * outputs[0].numel() * inputs[1][0].numel()
    return 0.0
