"""`lora_memory: host`: adapters on experts that stay in host memory, wherever the model goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapted, load, logits, tensors
from peft import PeftModel

from kt_sft.config import ConfigError, KTConfig
from kt_sft.integrations.host_memory import check_training
from kt_sft.integrations.peft import target_parameters
from kt_sft.loading.errors import NotEnoughMemoryError

BLOCK: dict[str, Any] = {"kt_sft": {"lora_experts": True, "lora_memory": "host"}}


def on_experts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors(model).items() if ".experts." in key}


def elsewhere(model: torch.nn.Module) -> list[torch.Tensor]:
    return [value for key, value in model.named_parameters() if ".experts." not in key]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to("meta"),
        lambda model: model.to("meta", torch.float16),
        lambda model: model.bfloat16(),
        lambda model: model.base_model.model.model.layers.to("meta", torch.bfloat16),
        lambda model: model.to_empty(device="meta"),
    ],
    ids=["moved", "moved and cast", "cast", "moved from within", "emptied"],
)
def test_they_stay_while_the_rest_goes(tiny_moe: Path, change: Callable[[torch.nn.Module], object]) -> None:
    """The meta device stands for an accelerator: what is moved there has lost its values."""
    model = adapted(load(tiny_moe, lora_memory="host")).train()
    model(input_ids=torch.arange(24)[None], labels=torch.arange(24)[None]).loss.backward()
    before = {key: (value, value.detach().clone(), value.grad.clone()) for key, value in on_experts(model).items()}

    change(model)

    assert before
    for key, value in on_experts(model).items():
        parameter, values, gradient = before[key]
        assert value is parameter  # an optimizer that was made before goes on with it
        assert (value.dtype, value.device.type) == (torch.float32, "cpu")
        assert torch.equal(value, values)
        assert torch.equal(value.grad, gradient)
    assert any((value.dtype, value.device.type) != (torch.float32, "cpu") for value in elsewhere(model))


def test_without_the_setting_they_go_with_the_model(tiny_moe: Path) -> None:
    model = adapted(load(tiny_moe)).to("meta")
    assert {value.device.type for value in on_experts(model).values()} == {"meta"}


def test_new_adapters_lie_there_wherever_the_model_is(tiny_moe: Path, tmp_path: Path) -> None:
    first = adapted(load(tiny_moe, lora_memory="host"))
    first.save_pretrained(tmp_path)
    model = adapted(load(tiny_moe, lora_memory="host").to("meta"), filled=False)
    adapted(model, name="other", filled=False)
    model.load_adapter(tmp_path, "third", low_cpu_mem_usage=True)
    assert len(on_experts(model)) == 3 * len(on_experts(first))
    assert {(value.dtype, value.device.type) for value in on_experts(model).values()} == {(torch.float32, "cpu")}
    loaded = [value for key, value in on_experts(model).items() if ".third." in key]
    assert all(torch.equal(a, b) for a, b in zip(loaded, on_experts(first).values(), strict=True))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_are_read_to_host_memory(
    tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_cpu_mem_usage: bool
) -> None:
    """PEFT reads them to the accelerator, which they may not fit: here to the meta device, where they would be lost."""
    model = adapted(load(tiny_moe, lora_memory="host"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "meta")
    again = PeftModel.from_pretrained(load(tiny_moe, lora_memory="host"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(torch.equal(a, b) for a, b in zip(tensors(again).values(), tensors(model).values(), strict=True))


def test_files_and_results_are_those_of_the_accelerators(tiny_moe: Path, tmp_path: Path) -> None:
    found = []
    for memory in ("accelerator", "host"):
        model = adapted(load(tiny_moe, lora_memory=memory), lora_dropout=0.1).train()
        optimizer = torch.optim.AdamW(tensors(model).values(), fused=True)
        for step in range(2):
            model(input_ids=torch.arange(24)[None] + step, labels=torch.arange(24)[None]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / memory)
        found.append([logits(model), logits(model.merge_and_unload())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for file in (tmp_path / "host").iterdir():
        assert file.read_bytes() == (tmp_path / "accelerator" / file.name).read_bytes(), file.name


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optim": "paged_adamw_32bit"}, "which optim paged_adamw_32bit does not; use one of adamw_torch_fused"),
            ({"use_muon": True}, "lora_memory 'host' cannot be combined with use_muon"),
        ],
    )
    def test_optimizers_of_one_device(self, parse: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            parse(**BLOCK, **changes)
        parse(kt_sft={"lora_experts": True}, **changes)

    def test_several_processes(self, parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kt_sft.integrations.host_memory.launched_processes", lambda: 2)
        with pytest.raises(ConfigError, match="lora_memory 'host' is for one process, and this run has 2"):
            parse(**BLOCK)

    def test_several_processes_from_python(self, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = load(tiny_moe, lora_memory="host")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="is for one process, and this run has 2"):
            adapted(model)
        assert target_parameters(model)  # as it was

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [("deepspeed", "zero2.json", "with DeepSpeed"), ("_n_gpu", 2, "for one accelerator")],
    )
    def test_replicas_and_deepspeed(
        self, parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
    ) -> None:
        """Neither deepspeed nor a second accelerator is there: only what the Trainer's arguments then say is made."""
        _, _, training_args, finetuning_args, _ = parse(**BLOCK)
        monkeypatch.setattr(training_args, name, value)
        with pytest.raises(ConfigError, match=f"lora_memory 'host'.*{message}"):
            check_training(KTConfig(lora_memory="host"), training_args, finetuning_args)
        check_training(KTConfig(), training_args, finetuning_args)

    def test_deepspeed_from_python(self, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers.integrations.deepspeed.deepspeed_config", lambda: {"train_batch_size": 1})
        with pytest.raises(ConfigError, match="cannot be combined with DeepSpeed"):
            adapted(load(tiny_moe, lora_memory="host"))

    def test_more_than_fits(self, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = load(tiny_moe, lora_memory="host")
        need = 2 * 8 * 3 * (32 + 48 + 24 + 32) * (4 + 4 + 2)  # layers, experts, rank, sizes, bytes
        monkeypatch.setattr("kt_sft.loading.memory.available_bytes", lambda: need - 1)
        with pytest.raises(
            NotEnoughMemoryError, match=r"experts with 0\.0 million parameters and their gradients: 63\.8"
        ):
            adapted(model)
        assert target_parameters(model)  # nothing was attached
        monkeypatch.setattr("kt_sft.loading.memory.available_bytes", lambda: need)
        adapted(model)
