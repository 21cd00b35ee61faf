"""Where kt_sft attaches to transformers' Trainer to interleave micro-batches.

The Trainer calls `training_step` for each micro-batch of an optimizer step, with DDP's exchange of gradients held back
for all but the last. Of two the first call is put off: it gives a loss of zero, and the second runs both, so what it is
to exchange holds for both. The step of the class itself runs, in a thread for each micro-batch; only
`Accelerator.backward` is held there, and called once for both.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kt_sft.config import local_rank_and_size

logger = logging.getLogger("kt_sft")

#: Where a Trainer keeps its `_Interleaving`.
_STATE = "_kt_sft_interleaving"

#: What of a batch may be cut along its first dimension.
_ROWS = {"input_ids", "attention_mask", "labels", "position_ids"}

#: Whose `compute_loss` gives a sum over tokens, divided by their number in the whole step.
_SUMMED_LOSSES = {"transformers.trainer", "llamafactory.train.pt.trainer", "llamafactory.train.sft.trainer"}

#: Fewer rows for an expert than about this, and the engine takes longer for two halves than for the whole.
LEAST_ROWS = 24


def extend_trainer(module: ModuleType) -> None:
    """Wraps `Trainer.training_step`; for models without experts in the engine it does nothing.

    Args:
        module: `transformers.trainer`.
    """
    step: Callable[..., Tensor] = module.Trainer.training_step

    @functools.wraps(step)
    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        interleaving = _interleaving_of(self, model)
        if interleaving is None:
            return step(self, model, inputs, *args, **kwargs)
        return interleaving.step(model, inputs, lambda given: step(self, model, given, *args, **kwargs))

    module.Trainer.training_step = training_step


def _interleaving_of(trainer: Any, model: Any) -> _Interleaving | None:
    """A Trainer's, or None where micro-batches run one after the other."""
    if _STATE not in vars(trainer):
        made = None
        experts = sys.modules.get("kt_sft.experts")  # not imported into processes that have no use for it
        layers = [] if experts is None else [part for part in model.modules() if isinstance(part, experts.CpuExperts)]
        if layers:
            wanted = layers[0].config.interleave_micro_batches
            if wanted is None:  # on the CPU alone there is nothing that could run beside the engine
                wanted = trainer.args.device.type != "cpu"
            if wanted:
                made = _Interleaving(trainer, layers)
                made.check(model)
        setattr(trainer, _STATE, made)
    found = getattr(trainer, _STATE)
    return found if found is not None and not found.is_off else None


#: Runs the Trainer's own step on a micro-batch.
_Step = Callable[[Any], Tensor]


