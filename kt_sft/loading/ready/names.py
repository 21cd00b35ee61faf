"""What the tensors of a ready store are called."""

from __future__ import annotations

from kt_sft.loading.layout import ExpertLayout

#: In the name of every tensor of experts.
MARK = ".kt_sft_"

#: Stands in every module of experts under the name of the module's own first parameter. It is of no shape that a model
#: has: whatever loads a store without kt_sft fails on it, where it would otherwise put random values for the experts.
NOTE = "a ready store of kt_sft: its experts are codes and scales that only kt_sft reads; load it with a kt_sft block"


def part_key(module: str, matrix: str, expert_format: str, part: str) -> str:
    """Codes, scales or zero points of one matrix of all experts; the codes of several formats look alike otherwise."""
    return f"{module}.{matrix}{MARK}{expert_format}_{part}"


def bias_key(module: str, name: str) -> str:
    """The bias of "gate_up" or of "down", as the source has it."""
    return f"{module}.{name}{MARK}bias"


def note_key(module: str, layout: ExpertLayout) -> str:
    """The name of `NOTE`."""
    return f"{module}.{layout.first_parameter}"
