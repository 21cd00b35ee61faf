"""Facts read from made-up /sys and /proc, and the reasons of tiers."""

from __future__ import annotations

from pathlib import Path

import pytest

from kt_sft.cli import hosts, machine, seams
from kt_sft.config import TIERS


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def cache(sys: Path, cpu: int, index: int, *, level: int, kind: str, size: str, shared: str) -> None:
    folder = sys / f"devices/system/cpu/cpu{cpu}/cache/index{index}"
    for name, value in (("level", str(level)), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
        write(folder / name, value)


class TestCaches:
    def test_last_level_caches_count_once_for_all_cpus_that_share_them(self, tmp_path: Path) -> None:
        for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
            cache(tmp_path, cpu, 0, level=1, kind="Data", size="32K", shared=str(cpu))
            cache(tmp_path, cpu, 3, level=3, kind="Unified", size="16384K", shared=shared)
        assert machine.last_level_cache_bytes([0, 1], tmp_path) == 16 << 20
        assert machine.last_level_cache_bytes([0, 1, 2], tmp_path) == 32 << 20

    def test_instruction_caches_are_no_room_for_weights(self, tmp_path: Path) -> None:
        cache(tmp_path, 0, 0, level=2, kind="Instruction", size="512K", shared="0")
        cache(tmp_path, 0, 1, level=1, kind="Data", size="32K", shared="0")
        assert machine.last_level_cache_bytes([0], tmp_path) == 32 << 10

    def test_a_system_that_says_nothing(self, tmp_path: Path) -> None:
        assert machine.last_level_cache_bytes([0], tmp_path) is None


def test_numa_nodes_in_order_one_without_cpus(tmp_path: Path) -> None:
    nodes = tmp_path / "devices/system/node"
    write(nodes / "node10/cpulist", "")
    write(nodes / "node10/meminfo", "Node 10 MemTotal:       1024 kB")
    write(nodes / "node0/cpulist", "0-31,64-95")
    write(nodes / "node0/meminfo", "Node 0 MemFree: 5 kB\nNode 0 MemTotal:       2048 kB")
    assert machine.numa_nodes(tmp_path) == [
        {"node": 0, "cpus": "0-31,64-95", "memory_bytes": 2 << 20},
        {"node": 10, "cpus": "", "memory_bytes": 1 << 20},
    ]


def test_huge_pages(tmp_path: Path) -> None:
    write(tmp_path / "kernel/mm/transparent_hugepage/enabled", "always madvise [never]")
    write(tmp_path / "meminfo", "MemTotal: 9 kB\nHugePages_Total:       8\nHugePages_Free:  3\nHugepagesize:   2048 kB")
    assert machine.huge_pages(tmp_path, tmp_path) == {
        "transparent": "never",
        "defrag": None,
        "reserved": 8,
        "reserved_free": 3,
        "page_bytes": 2 << 20,
    }


def test_huge_pages_of_a_system_without_them(tmp_path: Path) -> None:
    found = machine.huge_pages(tmp_path, tmp_path)
    assert (found["transparent"], found["reserved"], found["page_bytes"]) == (None, 0, 0)


@pytest.mark.parametrize(
    ("before", "after", "granted"), [(0, 4 << 20, True), (2 << 20, 2 << 20, False), (None, None, None)]
)
def test_huge_pages_are_granted_where_touching_memory_makes_some(
    monkeypatch: pytest.MonkeyPatch, before: int | None, after: int | None, granted: bool | None
) -> None:
    readings = iter([before, after])
    monkeypatch.setattr(machine, "_own_huge_bytes", lambda: next(readings))
    assert machine.huge_pages_granted(megabytes=4) is granted


def test_the_cpu_and_its_features(tmp_path: Path) -> None:
    write(tmp_path / "cpuinfo", "processor : 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2 fma\n\nprocessor : 1")
    assert machine.cpu_flags(tmp_path) == {"fpu", "avx2", "fma"}
    assert machine.cpu_model(tmp_path) == "A CPU @ 2 GHz"
    assert machine.cpu_flags(tmp_path / "absent") is None


class TestTierReasons:
    flags = frozenset({"avx2", "fma", "f16c"})

    def test_the_best_is_in_use_and_the_cpu_lacks_the_rest(self) -> None:
        reasons = machine.tier_reasons(["portable", "avx2"], "avx2", None, set(self.flags))
        assert list(reasons) == list(TIERS)
        assert reasons["portable"] == "available"
        assert reasons["avx2"] == "in use: the best this machine has"
        assert "avx512f" in reasons["avx512"]
        assert (
            reasons["amx"] == "the CPU lacks avx512_bf16, amx_tile, amx_bf16, amx_int8, or the system does not grant it"
        )

    def test_a_higher_tier_that_is_slower_is_left_alone(self) -> None:
        reasons = machine.tier_reasons(["portable", "avx2", "avx512", "avx512_bf16"], "avx512", None, set())
        assert reasons["avx512"] == "in use: the fastest on this machine"
        assert reasons["avx512_bf16"] == (
            "available; its products are slower here than avx512's (KT_SFT_ISA=avx512_bf16 would use it)"
        )
        assert reasons["avx2"] == "available"

    def test_a_lowered_tier_is_put_down_to_the_variable(self) -> None:
        reasons = machine.tier_reasons(["portable", "avx2"], "portable", "portable", set(self.flags))
        assert reasons["portable"] == "in use: KT_SFT_ISA=portable"
        assert reasons["avx2"] == "available; KT_SFT_ISA=portable keeps it from being used"

    def test_a_cpu_that_has_it_all_points_to_the_build(self) -> None:
        reasons = machine.tier_reasons(["portable"], "portable", None, set(self.flags))
        assert reasons["avx2"] == "this build lacks it, or the system does not grant its registers"

    def test_features_that_cannot_be_read_are_not_called_missing(self) -> None:
        assert "lacks it" in machine.tier_reasons(["portable"], "portable", None, None)["avx2"]


def test_accelerators_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Module:
        @staticmethod
        def get_device_name(number: int) -> str:
            return f"Device {number}"

        @staticmethod
        def mem_get_info(number: int) -> tuple[int, int]:
            return 1, 2 + number

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module)
    assert machine.accelerators() == [
        {"kind": "cuda", "name": "Device 0", "memory_bytes": 2, "free_bytes": 1},
        {"kind": "cuda", "name": "Device 1", "memory_bytes": 3, "free_bytes": 1},
    ]


