"""LoRA on routed experts in the engine beside plain PEFT on the plain model: same tensors, same results, same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import kt_sft
from kt_sft.integrations.peft import target_parameters
from kt_sft.lora import ExpertLora

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

#: Half the spacing of BF16 at 1, which adapters' matrices are rounded to in the engine.
UNIT = 2.0**-9


def load(folder: Path, engine: bool = True, **settings: Any) -> nn.Module:
    """The tiny model; every token goes to all its experts, so that no rounding can send it elsewhere."""
    config = {"quantization_config": kt_sft.KTConfig(**settings)} if engine else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_experts_per_tok=8, **config)


def adapted(model: nn.Module, seed: int = 0, name: str = "default", filled: bool = True, **settings: Any) -> PeftModel:
    """The model with an adapter on attention and experts, whose B is no longer zero if `filled`."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": EXPERTS} | settings)
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    if filled:
        with torch.no_grad():
            for key, value in model.named_parameters():
                if f"lora_B.{name}" in key:
                    value.normal_(std=0.1)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(48).reshape(2, 24)).logits


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.named_parameters() if "lora_" in key}


def assert_close(actual: torch.Tensor, reference: torch.Tensor) -> None:
    """Matrices rounded to BF16, and products of them: a few units of the largest, whichever way the errors add up."""
    assert (actual - reference).abs().max() <= 8 * UNIT * reference.abs().max()


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("rslora", [False, True])
def test_tensors_and_results_are_those_of_peft(tiny_moe: Path, targets: list[str], rslora: bool) -> None:
    settings = {"target_parameters": targets, "use_rslora": rslora}
    plain, ours = adapted(load(tiny_moe, False), **settings), adapted(load(tiny_moe), **settings)

    assert list(tensors(plain)) == list(tensors(ours))
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain).values(), tensors(ours).values(), strict=True))
    assert_close(logits(ours), logits(plain))
    assert not torch.allclose(logits(plain), logits(load(tiny_moe, False)), rtol=0.1, atol=0.1)


