"""What a folder may hold besides a model: links to elsewhere, code, pickles, headers of any content."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import load, same_experts, stores
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kt_sft.config import KTConfig
from kt_sft.loading.checkpoint import read_header
from kt_sft.loading.errors import CheckpointError, UnsupportedModelError

WEIGHTS = "model.safetensors"


class TestLinks:
    """A file is in the model's folder, or in the blobs of the hub's cache that the folder belongs to."""

    @pytest.fixture
    def cached(self, tiny_moe: Path, tmp_path: Path) -> Path:
        """A snapshot as huggingface_hub keeps it."""
        return checkpoints.cached(tiny_moe, tmp_path, "org/tiny")

    @pytest.mark.parametrize("store", ["resident", "mapped"])
    def test_the_hubs_cache_is_loaded_and_exported(
        self, store: str, cached: Path, tiny_moe: Path, tmp_path: Path
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(cached, quantization_config=KTConfig(store=store))
        assert same_experts(model, load(tiny_moe))
        model.save_pretrained(tmp_path / "saved")
        saved, source = load_file(tmp_path / "saved" / WEIGHTS), load_file(tiny_moe / WEIGHTS)
        assert all(torch.equal(saved[key], source[key]) for key in source)

    def test_saving_over_the_hubs_cache_is_refused(self, cached: Path) -> None:
        with pytest.raises(CheckpointError, match="save into another folder"):
            load(cached).save_pretrained(cached)

    def test_a_folder_may_be_a_link_and_hold_links_into_itself(self, checkpoint: Path, tmp_path: Path) -> None:
        (checkpoint / "data").mkdir()
        (checkpoint / WEIGHTS).rename(checkpoint / "data" / "weights")
        (checkpoint / WEIGHTS).symlink_to("data/weights")
        (tmp_path / "link").symlink_to(checkpoint)
        assert stores(load(tmp_path / "link"))

    def test_another_place_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere.safetensors"
        (checkpoint / WEIGHTS).rename(elsewhere)
        (checkpoint / WEIGHTS).symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: is at {elsewhere}, outside the model's folder"):
            load(checkpoint)

    def test_blobs_may_lie_on_another_disk(self, cached: Path, tmp_path: Path) -> None:
        blobs = cached.parents[1] / "blobs"
        blobs.rename(tmp_path / "disk")
        blobs.symlink_to(tmp_path / "disk")
        assert stores(load(cached))

    def test_blobs_of_another_repository_are_refused(self, cached: Path, tmp_path: Path) -> None:
        other = tmp_path / "models--org--other" / "blobs" / "1"
        other.parent.mkdir(parents=True)
        shutil.copy((cached / WEIGHTS).resolve(), other)
        (cached / WEIGHTS).unlink()
        (cached / WEIGHTS).symlink_to(other)
        with pytest.raises(CheckpointError, match="outside the model's folder"):
            load(cached)

    def test_an_index_that_leads_out_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (checkpoint / WEIGHTS).rename(outside / WEIGHTS)
        names = dict.fromkeys(read_header(outside / WEIGHTS), f"../{outside.name}/{WEIGHTS}")
        (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        with pytest.raises(CheckpointError, match="outside the model's folder"):
            load(checkpoint)


@pytest.fixture
def sharded(tiny_moe: Path, tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(tiny_moe).save_pretrained(tmp_path, max_shard_size="40KB")
    return tmp_path


def _swap_two(folder: Path) -> None:
    one, other, *_ = sorted(folder.glob("*.safetensors"))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


def _repeat_one(folder: Path) -> None:
    one, other = sorted(folder.glob("*.safetensors"))[1:3]
    tensors = load_file(one)
    key = next(key for key in tensors if ".experts." in key)
    save_file(load_file(other) | {key: tensors[key]}, other, {"format": "pt"})


def _turn_the_index(folder: Path) -> None:
    index = folder / f"{WEIGHTS}.index.json"
    found = json.loads(index.read_text())
    names = [*found["weight_map"].values()]
    found["weight_map"] = dict(zip(found["weight_map"], [*names[1:], names[0]], strict=True))
    index.write_text(json.dumps(found))


@pytest.mark.parametrize("change", [_swap_two, _repeat_one, _turn_the_index])
def test_tensors_are_found_in_whichever_file_as_transformers_does(
    change: Callable[[Path], None], tiny_moe: Path, sharded: Path
) -> None:
    change(sharded)
    ours, theirs = load(sharded), AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    assert same_experts(ours, load(tiny_moe))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items() if key in theirs)


def test_two_values_of_one_tensor_are_refused(sharded: Path) -> None:
    _repeat_one(sharded)
    other = sorted(sharded.glob("*.safetensors"))[2]
    save_file({key: value + 1 for key, value in load_file(other).items()}, other, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor model\..* appears twice with different values"):
        load(sharded)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="is no file"):
        read_header(tmp_path / WEIGHTS)


def _remove(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


@pytest.mark.parametrize(
    "key",
    ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"],
)
def test_every_weight_must_be_there(key: str, checkpoint: Path, edit: Callable[..., None]) -> None:
    edit(_remove(key))
    with pytest.raises(CheckpointError, match=rf"the checkpoint has no tensor for {key}, and is no whole model"):
        load(checkpoint)


def test_a_new_head_may_be_missing(tiny_moe: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_moe, quantization_config=KTConfig(), num_labels=3)
    assert model.score.weight.shape == (3, 32)


class _Witness:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (str(self.file), "w"))


class TestCode:
    """Nothing of a model's folder is executed unless `trust_remote_code` says so."""

    @pytest.fixture
    def witness(self, checkpoint: Path, tmp_path: Path) -> Path:
        """The file that any code or pickle of `checkpoint` would make."""
        witness = tmp_path / "executed"
        code = f"open({str(witness)!r}, 'w')\nfrom transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM\n"
        for name in (
            "modeling_tiny",
            "configuration_tiny",
            "tokenization_tiny",
            "__init__",
            "setup",
            "kt_sft",
            "sitecustomize",
        ):
            (checkpoint / f"{name}.py").write_text(code)
        config = json.loads((checkpoint / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "configuration_tiny.Qwen3MoeConfig",
            "AutoModelForCausalLM": "modeling_tiny.Qwen3MoeForCausalLM",
        }
        (checkpoint / "config.json").write_text(json.dumps(config))
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
            (checkpoint / name).write_bytes(pickle.dumps(_Witness(witness)))
        return witness

    def test_a_model_that_brings_code_and_pickles_is_loaded_without(self, witness: Path, checkpoint: Path) -> None:
        model = load(checkpoint)
        assert type(model).__module__.startswith("transformers.")
        assert stores(model)
        assert not witness.exists()

    def test_a_model_in_pickles_alone_is_refused(self, witness: Path, checkpoint: Path) -> None:
        (checkpoint / WEIGHTS).unlink()
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: only safetensors checkpoints can be read"):
            load(checkpoint)
        assert not witness.exists()

    def test_a_class_that_is_in_the_folder_alone_is_refused(self, witness: Path, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "tiny"}))
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(checkpoint)
        assert not witness.exists()

    def test_an_index_of_pickles_is_refused(self, witness: Path, checkpoint: Path) -> None:
        (checkpoint / WEIGHTS).unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="only safetensors checkpoints"):
            load(checkpoint)
        assert not witness.exists()


