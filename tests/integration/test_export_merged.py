"""Models saved with adapters merged into their experts: `CpuExperts.merged` set, then `save_pretrained`.

E experts, H hidden size, I expert intermediate size, R rank.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load
from commands import run_command
from families import FAMILIES, make
from rounding import bound_of_rounding
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import kt_sft
from kt_sft.config import KTConfig
from kt_sft.engine.low_rank import LowRank
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.layout import ExpertLayout, find_experts


def experts_of(model: nn.Module) -> dict[str, kt_sft.CpuExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kt_sft.CpuExperts)}


def change(experts: kt_sft.CpuExperts, *, rank: int = 3, size: float = 0.3, seed: int = 3) -> LowRank:
    """A random change of every expert but the last, whose B is zero."""
    E, H, I = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    rows = 2 * I if experts.store.gated else I
    generator = torch.Generator().manual_seed(seed)
    shapes = ((E, rank, H), (E, rows, rank), (E, rank, I), (E, H, rank))
    tensors = [size * torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1][-1], tensors[3][-1] = 0, 0
    return LowRank(*tensors)


def merge(model: nn.Module, **settings: Any) -> dict[str, LowRank]:
    for seed, experts in enumerate(experts_of(model).values()):
        experts.merged = change(experts, seed=seed, **settings)
    return {name: experts.merged for name, experts in experts_of(model).items()}


def as_parameters(change: LowRank, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """The change of a module's two parameters, as they lie in transformers."""
    deltas = [change.delta(expert) for expert in range(change.num_experts)]
    first, down = (torch.stack([delta[i] for delta in deltas]) for i in range(2))
    if layout.interleaved:
        first = torch.stack(first.chunk(2, dim=1), dim=2).flatten(1, 2)
    return (first.transpose(1, 2), down.transpose(1, 2)) if layout.transposed else (first, down)


