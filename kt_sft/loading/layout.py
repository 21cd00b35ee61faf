"""Recognises modules of routed experts by what they are and do, never by their class's name.

transformers marks an experts class with a decorator that sets `has_gate`, `has_bias` and `is_transposed`; shapes come
from the parameters; what the gating computes is found by computing it, so a new class needs no entry anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from kt_sft.loading.errors import UnsupportedModelError

_MARKS = ("has_gate", "has_bias", "is_transposed")

#: gpt-oss: https://github.com/openai/gpt-oss, swiglu() in gpt_oss/torch/model.py.
_OAI_LIMIT, _OAI_ALPHA = 7.0, 1.702

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}

# Probes run in float64 on |x| <= 64, most of them near 0, where activations differ, and some far out, where they are
# clamped. Two ways to write the same function agree up to a few tens of roundings of 2**-53, relative to the value or
# to 1; two different activations differ by more than 1e-4 somewhere.
_PROBE_RANGE, _PROBE_TOLERANCE = 64.0, 1e-11


@dataclass(frozen=True)
class ExpertLayout:
    """What one module of routed experts holds and computes."""

    class_name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str  # as in CpuExperts
    gated: bool
    interleaved: bool  # gate and up rows alternate
    transposed: bool  # parameters are [in, out]
    biased: bool

    @property
    def first_parameter(self) -> str:
        """The name of the parameter that the hidden states meet first."""
        return "gate_up_proj" if self.gated else "up_proj"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the module that this layout was read from."""
        E, H, I = self.num_experts, self.hidden_size, self.intermediate_size
        rows = 2 * I if self.gated else I
        first, down = ((E, H, rows), (E, I, H)) if self.transposed else ((E, rows, H), (E, H, I))
        shapes: dict[str, tuple[int, ...]] = {self.first_parameter: first, "down_proj": down}
        if self.biased:
            shapes |= {f"{self.first_parameter}_bias": (E, rows), "down_proj_bias": (E, H)}
        return shapes


def find_experts(model: nn.Module) -> dict[str, ExpertLayout]:
    """The modules of routed experts of `model`, by name; empty for a dense model.

    Raises:
        UnsupportedModelError: The model has routed experts that the engine cannot take.
    """
    layouts = {
        name: _read_layout(name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, mark) for mark in _MARKS)
    }
    for name, module in model.named_modules():
        if _looks_like_experts(name, module) and not _related(name, layouts):
            raise UnsupportedModelError(
                f"{type(module).__name__} at {name!r} holds routed experts that do not follow transformers' experts "
                f"interface, so kt_sft cannot run them; leave kt_sft out to train {type(model).__name__} without it"
            )
    return layouts


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2].lower()
    class_name = type(module).__name__
    named = re.search(r"experts$", last) is not None or re.search(r"Experts(?![a-z])", class_name) is not None
    shared = "shared" in last or "Shared" in class_name
    return named and not shared and any(True for _ in module.parameters())


def _related(name: str, layouts: dict[str, ExpertLayout]) -> bool:
    """Whether `name` is a recognised module, lies in one, or contains one."""
    return any(name == known or name.startswith(f"{known}.") or known.startswith(f"{name}.") for known in layouts)


def _read_layout(name: str, module: nn.Module) -> ExpertLayout:
    class_name = type(module).__name__
    gated, biased, transposed = (bool(getattr(module, mark)) for mark in _MARKS)
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters()}
    first = shapes.get("gate_up_proj" if gated else "up_proj")
    down = shapes.get("down_proj")
    if first is None or down is None or len(first) != 3 or len(down) != 3:
        raise UnsupportedModelError(f"{class_name} at {name!r} has parameters {shapes}, not those of routed experts")
    E, H, I = (down[0], down[2], down[1]) if transposed else down
    activation, interleaved = _read_gating(name, module) if gated else (_read_activation(name, module), False)
    layout = ExpertLayout(class_name, E, H, I, activation, gated, interleaved, transposed, biased)
    if layout.parameter_shapes() != shapes:
        raise UnsupportedModelError(
            f"{class_name} at {name!r} has parameters {shapes}, expected {layout.parameter_shapes()}"
        )
    return layout


def _probe(shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    unit = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (2 * unit - 1) ** 3 * _PROBE_RANGE


def _same(found: object, expected: torch.Tensor) -> bool:
    return (
        isinstance(found, torch.Tensor)
        and found.shape == expected.shape
        and found.device.type == "cpu"
        and bool(((found - expected).abs() <= _PROBE_TOLERANCE * expected.abs().clamp(min=1)).all())
    )


def _run(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> object:
    """`function(x)` away from the meta device that models are built under; None if it cannot run on its own."""
    try:
        with torch.device("cpu"), torch.no_grad():
            return function(x)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return None


def _read_activation(name: str, module: nn.Module) -> str:
    x = _probe((256,))
    found = _run(getattr(module, "act_fn", lambda _: None), x)
    for activation, reference in _ACTIVATIONS.items():
        if _same(found, reference(x)):
            return activation
    raise UnsupportedModelError(
        f"{type(module).__name__} at {name!r} uses an activation that the engine does not have "
        f"({getattr(module, 'act_fn', None)!r}); it has {', '.join(_ACTIVATIONS)}"
    )


def _read_gating(name: str, module: nn.Module) -> tuple[str, bool]:
    """(activation, whether gate and up alternate) of a gated module."""
    x = _probe((16, 64))
    found = _run(getattr(module, "_apply_gate", lambda _: None), x)
    for interleaved in (False, True):
        gate, up = (x[:, 0::2], x[:, 1::2]) if interleaved else x.chunk(2, dim=-1)
        for activation, reference in _ACTIVATIONS.items():
            if _same(found, reference(gate) * up):
                return activation, interleaved
        clamped = gate.clamp(max=_OAI_LIMIT)
        oai = clamped * torch.sigmoid(_OAI_ALPHA * clamped) * (up.clamp(-_OAI_LIMIT, _OAI_LIMIT) + 1)
        if _same(found, oai):
            return "swiglu_oai", interleaved
    raise UnsupportedModelError(
        f"{type(module).__name__} at {name!r} gates its experts in a way that the engine does not have "
        f"(act_fn {getattr(module, 'act_fn', None)!r}); it has {', '.join(_ACTIVATIONS)} and gpt-oss' clamped SwiGLU"
    )
