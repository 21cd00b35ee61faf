"""An exported model says which adapters are merged into its experts, so that none is merged a second time."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapted
from checkpoints import load
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kt_sft.integrations.adapter_files import convert
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.merged_record import RECORD
from kt_sft.lora import peft_turns_parameters

REFUSED = r"has the values of one that is merged into the experts already, here or in the checkpoint"


@pytest.fixture(scope="module")
def exported(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, and a model that was exported with it."""
    folder = tmp_path_factory.mktemp("exported")
    adapted(load(tiny_moe)).save_pretrained(folder / "adapter")
    PeftModel.from_pretrained(load(tiny_moe), folder / "adapter").merge_and_unload().save_pretrained(folder / "model")
    return folder


def record(folder: Path) -> list[str]:
    return json.loads((folder / RECORD).read_text())["merged_into_experts"]


def merged(model: Any, adapter: Path) -> Any:
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.parametrize("kept", ["as it was saved", "per expert and back", "as another PEFT has it"])
def test_the_same_adapter_is_refused_however_it_is_kept(kept: str, exported: Path, tmp_path: Path) -> None:
    adapter = exported / "adapter"
    if kept == "per expert and back":
        convert(adapter, tmp_path / "listed", "per-expert")
        adapter = tmp_path / "adapter"
        convert(tmp_path / "listed", adapter, "peft")
    elif kept == "as another PEFT has it":
        adapter = tmp_path / "adapter"
        convert(exported / "adapter", adapter, "peft", peft_version="0.18" if peft_turns_parameters() else "0.19")
    model = PeftModel.from_pretrained(load(exported / "model"), adapter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=REFUSED):
            merge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # attention's, too


def test_another_goes_on_top_and_both_are_recorded(exported: Path, tiny_moe: Path, tmp_path: Path) -> None:
    assert len(record(exported / "model")) == 2 * 2  # layers, parameters
    adapted(load(tiny_moe), seed=8).save_pretrained(tmp_path / "other")
    merged(load(exported / "model"), tmp_path / "other").save_pretrained(tmp_path / "model")
    assert {*record(tmp_path / "model")} > {*record(exported / "model")}
    for adapter in (exported / "adapter", tmp_path / "other"):
        with pytest.raises(ValueError, match=REFUSED):
            merged(load(tmp_path / "model"), adapter)


def test_a_copy_keeps_the_record_and_a_model_without_merges_has_none(
    exported: Path, tiny_moe: Path, tmp_path: Path
) -> None:
    load(exported / "model").save_pretrained(tmp_path)
    assert record(tmp_path) == record(exported / "model")
    taken_back = PeftModel.from_pretrained(load(tiny_moe), exported / "adapter")
    taken_back.merge_adapter()
    taken_back.unmerge_adapter()
    taken_back.unload().save_pretrained(tmp_path)  # over the other
    assert not (tmp_path / RECORD).exists()
    merged(load(tmp_path), exported / "adapter")


def test_training_on_with_it_is_warned_of(exported: Path, tiny_moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kt_sft"):
        PeftModel.from_pretrained(load(tiny_moe), exported / "adapter")
        assert not caplog.records
        PeftModel.from_pretrained(load(exported / "model"), exported / "adapter", is_trainable=True)
    (said,) = caplog.messages
    assert f"the adapter in {exported / 'adapter'} is merged into this model's experts already" in said


def test_plain_transformers_loads_it(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported / "model")
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    with torch.no_grad():
        assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("damaged", ["{", "[]", '{"merged_into_experts": [1]}', '{"merged_into_experts": "a"}'])
def test_a_damaged_record_is_an_error(damaged: str, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "model", tmp_path / "model"))
    (folder / RECORD).write_text(damaged)
    with pytest.raises(CheckpointError, match=RECORD):
        load(folder)
