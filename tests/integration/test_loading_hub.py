"""Models by their id on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import cached
from typer.testing import CliRunner

from kt_sft.cli.app import app
from kt_sft.loading.ready.manifest import read_manifest

NAME = "org/tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, and no hub within reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


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
