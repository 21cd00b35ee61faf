"""Plans of published models, from config.json and headers alone: what they hold follows from their sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kt_sft.planning.activations import Cost
from kt_sft.planning.machine import Machine
from kt_sft.planning.memory import lora_parameters, memory_of
from kt_sft.planning.model import read_model
from kt_sft.planning.plan import as_json, make_plan
from kt_sft.planning.setup import setup_of
from kt_sft.planning.suggestion import suggest
from tests import sparse

GIB = 1 << 30
FEW = {"num_hidden_layers": 6}
MACHINE = Machine(
    name="a server",
    host_bytes=1024 * GIB,
    device="NVIDIA H100 80GB",
    device_bytes=79 * GIB,
    threads=64,
    tier="amx",
    peak_flops=2e13,
    read_bytes=3e11,
)


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder),
        "kt_sft": {},
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "o_proj",
        "lora_rank": 16,
        "cutoff_len": 1024,
        "per_device_train_batch_size": 1,
        "bf16": True,
        "flash_attn": "sdpa",
    } | changes


def experts_weights(config: dict[str, Any]) -> int:
    count = config.get("n_routed_experts") or config.get("num_local_experts") or config["num_experts"]
    layers = config["num_hidden_layers"] - config.get("first_k_dense_replace", 0)
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    return layers * count * 3 * config["hidden_size"] * inner


# A format's bits a weight with its scales: E4M3 and FP32 for 128 x 128; E2M1 and a byte for 32; 4 bits and BF16 for 32.
# Where there are many layers the first ones must do: their headers alone take seconds to make.
MODELS = {
    "DeepSeek-V3, FP8": (sparse.DEEPSEEK_V3 | {"quantization_config": sparse.FP8}, "fp8", 8 + 32 / 128**2, "fp8"),
    "Kimi-K2, INT4": (sparse.KIMI_K2 | {"quantization_config": sparse.INT4, **FEW}, "int4", 4 + 16 / 32, "int4"),
    "gpt-oss-120b, MXFP4": (sparse.GPT_OSS_120B, "mxfp4", 4 + 8 / 32, "mxfp4"),
    "Qwen3-235B, BF16": (sparse.QWEN3_235B | FEW, "", 16, "bf16"),
}
# Of the published 671.03 and 116.83 thousand million parameters, what is no weight or bias of routed experts, in BF16.
DENSE_WEIGHTS = {"DeepSeek-V3, FP8": 671.03e9 - 653.91e9, "gpt-oss-120b, MXFP4": 116.83e9 - 114.66e9 - 0.04e9}


@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_planned_from_their_headers(tmp_path: Path, name: str) -> None:
    config, quantised, bits, stored = MODELS[name]
    folder = sparse.write_sparse(tmp_path, config, quantised)
    on_disk = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    setup = setup_of(recipe(folder, flash_attn="disabled" if stored == "mxfp4" else "sdpa"))

    facts = read_model(setup)
    plan = make_plan(facts, setup, MACHINE, base=1 * GIB)
    found = as_json(plan, suggest(plan, facts))

    assert on_disk < 64 << 20
    assert found["expert_formats"] == [stored]
    # Rows of scales that are padded to whole cache lines are below a thousandth.
    assert found["experts_bytes"] == pytest.approx(experts_weights(config) * bits / 8, rel=1e-3)
    if name in DENSE_WEIGHTS:
        assert found["dense_bytes"] == pytest.approx(2 * DENSE_WEIGHTS[name], rel=0.01)
    heads = config["num_attention_heads"] * (config.get("v_head_dim") or config["head_dim"])
    parameters = config["num_hidden_layers"] * 16 * (heads + config["hidden_size"])
    assert lora_parameters(facts, setup) == (parameters, 0)
    assert found["lora_bytes"] == 8 * parameters
    assert found["optimizer_bytes"] == 8 * parameters
    assert found["activation_bytes"] > 0
    assert found["step_seconds"] > 0
    assert found["tokens_per_second"] == pytest.approx(1024 / found["step_seconds"])
    assert {name: share for name, share in found["shares"].items() if not 0 < share < 1} == {}
    host = found["experts_bytes"] + GIB
    assert host < found["host_need_bytes"] < host + 32 * GIB
    assert found["dense_bytes"] < found["device_need_bytes"] < found["dense_bytes"] + 32 * GIB
    assert found["fits"] == (found["host_need_bytes"] <= 1024 * GIB and found["device_need_bytes"] <= 79 * GIB)


def test_another_format_is_suggested_where_the_models_own_does_not_fit(tmp_path: Path) -> None:
    config = sparse.QWEN3_235B | {"num_hidden_layers": 3}
    setup = setup_of(recipe(sparse.write_sparse(tmp_path, config)))
    facts = read_model(setup)
    setup = dataclasses.replace(setup, settings=dataclasses.replace(setup.settings, store="resident"))
    plan = make_plan(facts, setup, MACHINE, base=GIB)
    need = plan.memory
    experts, rest = need.experts_bytes, need.host_need - need.experts_bytes

    def suggested(host: float) -> dict[str, Any]:
        small = dataclasses.replace(plan, machine=dataclasses.replace(MACHINE, host_bytes=int(host)))
        return suggest(small, facts) | {"planned": small.fits}

    assert suggested(need.host_need)["changes"] == {}
    assert suggested(need.host_need)["planned"]
    int8 = suggested(0.6 * experts + rest)
    assert (int8["planned"], int8["fits"]) == (False, True)
    assert int8["changes"] == {"kt_sft.expert_format": "int8"}
    assert int8["reason"] == "with experts in int8 it fits"
    assert suggested(0.4 * experts + rest)["changes"] == {"kt_sft.expert_format": "int4"}
    assert suggested(rest)["changes"] == {"kt_sft.store": "mapped"}
    nothing = suggested(GIB / 2)
    assert not nothing["fits"]
    assert "nothing that a recipe can set makes it fit the memory of the host" in nothing["reason"]


@pytest.mark.parametrize(("settings", "bytes_a_weight"), [({}, 0), ({"expert_format": "int4"}, 12)])
def test_loading_takes_memory_where_weights_are_quantised_again(
    tmp_path: Path, settings: dict[str, Any], bytes_a_weight: int
) -> None:
    config = sparse.DEEPSEEK_V3 | {"quantization_config": sparse.FP8, "num_hidden_layers": 4}
    setup = setup_of(recipe(sparse.write_sparse(tmp_path, config, "fp8"), kt_sft=settings, cutoff_len=8))
    facts = read_model(setup)
    assert facts.staged_bytes == bytes_a_weight * 2048 * 7168
    memory = memory_of(facts, setup, MACHINE, Cost(), base=0, is_mapped=False)
    if settings:
        # Sixteen readers, while there is nothing of a step yet.
        assert memory.host.buffers == 16 * facts.staged_bytes - memory.host.activations
        assert memory.host_least == memory.host_need  # what is kept for backward comes later
    else:
        assert memory.host.buffers < 2 * 64 << 20


def test_interleaved_micro_batches_take_twice_the_activations_and_less_time(tmp_path: Path) -> None:
    folder = sparse.write_sparse(tmp_path, sparse.QWEN3_235B | {"num_hidden_layers": 2})
    plans = []
    for interleave in (False, True):
        block = {"interleave_micro_batches": interleave}
        setup = setup_of(recipe(folder, kt_sft=block, gradient_accumulation_steps=2))
        plans.append(make_plan(read_model(setup), setup, MACHINE, base=0))
    one, two = plans
    assert one.memory.device is not None
    assert two.memory.device is not None
    assert two.memory.device.activations == pytest.approx(2 * one.memory.device.activations)
    assert two.memory.host.activations == 2 * one.memory.host.activations
    assert one.speed is not None
    assert two.speed is not None
    # Not less than what is busiest takes, and not more than all in turn.
    assert two.speed.step < one.speed.step
    assert two.speed.step > max(two.speed.experts, two.speed.rest)


@pytest.mark.parametrize(("settings", "mapped"), [({}, False), ({"retained_mb": 1 << 20}, True)])
def test_values_that_can_be_computed_again_are_no_reason_to_map_experts(
    tmp_path: Path, settings: dict[str, Any], mapped: bool
) -> None:
    """They are kept in what memory is left, unless a setting grants them memory."""
    setup = setup_of(
        recipe(sparse.write_sparse(tmp_path, sparse.QWEN3_235B | {"num_hidden_layers": 2}), kt_sft=settings)
    )
    facts = read_model(setup)
    resident = make_plan(facts, setup, MACHINE, base=GIB)
    values = 2 * 2 * 1024 * 8 * 2 * 1536  # layers, bytes, tokens, experts each, columns
    small = dataclasses.replace(MACHINE, host_bytes=resident.memory.host_need - values)
    plan = make_plan(facts, setup, small, base=GIB)
    assert plan.fits
    assert plan.memory.is_mapped is mapped
    assert any("gate and up values" in warning for warning in plan.warnings) is not mapped
    less = dataclasses.replace(small, host_bytes=resident.memory.host_need - values - 1)
    assert make_plan(facts, setup, less, base=GIB).memory.is_mapped


def test_codes_in_files_leave_scales_in_memory(tmp_path: Path) -> None:
    config = sparse.DEEPSEEK_V3 | {"quantization_config": sparse.FP8, "num_hidden_layers": 4}
    setup = setup_of(recipe(sparse.write_sparse(tmp_path, config, "fp8"), kt_sft={"store": "mapped"}, cutoff_len=8))
    facts = read_model(setup)
    assert facts.obstacle is None
    memory = memory_of(facts, setup, MACHINE, Cost(), base=0, is_mapped=True)
    assert memory.host.experts == 256 * 3 * 2048 * 7168 * 4 // 128**2
    assert memory.experts_bytes == facts.experts_bytes
    both = memory_of(facts, setup, MACHINE, Cost(), base=0, is_mapped=True, processes=2)
    assert both.host_need == 2 * both.host.total  # each process reads its own


@pytest.mark.parametrize(("shared", "copies"), [(True, 1), (False, 3)])
def test_processes_that_do_not_find_each_other_hold_their_own_experts(
    tmp_path: Path, shared: bool, copies: int
) -> None:
    setup = setup_of(recipe(sparse.write_sparse(tmp_path, sparse.QWEN3_235B | {"num_hidden_layers": 2}), cutoff_len=8))
    facts = read_model(setup)
    memory = memory_of(facts, setup, MACHINE, Cost(), base=GIB, is_mapped=False, processes=3, shared=shared)
    experts = memory.host.experts
    assert experts == facts.experts_bytes
    assert memory.host_need == copies * experts + 3 * (memory.host.total - experts)
    assert memory.weights_need == copies * experts + 3 * GIB