def _experts_of(tensors: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    def stack(name: str) -> Tensor:
        prefix = f"model.layers.{layer}.mlp.experts"
        return torch.stack([tensors[f"{prefix}.{expert}.{name}_proj.weight"] for expert in range(8)]).float()

    return torch.cat([stack("gate"), stack("up")], dim=1), stack("down")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_headers_load_right_or_not_at_all(seed: int, tiny_moe: Path, checkpoint: Path) -> None:
    """Whole loads of models whose header differs in one place; the library says what the file then holds."""
    random_ = random.Random(seed)
    whole = (tiny_moe / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    keys = [key for key in json.loads(whole[8 : 8 + length]) if key != "__metadata__"]
    loaded = 0
    for _ in range(10):
        header = json.loads(whole[8 : 8 + length])
        one, other = random_.sample(keys, 2)
        change = random_.choice(("places", "names", "shape", "dtype", "rename"))
        if change == "places":
            header[one]["data_offsets"], header[other]["data_offsets"] = (
                header[other]["data_offsets"],
                header[one]["data_offsets"],
            )
        elif change == "names":
            header[one], header[other] = header[other], header[one]
        elif change == "shape":
            header[one]["shape"] = header[one]["shape"][::-1]
        elif change == "dtype":
            header[one]["dtype"] = random_.choice(("F16", "I16", "U16"))
        else:
            header[f"{one}_"] = header.pop(one)
        raw = json.dumps(header).encode()
        (checkpoint / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + whole[8 + length :])
        try:
            model = load(checkpoint)
        except (CheckpointError, UnsupportedModelError) as error:
            assert ".safetensors" in str(error) or "model." in str(error)  # noqa: PT017  # any other error fails
            continue
        except SafetensorError:
            pytest.fail("the host's reader saw it first")
        tensors = load_file(checkpoint / WEIGHTS)
        for layer, store in enumerate(stores(model)):
            for stored, expected in zip(store.dequantized(), _experts_of(tensors, layer), strict=True):
                assert torch.equal(stored, expected)
        for name, value in model.named_parameters():
            assert torch.equal(value, tensors[name].to(value.dtype)), name
        loaded += 1
    assert 0 < loaded < 10
