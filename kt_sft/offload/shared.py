"""Shared experts run on the accelerator while the CPU computes the routed ones, in forward and in backward.

In the blocks of transformers, shared experts are called either before the routed ones or after them. Here both happen
while the engine works: those called before are put off until the routed experts have been submitted, those called after
are computed then and handed out when the block asks for them. Autograd visits what lies between the two nodes of a call
of CpuExperts (kt_sft/autograd.py) in reverse, so backward overlaps, too.

What a block does is found by running it on two tokens when a model has been loaded: a new class needs no entry here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kt_sft.config import local_rank_and_size
from kt_sft.experts import CpuExperts
from kt_sft.offload.deferred import Deferred

logger = logging.getLogger("kt_sft")

#: Where a block keeps its plan.
_PLAN = "_kt_sft_shared_experts"

#: The call of a block that this thread is in.
_CALL: ContextVar[_Call | None] = ContextVar("kt_sft_block_call", default=None)


class _NotRecognisedError(Exception):
    """A block whose shared experts stay where they are; the message says why."""


@dataclasses.dataclass
class _Plan:
    """Which children of a block are its shared experts, and when it calls them.

    A block's copy has a copy of its plan, about the copied modules.
    """

    experts: list[CpuExperts]
    early: dict[str, nn.Module] = dataclasses.field(default_factory=dict)  # called before the routed experts
    late: dict[str, nn.Module] = dataclasses.field(default_factory=dict)  # called after them
    late_takes_block_input: dict[str, bool] = dataclasses.field(default_factory=dict)  # otherwise the routed experts'
    said_why_not: bool = False

    def applies(self, block: nn.Module, hidden_states: Any) -> bool:
        """Whether a call of `block` overlaps."""
        wanted = self.experts[0].config.overlap_shared_experts
        if wanted is None:  # on the CPU both would share the same cores
            wanted = isinstance(hidden_states, Tensor) and hidden_states.device.type != "cpu"
        if not wanted or torch.compiler.is_compiling():
            return False
        reason = self._changed(block)
        if reason is not None and not self.said_why_not:
            self.said_why_not = True
            logger.info("shared experts of %s run in the model's own order: %s", type(block).__name__, reason)
        return reason is None

    def _changed(self, block: nn.Module) -> str | None:
        """What has happened to the modules since, if they can no longer be taken out of the block's order."""
        for name, module in (self.early | self.late).items():
            if getattr(block, name, None) is not module:
                return f"{name} was replaced"
        for name, module in self.early.items():
            if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
                return f"{name} has hooks that must see its result at once"
        return None