class _Interleaving:
    """Of one Trainer.

    Args:
        trainer: Whose steps are interleaved.
        layers: The routed experts of its model.
    """

    def __init__(self, trainer: Any, layers: Sequence[Any]) -> None:
        from kt_sft.offload.interleave import Interleaver

        self.is_off = False
        self._trainer, self._layers = trainer, layers
        self._interleaver = Interleaver(trainer.args.device)
        self._waiting: tuple[Any, _Step] | None = None
        self._state: Any = None
        self._is_watched = self._draws = self._said_on = self._said_whole = False
        self._slots = 0

    def check(self, model: Any) -> None:
        """Turns itself off where micro-batches cannot be interleaved."""
        reason = reason_against(self._trainer, model)
        if reason is not None:
            self._turn_off(reason)

    def step(self, model: Any, inputs: Any, plain: _Step) -> Tensor:
        """What the Trainer gets for a micro-batch."""
        is_last = self._trainer.accelerator.sync_gradients
        reason = _reason_around()
        if reason is not None:
            self._turn_off(reason)
            waiting, self._waiting = self._waiting if self._state is self._trainer.state else None, None
            if waiting is None:
                return plain(inputs)
            others, others_plain = waiting
            return self._reported(others_plain(others), plain(inputs))
        if not self._is_watched:
            return self._watch(model, inputs, plain, is_last)
        state = self._trainer.state  # a new one with each call of `train`: what one before has left waits for nothing
        waiting, self._waiting = self._waiting if self._state is state else None, None
        if waiting is None and not is_last:
            self._state, self._waiting = state, (inputs, plain)
            return torch.zeros((), device=self._trainer.args.device)
        if waiting is None:
            halves = self._halves(model, inputs)
            if halves is None:
                return plain(inputs)
            first, second = self._run(model, [(half, plain) for half in halves])
            return first + second
        first, second = self._run(model, [waiting, (inputs, plain)])
        return self._reported(first, second)

    def _watch(self, model: Any, inputs: Any, plain: _Step, is_last: bool) -> Tensor:
        """A micro-batch of the first optimizer step, which runs plainly: when does the model draw random numbers?

        Interleaved, what two micro-batches draw before their first experts comes first, in the order of the batches,
        and what they draw after their last ones comes last. So either may be, but not both, and none between.
        """
        from kt_sft.engine.retention import is_checkpointed

        self._is_watched = is_last
        device = self._trainer.args.device
        states = [_random_states(device)]

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._slots = (args[1] if len(args) > 1 else kwargs["top_k_index"]).shape[1]
            states.append(_random_states(device))

        calls: collections.Counter[str] = collections.Counter()

        def count(name: str, *_: Any) -> None:
            # Only calls that give a gradient of their own: not the second one of a checkpointed piece, in backward.
            is_recomputed = torch._C._current_graph_task_id() != -1
            if not is_recomputed and (torch.is_grad_enabled() or is_checkpointed()):
                calls[name] += 1

        handles = [experts.register_forward_pre_hook(note, with_kwargs=True) for experts in self._layers]
        for name, part in model.named_modules():
            if any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
                handles.append(part.register_forward_pre_hook(functools.partial(count, name)))
        try:
            loss = plain(inputs)
        finally:
            for handle in handles:
                handle.remove()
        repeated = next((name for name, times in calls.items() if times > 1), None)
        if repeated is not None and not self.is_off:
            self._turn_off(
                f"{repeated} is trained and called more than once, so its gradient has several terms of each"
            )
        before, *between, after = [*states, _random_states(device)]
        if not _are_same([before, after]):
            self._draws = True
        if not (self.is_off or _are_same([before, *between]) or _are_same([*between, after])):
            self._turn_off(f"{_what_draws(model)}, and two at a time would draw others than one after the other")
        return loss

    def _run(self, model: Any, parts: list[tuple[Any, _Step]]) -> list[Tensor]:
        """The losses of two micro-batches, whose gradients have been added to what is there."""
        if not self._said_on:
            self._said_on = True
            _say("two micro-batches at a time: the model computes one while the CPU computes the experts of the other")

        def second(inputs: Any, plain: _Step) -> Tensor:
            # DDP sends buffers around in the first forward after an exchange, which has begun; plainly once a step.
            if getattr(model, "require_forward_param_sync", False):
                model.require_forward_param_sync = False
            return plain(inputs)

        (inputs, plain), (others, others_plain) = parts
        with _held_backward(self._trainer.accelerator) as held:
            losses = self._interleaver.run(
                [functools.partial(plain, inputs), functools.partial(second, others, others_plain)]
            )
        held.run()
        return losses

    def _reported(self, first: Tensor, second: Tensor) -> Tensor:
        """Adds the loss of the micro-batch that was put off to the Trainer's, as the Trainer does; gives the other."""
        trainer = self._trainer
        total = getattr(trainer, "_tr_loss", None)
        if total is None:
            return first + second
        if trainer.args.logging_nan_inf_filter and not bool(torch.isfinite(first)):
            total += total / (1 + trainer.state.global_step - trainer._globalstep_last_logged)
        else:
            total += first
        return second

    def _halves(self, model: Any, inputs: Any) -> list[Any] | None:
        """A micro-batch cut in two, or None where it has to stay, or is better left, whole."""
        reason = reason_to_stay_whole(self._trainer, model, inputs)
        if reason is None and self._draws:
            reason = f"{_what_draws(model)}, and halves would draw others"
        experts = self._layers[0]
        if reason is None and experts.config.interleave_micro_batches is None:
            rows = inputs["input_ids"].numel() // 2 * self._slots / experts.num_experts
            if rows < LEAST_ROWS:
                reason = f"half of one has {rows:.0f} rows for an expert, with which the engine is slow"
        if reason is not None:
            if not self._said_whole:
                self._said_whole = True
                _say(f"a micro-batch without a second one is not cut in two: {reason}")
            return None
        count = (len(inputs["input_ids"]) + 1) // 2
        return [{key: value[part] for key, value in inputs.items()} for part in (slice(count), slice(count, None))]

    def _turn_off(self, reason: str) -> None:
        self.is_off = True
        _say(f"micro-batches run one after the other: {reason}")


def _say(message: str) -> None:
    if local_rank_and_size()[0] == 0:
        logger.info(message)


class _Held:
    """Calls of `Accelerator.backward` that have not been made yet."""

    def __init__(self, backward: Callable[..., None]) -> None:
        self._backward = backward
        self._calls: dict[int, list[tuple[Tensor, dict[str, Any]]]] = {}  # by thread

    def hold(self, loss: Tensor, **kwargs: Any) -> None:
        """In the place of `Accelerator.backward`."""
        self._calls.setdefault(threading.get_ident(), []).append((loss, kwargs))

    def run(self) -> None:
        """One backward of all losses; each gets the gradient that it would get alone.

        Raises:
            RuntimeError: They do not all have the same further arguments.
        """
        calls, self._calls = [call for made in self._calls.values() for call in made], {}
        if not calls:
            return
        given = calls[0][1]
        for _, kwargs in calls:
            if kwargs.keys() != given.keys() or any(
                value is not given[key] and (isinstance(value, Tensor) or value != given[key])
                for key, value in kwargs.items()
            ):
                raise RuntimeError(
                    "kt_sft: two micro-batches at a time have one backward, but accelerator.backward was called with "
                    f"different arguments ({', '.join(sorted(kwargs.keys() | given.keys()))}); set "
                    "interleave_micro_batches: false"
                )
        self._backward(functools.reduce(torch.add, [loss for loss, _ in calls]), **given)


