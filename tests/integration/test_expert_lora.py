"""LoRA on routed experts in the engine beside plain PEFT on the plain model: same tensors, same results."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import EXPERTS, adapted, assert_close, load, logits, tensors
from families import FAMILIES, make
from peft import AutoPeftModel, PeftConfig, PeftModel
from rounding_noise import UNIT_ROUNDOFF, bounds_of_rounding

import kt_sft
from kt_sft.integrations.peft import target_parameters
from kt_sft.lora import ExpertLora


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("rslora", [False, True])
def test_tensors_and_results_are_those_of_peft(tiny_moe: Path, targets: list[str], rslora: bool) -> None:
    settings = {"target_parameters": targets, "use_rslora": rslora}
    plain, ours = adapted(load(tiny_moe, False), **settings), adapted(load(tiny_moe), **settings)

    assert list(tensors(plain)) == list(tensors(ours))
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain).values(), tensors(ours).values(), strict=True))
    assert_close(ours, logits(plain))
    assert not torch.allclose(logits(plain), logits(load(tiny_moe, False)), rtol=0.1, atol=0.1)


def test_gradients_are_those_of_peft(tiny_moe: Path) -> None:
    plain, ours = (adapted(load(tiny_moe, engine)).train() for engine in (False, True))

    def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
        ids = torch.arange(48).reshape(2, 24)
        return [*torch.autograd.grad(model(input_ids=ids, labels=ids).loss, [*tensors(model).values()])]

    bounds = bounds_of_rounding(lambda: gradients(ours), torch.Tensor.norm)
    for key, found, reference, bound in zip(tensors(ours), gradients(ours), gradients(plain), bounds, strict=True):
        assert (found - reference).norm() <= bound < 0.1 * reference.norm(), key


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
    for model in (plain, ours):
        adapted(model, target_modules=[], target_parameters=targets)

    def results(model: torch.nn.Module) -> list[torch.Tensor]:
        layer = model.get_submodule(name)
        y = layer(x, idx, weights)
        trained = [value for key, value in layer.named_parameters() if "lora_" in key]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), trained)]

    bounds = bounds_of_rounding(lambda: results(ours), torch.Tensor.norm)
    for found, reference, bound in zip(results(ours), results(plain), bounds, strict=True):
        assert found.shape == reference.shape
        assert (found - reference).norm() <= bound < 0.1 * reference.norm()


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
    """Adam makes a whole step of a gradient's rounding near zero, and what one step rounds all later ones see.

    So the bound is what roundings do to the whole run: losses of runs with noise in every step.
    """

    def run() -> list[torch.Tensor]:
        return [torch.tensor(train(adapted(load(tiny_moe), filled=False), 100))]

    plain = torch.tensor(train(adapted(load(tiny_moe, False), filled=False), 100))
    (bound,) = bounds_of_rounding(run, lambda difference: (difference / plain).abs().max(), 3, [plain])
    assert ((run()[0] - plain) / plain).abs().max() <= bound
    without = torch.tensor(train(adapted(load(tiny_moe), filled=False, target_parameters=None), 100))
    assert (without[-1] - plain[-1]) / plain[-1] > 2 * bound


def test_copies_share_weights_but_not_adapters(tiny_moe: Path) -> None:
    model = adapted(load(tiny_moe))
    expected = logits(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for value in tensors(copied).values():
            value.zero_()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copied), logits(load(tiny_moe)))
    layers = [each.base_model.model.model.layers[0].mlp.experts for each in (model, copied)]
    assert layers[0].experts.store is layers[1].experts.store
    assert "parameter_name='down_proj'" in repr(layers[0])


def test_a_change_of_mode_shows_what_was_written_through_data(tiny_moe: Path) -> None:
    """As averaged weights are put in place for evaluation: autograd does not count it, and no optimizer steps."""
    model = adapted(load(tiny_moe), target_modules=[]).train()
    other = adapted(load(tiny_moe), seed=7, target_modules=[])
    expected = logits(other)
    ids = torch.arange(48).reshape(2, 24)
    assert not torch.allclose(model(input_ids=ids).logits, expected)
    for value, average in zip(tensors(model).values(), tensors(other).values(), strict=True):
        value.data.copy_(average)
    assert torch.equal(logits(model), expected)
    layer = model.base_model.model.model.layers[0].mlp.experts
    operands = layer.experts._operands._last
    model.eval()
    logits(model)
    assert layer.experts._operands._last is operands  # the same mode again costs nothing


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
        # The mean of 400 is within six of its own spreads; roundings of the two sides are a fraction of one draw's.
        assert ((draws.mean(0) - expected).abs() <= 6 * spread / 400**0.5 + 4 * UNIT_ROUNDOFF * expected.abs()).all()

    def test_the_file_says_none_to_peft_and_keeps_it_for_training(self, tiny_moe: Path, tmp_path: Path) -> None:
        model = adapted(load(tiny_moe), lora_dropout=0.3)
        model.save_pretrained(tmp_path)

        assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
        assert model.peft_config["default"].lora_dropout == 0.3
        assert_close(model, logits(PeftModel.from_pretrained(load(tiny_moe, False), tmp_path)))
        again = PeftModel.from_pretrained(load(tiny_moe), tmp_path, is_trainable=True)
        layers = again.base_model.model.model.layers[0]
        assert layers.mlp.experts.dropout("default") == 0.3
        assert layers.self_attn.q_proj.lora_dropout["default"].p == 0.3
        again.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "kt_sft_adapter.json").read_bytes() == (
            tmp_path / "kt_sft_adapter.json"
        ).read_bytes()

    @pytest.mark.parametrize("where", ["hub", "config given", "config changed", "auto"])
    def test_wherever_an_adapter_comes_from_training_goes_on_with_it(
        self, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        repository = tmp_path / "models--tiny--adapter"
        folder = repository / "snapshots" / "0"
        adapted(load(tiny_moe), lora_dropout=0.3).save_pretrained(folder)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        settings: dict[str, Any] = {"is_trainable": True}
        adapter = str(folder)
        if where == "hub":
            adapter, settings = "tiny/adapter", settings | {"cache_dir": str(tmp_path)}
        if "config" in where:
            settings["config"] = PeftConfig.from_pretrained(adapter)
        if where == "config changed":
            settings["config"].lora_dropout = 0.2

        if where == "auto":
            model = AutoPeftModel.from_pretrained(adapter, quantization_config=kt_sft.KTConfig(), **settings)
            assert any(isinstance(module, ExpertLora) for module in model.modules())
        else:
            model = PeftModel.from_pretrained(load(tiny_moe), adapter, **settings)

        layers = [module for module in model.modules() if isinstance(module, ExpertLora)]
        assert {layer.dropout("default") for layer in layers} == {0.2 if where == "config changed" else 0.3}

    def test_a_cache_without_its_file_is_told_of(
        self, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        repository = tmp_path / "models--tiny--adapter"
        adapted(load(tiny_moe)).save_pretrained(repository / "snapshots" / "0")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        PeftModel.from_pretrained(load(tiny_moe), "tiny/adapter", cache_dir=str(tmp_path))
        assert "its cache has no kt_sft_adapter.json of tiny/adapter" in caplog.text

    def test_beside_other_adapters_it_is_refused(self, tiny_moe: Path) -> None:
        model = adapted(adapted(load(tiny_moe), lora_dropout=0.3), name="other").train()
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match="dropout on experts is for one adapter alone"):
            model(input_ids=self.IDS)

    def test_on_top_of_merged_ones_it_is_refused_before_training(self, tiny_moe: Path, tmp_path: Path) -> None:
        adapted(load(tiny_moe), seed=1, lora_dropout=0.3).save_pretrained(tmp_path)
        merged = adapted(load(tiny_moe)).merge_and_unload()
        with pytest.raises(ValueError, match="that others were merged into cannot be trained with dropout"):
            PeftModel.from_pretrained(merged, tmp_path, is_trainable=True)
        merged = adapted(load(tiny_moe)).merge_and_unload()
        assert logits(PeftModel.from_pretrained(merged, tmp_path)).isfinite().all()  # to use it is no training

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
        assert not torch.allclose(logits(model), first)
        model.set_adapter("default")
        assert torch.equal(logits(model), first)

        model.save_pretrained(tmp_path)
        model.set_adapter("other")
        assert_close(model, logits(PeftModel.from_pretrained(load(tiny_moe, False), tmp_path / "other")))

    def test_several_at_once_add_up(self, tiny_moe: Path) -> None:
        model = adapted(adapted(load(tiny_moe)), seed=5, name="other", r=2)
        model.base_model.set_adapter(["default", "other"])
        both = logits(model)
        one_after_the_other = adapted(load(tiny_moe)).merge_and_unload()
        one_after_the_other = adapted(one_after_the_other, seed=5, name="other", r=2)
        assert_close(one_after_the_other, both, engines=2)
        model.merge_adapter(["default", "other"])
        assert_close(model, both, engines=2)

    def test_disabled_ones_leave_the_base_model(self, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe))
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(load(tiny_moe)))

    def test_on_other_parameters_is_refused(self, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe))
        with pytest.raises(ValueError, match=r"the same (set of )?parameters.*down_proj"):
            adapted(model, name="other", target_parameters=EXPERTS[1:])


class TestMerging:
    def test_merged_and_unloaded(self, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe))
        expected = logits(model)
        merged = model.merge_and_unload()
        experts = [module for module in merged.modules() if isinstance(module, kt_sft.CpuExperts)]
        assert not any(isinstance(module, ExpertLora) for module in merged.modules())
        assert [module.merged.rank for module in experts] == [3, 3]
        assert_close(merged, expected, engines=2)

        again = adapted(merged, seed=4)  # the next adapter goes on top
        assert_close(again.merge_and_unload(), logits_of_two(tiny_moe))

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

    def test_an_adapter_that_was_merged_is_not_merged_again(self, tiny_moe: Path, tmp_path: Path) -> None:
        """Under another name, onto a model that has it, or beside others: its change would count twice."""
        adapted(load(tiny_moe)).save_pretrained(tmp_path)
        twice = PeftModel.from_pretrained(load(tiny_moe), tmp_path)
        twice.load_adapter(tmp_path, "copy")
        with pytest.raises(ValueError, match="adapter 'copy' has the values of one that is merged into"):
            twice.merge_adapter(["default", "copy"])
        merged = adapted(adapted(load(tiny_moe), seed=2, r=5).merge_and_unload()).merge_and_unload()
        with pytest.raises(ValueError, match=r"is merged into .* already, .*; its change would count twice"):
            PeftModel.from_pretrained(merged, tmp_path).merge_and_unload()
        untrained = adapted(adapted(load(tiny_moe), filled=False).merge_and_unload(), filled=False).merge_and_unload()
        assert torch.equal(logits(untrained), logits(load(tiny_moe)))

    def test_in_inference_mode(self, tiny_moe: Path) -> None:
        """What such code makes has no counter of changes, and would not be allowed in training afterwards."""
        model = adapted(load(tiny_moe), target_modules=[])
        expected = logits(model)
        with torch.inference_mode():
            model.merge_adapter()
            assert torch.equal(logits(model), expected)
            with model.disable_adapter():
                assert torch.equal(logits(model), logits(load(tiny_moe)))
            model.merge_adapter()
        assert torch.equal(logits(model), expected)
        again = adapted(model.merge_and_unload(), seed=4).train()
        again(input_ids=torch.arange(24)[None], labels=torch.arange(24)[None]).loss.backward()
        assert all(value.grad.any() for value in tensors(again).values())

    @pytest.mark.parametrize("way", ["unload", "merge_and_unload", "delete_adapter"])
    def test_adapters_that_are_gone_are_freed(self, tiny_moe: Path, way: str) -> None:
        model = adapted(load(tiny_moe))
        logits(model)
        kept = [weakref.ref(value.untyped_storage()) for value in tensors(model).values()]
        assert all(storage() is not None for storage in kept)
        model.delete_adapter("default") if way == "delete_adapter" else getattr(model, way)()
        gc.collect()
        assert not any(storage() is not None for storage in kept)

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
