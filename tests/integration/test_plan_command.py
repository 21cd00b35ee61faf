"""`kt-sft plan`: JSON with its keys, tables, overrides, other machines, and what cannot be planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kt_sft.cli.app import app
from kt_sft.planning import machine

KEYS = {
    "experts_bytes",
    "dense_bytes",
    "lora_bytes",
    "optimizer_bytes",
    "activation_bytes",
    "host_need_bytes",
    "host_have_bytes",
    "device_need_bytes",
    "device_have_bytes",
    "step_seconds",
    "tokens_per_second",
    "fits",
    "suggestion",
}
GPU_BOX: dict[str, Any] = {
    "engine": {"tier": "amx", "threads": 8},
    "tiers": [{"chosen": True, "peak_gflops": 1000.0}],
    "cpu": {"model": "a CPU"},
    "memory": {"total_bytes": 64 << 30, "available_bytes": 60 << 30, "read_gbs": 40.0},
    "accelerators": [{"kind": "cuda", "name": "a GPU", "memory_bytes": 24 << 30, "free_bytes": 23 << 30}],
}


@pytest.fixture
def invoke(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command on the base recipe with changes; what a process takes is made up."""
    monkeypatch.setattr(machine, "measured_base", lambda: 1 << 30)

    def run(*arguments: str, **changes: Any) -> Any:
        recipe = write_recipe(**{"kt_sft": {}} | changes)
        return CliRunner().invoke(app, ["plan", str(recipe), "--no-measure", *arguments])

    return run


def test_the_json_has_its_keys(invoke: Callable[..., Any]) -> None:
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found.keys() >= KEYS
    assert found["experts_bytes"] == 2 * 8 * 3 * 32 * 24 * 2
    assert found["device_need_bytes"] == 0
    assert found["device_have_bytes"] is None
    assert found["fits"] is True
    assert found["host_need_bytes"] == sum(found["host_terms"].values())
    assert found["step_seconds"] > 0


def test_settings_and_processes_on_the_command_line(invoke: Callable[..., Any]) -> None:
    one = json.loads(invoke("--json").stdout)
    other = json.loads(invoke("kt_sft.expert_format=int8", "cutoff_len=96", "--processes", "2", "--json").stdout)
    assert other["expert_formats"] == ["int8"]
    assert other["experts_bytes"] < 0.75 * one["experts_bytes"]
    assert other["tokens_per_micro_batch"] == 2 * one["tokens_per_micro_batch"]
    each = sum(other["host_terms"].values()) - other["host_terms"]["experts"]
    assert other["host_need_bytes"] == 2 * each + other["experts_bytes"]


def test_another_machine_with_an_accelerator(invoke: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "box.json"
    file.write_text(json.dumps(GPU_BOX))
    found = json.loads(invoke("--machine", str(file), "--json", use_cpu=None).stdout)
    assert found["accelerator"] == "a GPU"
    assert (found["host_have_bytes"], found["device_have_bytes"]) == (60 << 30, 23 << 30)
    assert found["device_terms"]["dense"] == found["dense_bytes"]
    assert found["host_terms"]["dense"] == 0
    assert found["shares"]["gpu"] > 0
    assert found["shares"]["link"] > 0
    assert any("speeds were not measured" in warning for warning in found["warnings"])


def test_tables_say_the_same(invoke: Callable[..., Any]) -> None:
    result = invoke(stage="dpo")
    assert result.exit_code == 0
    assert "It fits this memory." in result.stdout
    assert "Suggestion: it fits" in result.stdout
    assert "not modelled: the loss of stage dpo" in result.stdout.replace("\n", " ")


def test_what_does_not_fit_ends_with_1(invoke: Callable[..., Any], tmp_path: Path) -> None:
    small = GPU_BOX | {"memory": {"total_bytes": 1 << 20, "available_bytes": 1 << 20, "read_gbs": 40.0}}
    file = tmp_path / "box.json"
    file.write_text(json.dumps(small))
    result = invoke("--machine", str(file), "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["fits"] is False
    assert "take a machine with more" in found["suggestion"]["reason"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "config.json: transformers makes no language model of it: Unrecognized configuration"),
        ({"num_attention_heads": 0}, "config.json: transformers makes no language model of it: integer division"),
        (
            {"hidden_size": "wide"},
            "config.json: transformers makes no language model of it: Validation error for field",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised (MLX) with quantization: bits 4, group_size 64"),
        ({"quantization_config": {"group_size": 32, "bits": 8}}, "quantised (MLX) with quantization_config: bits 8"),
    ],
)
def test_configs_that_are_of_no_use_end_with_2(
    invoke: Callable[..., Any], checkpoint: Path, config: dict[str, Any], message: str
) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    result = invoke(model_name_or_path=str(checkpoint))
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert "take " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cutoff_len"], "'cutoff_len' is no key=value"),
        (["model_name_or_path=/no/such/model"], "is neither a folder nor a repository's id; correct the path"),
        (["kt_sft.expert_format=int3"], "expert_format must be one of"),
        (["kt_sft.store=mapped", "kt_sft.expert_format=int4"], "store 'mapped' is not possible"),
        (["--machine", "/no/such/file"], "--machine: /no/such/file cannot be read"),
    ],
)
def test_what_cannot_be_planned_ends_with_2(invoke: Callable[..., Any], arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("kt-sft plan: ")
    assert message in result.stderr
