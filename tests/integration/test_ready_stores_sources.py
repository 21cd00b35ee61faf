"""What `kt-sft quantize` takes for a model's weights, what it copies, and where it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import same_experts, stores
from ready import make_store
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kt_sft.config import ConfigError, KTConfig
from kt_sft.loading.checkpoint import checkpoint_files
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.ready.manifest import read_manifest
from kt_sft.loading.ready.planning import plan_store
from kt_sft.loading.ready.writing import StoreWriter

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def source(tiny_moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_moe, tmp_path / "source"))


@pytest.mark.parametrize("with_shards", [True, False])
def test_of_two_checkpoints_in_a_folder_it_takes_the_one_that_transformers_takes(
    with_shards: bool, source: Path, tmp_path: Path
) -> None:
    tensors = load_file(source / WEIGHTS)
    if with_shards:  # of another state of the model
        save_file({key: torch.zeros_like(value) for key, value in tensors.items()}, source / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (source / INDEX).write_text(json.dumps(index))
    make_store(source, tmp_path / "store", expert_format="int8")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "store", quantization_config=KTConfig())
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=KTConfig(expert_format="int8"))
    assert same_experts(made, loaded)
    assert stores(made)


def test_other_files_that_look_like_weights_are_none(source: Path) -> None:
    shutil.copy(source / WEIGHTS, source / "consolidated.safetensors")
    assert checkpoint_files(source) == [str(source / WEIGHTS)]


@pytest.mark.parametrize(
    ("index", "message"),
    [(None, "has neither model.safetensors nor"), ("{}", "no readable index"), ("[", "no readable index")],
)
def test_a_folder_without_weights_is_named(index: str | None, message: str, tmp_path: Path) -> None:
    if index is not None:
        (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("name", ["README (1).md", "a, b & c's [x]@2~.md", "日本.md"])
def test_whatever_name_a_copied_file_has_the_store_loads(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).write_text("text")
    make_store(source, tmp_path / "store", expert_format="int4")
    assert (tmp_path / "store" / name).read_text() == "text"
    assert stores(AutoModelForCausalLM.from_pretrained(tmp_path / "store", quantization_config=KTConfig()))


def test_a_quantization_that_is_no_object_is_named(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": "fp8"}))
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config is no JSON object"):
        plan_store(source, KTConfig(expert_format="int4"))


def test_code_of_the_folder_is_not_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    config = json.loads((source / "config.json").read_text())
    own = {"model_type": "its_own", "auto_map": {"AutoConfig": "configuration_its_own.ItsOwn"}}
    (source / "config.json").write_text(json.dumps(config | own))
    (source / "configuration_its_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="without running code of its folder"):
        plan_store(source, KTConfig(expert_format="int4"))
    assert not (tmp_path / "ran").exists()


def test_a_mount_point_is_refused_before_any_work(
    tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "store")
    (tmp_path / "store").mkdir()
    writer = StoreWriter(plan_store(tiny_moe, KTConfig(expert_format="int4")), tmp_path / "store", threads=1)
    with pytest.raises(ConfigError, match="is a mount point, which stays; give a folder inside it"):
        writer.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_nobody_else_can_prepare_what_one_is_working_on(tiny_moe: Path, tmp_path: Path) -> None:
    """As while the model runs on texts for calibration, before anything is written."""
    plans = [plan_store(tiny_moe, KTConfig(expert_format=name)) for name in ("int4", "int8")]
    first, second = (StoreWriter(plan, tmp_path / "store", threads=1) for plan in plans)
    with first.locked():
        assert first.prepare()
        with pytest.raises(ConfigError, match="another process is writing"):
            second.prepare()
        first.write()
    assert read_manifest(tmp_path / "store").settings["expert_format"] == "int4"