@contextlib.contextmanager
def _held_backward(accelerator: Any) -> Iterator[_Held]:
    held, own = _Held(accelerator.backward), vars(accelerator).get("backward")
    accelerator.backward = held.hold
    try:
        yield held
    finally:
        del accelerator.backward
        if own is not None:  # somebody else's
            accelerator.backward = own


def reason_against(trainer: Any, model: Any) -> str | None:
    """Why the micro-batches of a Trainer cannot be interleaved, or None if they can be."""
    from torch.nn.parallel import DistributedDataParallel

    accelerator, args = trainer.accelerator, trainer.args
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU"):
        return f"{kind} has a backward of its own"
    if args.n_gpu > 1:
        return f"the Trainer copies the model to {args.n_gpu} devices (DataParallel); start it with torchrun instead"
    if getattr(accelerator, "parallelism_config", None) is not None:
        return "a parallelism_config is set"
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return "sync_each_batch is set"
    if getattr(args, "activation_offloading", False):
        return "activation_offloading is set, whose hooks would not see the threads of micro-batches"
    if args.torch_compile:
        return "torch_compile is set"
    if isinstance(model, DistributedDataParallel) and (model.find_unused_parameters or model.static_graph):
        return "DDP looks for unused parameters after each forward; set ddp_find_unused_parameters: false"
    trained = [(name, value) for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad]
    names = {value: name for name, value in trained}
    for name, value in trained:
        if names[value] != name:
            return f"{name} is trained and also {names[value]}, so its gradient has more than one term of each"
    return _reason_in_checkpointing(accelerator.unwrap_model(model))


def _reason_in_checkpointing(model: Any) -> str | None:
    from torch.utils.checkpoint import checkpoint

    for name, part in model.named_modules():
        function = getattr(part, "_gradient_checkpointing_func", None)
        if function is None or not getattr(part, "gradient_checkpointing", False):
            continue
        function = inspect.unwrap(function)
        settings = function.keywords if isinstance(function, functools.partial) else {}
        if getattr(function, "func", function) is not checkpoint:
            return f"the gradient checkpointing of {name} is not torch's; remove use_unsloth_gc"
        if settings.get("use_reentrant", True) and _has_router_loss(model):
            return (
                "the routers' auxiliary loss (moe_aux_loss_coef) gives routers no gradient where checkpointing is "
                "reentrant, and would give one here; set use_reentrant_gc: false"
            )
    return None


def _has_router_loss(model: Any) -> bool:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    return any(getattr(part, "output_router_logits", False) for part in (config, text))


def reason_to_stay_whole(trainer: Any, model: Any, inputs: Any) -> str | None:
    """Why a micro-batch cannot be cut in two with the same gradients but for rounding, or None if it can be."""
    owner = next(cls.__module__ for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    if owner not in _SUMMED_LOSSES or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return "its loss is no sum over tokens"
    if not trainer.model_accepts_loss_kwargs:
        return "its loss is a mean over its own tokens"
    if _has_router_loss(trainer.accelerator.unwrap_model(model)):
        return "the routers' auxiliary loss (moe_aux_loss_coef) is one of a whole batch"
    if not isinstance(inputs, Mapping) or not {"input_ids", "labels"} <= inputs.keys() <= _ROWS:
        return "it has inputs of other kinds than tokens"
    rows = len(inputs["input_ids"])
    if not all(isinstance(value, Tensor) and len(value) == rows for value in inputs.values()):
        return "its inputs have no common first dimension"
    shape = inputs["input_ids"].shape
    for key, value in inputs.items():
        # As M-RoPE's positions, [3, B, S]: with three sequences their first dimension is that of the batch.
        is_mask = key == "attention_mask" and value.dim() == 4 and value.shape == (rows, 1, shape[-1], shape[-1])
        if value.shape != shape and not is_mask:
            return f"its {key} are no rows of sequences"
    if rows < 2:
        return "it is one sequence"
    return None


def _reason_around() -> str | None:
    """What of this thread's state torch does not take over into the threads of micro-batches, or None."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks for saved tensors are set around the Trainer's step, as for offloading activations"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a mode of torch, as a default device, is set around the Trainer's step"
    return None


def _random_states(device: torch.device) -> Tensor:
    """Of the generators that a model on `device` draws from."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return torch.cat(states)


def _are_same(states: Sequence[Tensor]) -> bool:
    return all(torch.equal(states[0], state) for state in states[1:])


def _what_draws(model: Any) -> str:
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.p > 0:
            return f"{name} draws dropout masks"
    return "the model draws random numbers"