def test_gradients_are_those_of_peft(tiny_moe: Path) -> None:
    found = []
    for engine in (False, True):
        model = adapted(load(tiny_moe, engine)).train()
        ids = torch.arange(48).reshape(2, 24)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({key: value.grad for key, value in tensors(model).items()})
    for key, reference in found[0].items():
        # Norms, as roundings of one layer reach all gradients before it.
        assert (found[1][key] - reference).norm() <= 8 * UNIT * reference.norm(), key


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"], ids=["plain", "interleaved", "ungated"])
def test_experts_of_every_layout(family: str, tmp_path: Path) -> None:
    """gpt-oss keeps parameters transposed, with gate and up alternating; Nemotron-H has no gate."""
    plain = make(FAMILIES[family][0])
    plain.save_pretrained(tmp_path)
    ours = type(plain).from_pretrained(tmp_path, dtype=torch.float32, quantization_config=kt_sft.KTConfig())
    targets = target_parameters(ours)
    name = next(name for name, module in ours.named_modules() if isinstance(module, kt_sft.CpuExperts))
    experts = ours.get_submodule(name)
    random = torch.Generator().manual_seed(0)
    x, idx = torch.randn(30, experts.hidden_dim, generator=random), torch.randint(0, 8, (30, 2), generator=random)
    weights = torch.rand(30, 2, generator=random)
    results = []
    for model in (plain, ours):
        adapted(model, target_modules=[], target_parameters=targets)
        layer = model.get_submodule(name)
        y = layer(x, idx, weights)
        trained = [value for key, value in layer.named_parameters() if "lora_" in key]
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), trained)])
    for found, reference in zip(results[1], results[0], strict=True):
        assert found.shape == reference.shape
        assert (found - reference).norm() <= 8 * UNIT * reference.norm()


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_gradients_do_not_depend_on_checkpointing(tiny_moe: Path, policy: str, checkpointing: bool | None) -> None:
    found = []
    for reentrant in (None, checkpointing):
        model = adapted(load(tiny_moe, activation_policy=policy)).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids = torch.arange(48).reshape(2, 24)
        for part in (ids, ids + 1):  # accumulated
            model(input_ids=part, labels=part).loss.backward()
        found.append([value.grad for value in tensors(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def train(model: PeftModel, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=2e-3)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (4, 4, 24), generator=random)
    losses = []
    for step in range(steps):
        loss = model(input_ids=ids[step % 4], labels=ids[step % 4]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_hundred_steps_track_plain_peft(tiny_moe: Path) -> None:
    """Adam makes a whole step of a gradient's rounding near zero, and routing may flip, so the bound is a measured one.

    On BF16 tiers losses were off by at most 1.4 u and on FP32 tiers by 0.3 u; without the experts they are off by 50 u.
    """
    plain, ours = (train(adapted(load(tiny_moe, engine), filled=False), 100) for engine in (False, True))
    assert ours == pytest.approx(plain, rel=8 * UNIT)
    others = train(adapted(load(tiny_moe), filled=False, target_parameters=None), 100)
    assert others[-1] != pytest.approx(plain[-1], rel=16 * UNIT)


def test_files_are_exchanged_with_plain_peft_both_ways(tiny_moe: Path, tmp_path: Path) -> None:
    ours, plain = adapted(load(tiny_moe)), adapted(load(tiny_moe, False), seed=1)
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")

    there = PeftModel.from_pretrained(load(tiny_moe, False), tmp_path / "ours")
    here = PeftModel.from_pretrained(load(tiny_moe), tmp_path / "plain")

    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain")]
    assert {key: value.shape for key, value in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    assert all(torch.equal(a, b) for a, b in zip(tensors(there).values(), tensors(ours).values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(here).values(), tensors(plain).values(), strict=True))
    assert_close(logits(ours), logits(there))
    assert_close(logits(here), logits(plain))


def test_an_adapter_with_a_on_the_other_side_loads(tiny_moe: Path, tmp_path: Path) -> None:
    """As the version of PEFT that is not installed keeps it: sizes tell which it is."""
    ours = adapted(load(tiny_moe))
    ours.save_pretrained(tmp_path)
    turn_sides(tmp_path, experts=8)
    again = PeftModel.from_pretrained(load(tiny_moe), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tensors(again).values(), tensors(ours).values(), strict=True))


def turn_sides(folder: Path, experts: int) -> None:
    path = folder / "adapter_model.safetensors"
    changed = load_file(path)
    for key in [key for key in changed if "experts" in key and "lora_A" in key]:
        a, b = changed[key], changed[key.replace("lora_A", "lora_B")]
        changed[key] = b.unflatten(1, (-1, experts)).permute(2, 1, 0).flatten(0, 1).contiguous()
        changed[key.replace("lora_A", "lora_B")] = (
            a.unflatten(0, (experts, -1)).permute(2, 1, 0).flatten(1, 2).contiguous()
        )
    save_file(changed, path, {"format": "pt"})


class TestDropout:
    IDS = torch.arange(48).reshape(2, 24)

    def gradients(self, folder: Path, reentrant: bool | None = None, seed: int = 3, **settings: Any) -> list[Any]:
        model = adapted(load(folder, **settings), lora_dropout=0.3).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(seed)
        model(input_ids=self.IDS, labels=self.IDS).loss.backward()
        return [value.grad for value in tensors(model).values()]

    @pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
    @pytest.mark.parametrize("policy", ["retain", "recompute"])
    def test_every_pass_leaves_out_the_same(self, tiny_moe: Path, policy: str, reentrant: bool | None) -> None:
        first = self.gradients(tiny_moe)
        again = self.gradients(tiny_moe, reentrant, activation_policy=policy)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        other = self.gradients(tiny_moe, seed=4)
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    def test_its_mean_is_the_layer_without(self, tiny_moe: Path) -> None:
        """The down projection's change is linear in what is left out: 400 draws are off by 0.05 of one's spread."""
        settings = {"target_modules": [], "target_parameters": EXPERTS[1:]}
        layer = adapted(load(tiny_moe), lora_dropout=0.5, **settings).base_model.model.model.layers[0].mlp.experts
        x, idx, w = torch.randn(8, 32), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
        with torch.no_grad():
            expected = layer.eval()(x, idx, w)
            layer.train()
            draws = torch.stack([layer(x, idx, w) for _ in range(400)])
        spread = draws.std(0)
        assert spread.mean() > 0.1 * expected.std()
        assert ((draws.mean(0) - expected).abs() <= 6 * spread / 400**0.5 + 8 * UNIT * expected.abs().max()).all()

    def test_the_file_says_none_to_peft_and_keeps_it_for_training(self, tiny_moe: Path, tmp_path: Path) -> None:
        model = adapted(load(tiny_moe), lora_dropout=0.3)
        model.save_pretrained(tmp_path)

        assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
        assert model.peft_config["default"].lora_dropout == 0.3
        assert_close(logits(model), logits(PeftModel.from_pretrained(load(tiny_moe, False), tmp_path)))
        again = PeftModel.from_pretrained(load(tiny_moe), tmp_path, is_trainable=True)
        layers = again.base_model.model.model.layers[0]
        assert layers.mlp.experts.dropout("default") == 0.3
        assert layers.self_attn.q_proj.lora_dropout["default"].p == 0.3
        again.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "kt_sft_adapter.json").read_bytes() == (
            tmp_path / "kt_sft_adapter.json"
        ).read_bytes()

    def test_beside_other_adapters_it_is_refused(self, tiny_moe: Path) -> None:
        merged = adapted(load(tiny_moe)).merge_and_unload()
        model = adapted(merged, lora_dropout=0.3).train()
        with pytest.raises(ValueError, match="dropout on experts is for one adapter alone"):
            model(input_ids=self.IDS)

    @pytest.mark.parametrize("share", [1.0, -0.1])
    def test_an_impossible_share_is_refused(self, tiny_moe: Path, share: float) -> None:
        with pytest.raises(ValueError, match="lora_dropout must be at least 0 and less than 1"):
            adapted(load(tiny_moe), target_modules=[], lora_dropout=share)


class TestSeveralAdapters:
    def test_one_is_active_and_each_is_saved_for_itself(self, tiny_moe: Path, tmp_path: Path) -> None:
        model = adapted(load(tiny_moe))
        first = logits(model)
        adapted(model, seed=5, name="other", r=2)
        assert torch.equal(logits(model), first)
        model.set_adapter("other")
        second = logits(model)
        assert not torch.allclose(second, first)
        model.set_adapter("default")
        assert torch.equal(logits(model), first)

        model.save_pretrained(tmp_path)
        there = PeftModel.from_pretrained(load(tiny_moe, False), tmp_path / "other")
        assert_close(second, logits(there))

    def test_disabled_ones_leave_the_base_model(self, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe))
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(load(tiny_moe)))

    def test_on_other_parameters_is_refused(self, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe))
        with pytest.raises(ValueError, match=r"must be on the same parameters .* the new one is on down_proj"):
            adapted(model, name="other", target_parameters=EXPERTS[1:])


