"""Adapters with LoRA on routed experts, made by PEFT, between the layouts that tools read.

E experts, R rank, I expert intermediate size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, make
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kt_sft import CpuExperts
from kt_sft.config import KTConfig
from kt_sft.integrations.adapter_files import AdapterFileError, convert, read_adapter
from kt_sft.integrations.adapter_layouts import split

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = "base_model.model.model.layers.1.mlp.experts"
#: A version that puts A on the other side than the installed one does.
OTHER = "0.19.1" if peft.__version__ < "0.19" else "0.18.1"


def deltas(adapted: peft.PeftModel) -> dict[tuple[str, str], Tensor]:
    """(module of experts, parameter) -> the change [E, ...] as PEFT itself computes it, as the parameter lies."""
    return {
        (name.replace(".base_layer", ""), wrapper.parameter_name): wrapper.get_delta_weight("default").detach()
        for name, wrapper in adapted.named_modules()
        if isinstance(wrapper, ParamWrapper)
    }


def listed_deltas(folder: Path, names: dict[str, tuple[str, ...]], *, rank: int) -> dict[tuple[str, str], Any]:
    """The same from the files of the layout per-expert; `names` are those of each parameter's matrices.

    Returns:
        Besides each change, what another way to compute it in FP32, with `rank` products in a sum, may be off by: each
        of the two rounds every product, partial sum and scaling by 2^-24 of at most scale · |B| |A|.
    """
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    modules = {key.rpartition(".experts.")[0] + ".experts" for key in tensors if ".experts." in key}
    found = {}
    for module in modules:
        for parameter, leaves in names.items():
            changes, limits = [], []
            for expert in range(8):
                keys = [f"{module}.{expert}.{leaf}" for leaf in leaves]
                pairs = [(tensors[f"{key}.lora_B.weight"], tensors[f"{key}.lora_A.weight"]) for key in keys]
                changes.append(torch.cat([scale * (b @ a) for b, a in pairs]))
                sizes = torch.cat([scale * (b.abs() @ a.abs()) for b, a in pairs])
                limits.append(2 * (rank + 2) * 2.0**-24 * sizes)
            found[module, parameter] = torch.stack(changes), torch.stack(limits)
    return found


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    )


LISTED_NAMES = {
    "qwen3_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "nemotron_h": {"up_proj": ("up_proj",), "down_proj": ("down_proj",)},
}


class TestPeftToPerExpert:
    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("family", LISTED_NAMES)
    def test_experts_change_by_what_peft_says(self, family: str, rslora: bool, adapt: Any, tmp_path: Path) -> None:
        adapted, source = adapt(family, use_rslora=rslora)

        convert(source, tmp_path / "listed", "per-expert", base=tmp_path / "base")

        expected, found = deltas(adapted), listed_deltas(tmp_path / "listed", LISTED_NAMES[family], rank=3)
        renamed = {(name.replace(".block_sparse_moe.", ".mlp."), key): value for (name, key), value in found.items()}
        assert renamed.keys() == expected.keys()
        for key, (delta, limit) in renamed.items():
            assert bool(((expected[key] - delta).abs() <= limit).all())
            assert delta.abs().max() > 1000 * limit.max()

    def test_keys_are_those_of_checkpoints(self, adapt: Any, tmp_path: Path) -> None:
        convert(adapt("qwen3_moe")[1], tmp_path / "qwen", "per-expert")
        convert(adapt("mixtral")[1], tmp_path / "mixtral", "per-expert", base=tmp_path / "base")

        assert f"{EXPERTS}.7.gate_proj.lora_A.weight" in load_file(tmp_path / "qwen" / WEIGHTS)
        key = f"{EXPERTS.replace('.mlp.', '.block_sparse_moe.')}.7.w1.lora_A.weight"
        assert key in load_file(tmp_path / "mixtral" / WEIGHTS)

    def test_config_says_what_serving_tools_ask(self, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt()
        convert(source, tmp_path / "listed", "per-expert")
        config = json.loads((tmp_path / "listed" / CONFIG).read_text())
        assert config["target_modules"] == ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]
        assert config["target_parameters"] is None
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 8, {})

    @pytest.mark.parametrize("version", [peft.__version__, OTHER])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_there_and_back_is_equal_bit_for_bit(
        self, version: str, dtype: torch.dtype, adapt: Any, tmp_path: Path
    ) -> None:
        _, source = adapt()
        save_file({key: value.to(dtype) for key, value in load_file(source / WEIGHTS).items()}, source / WEIGHTS)
        if version == OTHER:
            convert(source, tmp_path / "other", "peft", peft_version=OTHER)
            source = tmp_path / "other"
        convert(source, tmp_path / "listed", "per-expert")

        convert(tmp_path / "listed", tmp_path / "back", "peft", peft_version=version)

        assert same(tmp_path / "back", source)
        before, after = (json.loads((folder / CONFIG).read_text()) for folder in (source, tmp_path / "back"))
        targeted = [{*config.pop("target_parameters")} for config in (before, after)]
        assert targeted[0] == {name.removeprefix("mlp.") for name in targeted[1]}
        assert sorted(before.pop("target_modules")) == sorted(after.pop("target_modules"))
        assert before == after

    def test_other_tensors_and_files_are_carried_through(self, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt()
        (source / "tokenizer.json").write_text("{}")
        (source / "optimizer.pt").write_bytes(b"state")
        (source / "trainer_state.json").write_text("{}")
        (source / "training_args.bin").write_bytes(b"pickle")

        convert(source, tmp_path / "listed", "per-expert")

        before, after = load_file(source / WEIGHTS), load_file(tmp_path / "listed" / WEIGHTS)
        dense = [key for key in before if ".experts" not in key]
        assert dense
        assert all(torch.equal(before[key], after[key]) for key in dense)
        names = {file.name for file in (tmp_path / "listed").iterdir()}
        assert names == {CONFIG, WEIGHTS, "README.md", "tokenizer.json"}


class TestOrientation:
    """PEFT 0.18's and 0.19's files of the same change."""

    def as_other(self, source: Path) -> None:
        """Rewrites a 0.18 file as 0.19 does, or the other way: the same change, with A on the other side.

        PEFT 0.18: change[e] [x, y] = (B A)ᵀ with A [E·R, x], B [y, R·E]; 0.19: = B A with A [E·R, y], B [x, R·E].
        """
        tensors, written = load_file(source / WEIGHTS), {}
        for key, tensor in tensors.items():
            if ".experts." not in key:
                written[key] = tensor
                continue
            if "lora_B" in key:
                continue
            other = key.replace("lora_A", "lora_B")
            rows, columns = tensor, tensors[other]
            written[key] = torch.stack([columns[:, r * 8 + e] for e in range(8) for r in range(3)])
            written[other] = torch.stack([rows[e * 3 + r] for r in range(3) for e in range(8)], dim=1)
        save_file(written, source / WEIGHTS)

    def set_version(self, folder: Path, version: str | None) -> None:
        config = json.loads((folder / CONFIG).read_text()) | {"peft_version": version}
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def factors(self, folder: Path, base: Path | None = None) -> list[Tensor]:
        experts = read_adapter(folder, base).experts
        return [tensor for name in sorted(experts) for _, f in sorted(experts[name].items()) for tensor in (f.a, f.b)]

    def test_sizes_tell_whatever_the_version_says(self, adapt: Any) -> None:
        _, source = adapt()
        old = self.factors(source)
        self.set_version(source, OTHER)
        assert all(
            torch.equal(x, y) for a, b in zip(old, self.factors(source), strict=True) for x, y in zip(a, b, strict=True)
        )
        self.as_other(source)
        for version in ("0.19.1", "0.18.1", None):
            self.set_version(source, version)
            new = self.factors(source)
            assert all(map(torch.equal, old, new))

    @pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
    def test_of_one_parameter_the_version_or_the_base_model_tells(
        self, parameter: str, adapt: Any, tmp_path: Path
    ) -> None:
        _, source = adapt(parameters=(f"experts.{parameter}",))
        old = self.factors(source)
        assert old[0].shape == ((8, 3, 32) if parameter == "gate_up_proj" else (8, 3, 24))
        self.as_other(source)
        self.set_version(source, OTHER)
        by_version = self.factors(source)
        self.set_version(source, None)
        by_base = self.factors(source, tmp_path / "base")
        for new in (by_version, by_base):
            assert all(map(torch.equal, old, new))

    def test_of_ungated_experts_the_version_tells(self, adapt: Any) -> None:
        _, source = adapt("nemotron_h")
        old = self.factors(source)
        self.as_other(source)
        self.set_version(source, OTHER)
        new = self.factors(source)
        assert all(map(torch.equal, old, new))

    def test_either_nesting(self, adapt: Any) -> None:
        _, source = adapt()
        expected = self.factors(source)
        tensors = load_file(source / WEIGHTS)
        swapped = {
            key.replace(".base_layer", "")
            if ".base_layer" in key
            else key.replace("experts.", "experts.base_layer."): value
            for key, value in tensors.items()
        }
        save_file(swapped, source / WEIGHTS)
        found = self.factors(source)
        assert all(map(torch.equal, expected, found))

    def test_between_versions(self, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt()
        convert(source, tmp_path / "other", "peft", peft_version=OTHER)
        self.as_other(source)
        assert same(tmp_path / "other", source)
        assert json.loads((tmp_path / "other" / CONFIG).read_text())["peft_version"] == OTHER

    def test_of_one_parameter_of_gpt_oss_its_name_tells(self, adapt: Any) -> None:
        _, source = adapt("gpt_oss", ("experts.down_proj",))
        for name in ("someone/gpt-oss-20b-BF16", "/models/gpt_oss"):
            config = json.loads((source / CONFIG).read_text()) | {"base_model_name_or_path": name}
            (source / CONFIG).write_text(json.dumps(config))
            a, b = self.factors(source)[:2]
            assert (a.shape, b.shape) == ((8, 3, 40), (8, 32, 3))

    def test_transposed_experts_have_one_layout(self, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt("gpt_oss")
        for version, base in (("0.18.1", None), ("0.19.1", tmp_path / "base")):
            self.set_version(source, version)
            for to, target in (("per-expert", None), ("peft", "0.19.1"), ("peft", "0.18.1")):
                with pytest.raises(AdapterFileError, match=r"stores its experts as \[in, out\]"):
                    convert(source, tmp_path / "target", to, base=base, peft_version=target)


class TestPerExpertToPeft:
    @pytest.mark.parametrize("rslora", [False, True])
    def test_gate_and_up_with_matrices_a_of_their_own(self, rslora: bool, adapt: Any, tmp_path: Path) -> None:
        adapted, source = adapt(use_rslora=rslora)
        tokens = torch.arange(3, 23).reshape(2, 10)
        convert(source, tmp_path / "listed", "per-expert")
        tensors = load_file(tmp_path / "listed" / WEIGHTS)
        generator = torch.Generator().manual_seed(1)
        for key in [key for key in tensors if ".up_proj.lora_A" in key]:
            tensors[key] = torch.randn(tensors[key].shape, generator=generator)
        save_file(tensors, tmp_path / "listed" / WEIGHTS)

        convert(tmp_path / "listed", tmp_path / "fused", "peft")

        plain = make(FAMILIES["qwen3_moe"][0])
        fused = peft.PeftModel.from_pretrained(plain, tmp_path / "fused")
        expected = listed_deltas(tmp_path / "listed", LISTED_NAMES["qwen3_moe"], rank=12)
        found = deltas(fused)
        assert found.keys() == expected.keys()
        for key, (delta, limit) in expected.items():
            assert bool(((found[key] - delta).abs() <= limit).all())
            assert delta.abs().max() > 1000 * limit.max()
        assert not torch.equal(fused(tokens).logits, adapted(tokens).logits)
        # And back: the ranks are no longer the config's.
        convert(tmp_path / "fused", tmp_path / "again", "per-expert")
        assert json.loads((tmp_path / "again" / CONFIG).read_text())["rank_pattern"]
        config = read_adapter(tmp_path / "again")
        assert {factors.rank for factors in config.experts[EXPERTS].values()} == {3, 12 if rslora else 6}

    def test_what_peft_reads_is_what_it_wrote(self, adapt: Any, tmp_path: Path) -> None:
        adapted, source = adapt()
        convert(source, tmp_path / "listed", "per-expert")
        convert(tmp_path / "listed", tmp_path / "back", "peft")
        again = peft.PeftModel.from_pretrained(make(FAMILIES["qwen3_moe"][0]), tmp_path / "back")
        tokens = torch.arange(3, 23).reshape(2, 10)
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, adapted(tokens).logits)

    @pytest.mark.parametrize("own_a", [False, True])
    def test_a_model_in_the_engine_reads_it(self, own_a: bool, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt()
        convert(source, tmp_path / "listed", "per-expert")
        tensors = load_file(tmp_path / "listed" / WEIGHTS)
        if own_a:
            tensors |= {key: value.flip(0) for key, value in tensors.items() if ".up_proj.lora_A" in key}
            save_file(tensors, tmp_path / "listed" / WEIGHTS)
        convert(tmp_path / "listed", tmp_path / "fused", "peft")
        make(FAMILIES["qwen3_moe"][0]).save_pretrained(tmp_path / "model")
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=KTConfig())

        merged = peft.PeftModel.from_pretrained(ours, tmp_path / "fused").merge_and_unload()

        expected = listed_deltas(tmp_path / "listed", LISTED_NAMES["qwen3_moe"], rank=6)
        for name, experts in merged.named_modules():
            if isinstance(experts, CpuExperts):
                for expert in range(8):
                    found = dict(zip(("gate_up_proj", "down_proj"), experts.merged.delta(expert), strict=True))
                    for parameter, change in found.items():
                        delta, limit = expected[f"base_model.model.{name}", parameter]
                        assert bool(((change - delta[expert]).abs() <= limit[expert]).all())

    def test_dropout_of_training_is_left_behind(self, adapt: Any, tmp_path: Path) -> None:
        convert(adapt()[1], tmp_path / "listed", "per-expert")
        self.set(tmp_path / "listed", lora_dropout=0.1)
        convert(tmp_path / "listed", tmp_path / "back", "peft")
        assert json.loads((tmp_path / "back" / CONFIG).read_text())["lora_dropout"] == 0.0

    def set(self, folder: Path, **changes: Any) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def test_split_shares_the_common_matrix(adapt: Any) -> None:
    matrices = read_adapter(adapt()[1]).experts[EXPERTS]
    apart = split(matrices)
    assert [*apart] == ["gate", "up", "down"]
    assert torch.equal(apart["gate"].a, apart["up"].a)
    assert torch.equal(torch.cat([apart["gate"].b, apart["up"].b], dim=1), matrices["gate_up"].b)
