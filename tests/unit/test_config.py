"""KTConfig: every field checked, every refusal a sentence that names the field."""

from __future__ import annotations

import json

import pytest

import kt_sft
from kt_sft.config import (
    AVAILABLE_FORMATS,
    EXPERT_FORMATS,
    TIERS,
    ConfigError,
    launched_processes,
    local_rank_and_size,
    requested_tier,
)
from kt_sft.engine.store import matrix_bytes


def test_all_defaults():
    config = kt_sft.KTConfig()
    assert config.expert_format == "auto"
    assert config.stored_format == "bf16"
    assert config.activation_policy == "retain"
    assert config.num_threads is None
    assert not config.lora_experts


def test_from_dict_takes_a_recipes_block():
    assert kt_sft.KTConfig.from_dict({}) == kt_sft.KTConfig()
    assert kt_sft.KTConfig.from_dict({"num_threads": 3}).num_threads == 3
    assert kt_sft.KTConfig.from_dict({"num_threads": 3}, num_threads=2).num_threads == 2


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"expert_fromat": "bf16"}, "unknown setting 'expert_fromat'; the settings are expert_format"),
        ({"expert_format": "int3"}, "expert_format must be one of auto, bf16"),
        ({"expert_format": 4}, "expert_format must be one of"),
        ({"activation_policy": True}, "activation_policy must be one of retain, recompute"),
        ({"lora_memory": "cpu"}, "lora_memory must be one of accelerator, host, got 'cpu'"),
        ({"num_threads": 0}, "num_threads must be a whole number of at least 1, got 0"),
        ({"num_threads": 5000}, "num_threads must be at most 1024, got 5000"),
        ({"num_threads": "two"}, "num_threads must be a whole number"),
        ({"num_threads": True}, "num_threads must be a whole number"),
        ({"num_threads": 1.5}, "num_threads must be a whole number"),
        ({"scratch_mb": 0}, "scratch_mb must be a whole number of at least 1, got 0"),
        ({"scratch_mb": None}, "scratch_mb must be a whole number of at least 1, got None"),
        ({"zero_point": "yes"}, "zero_point must be true or false"),
        ({"lora_experts": 1}, "lora_experts must be true or false"),
        ({"overlap_shared_experts": 1}, "overlap_shared_experts must be true or false"),
        ({"interleave_micro_batches": "auto"}, "interleave_micro_batches must be true or false"),
        ({"retained_mb": -1}, "retained_mb must be a whole number of at least 0, got -1"),
        ({"metrics": "all"}, "metrics must be one of off, step, layers"),
        ({"profile": True}, "profile must be the path of a file to write, ending in .json, got True"),
        ({"profile": "trace"}, "profile must be the path of a file to write, ending in .json"),
        ({"quant_method": "awq"}, "quant_method is always 'kt_sft'"),
        ({"compute": "fp32"}, "compute must be one of bf16, int8"),
        (["expert_format"], "must be a block of settings"),
        ("bf16", "must be a block of settings"),
        (None, "must be a block of settings"),
    ],
)
def test_what_cannot_be_is_refused_by_name(block, message):
    with pytest.raises(ConfigError, match=message):
        kt_sft.KTConfig.from_dict(block)


def test_adapters_on_experts_cannot_have_integer_products():
    assert kt_sft.KTConfig(lora_experts=True, expert_format="int8").lora_experts
    with pytest.raises(ConfigError, match=r"lora_experts cannot be combined with compute 'int8'.* set compute: bf16"):
        kt_sft.KTConfig(lora_experts=True, expert_format="int8", compute="int8")


POWERS = [2**n for n in range(5, 17)]


@pytest.mark.parametrize(
    ("expert_format", "group_sizes"),
    [
        ("bf16", []),
        ("auto", []),
        ("int8", [0, *POWERS]),
        ("int4", [0, *POWERS]),
        ("nf4", [0, *POWERS]),
        ("fp8", [0, 128]),
        ("mxfp4", [32]),
    ],
)
def test_group_sizes_are_the_formats_own(expert_format, group_sizes):
    assert kt_sft.KTConfig(expert_format=expert_format).group_size is None
    for group_size in (0, 1, 16, *POWERS, 48, 100, 131072):
        if group_size in group_sizes:
            assert kt_sft.KTConfig(expert_format=expert_format, group_size=group_size).group_size == group_size
        else:
            with pytest.raises(ConfigError, match="kt_sft: group_size "):
                kt_sft.KTConfig(expert_format=expert_format, group_size=group_size)


@pytest.mark.parametrize("expert_format", EXPERT_FORMATS)
def test_zero_points_are_int4s(expert_format):
    if expert_format == "int4":
        assert kt_sft.KTConfig(expert_format=expert_format, zero_point=True).zero_point
    else:
        with pytest.raises(ConfigError, match="zero_point applies to expert_format int4 only; leave it out"):
            kt_sft.KTConfig(expert_format=expert_format, zero_point=True)


@pytest.mark.parametrize("expert_format", AVAILABLE_FORMATS)
def test_what_is_accepted_the_engine_stores(expert_format):
    """The checks here and the engine's are written twice; they must not part."""
    for group_size in (None, 0, 16, 32, 48, 64, 100, 128, 1024, 65536, 131072):
        for zero_point in (False, True):
            options = {"expert_format": expert_format, "group_size": group_size, "zero_point": zero_point}
            if expert_format == "bf16" and group_size == 0:
                continue  # "whole rows" of no scales: nothing for the engine to refuse
            try:
                kt_sft.KTConfig(**options)
            except ConfigError:
                with pytest.raises(ValueError, match=r"group size|zero point"):
                    matrix_bytes(8, 8, **options)
            else:
                assert matrix_bytes(8, 8, **options) >= 8 * 8 // 2


def test_it_is_json_and_survives_the_round_trip():
    config = kt_sft.KTConfig(num_threads=2, activation_policy="recompute", expert_format="int4", zero_point=True)
    assert kt_sft.KTConfig.from_dict(json.loads(config.to_json_string())) == config


def test_isa_takes_tier_names_only(monkeypatch):
    monkeypatch.delenv("KT_SFT_ISA", raising=False)
    assert requested_tier() is None
    for tier in TIERS:
        monkeypatch.setenv("KT_SFT_ISA", tier)
        assert requested_tier() == tier
    monkeypatch.setenv("KT_SFT_ISA", "sse9")
    with pytest.raises(ConfigError, match="KT_SFT_ISA='sse9' is no instruction tier; use one of portable, avx2"):
        requested_tier()


def test_place_among_the_processes_of_a_launcher(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_rank_and_size() == (1, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert local_rank_and_size() == (0, 1)
    for rank, size in (("4", "4"), ("-1", "2"), ("one", "2"), ("0", "x")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
        with pytest.raises(ConfigError, match=f"LOCAL_RANK='{rank}' and LOCAL_WORLD_SIZE='{size}'"):
            local_rank_and_size()


def test_the_number_of_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launched_processes() == 16
    for size in ("0", "-1", "two"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(ConfigError, match=f"WORLD_SIZE='{size}' is no number of processes"):
            launched_processes()
