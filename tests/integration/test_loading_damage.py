"""Damaged checkpoints, machines too small and interruptions: one error each, which names what is at fault."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import EXPERT, load, set_matrix, set_value, stores
from trainers import train_model
from transformers import AutoModelForCausalLM

from kt_sft.config import ConfigError, KTConfig
from kt_sft.loading import memory, streaming
from kt_sft.loading.errors import CheckpointError, NotEnoughMemoryError, UnsupportedModelError


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[EXPERT.format("up")]


def _drop_all_down(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.1.mlp.experts" in key and "down" in key]:
        del tensors[key]


def _surplus(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = tensors[EXPERT.format("up")].clone()


def _both_layouts(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.zeros(8, 32, 24, dtype=torch.bfloat16)


def _scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT.format("up") + "_scale_inv"] = torch.ones(1, 1)


def _fused_of_wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    _drop_all_down(tensors)
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.zeros(8, 24, 32, dtype=torch.bfloat16)


def _no_router(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.gate.weight"]


def _dense_value(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = value

    return change


DAMAGES = {
    "no router": (_no_router, "no tensor for model.layers.1.mlp.gate.weight, of the block around model.layers.1.mlp"),
    "dense nan": (_dense_value(float("nan")), "model.layers.1.self_attn.o_proj.weight holds NaN or Inf"),
    "dense inf": (_dense_value(float("-inf")), "model.layers.1.self_attn.o_proj.weight holds NaN or Inf"),
    "missing": (_drop, f"the checkpoint lacks {EXPERT.format('up')}"),
    "all missing": (_drop_all_down, "no tensor for model.layers.1.mlp.experts.down_proj, shape [8, 32, 24]"),
    "wrong shape": (
        set_matrix("up", torch.zeros(23, 32).bfloat16()),
        "a matrix of shape [23, 32], the model expects [24, 32]",
    ),
    "transposed": (
        set_matrix("up", torch.zeros(32, 24).bfloat16()),
        "a matrix of shape [32, 24], the model expects [24, 32]",
    ),
    "no matrix": (set_matrix("up", torch.zeros(24).bfloat16()), "has shape [24], expected a matrix"),
    "fused, wrong shape": (_fused_of_wrong_shape, "a matrix of shape [24, 32], the model expects [32, 24]"),
    "float64": (
        set_matrix("down", torch.zeros(32, 24).double()),
        "holds F64 values; routed experts are read from BF16, F16",
    ),
    "float8": (set_matrix("down", torch.zeros(32, 24).to(torch.float8_e4m3fn)), "holds F8_E4M3 values"),
    "integers": (set_matrix("down", torch.zeros(32, 24).to(torch.int8)), "holds I8 values"),
    "surplus expert": (_surplus, "is expert 8 of model.layers.1.mlp.experts.gate_up_proj, the model has 8"),
    "two layouts": (_both_layouts, "in two different layouts"),
    "scales": (_scale, "is no weight that Qwen3MoeExperts has"),
    "nan": (set_value(float("nan")), "gate of expert 3 of model.layers.1.mlp.experts"),
    "inf": (set_value(float("-inf")), "gate of expert 3 of model.layers.1.mlp.experts"),
}


class TestDamage:
    """Every damage to the experts is one error that names the tensor."""

    @pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
    def test_damaged_tensors(
        self, damage: Callable[..., None], message: str, checkpoint: Path, edit: Callable[..., None]
    ) -> None:
        edit(damage)
        with pytest.raises(CheckpointError) as error:
            load(checkpoint)
        assert message in str(error.value)

    def test_the_place_of_a_nan_is_named(self, checkpoint: Path, edit: Callable[..., None]) -> None:
        edit(set_value(float("nan")))
        with pytest.raises(CheckpointError) as error:
            load(checkpoint)
        assert f"{checkpoint / 'model.safetensors'}: tensor {EXPERT.format('gate')}" in str(error.value)
        assert "row 5, column 7" in str(error.value)

    def test_values_too_large_for_the_dtype_asked_for(self, checkpoint: Path, edit: Callable[..., None]) -> None:
        edit(_dense_value(1e30))
        load(checkpoint)
        with pytest.raises(CheckpointError, match=r"too large for the torch\.float16 it is loaded as"):
            load(checkpoint, dtype=torch.float16)

    def test_a_routers_bias_is_looked_at(self, tmp_path: Path) -> None:
        from families import FAMILIES, make

        plain = make(FAMILIES["deepseek_v3"][0])
        name, bias = next((k, v) for k, v in plain.named_buffers() if "e_score_correction_bias" in k)
        bias[3] = float("nan")
        plain.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} holds NaN or Inf"):
            load(tmp_path)

    def test_truncated_file(self, checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load(checkpoint)

    def test_file_cut_off_between_header_and_rows(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Another process may shorten the file after its header was checked.
        path = checkpoint / "model.safetensors"
        real = streaming.stream

        def cut_then_stream(work: Any, **settings: Any) -> None:
            path.write_bytes(path.read_bytes()[:20000])
            real(work, **settings)

        monkeypatch.setattr("kt_sft.loading.processes.stream", cut_then_stream)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model\.layers"):
            load(checkpoint)

    def test_missing_shard(self, tiny_moe: Path, tmp_path: Path) -> None:
        AutoModelForCausalLM.from_pretrained(tiny_moe).save_pretrained(tmp_path, max_shard_size="40KB")
        shard = sorted(tmp_path.glob("*.safetensors"))[2]
        shard.unlink()
        with pytest.raises(
            CheckpointError, match=f"{shard.name}: the checkpoint names this file, but it does not exist"
        ):
            load(tmp_path)

    def test_not_enough_memory_is_said_before_any_is_taken(
        self, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
        monkeypatch.setattr("kt_sft.loading.processes.LayerStore", lambda **_: pytest.fail("a store was allocated"))
        with pytest.raises(NotEnoughMemoryError, match=r"the experts of 2 layers: .* KiB needed, 1000 bytes available"):
            load(tiny_moe)

    def test_memory_that_the_system_refuses(self, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_: Any) -> None:
            raise MemoryError("std::bad_alloc")

        monkeypatch.setattr("kt_sft.loading.processes.LayerStore", refuse)
        monkeypatch.setattr("kt_sft.loading.quantizer.available_bytes", lambda: 5 << 20)
        # 8 experts of three BF16 matrices of 24 x 32 take 36 KiB.
        with pytest.raises(
            NotEnoughMemoryError,
            match=r"the experts of model\.layers\.0\.mlp\.experts: 36\.0 KiB needed, 5\.0 MiB available",
        ):
            load(tiny_moe)

    def test_what_is_checked_is_what_is_taken(self, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[int, str, int, int]] = []
        monkeypatch.setattr("kt_sft.loading.quantizer.shared_store", lambda _: None)
        monkeypatch.setattr("kt_sft.loading.quantizer.require_bytes", lambda *what: asked.append(what))
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        model = load(tiny_moe)
        dense = sum(parameter.nbytes for parameter in model.parameters())
        taken = sum(store.nbytes for store in stores(model))
        # Each its own copy: without MASTER_PORT the processes cannot find each other.
        assert asked == [(taken + dense, "the experts of 2 layers", 3, 0)]

    def test_unsupported_model(self, tmp_path: Path) -> None:
        config = transformers.GraniteMoeConfig(
            hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
        )
        transformers.GraniteMoeForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match="GraniteMoeParallelExperts"):
            load(tmp_path)

    def test_state_dict_instead_of_files(self, tiny_moe: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(tiny_moe)
        with pytest.raises(ConfigError, match="a state_dict cannot be given instead"):
            transformers.Qwen3MoeForCausalLM.from_pretrained(
                None, config=config, state_dict={}, quantization_config=KTConfig()
            )


class TestInterruption:
    """Ctrl-C while experts are read."""

    def test_what_is_queued_is_not_read(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        readers = 2
        began: list[object] = []
        stopping = threading.Event()

        class Pool(ThreadPoolExecutor):
            """Lets the reads in flight go on only once the pool was told to stop."""

            def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
                super().shutdown(wait=False, cancel_futures=cancel_futures)
                stopping.set()
                super().shutdown(wait=True)

        def blocked_read(*_: object) -> None:
            began.append(None)
            stopping.wait()

        def interrupt(futures: list[object], **_: object) -> None:
            assert len(futures) == 8 * readers  # of 3 of 48 matrices each: stretches short enough to share out evenly
            raise KeyboardInterrupt

        monkeypatch.setattr(streaming, "_MAX_READERS", readers)
        monkeypatch.setattr(streaming, "ThreadPoolExecutor", Pool)
        monkeypatch.setattr(streaming, "_read", blocked_read)
        monkeypatch.setattr(streaming, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(checkpoint)
        assert len(began) <= readers


@pytest.mark.parametrize("keys", [["quantization"], ["quantization", "quantization_config"]])
def test_what_mlx_has_quantised_is_refused_by_name(
    checkpoint: Path, parse: Callable[..., Any], keys: list[str]
) -> None:
    """Old versions of it write one key, newer ones both, of which transformers itself refuses the second, unnamed."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {key: {"group_size": 64, "bits": 4} for key in keys}))
    refused = r"quantised \(MLX\) with quantization: bits 4, group_size 64, .*; take or make a BF16 copy"
    with pytest.raises(ConfigError, match=refused):
        train_model(parse, model_name_or_path=str(checkpoint), kt_sft={})
    if keys == ["quantization"]:
        with pytest.raises(ConfigError, match=refused):
            load(checkpoint)
