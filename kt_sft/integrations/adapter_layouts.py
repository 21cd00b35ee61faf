"""The two ways in which adapter files name and store LoRA on routed experts, and one form that both are turned into.

E experts, R rank, H hidden size, I expert intermediate size, p and q the two sizes of a matrix.

*fused*: PEFT's `target_parameters`. `gate_up_proj` and `down_proj` of a layer are one parameter each, wrapped one
around the other, so the inner one's tensors are `...experts.base_layer.lora_A.weight` and the outer one's
`...experts.lora_A.weight`. A is [E·R, p], expert-major; B is [q, R·E], rank-major. PEFT takes a parameter [E, x, y] as
p = x, q = y up to 0.18, and from 0.19 on as p = y, q = x unless the class is marked `is_transposed` (gpt-oss). With
weights stored [E, out, in], A therefore stands on the output side in files of 0.18 and on the input side in those of
0.19; with weights stored [E, in, out] it stands on the input side in both.

*listed*: one pair per matrix of each expert, `...experts.3.gate_proj.lora_A.weight` [R, in], `lora_B` [out, R], with
the names that the matrices have in checkpoints. It is what vLLM and SGLang load.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class AdapterFileError(ValueError):
    """An adapter cannot be read or converted; the message names the file, tensor or setting and the way out."""


@dataclass(frozen=True)
class Factors:
    """LoRA on one matrix of every expert: the change of expert e is scale · b[e] @ a[e]."""

    a: Tensor  # [E, R, in]
    b: Tensor  # [E, out, R]
    alpha: float  # scale is alpha / R, or alpha / sqrt(R) with rsLoRA

    @property
    def num_experts(self) -> int:
        """E."""
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[1]


#: Module of experts -> "gate_up", "gate", "up" or "down" -> its factors. Gate rows come first in "gate_up".
Experts = dict[str, dict[str, Factors]]

#: The name of a tensor's module or parameter, as PEFT matches patterns against it -> (rank, alpha) by the config.
RankOf = Callable[[str], tuple[int, float]]

_FUSED = re.compile(r"(?P<module>(?:.*\.)?experts)(?P<nesting>(?:\.base_layer)*)\.lora_(?P<side>[AB])\.weight")
_LISTED = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.lora_(?P<side>[AB])\.weight")
_PREFIX = "base_model.model."

#: What checkpoints call an expert's matrices.
_MATRICES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
DEFAULT_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

PARAMETERS = {"gate_up": "gate_up_proj", "up": "up_proj", "down": "down_proj"}


def plain_name(key: str) -> str:
    """The module or parameter that an adapter's key belongs to, as the base model names it."""
    return re.sub(r"\.lora_[AB]\.weight$", "", key).removeprefix(_PREFIX)


def is_of_experts(key: str) -> bool:
    """Whether a tensor belongs to routed experts. Every family of transformers calls their module `experts`."""
    return "experts" in key.split(".")


def layout_of(keys: Sequence[str]) -> str:
    """ "fused" or "listed", by the keys of the experts' tensors.

    Raises:
        AdapterFileError: There are none, they mix both layouts, or one has a key of neither.
    """
    if not keys:
        raise AdapterFileError("the adapter has no weights for routed experts, so there is nothing to convert")
    layouts: dict[str, str] = {}
    for key in keys:
        if _FUSED.fullmatch(key):
            layouts["fused"] = key
        elif _LISTED.fullmatch(key):
            layouts["listed"] = key
        else:
            raise AdapterFileError(f"tensor {key} belongs to routed experts, but to no layout of LoRA known here")
    if len(layouts) > 1:
        raise AdapterFileError(f"tensors {layouts['fused']} and {layouts['listed']} are of two different layouts")
    return next(iter(layouts))