class TestMerging:
    def test_merged_and_unloaded(self, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe))
        expected = logits(model)
        merged = model.merge_and_unload()
        experts = [module for module in merged.modules() if isinstance(module, kt_sft.CpuExperts)]
        assert not any(isinstance(module, ExpertLora) for module in merged.modules())
        assert [module.merged.rank for module in experts] == [3, 3]
        assert_close(logits(merged), expected)

        again = adapted(merged, seed=4)  # the next adapter goes on top
        assert_close(logits(again.merge_and_unload()), logits_of_two(tiny_moe))

    def test_merged_and_unmerged(self, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe), target_modules=[])
        expected = logits(model)
        model.merge_adapter()
        assert torch.equal(logits(model), expected)
        with pytest.raises(ValueError, match="adapter 'default' is merged into the experts already"):
            model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(load(tiny_moe)))

    def test_what_is_merged_is_what_peft_adds(self, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe))
        plain = adapted(load(tiny_moe, False))
        model.merge_adapter()
        layers = zip(model.base_model.model.model.layers, plain.base_model.model.model.layers, strict=True)
        for ours, theirs in layers:
            down = theirs.mlp.experts
            for expert in range(8):
                change = ours.mlp.experts.experts.merged.delta(expert)
                for found, layer in zip(change, (down.base_layer, down), strict=True):
                    torch.testing.assert_close(found, layer.get_delta_weight("default")[expert])


def logits_of_two(folder: Path) -> torch.Tensor:
    model = adapted(load(folder, False)).merge_and_unload()
    return logits(adapted(model, seed=4).merge_and_unload())


class TestWhatDoesNotFit:
    """Nothing is dropped or taken for something else without a word."""

    @pytest.fixture
    def saved(self, tiny_moe: Path, tmp_path: Path) -> Path:
        adapted(load(tiny_moe)).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"r": 4}, "an adapter of rank 4 .* another rank, or was made for another model"),
            ({"target_parameters": EXPERTS[:1]}, "an adapter of rank 3 on gate_up_proj of 8 experts has"),
            ({"target_parameters": None}, "is a weight of routed experts"),
            ({"target_parameters": [*EXPERTS, "experts.gate_up_proj_bias"]}, "names experts.gate_up_proj_bias"),
            ({"target_modules": []}, r"has tensors that this model has no place for: .*q_proj"),
            ({"target_modules": ["q_proj", "v_proj"]}, r"lacks tensors that its config asks for: .*v_proj"),
            ({"use_dora": True}, "cannot have use_dora"),
            ({"r": 257}, "ranks from 1 to 256, got 257"),
        ],
    )
    def test_a_config(self, saved: Path, tiny_moe: Path, change: dict[str, Any], message: str) -> None:
        path = saved / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    def test_experts_of_another_number(self, saved: Path, tiny_moe: Path) -> None:
        def change(values: dict[str, torch.Tensor]) -> None:
            for key in [key for key in values if "experts" in key]:
                values[key] = (values[key][:9] if "lora_A" in key else values[key][:, :9]).contiguous()

        self._rewrite(saved, change)
        with pytest.raises(ValueError, match=r"of 8 experts has .* made for another model"):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    def test_a_tensor_that_is_missing(self, saved: Path, tiny_moe: Path) -> None:
        self._rewrite(saved, lambda values: values.pop(next(key for key in values if "experts" in key)))
        with pytest.raises(ValueError, match=r"lacks tensors that its config asks for: .*experts"):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    def test_another_adapter_than_the_one_that_is_trained(self, saved: Path, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe), lora_alpha=6)
        with pytest.raises(ValueError, match=r"is not the one that this run trains \(lora_alpha 5 there, 6 here"):
            model.load_adapter(saved, "default", is_trainable=True)

    def test_integer_products(self, tiny_moe: Path) -> None:
        model = load(tiny_moe, expert_format="int8", compute="int8")
        with pytest.raises(ValueError, match="compute 'int8' multiplies rounded tokens"):
            adapted(model)

    def test_a_model_without_experts(self) -> None:
        with pytest.raises(ValueError, match="lora_experts is set, but Linear has no routed experts"):
            target_parameters(nn.Linear(2, 2))

    def _rewrite(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        values = load_file(folder / "adapter_model.safetensors")
        change(values)
        save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})
