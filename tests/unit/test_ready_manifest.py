"""Manifests and headers of any content: the store is read as it is, or refused with an error that is ours."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from kt_sft.config import KTConfig
from kt_sft.loading.checkpoint import Checkpoint, checkpoint_files
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.layout import find_experts
from kt_sft.loading.mapping import ModulePlan
from kt_sft.loading.ready.manifest import MANIFEST, read_manifest
from kt_sft.loading.ready.planning import plan_store
from kt_sft.loading.ready.reading import ReadyStore
from kt_sft.loading.ready.writing import StoreWriter

#: What a value of a manifest may be replaced by.
VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    8,
    24,
    32,
    64,
    2**70,
    1.5,
    float("nan"),
    "",
    "int8",
    "nf4",
    "BF16",
    "../x",
    "/",
)


@pytest.fixture(scope="module")
def store(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifests") / "store"
    StoreWriter(plan_store(tiny_moe, KTConfig(expert_format="int4")), folder, threads=1).write()
    return folder


@pytest.fixture(scope="module")
def model(tiny_moe: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_moe))


def read(store: Path, model: Any) -> list[ModulePlan]:
    """All that is done before weights are read."""
    checkpoint = Checkpoint(checkpoint_files(store))
    conversions = get_model_conversion_mapping(model, None, None)
    return ReadyStore(checkpoint, None).plan(model, find_experts(model), checkpoint, conversions)


@pytest.fixture
def damaged(store: Path, tmp_path: Path) -> Path:
    """A copy of `store` to damage."""
    return Path(shutil.copytree(store, tmp_path / "damaged"))


def check(folder: Path, store: Path, model: Any) -> bool:
    """Whether the store is refused; that it is the undamaged one where it is not."""
    try:
        plans = read(folder, model)
    except CheckpointError as error:
        assert str(folder) in str(error) or "experts" in str(error)  # noqa: PT017  # any other error fails
        return True
    assert repr(plans).replace(str(folder), str(store)) == repr(read(store, model))
    return False


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value but its root."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate(manifest: dict[str, Any], generator: random.Random) -> None:
    *path, last = generator.choice(list(places(manifest)))
    node: Any = manifest
    for step in path:
        node = node[step]
    action = generator.choice(["replace", "delete", "copy", "swap", "rename"])
    others = [other for other in node if other != last] if isinstance(node, dict) else []
    if action == "delete":
        del node[last]
    elif action == "copy" and others:
        node[last] = copy.deepcopy(node[generator.choice(others)])
    elif action == "swap" and others:
        other = generator.choice(others)
        node[last], node[other] = node[other], node[last]
    elif action == "rename" and isinstance(node, dict):
        node[generator.choice([f"{last}x", "..", f"x.{last}", str(last).replace("0", "1")])] = node.pop(last)
    else:
        node[last] = generator.choice(VALUES)


def sealed(manifest: dict[str, Any]) -> bytes:
    """With a hash that fits: what somebody writes who wants it to be read."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps(body | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


@pytest.mark.parametrize("seed", range(8))
def test_manifests_that_were_forged(seed: int, damaged: Path, store: Path, model: Any) -> None:
    generator, manifest = random.Random(seed), json.loads((store / MANIFEST).read_text())
    refused = 0
    for _ in range(25):
        changed = copy.deepcopy(manifest)
        for _ in range(generator.randint(1, 3)):
            mutate(changed, generator)
        (damaged / MANIFEST).write_bytes(sealed(changed))
        refused += check(damaged, store, model)
    assert refused > 0  # what is not is without effect: a name, a hash of content


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [MANIFEST, "model-00002-of-00003.safetensors"])
def test_bytes_that_were_damaged(seed: int, name: str, damaged: Path, store: Path, model: Any) -> None:
    generator, content = random.Random(seed), (store / name).read_bytes()
    header = len(content) if name == MANIFEST else 8 + int.from_bytes(content[:8], "little")
    for _ in range(25):
        changed = bytearray(content)
        start = generator.randrange(header)
        action = generator.choice(["flip", "cut", "drop", "insert"])
        if action == "flip":
            changed[start] ^= 1 << generator.randrange(8)
        elif action == "cut":
            del changed[start:]
        elif action == "drop":
            del changed[start : start + generator.randint(1, 9)]
        else:
            changed[start:start] = generator.randbytes(generator.randint(1, 9))
        (damaged / name).write_bytes(bytes(changed))
        refused = check(damaged, store, model)
        assert refused or name == MANIFEST  # white space between the values of JSON


def test_it_comes_out_as_it_went_in(store: Path) -> None:
    manifest = read_manifest(store)
    assert manifest.to_json() == (store / MANIFEST).read_text()
    assert manifest.made_by.startswith("kt_sft ")
    assert manifest.settings["expert_format"] == "int4"
    assert {experts.group_size for experts in manifest.experts.values()} == {32}
    assert all(0.05 < experts.relative_error < 0.1 for experts in manifest.experts.values())


def test_one_of_another_version_is_refused(damaged: Path, store: Path) -> None:
    manifest = json.loads((store / MANIFEST).read_text())
    (damaged / MANIFEST).write_bytes(sealed(manifest | {"version": 2}))
    with pytest.raises(CheckpointError, match=r"it has version 2, this kt_sft reads 1; make the store again"):
        read_manifest(damaged)