def read_listed(tensors: Mapping[str, Tensor], rank_of: RankOf) -> Experts:
    """Reads the listed layout.

    Raises:
        AdapterFileError: An expert or one of a pair is missing, or a shape does not fit the config or the others.
    """
    found: dict[str, dict[str, dict[int, dict[str, str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for key in tensors:
        match = _LISTED.fullmatch(key)
        assert match is not None
        if match["leaf"] not in _MATRICES:
            raise AdapterFileError(f"tensor {key}: {match['leaf']} is none of {', '.join(_MATRICES)}")
        sides = found[match["module"]][_MATRICES[match["leaf"]]][int(match["expert"])]
        if match["side"] in sides:
            raise AdapterFileError(f"tensors {sides[match['side']]} and {key} are the same matrix")
        sides[match["side"]] = key
    experts: Experts = {}
    for module, matrices in found.items():
        count = 1 + max(expert for listed in matrices.values() for expert in listed)
        experts[module] = {
            matrix: _stack(module, matrix, listed, count, tensors, rank_of) for matrix, listed in matrices.items()
        }
    return experts


def _stack(
    module: str,
    matrix: str,
    listed: Mapping[int, Mapping[str, str]],
    count: int,
    tensors: Mapping[str, Tensor],
    rank_of: RankOf,
) -> Factors:
    pairs: list[tuple[Tensor, Tensor]] = []
    alphas = set()
    for expert in range(count):
        keys = listed.get(expert, {})
        if set(keys) != {"A", "B"}:
            missing = " and ".join(f"lora_{side}" for side in ("A", "B") if side not in keys)
            raise AdapterFileError(f"{module}: {missing} of {matrix} of expert {expert} (of {count}) is missing")
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        rank, alpha = rank_of(plain_name(keys["A"]))
        _check_pair(keys["A"], a, b, rank, experts=1)
        if pairs and (a.shape, b.shape) != (pairs[0][0].shape, pairs[0][1].shape):
            raise AdapterFileError(f"tensor {keys['A']} or its lora_B has another shape than those of expert 0")
        pairs.append((a, b))
        alphas.add(alpha)
    if len(alphas) > 1:
        raise AdapterFileError(f"{module}: alpha_pattern gives the experts different alphas for {matrix}")
    return Factors(torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]), alphas.pop())


def _check_pair(key: str, a: Tensor, b: Tensor, rank: int, experts: int | None) -> None:
    """Are A [E·R, p] and B [q, R·E] of the config's rank, with E any count where `experts` is None?"""
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise AdapterFileError(f"tensor {key} {list(a.shape)} and its lora_B {list(b.shape)} do not fit each other")
    expected = "a multiple of" if experts is None else "equal to"
    if a.shape[0] % rank or (experts is not None and a.shape[0] != experts * rank):
        raise AdapterFileError(
            f"tensor {key} has {a.shape[0]} rows, which should be {expected} the rank {rank} that adapter_config.json "
            "gives it: the config is not this adapter's"
        )


def write_listed(experts: Experts, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors in the listed layout, where gate and up of a fused pair get a copy of their common A each.

    Args:
        experts: In fused or split form.
        names: Of "gate", "up" and "down" in the keys.
    """
    tensors = {}
    for module, fused in experts.items():
        for matrix, factors in split(fused).items():
            for expert in range(factors.num_experts):
                key = f"{module}.{expert}.{names[matrix]}"
                tensors[f"{key}.lora_A.weight"] = factors.a[expert].clone(memory_format=torch.contiguous_format)
                tensors[f"{key}.lora_B.weight"] = factors.b[expert].clone(memory_format=torch.contiguous_format)
    return tensors


def split(matrices: Mapping[str, Factors]) -> dict[str, Factors]:
    """A fused gate_up as gate and up."""
    apart = {key: factors for key, factors in matrices.items() if key != "gate_up"}
    if (both := matrices.get("gate_up")) is not None:
        gate, up = both.b.chunk(2, dim=1)
        apart = {"gate": Factors(both.a, gate, both.alpha), "up": Factors(both.a, up, both.alpha)} | apart
    return apart


def fuse(module: str, matrices: Mapping[str, Factors], *, rslora: bool) -> dict[str, Factors]:
    """Gate and up as one gate_up, which has one A.

    Where theirs differ, the ranks are concatenated, so that the change stays exactly the same:
    [gate B, 0; 0, up B] @ [gate A; up A]. The rank doubles, and with alpha doubled alpha / R stays. With rsLoRA the
    scale is alpha / sqrt(R): only a fourfold rank, half of it zeros, leaves it exact, with alpha doubled.

    Raises:
        AdapterFileError: One of them is missing, or ranks, alphas or shapes differ.
    """
    if "gate" not in matrices:
        return dict(matrices)
    if "up" not in matrices:
        raise AdapterFileError(f"{module}: gate has LoRA and up has none; a fused gate_up_proj cannot say that")
    gate, up = matrices["gate"], matrices["up"]
    if gate.a.shape != up.a.shape or gate.b.shape != up.b.shape or gate.alpha != up.alpha:
        raise AdapterFileError(f"{module}: LoRA of gate and up differ in rank, alpha or size, so they cannot be fused")
    if torch.equal(gate.a, up.a):
        both = Factors(gate.a, torch.cat([gate.b, up.b], dim=1), gate.alpha)
    else:
        a = torch.cat([gate.a, up.a], dim=1)
        zero = torch.zeros_like(gate.b)
        b = torch.cat([torch.cat([gate.b, zero], dim=2), torch.cat([zero, up.b], dim=2)], dim=1)
        if rslora:
            a, b = torch.cat([a, torch.zeros_like(a)], dim=1), torch.cat([b, torch.zeros_like(b)], dim=2)
        both = Factors(a, b, 2 * gate.alpha)
    return {"gate_up": both, **{key: factors for key, factors in matrices.items() if key not in ("gate", "up")}}


def read_fused(
    tensors: Mapping[str, Tensor], rank_of: RankOf, targeted: set[str], side_of: Callable[[int, int], bool]
) -> tuple[Experts, bool]:
    """Reads the fused layout.

    Which wrapper is which, and on which side A stands, follows from sizes where both parameters of gated experts are
    there: of (p, q) and (p', q') one is (H, 2I) and the other (I, H), or (2I, H) and (H, I), and at most one of the
    four ways to assign them can hold. Else the names are those of `targeted` (of two, the inner one is what the class
    defines first: never down_proj), and the side is what `side_of` says.

    Args:
        tensors: Those of experts.
        rank_of: By parameter names as `model.layers.0.mlp.experts.gate_up_proj`.
        targeted: Names of parameters that the config targets.
        side_of: (p, q) of one that the hidden states meet first, or (q, p) of a down_proj -> whether A is on the input
            side.

    Returns:
        The factors, and whether A stands on the input side.

    Raises:
        AdapterFileError: One of a pair is missing, or a shape fits neither the config nor the others.
    """
    found: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in tensors:
        match = _FUSED.fullmatch(key)
        assert match is not None
        found[match["module"]][match["nesting"].count(".")][match["side"]] = key
    experts: Experts = {}
    sides = set()
    for module, wrappers in found.items():
        pairs = []
        for depth in sorted(wrappers, reverse=True):  # the inner one first
            keys = wrappers[depth]
            if set(keys) != {"A", "B"}:
                (key,) = keys.values()
                raise AdapterFileError(f"tensor {key} has no counterpart lora_{'B' if 'A' in keys else 'A'}")
            pairs.append((keys["A"], tensors[keys["A"]], tensors[keys["B"]]))
        for key, a, b in pairs:
            _check_pair(key, a, b, 1, experts=None)
        sizes = [(a.shape[1], b.shape[0]) for _, a, b in pairs]
        matrices, input_side = _assign(module, sizes, targeted, side_of)
        sides.add(input_side)
        experts[module] = {
            matrix: _unfuse(module, matrix, *pair, rank_of, input_side)
            for matrix, pair in zip(matrices, pairs, strict=True)
        }
        counts = {matrix: factors.num_experts for matrix, factors in experts[module].items()}
        if len(set(counts.values())) > 1:
            raise AdapterFileError(f"{module}: by their ranks its parameters have different counts of experts {counts}")
    if len(sides) > 1:
        raise AdapterFileError("lora_A stands on the input side in some layers and on the output side in others")
    return experts, sides.pop()


def _assign(
    module: str, sizes: list[tuple[int, int]], targeted: set[str], side_of: Callable[[int, int], bool]
) -> tuple[list[str], bool]:
    """Which matrix each wrapper is, the inner one first, and whether A stands on the input side."""
    known = [matrix for matrix, name in PARAMETERS.items() if name in targeted]
    if len(sizes) != len(known):
        raise AdapterFileError(
            f"{module} has LoRA on {len(sizes)} parameters, and target_parameters of adapter_config.json names "
            f"{len(known)} of {', '.join(PARAMETERS.values())}"
        )
    if len(sizes) == 1:
        (p, q), (matrix,) = sizes[0], known
        input_side = side_of(q, p) if matrix == "down" else side_of(p, q)
        if matrix == "gate_up" and (q if input_side else p) % 2:
            raise AdapterFileError(
                f"{module}: gate_up_proj with {q if input_side else p} rows is no pair of gate and up"
            )
        return known, input_side
    first = known[0]
    if first == "up":
        (p, q), (other_p, other_q) = sizes
        if (p, q) != (other_q, other_p):
            raise AdapterFileError(f"{module}: LoRA of sizes {sizes} is not that of an up_proj and a down_proj")
        return ["up", "down"], side_of(p, q)
    for names in (["gate_up", "down"], ["down", "gate_up"]):
        (p, q), (down_p, down_q) = (sizes[names.index(matrix)] for matrix in ("gate_up", "down"))
        if p == down_q and q == 2 * down_p:
            return names, True
        if q == down_p and p == 2 * down_q:
            return names, False
    raise AdapterFileError(f"{module}: LoRA of sizes {sizes} is not that of a gate_up_proj and a down_proj")


def _unfuse(module: str, matrix: str, key: str, a: Tensor, b: Tensor, rank_of: RankOf, input_side: bool) -> Factors:
    rank, alpha = rank_of(plain_name(f"{module}.{PARAMETERS[matrix]}"))
    _check_pair(key, a, b, rank, experts=None)
    a_ERp = a.reshape(-1, rank, a.shape[1])
    b_EqR = b.reshape(b.shape[0], rank, -1).permute(2, 0, 1)
    if input_side:
        return Factors(a_ERp, b_EqR, alpha)
    return Factors(b_EqR.transpose(1, 2), a_ERp.transpose(1, 2), alpha)


def write_fused(experts: Experts, *, input_side: bool) -> dict[str, Tensor]:
    """Tensors in the fused layout, down_proj outside, as the classes of transformers make PEFT nest them."""
    tensors = {}
    for module, matrices in experts.items():
        for matrix, factors in matrices.items():
            nesting = ".base_layer" if matrix != "down" and "down" in matrices else ""
            a, b = factors.a, factors.b
            if not input_side:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            key = f"{module}{nesting}"
            tensors[f"{key}.lora_A.weight"] = a.reshape(-1, a.shape[2]).contiguous()
            tensors[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()
    return tensors
