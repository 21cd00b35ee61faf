"""Models by their id on the hub: what kt_sft keeps beside the weights is found as in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from adapted_models import adapted
from checkpoints import cached, load, same_experts
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import PeftModel
from ready import make_store
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kt_sft.cli.app import app
from kt_sft.config import KTConfig
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.merged_record import RECORD
from kt_sft.loading.ready.manifest import MANIFEST, read_manifest

NAME = "org/tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, and no hub within reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has the files of `source`; what it is asked for."""
    asked: list[dict[str, Any]] = []

    def download(name: str, file: str, *, cache_dir: Path, revision: str, **settings: Any) -> str:
        asked.append({"name": name, "file": file} | settings)
        snapshot = cache_dir / "models--org--tiny" / "snapshots" / revision
        return shutil.copy(cache_dir.parent / "source" / file, snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def by_name(cache: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(NAME, cache_dir=cache, quantization_config=KTConfig(), **settings)


@pytest.fixture
def merged(tiny_moe: Path, tmp_path: Path) -> Path:
    """A model with an adapter merged into its experts, which lies in `adapter`."""
    adapted(load(tiny_moe)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load(tiny_moe), tmp_path / "adapter").merge_and_unload()
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("without", [(), (RECORD,)], ids=["all downloaded", "what transformers downloads"])
def test_no_adapter_is_merged_twice(
    without: tuple[str, ...], merged: Path, cache: Path, hub: list[dict[str, Any]], tmp_path: Path
) -> None:
    cached(merged, cache, NAME, without)
    model = PeftModel.from_pretrained(by_name(cache), tmp_path / "adapter")
    with pytest.raises(ValueError, match="has the values of one that is merged into the experts already"):
        model.merge_and_unload()
    assert [one["file"] for one in hub] == [*without]


@pytest.mark.parametrize("without", [(), (MANIFEST,)], ids=["all downloaded", "what transformers downloads"])
def test_a_ready_store_is_loaded(
    without: tuple[str, ...], tiny_moe: Path, cache: Path, hub: list[dict[str, Any]], tmp_path: Path
) -> None:
    make_store(tiny_moe, tmp_path / "source", expert_format="int4")
    cached(tmp_path / "source", cache, NAME, without)
    absent = cache / "models--org--tiny" / ".no_exist" / ("0" * 40) / RECORD
    absent.parent.mkdir(parents=True)
    absent.touch()  # the hub was asked before

    assert same_experts(by_name(cache, token="secret"), load(tmp_path / "source"))
    assert hub == [{"name": NAME, "file": file, "token": "secret"} for file in without]


def test_a_snapshot_that_is_given_as_a_folder_needs_no_hub(
    tiny_moe: Path, cache: Path, hub: list[dict[str, Any]]
) -> None:
    assert same_experts(load(cached(tiny_moe, cache, NAME)), load(tiny_moe))
    assert not hub


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("x"), OfflineModeIsEnabled("x"), OSError("x")])
def test_a_hub_out_of_reach_is_no_error(
    error: Exception, tiny_moe: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    cached(tiny_moe, cache, NAME)
    assert same_experts(by_name(cache), load(tiny_moe))


def test_a_store_without_its_manifest_is_an_error(tiny_moe: Path, cache: Path, tmp_path: Path) -> None:
    make_store(tiny_moe, tmp_path / "source", expert_format="int4")
    cached(tmp_path / "source", cache, NAME, [MANIFEST])
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: missing"):
        by_name(cache)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_quantize_and_verify_take_an_id(tiny_moe: Path, cache: Path, tmp_path: Path) -> None:
    cached(tiny_moe, cache, NAME)
    (tmp_path / "words.txt").write_text("red green blue black " * 20)

    result = run("quantize", NAME, tmp_path / "store", "--calibrate", tmp_path / "words.txt")

    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith(f"from {NAME}")
    assert read_manifest(tmp_path / "store").source["name"] == NAME
    cached(tmp_path / "store", cache, "org/store")
    assert run("verify", "org/store").exit_code == 0


@pytest.mark.parametrize("command", ["quantize", "verify"])
def test_what_was_not_downloaded_is_said(command: str, cache: Path, tmp_path: Path) -> None:
    result = run(command, "org/missing", *([tmp_path / "store"] if command == "quantize" else []))
    assert result.exit_code == 2
    assert f"kt-sft {command}: kt_sft: org/missing is neither a folder nor in the hub's cache" in result.output
    assert "download it (`hf download org/missing`), or give a folder" in result.output