@dataclasses.dataclass
class _Call:
    """One call of a block: what has been put off, and what was computed in advance."""

    plan: _Plan
    block_input: Any
    put_off: list[Deferred] = dataclasses.field(default_factory=list)
    ready: dict[str, tuple[Tensor, int | None, Any]] = dataclasses.field(default_factory=dict)
    submitted: bool = False

    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a shared expert gives to the block that calls it."""
        compute = functools.partial(type(module).forward, module, *args, **kwargs)
        for child in self.plan.early.values():
            if child is module and not self.submitted:
                self.put_off.append(Deferred.of(compute))
                return self.put_off[-1]
        for name, child in self.plan.late.items():
            if child is module and name in self.ready:
                given, version, result = self.ready[name]
                if len(args) == 1 and not kwargs and args[0] is given and _version(given) == version:
                    del self.ready[name]
                    return result
        return compute()

    def run(self, hidden_states: Tensor) -> None:
        """Computes the shared experts; the routed ones, of `hidden_states`, have been submitted."""
        if self.submitted:  # by other experts of the same block
            return
        self.submitted = True
        for deferred in self.put_off:
            deferred.result()
        for name, module in self.plan.late.items():
            given = self.block_input if self.plan.late_takes_block_input[name] else hidden_states
            version = _version(given)
            self.ready[name] = (given, version, type(module).forward(module, given))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _block_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plan, forward = getattr(block, _PLAN), type(block).forward
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if not plan.applies(block, hidden_states):
        return forward(block, *args, **kwargs)
    with _within(_Call(plan, hidden_states)):
        return forward(block, *args, **kwargs)


def _shared_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = _CALL.get()
    return type(module).forward(module, *args, **kwargs) if call is None else call.serve(module, args, kwargs)


def _run_beside(hidden_states: Tensor) -> None:
    call = _CALL.get()
    if call is not None:
        call.run(hidden_states)


@contextlib.contextmanager
def _within(call: _Call) -> Iterator[None]:
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def overlap_shared_experts(model: nn.Module) -> None:
    """Lets the shared experts of a loaded model run beside the routed ones; logs where that is not possible.

    Args:
        model: With its weights, and without adapters.
    """
    overlapped, refused = 0, {}
    for name, experts in _blocks_with_shared_experts(model).items():
        block = model.get_submodule(name)
        try:
            plan = _observe(block, experts)
        except _NotRecognisedError as error:
            refused[type(block).__name__] = str(error)
            continue
        _attach(block, plan)
        overlapped += 1
    if local_rank_and_size()[0] != 0:
        return
    if overlapped:
        logger.info("shared experts of %d layers can run while the CPU computes the routed ones", overlapped)
    for class_name, reason in refused.items():
        logger.info("shared experts of %s run in the model's own order: %s", class_name, reason)


def _blocks_with_shared_experts(model: nn.Module) -> dict[str, list[CpuExperts]]:
    """The modules that have both routed experts and something shared beside them, by name."""
    found: dict[str, list[CpuExperts]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, CpuExperts):
            continue
        parent = name.rpartition(".")[0]
        for ancestor in (parent, parent.rpartition(".")[0]):  # the latter where experts of several kinds share some
            if _shared_children(model.get_submodule(ancestor)):
                found.setdefault(ancestor, []).append(module)
                break
    return found


def _shared_children(block: nn.Module) -> dict[str, nn.Module]:
    return {
        name: child
        for name, child in block.named_children()
        if "shared" in name and any(True for _ in child.parameters())
    }


def _attach(block: nn.Module, plan: _Plan) -> None:
    setattr(block, _PLAN, plan)
    for module, forward in [(block, _block_forward)] + [
        (module, _shared_forward) for module in (plan.early | plan.late).values()
    ]:
        # A method of its instance: a copy of the module gets one of its own.
        module.forward = MethodType(forward, module)
    for experts in plan.experts:
        experts.beside = _run_beside


def _observe(block: nn.Module, experts: list[CpuExperts]) -> _Plan:
    """Finds when `block` calls its shared experts, and makes sure that its results stay the same to the bit.

    Raises:
        _NotRecognisedError: It cannot be found, or they would not.
    """
    children = _shared_children(block)
    if any("forward" in vars(module) for module in (block, *children.values())):
        raise _NotRecognisedError("its forward was replaced")
    weight = next((value for child in children.values() for value in child.parameters() if value.dim() == 2), None)
    if weight is None or weight.device.type == "meta":
        raise _NotRecognisedError("its weights are not there")
    random = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(1, 2, weight.shape[1], generator=random, device="cpu").to(weight.device, weight.dtype)
    plan = _Plan(experts)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device(weight.device):
            expected = _observe_order(block, plan, children, x)
            found = _try_plan(block, plan, x)
    except _NotRecognisedError:
        raise
    except Exception as error:  # whatever a block that we do not know does with an input that we made up
        raise _NotRecognisedError(f"it could not be tried ({error!r})") from error
    if len(expected) != len(found) or not all(map(_same_bits, expected, found)):
        raise _NotRecognisedError("its results depend on the order")
    return plan


def _observe_order(block: nn.Module, plan: _Plan, children: dict[str, nn.Module], x: Tensor) -> list[Any]:
    """Runs the block as it is, and notes what is called before and after the routed experts, with what."""
    routed: list[Tensor] = []

    def observed(name: str, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not routed:
                plan.early[name] = module
            elif len(args) == 1 and not kwargs and (args[0] is x or args[0] is routed[0]):
                plan.late[name], plan.late_takes_block_input[name] = module, args[0] is x
            return type(module).forward(module, *args, **kwargs)

        return forward

    replaced = {module: observed(name, module) for name, module in children.items()}
    replaced |= {module: _stand_in(routed.append) for module in plan.experts}
    with _replaced(replaced):
        result = tree_leaves(type(block).forward(block, x))
    if not routed or not (plan.early or plan.late):
        raise _NotRecognisedError("it calls them on something else than its routed experts")
    return result


def _try_plan(block: nn.Module, plan: _Plan, x: Tensor) -> list[Any]:
    """Runs the block by the plan, and leaves out of it what is needed before the routed experts."""
    call = _Call(plan, x)
    needed_before: list[bool] = []

    def submitted(hidden_states: Tensor) -> None:
        needed_before.append(any(deferred.is_computed for deferred in call.put_off))
        call.run(hidden_states)

    replaced: dict[nn.Module, Callable[..., Any]] = {module: _stand_in(submitted) for module in plan.experts}
    for module in (plan.early | plan.late).values():
        replaced[module] = functools.partial(_shared_forward, module)
    with _replaced(replaced), _within(call):
        result = tree_leaves(type(block).forward(block, x))
    if needed_before[0] or call.ready:
        raise _NotRecognisedError("it needs their result before that of its routed experts")
    return result


def _stand_in(called: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    """A function in the place of routed experts that costs nothing, but depends on all its inputs."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        called(hidden_states)
        factor = (top_k_weights * (top_k_index + 1)).sum(-1, keepdim=True)
        return hidden_states * factor.to(hidden_states.dtype)

    return forward


@contextlib.contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is other or bool(one == other)