def transpose_on_disk(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def fuse_on_disk(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, save_original_format=False)


LAYOUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "per expert": ("qwen3_moe", lambda folder: None),
    "per expert, w1 w2 w3": ("mixtral", lambda folder: None),
    "per expert, text and vision in one list": ("ernie4_5_vl_moe", lambda folder: None),
    "ungated": ("nemotron_h", lambda folder: None),
    "fused": ("qwen3_moe", fuse_on_disk),
    "fused and transposed": ("qwen3_vl_moe", transpose_on_disk),
    "fused, transposed, gate and up alternating": ("gpt_oss", lambda folder: None),
}


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_disk(layout: str, shard: str, tmp_path: Path) -> None:
    family, prepare = LAYOUTS[layout]
    source, target = tmp_path / "source", tmp_path / "target"
    plain = make(FAMILIES[family][0])
    plain.save_pretrained(source)
    prepare(source)
    layouts = find_experts(plain)
    ours = type(plain).from_pretrained(source, quantization_config=KTConfig(), dtype=torch.float32)
    changes = merge(ours)

    ours.save_pretrained(target, max_shard_size=shard)

    again = type(plain).from_pretrained(target, dtype=torch.float32)
    for name, change in changes.items():
        before, after = plain.get_submodule(name), again.get_submodule(name)
        first, down = as_parameters(change, layouts[name])
        # One FP32 matrix product each in the two of us, the same one: equal to the bit.
        assert torch.equal(
            getattr(after, layouts[name].first_parameter), getattr(before, layouts[name].first_parameter) + first
        )
        assert torch.equal(after.down_proj, before.down_proj + down)
    inside = tuple(f"{name}." for name in changes)
    rest = {key: value for key, value in plain.state_dict().items() if not key.startswith(inside) or "bias" in key}
    assert all(torch.equal(again.state_dict()[key], value) for key, value in rest.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_rounded_once_to_the_sources_dtype(dtype: torch.dtype, tiny_moe: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=dtype).save_pretrained(source)
    ours = load(source, dtype=torch.float32)
    changes = merge(ours)

    ours.save_pretrained(target)

    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    for name, change in changes.items():
        for expert in range(change.num_experts):
            gate_up, down = change.delta(expert)
            parts = dict(zip(("gate", "up", "down"), (*gate_up.chunk(2), down), strict=True))
            for matrix, delta in parts.items():
                key = f"{name}.{expert}.{matrix}_proj.weight"
                assert after[key].dtype == dtype
                assert torch.equal(after[key], (before[key].float() + delta).to(dtype))
                assert torch.equal(after[key], before[key]) == (expert == change.num_experts - 1)


def test_experts_without_change_keep_their_bytes(tiny_moe: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_moe).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key][0, 0] = -0.0  # + 0.0 would be another bit pattern
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ours = load(source, dtype=torch.bfloat16)
    for experts in experts_of(ours).values():
        experts.merged = change(experts, size=0.0)

    ours.save_pretrained(tmp_path / "target")

    assert (tmp_path / "target" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_logits_are_those_of_base_and_adapter(tiny_moe: Path, tmp_path: Path) -> None:
    """Up to the rounding of merged weights. The routing is replayed: top-k may flip on a rounding difference."""
    base = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    layouts = find_experts(base)
    ours = load(tiny_moe, dtype=torch.bfloat16)
    changes = merge(ours, size=0.1)
    ours.save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(24).reshape(2, 12)
    before = base(tokens).logits
    for name, change in changes.items():
        for key, delta in zip(("gate_up_proj", "down_proj"), as_parameters(change, layouts[name]), strict=True):
            getattr(base.get_submodule(name), key).data.add_(delta)
    expected, routing = _run(base, [*layouts], tokens, None)

    actual, _ = _run(exported, [*layouts], tokens, routing)

    bound = bound_of_rounding(base, layouts, lambda: _run(base, [*layouts], tokens, routing)[0])
    assert (actual - expected).abs().max() <= bound
    assert bound < 0.1 * (before - expected).abs().max(), "the bound would not notice a missing adapter"


def _run(
    model: nn.Module, names: list[str], tokens: Tensor, routing: list[tuple[Tensor, Tensor]] | None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    used: list[tuple[Tensor, Tensor]] = []

    def replay(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        used.append((args[1], args[2]) if routing is None else routing[len(used)])
        return args[0], *used[-1]

    handles = [model.get_submodule(name).register_forward_pre_hook(replay) for name in names]
    with torch.no_grad():
        logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return logits, used


class TestRefused:
    def test_a_weight_that_is_no_longer_finite(self, tiny_moe: Path, tmp_path: Path) -> None:
        source = tmp_path / "source"
        AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float16).save_pretrained(source)
        ours = load(source)
        merge(ours, size=1e3)
        with pytest.raises(CheckpointError, match=r"of expert 0 of .*: with the adapter merged a weight is not finite"):
            ours.save_pretrained(tmp_path / "target")
        assert not (tmp_path / "target").exists()

    def test_the_source_itself(self, checkpoint: Path) -> None:
        ours = load(checkpoint)
        merge(ours)
        before = (checkpoint / "model.safetensors").read_bytes()
        with pytest.raises(CheckpointError, match="save into another folder"):
            ours.save_pretrained(checkpoint)
        assert (checkpoint / "model.safetensors").read_bytes() == before

    def test_an_upload_before_the_merge(self, tiny_moe: Path, tmp_path: Path) -> None:
        ours = load(tiny_moe)
        merge(ours)
        with pytest.raises(ValueError, match="save the model first, then call push_to_hub"):
            ours.save_pretrained(tmp_path / "target", push_to_hub=True)

    def test_an_adapter_that_is_not_merged(self, tiny_moe: Path, tmp_path: Path) -> None:
        class Wrapper(nn.Module):
            def __init__(self, base_layer: nn.Module) -> None:
                super().__init__()
                self.base_layer = base_layer

        ours = load(tiny_moe)
        name, experts = next(iter(experts_of(ours).items()))
        ours.set_submodule(name, Wrapper(experts))
        with pytest.raises(CheckpointError, match=f"{name} has an adapter attached; merge it"):
            ours.save_pretrained(tmp_path / "target")


class TestUnfinished:
    """What a failing save leaves behind is no model."""

    @pytest.fixture
    def full_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def pwrite(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", pwrite)

    def test_nothing(self, full_disk: None, tiny_moe: Path, tmp_path: Path) -> None:
        ours = load(tiny_moe)
        merge(ours)
        with pytest.raises(CheckpointError, match="No space left on device"):
            ours.save_pretrained(tmp_path / "target")
        assert not (tmp_path / "target").exists()

    def test_not_even_by_the_hosts_own_writing(self, tiny_moe: Path, tmp_path: Path) -> None:
        model = load(tiny_moe)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # config.json fits, the weights do not
        try:
            with pytest.raises(CheckpointError, match=r"cannot be written there \(.*nothing of it was left behind"):
                model.save_pretrained(tmp_path / "target")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert not (tmp_path / "target").exists()

    def test_after_a_kill_no_model(self, tiny_moe: Path, tmp_path: Path) -> None:
        script = (
            "import os, signal, sys, kt_sft\n"
            "import transformers.modeling_utils as modeling\n"
            "from transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=kt_sft.KTConfig())\n"
            "save = modeling.safe_save_file\n"
            "modeling.safe_save_file = lambda *a, **k: (save(*a, **k), os.kill(os.getpid(), signal.SIGKILL))\n"
            "model.save_pretrained(sys.argv[2])\n"
        )
        result = run_command(["python", "-c", script, str(tiny_moe), str(tmp_path / "target")])
        assert result.returncode == -signal.SIGKILL
        assert [entry.name for entry in (tmp_path / "target").iterdir()] == ["incomplete-save-0"]
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / "target")

    def test_an_earlier_model_there_stays_as_it_was(self, full_disk: None, tiny_moe: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        ours = load(tiny_moe)
        ours.save_pretrained(target)
        (target / "notes.txt").write_text("mine")
        before = {file.name: file.read_bytes() for file in target.iterdir()}
        merge(ours)
        with pytest.raises(CheckpointError, match="No space left on device"):
            ours.save_pretrained(target)
        assert {file.name: file.read_bytes() for file in target.iterdir()} == before

    def test_nor_for_a_folder_in_a_files_place(self, tiny_moe: Path, tmp_path: Path) -> None:
        ours = load(tiny_moe)
        ours.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").unlink()
        (tmp_path / "generation_config.json").mkdir()
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
        merge(ours)
        with pytest.raises(CheckpointError, match=r"generation_config\.json is a folder"):
            ours.save_pretrained(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
        assert not (tmp_path / "incomplete-save-0").exists()

    def test_what_cannot_be_moved_is_kept(
        self, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def replace(*_: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("kt_sft.loading.staging.os.replace", replace)
        ours = load(tiny_moe)
        with pytest.raises(CheckpointError, match="is complete, but cannot be moved there from incomplete-save-0"):
            ours.save_pretrained(tmp_path)
        monkeypatch.undo()
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "incomplete-save-0").num_parameters() > 0
        ours.save_pretrained(tmp_path)
        assert not (tmp_path / "incomplete-save-0").exists()

    def test_what_a_killed_save_left_goes_with_the_next(self, tiny_moe: Path, tmp_path: Path) -> None:
        left = tmp_path / "target" / "incomplete-save-0"
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"half")
        load(tiny_moe).save_pretrained(tmp_path / "target")
        assert not left.exists()

    def test_weights_of_an_earlier_save_are_replaced(self, tiny_moe: Path, tmp_path: Path) -> None:
        ours = load(tiny_moe)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"another")
        for shard in ("5GB", "40KB", "5GB"):
            ours.save_pretrained(tmp_path, max_shard_size=shard)
            index = tmp_path / "model.safetensors.index.json"
            named = (
                {*json.loads(index.read_text())["weight_map"].values()} if shard == "40KB" else {"model.safetensors"}
            )
            assert index.exists() == (shard == "40KB")
            assert {file.name for file in tmp_path.glob("model*.safetensors")} == named
        assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"another"
