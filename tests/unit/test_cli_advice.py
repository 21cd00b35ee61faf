"""What `kt-sft doctor` advises, on made-up machines."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kt_sft.cli.advice import advise

GIB = 1 << 30

#: A machine on which there is nothing to do.
READY: dict[str, Any] = {
    "engine": {"error": None, "tier": "avx512_bf16", "limit": None, "threads": 8},
    "tiers": [
        {"name": "portable", "available": True},
        {"name": "avx2", "available": True},
        {"name": "avx512_bf16", "available": True},
        {"name": "amx", "available": False},
    ],
    "cpu": {"online": 8, "usable": 8, "container_limit": None, "matrix_flags": [], "openmp_wait_policy": "passive"},
    "memory": {"total_bytes": 64 * GIB, "container_limit_bytes": None},
    "numa": [{"node": 0}],
    "huge_pages": {"transparent": "madvise", "granted": True},
    "accelerators": [{"kind": "cuda"}],
    "hosts": [{"name": "torch", "version": "2.11.0", "wanted": ">=2.6", "fits": True}],
    "seams": [{"name": "saving", "problem": None}],
}


def changed(path: str, value: object) -> dict[str, Any]:
    facts = copy.deepcopy(READY)
    *parents, last = path.split(".")
    place = facts
    for parent in parents:
        place = place[parent]
    place[last] = value
    return facts


def test_a_ready_machine_needs_no_advice() -> None:
    assert advise(READY) == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("engine.error", "no threads", "The engine does not run: no threads"),
        ("cpu.container_limit", 2.0, "Your container grants 2 of 8 CPUs"),
        ("cpu.online", 64, "This process may use 8 of 64 CPUs"),
        ("cpu.openmp_wait_policy", None, "Set OMP_WAIT_POLICY=passive"),
        ("cpu.openmp_wait_policy", "active", "Set OMP_WAIT_POLICY=passive"),
        ("cpu.matrix_flags", ["amx_bf16", "amx_tile"], "This CPU has AMX but the engine cannot use it"),
        ("huge_pages.transparent", "never", "Transparent huge pages are off: as root, echo madvise >"),
        ("huge_pages.granted", False, "memory that asked for them got none"),
        ("memory.container_limit_bytes", 16 * GIB, "Your container may take 16 of the machine's 64 GiB"),
        ("accelerators", [], "needs use_cpu: true"),
        (
            "hosts",
            [{"name": "peft", "version": "0.17.0", "wanted": ">=0.18", "fits": False}],
            "peft 0.17.0 is installed, kt_sft needs peft>=0.18",
        ),
        (
            "hosts",
            [{"name": "peft", "version": None, "wanted": ">=0.18", "fits": False}],
            "peft is not installed, kt_sft needs peft>=0.18",
        ),
        ("seams", [{"name": "saving", "problem": "save has moved"}], "save has moved: recipes with a kt_sft block may"),
    ],
)
def test_what_applies_is_advised_and_nothing_else(path: str, value: object, expected: str) -> None:
    (sentence,) = advise(changed(path, value))
    assert expected in sentence
    assert sentence.endswith((".", "no threads"))


def test_a_tier_held_back_is_named_with_the_one_to_be_had() -> None:
    facts = changed("engine.limit", "avx2")
    facts["engine"]["tier"] = "avx2"
    (sentence,) = advise(facts)
    assert "KT_SFT_ISA=avx2 holds the engine at avx2 although this machine has avx512_bf16" in sentence


def test_a_limit_that_does_not_hold_anything_back_is_not_mentioned() -> None:
    assert advise(changed("engine.limit", "amx")) == []


def test_a_container_limit_above_the_usable_cpus_is_none() -> None:
    assert advise(changed("cpu.container_limit", 16.0)) == []


def test_limited_time_on_several_nodes_costs_the_threads_their_place() -> None:
    facts = changed("numa", [{"node": 0}, {"node": 1}])
    assert advise(facts) == []
    facts["cpu"]["container_limit"] = 4.0
    assert any("2 NUMA nodes" in sentence and "--cpuset-cpus" in sentence for sentence in advise(facts))


def test_huge_pages_that_cannot_be_told_are_left_alone() -> None:
    assert advise(changed("huge_pages.granted", None)) == []
