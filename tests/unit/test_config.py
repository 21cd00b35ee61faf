"""KTConfig: every field checked, every refusal a sentence that names the field."""

from __future__ import annotations

import json

import pytest

import kt_sft
from kt_sft.config import TIERS, ConfigError, local_rank_and_size, requested_tier


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
        ({"num_threads": 0}, "num_threads must be a whole number of at least 1, got 0"),
        ({"num_threads": 5000}, "num_threads must be at most 1024, got 5000"),
        ({"num_threads": "two"}, "num_threads must be a whole number"),
        ({"num_threads": True}, "num_threads must be a whole number"),
        ({"num_threads": 1.5}, "num_threads must be a whole number"),
        ({"scratch_mb": 0}, "scratch_mb must be a whole number of at least 1, got 0"),
        ({"scratch_mb": None}, "scratch_mb must be a whole number of at least 1, got None"),
        ({"zero_point": "yes"}, "zero_point must be true or false"),
        ({"lora_experts": 1}, "lora_experts must be true or false"),
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


@pytest.mark.parametrize(
    "block",
    [{"expert_format": "int4"}, {"compute": "int8"}, {"group_size": 32}, {"zero_point": True}, {"lora_experts": True}],
)
def test_what_this_version_lacks_is_refused_with_a_way_out(block):
    with pytest.raises(ConfigError, match=next(iter(block))):
        kt_sft.KTConfig.from_dict(block)


def test_it_is_json_and_survives_the_round_trip():
    config = kt_sft.KTConfig(num_threads=2, activation_policy="recompute")
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
