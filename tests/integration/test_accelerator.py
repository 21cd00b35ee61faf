"""Experts, and adapters on them in host memory, beside an accelerator; skipped where there is none."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapted, load, tensors
from families import FAMILIES, make
from recording import record_engine
from rounding_noise import UNIT_ROUNDOFF as UNIT
from transformers import Trainer, TrainingArguments

import kt_sft
from kt_sft.offload.interleave import Interleaver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]


def run(layer, device, dtype):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, 24, generator=random).to(device, dtype).requires_grad_()
    w = torch.rand(50, 2, generator=random).to(device).requires_grad_()
    idx = torch.randint(0, 7, (50, 2), generator=random).to(device)
    y = layer(x, idx, w)
    y.square().sum().backward()
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_same_bits_as_on_the_cpu(dtype, policy):
    torch.manual_seed(0)
    config = kt_sft.KTConfig(activation_policy=policy)
    layer = kt_sft.CpuExperts.from_weights(torch.randn(6, 32, 24) / 5, torch.randn(6, 24, 16) / 4, config)
    device = torch.accelerator.current_accelerator()
    on_device, on_cpu = run(layer, device, dtype), run(layer, "cpu", dtype)
    for there, here in zip(on_device, on_cpu, strict=True):
        assert there.device.type == device.type
        assert there.dtype == here.dtype
    # The loss's own gradient may be rounded differently on the device; y itself must be the same.
    assert torch.equal(on_device[0].cpu(), on_cpu[0])
    for there, here in zip(on_device[1:], on_cpu[1:], strict=True):
        torch.testing.assert_close(there.cpu(), here)


def test_weights_may_come_from_the_accelerator():
    device = torch.accelerator.current_accelerator()
    gate_up, down = torch.randn(2, 8, 6), torch.randn(2, 6, 4)
    from_device = kt_sft.CpuExperts.from_weights(gate_up.to(device), down.to(device))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            from_device.dequantized(), kt_sft.CpuExperts.from_weights(gate_up, down).dequantized(), strict=True
        )
    )


class TestAdaptersInHostMemory:
    """The same training as with adapters on the accelerator.

    Its optimizer rounds their FP32 values otherwise, so a BF16 copy may be the next one: a unit of each loss.
    """

    def adapted_on_device(self, folder: Path, memory: str) -> torch.nn.Module:
        model = adapted(load(folder, lora_memory=memory)).to(torch.accelerator.current_accelerator())
        kinds = {value.device.type for key, value in tensors(model).items() if ".experts." in key}
        assert kinds == {"cpu" if memory == "host" else torch.accelerator.current_accelerator().type}
        return model

    @pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {}], ids=str)
    def test_optimizers_and_clipping_take_both_devices(self, tiny_moe: Path, settings: dict[str, Any]) -> None:
        losses: dict[str, list[float]] = {"accelerator": [], "host": []}
        for memory, found in losses.items():
            model = self.adapted_on_device(tiny_moe, memory).train()
            optimizer = torch.optim.AdamW(tensors(model).values(), lr=1e-2, **settings)
            ids = torch.arange(48).reshape(2, 24).to(torch.accelerator.current_accelerator())
            for _ in range(4):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            states = [optimizer.state[value]["exp_avg"].device for value in tensors(model).values()]
            assert states == [value.device for value in tensors(model).values()]
        assert losses["host"] == pytest.approx(losses["accelerator"], rel=UNIT)
        assert losses["host"][-1] < losses["host"][0] * (1 - 4 * UNIT)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_the_trainer_saves_and_resumes(self, tiny_moe: Path, tmp_path: Path, precision: str) -> None:
        """fp16 brings a gradient scaler, which looks at the gradients of each device."""
        data = [{"input_ids": torch.arange(24) + n, "labels": torch.arange(24) + n} for n in range(24)]
        found = {}
        for name, memory in (("accelerator", "accelerator"), ("whole", "host"), ("resumed", "host")):
            arguments = TrainingArguments(
                output_dir=str(tmp_path / name),
                max_steps=4,
                save_steps=2,
                logging_steps=1,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                max_grad_norm=0.5,
                report_to="none",
                **{precision: True},
            )
            trainer = Trainer(self.adapted_on_device(tiny_moe, memory), arguments, train_dataset=data)
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2") if name == "resumed" else None)
            trainer.save_model(str(tmp_path / name))
            state = json.loads((tmp_path / name / "checkpoint-4/trainer_state.json").read_text())
            found[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert found["whole"] == pytest.approx(found["accelerator"], rel=4 * UNIT)
        assert found["resumed"] == pytest.approx(found["whole"], rel=UNIT)  # an accelerator need not repeat its bits
        assert found["resumed"][-1] < found["resumed"][0] * (1 - 8 * UNIT)
        assert [file.name for file in sorted((tmp_path / "whole/checkpoint-4").iterdir())] == [
            file.name for file in sorted((tmp_path / "accelerator/checkpoint-4").iterdir())
        ]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_overlap_by_default(family, tmp_path, monkeypatch):
    happened = []
    record_engine(monkeypatch, happened.append)
    plain = make(FAMILIES[family][0])
    plain.save_pretrained(tmp_path)
    config = kt_sft.KTConfig(await_in_stream=False)  # so that the host awaits, and the record shows when
    model = type(plain).from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config, device_map="auto")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "shared" in name.rpartition(".")[0]:
            module.register_forward_hook(lambda *_: happened.append("s"))
    ids = torch.arange(3, 12).reshape(1, 9).to(model.device)
    logits = model(input_ids=ids).logits
    assert re.fullmatch("(Ss+A)+", "".join(happened))
    logits.sum().backward()
    config_of_the_model = next(m for m in model.modules() if isinstance(m, kt_sft.CpuExperts)).config
    monkeypatch.setattr(config_of_the_model, "overlap_shared_experts", False)
    assert torch.equal(logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_interleave(tiny_moe: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU; an accelerator need not repeat its bits, so gradients are held to a unit of BF16."""
    events: list[str] = []
    record_engine(monkeypatch, events.append)
    device = torch.accelerator.current_accelerator()
    model = adapted(load(tiny_moe, await_in_stream=False)).to(device).train()  # so that the host awaits
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    batches = [torch.arange(3, 3 + count).reshape(2, -1).to(device) for count in (40, 64)]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    for ids in batches:
        loss_of(ids).backward()
    expected = {name: value.grad for name, value in tensors(model).items()}
    model.zero_grad(set_to_none=True)
    events.clear()
    losses = Interleaver(device).run([functools.partial(loss_of, ids) for ids in batches])
    assert "".join(events) == "SSASASAA"
    events.clear()
    torch.add(*losses).backward()
    # The thread that waits is not the one that feeds the accelerator, so either may come first, but not alone.
    assert re.fullmatch("SS[SA]{4}AA", "".join(events))
    for name, value in tensors(model).items():
        assert (value.grad - expected[name]).norm() <= UNIT * expected[name].norm(), name
