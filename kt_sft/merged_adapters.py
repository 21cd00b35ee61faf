"""What adapters merged into one module of experts left there: their parts, to be taken back one by one.

Shape letters: E experts, H hidden size, I expert intermediate size, r rank.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kt_sft.engine.low_rank import LowRank, concatenate
from kt_sft.engine.operands import Factors


class MergedAdapters:
    """What the layers around one module of experts have merged into it.

    Args:
        before: What was merged before these layers were there.
        before_digests: Of that, and of what was merged into the weights before they were loaded.
        num_experts: E.
        gate_up_sizes: What one expert's gate and up take, and what they give: (H, 2I).
        down_sizes: (I, H).
    """

    def __init__(
        self,
        before: LowRank | None,
        before_digests: frozenset[str],
        num_experts: int,
        gate_up_sizes: tuple[int, int],
        down_sizes: tuple[int, int],
    ) -> None:
        self._before = before
        self._before_digests = before_digests
        self._num_experts = num_experts
        self._sizes = {False: gate_up_sizes, True: down_sizes}
        self._parts: dict[str, dict[bool, tuple[Tensor, Tensor]]] = {}
        self._digests: dict[tuple[str, bool], str | None] = {}

    @property
    def for_good(self) -> bool:
        """Whether something was merged before these layers were there."""
        return self._before is not None

    def digests(self) -> frozenset[str]:
        """Of all that is merged."""
        return self._before_digests | {digest for digest in self._digests.values() if digest is not None}

    def check_new(self, adapter_name: str, is_down: bool, a: Tensor, b: Tensor) -> str | None:
        """The digest of an adapter's part on down, or on gate and up, as `snapshot` gives it.

        Raises:
            ValueError: An adapter with these very values is merged, under whatever name.
        """
        digest = digest_of(is_down, a, b)
        if digest in self.digests():
            raise ValueError(
                f"kt_sft: adapter {adapter_name!r} has the values of one that is merged into the experts already, here "
                "or in the checkpoint that they were loaded from; its change would count twice, so leave it out"
            )
        return digest

    def add(self, adapter_name: str, is_down: bool, a: Tensor, b: Tensor) -> None:
        """Adds such a part.

        Raises:
            ValueError: As of `check_new`.
        """
        digest = self.check_new(adapter_name, is_down, a, b)
        self._parts.setdefault(adapter_name, {})[is_down] = (a, b)
        self._digests[adapter_name, is_down] = digest

    def remove(self, adapter_name: str, is_down: bool) -> None:
        """Takes such a part back."""
        parts = self._parts[adapter_name]
        del parts[is_down], self._digests[adapter_name, is_down]
        if not parts:
            del self._parts[adapter_name]

    def total(self) -> LowRank | None:
        """All of them as one change; None without any."""
        changes = [] if self._before is None else [self._before]
        with torch.inference_mode(False):  # what is merged stays, and may meet training
            changes += [self._change(parts) for parts in self._parts.values()]
            return concatenate(changes) if changes else None

    def _change(self, parts: dict[bool, tuple[Tensor, Tensor]]) -> LowRank:
        """Zeros stand for a parameter that is not adapted, and for ranks that one has more than the other."""
        rank = max(a.shape[1] for a, _ in parts.values())
        tensors = []
        for is_down, (columns, rows) in self._sizes.items():
            a = torch.zeros(self._num_experts, rank, columns, device="cpu", dtype=torch.float32)
            b = torch.zeros(self._num_experts, rows, rank, device="cpu", dtype=torch.float32)
            if is_down in parts:
                part_a, part_b = parts[is_down]
                a[:, : part_a.shape[1]], b[:, :, : part_a.shape[1]] = part_a, part_b
            tensors += [a, b]
        return LowRank(*tensors)


def snapshot(factors: Factors) -> tuple[Tensor, Tensor]:
    """An adapter's matrices as they are now, copied to the CPU: FP32 A [E, r, in], and B [E, out, r] with its scale."""
    a, b = factors.a.detach(), factors.b.detach().flatten(1, -2)
    return a.to("cpu", torch.float32).clone(), b.to("cpu", torch.float32) * factors.scale


def digest_of(is_down: bool, a: Tensor, b: Tensor) -> str | None:
    """What tells the values of a `snapshot` from others, whatever file they came from; None if they change nothing."""
    if not (a.any() and b.any()):
        return None
    digest = hashlib.sha256(repr((is_down, a.shape, b.shape)).encode())
    for tensor in (a, b):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:32]