class TestHosts:
    def test_every_host_the_package_asks_for_is_listed_with_its_range(self) -> None:
        found = {host["name"]: host for host in hosts.versions()}
        assert found["torch"]["wanted"] == ">=2.6"
        assert not found["torch"]["optional"]
        assert found["deepspeed"]["optional"]
        assert all(host["fits"] for host in found.values())

    @pytest.mark.parametrize(
        ("version", "fits"), [("2.5.1", False), ("2.6.0", True), ("2.11.0+cpu", True), ("2.12.0.dev1", True)]
    )
    def test_versions_against_the_range(self, monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
        monkeypatch.setattr(hosts.importlib.metadata, "version", lambda name: version)
        assert hosts.versions()[0]["fits"] is fits

    def test_what_is_absent_fits_only_where_it_is_optional(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> str:
            raise hosts.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(hosts.importlib.metadata, "version", absent)
        assert {host["name"] for host in hosts.versions() if host["fits"]} == {"trl", "deepspeed", "wandb"}


class TestSeams:
    @pytest.mark.parametrize("name", seams.SEAMS)
    def test_fits_the_installed_hosts(self, name: str) -> None:
        assert seams.SEAMS[name]() is None

    def test_another_signature_is_a_problem_that_names_both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import llamafactory.model.loader
        import llamafactory.model.patcher

        def patch_model(model: object, tokenizer: object) -> None: ...

        monkeypatch.setattr(llamafactory.model.patcher, "patch_model", patch_model)
        monkeypatch.setattr(llamafactory.model.loader, "patch_model", patch_model)
        problem = seams.SEAMS["LLaMA-Factory: loaded models"]()
        assert problem is not None
        assert "takes (model, tokenizer), kt_sft expects (model, tokenizer, model_args" in problem

    def test_a_name_that_is_gone_is_a_problem_not_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import core_model_loading

        monkeypatch.delattr(core_model_loading, "rename_source_key")
        found = {seam["name"]: seam["problem"] for seam in seams.check_all()}
        assert "rename_source_key" in found["transformers: weight conversions"]
        assert found["transformers: saving"] is None
