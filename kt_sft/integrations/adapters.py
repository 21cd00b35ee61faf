"""Adapters and checkpoints that a recipe names: looked at before anything is loaded.

PEFT and the Trainer drop tensors of modules that a model does not have without a word. While there is no model, the
tensors' names tell what they are for; the model itself refuses what it has no place for when it is loaded into it
(kt_sft.integrations.peft, `CpuExperts._load_from_state_dict`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from kt_sft.config import ConfigError
from kt_sft.loading.checkpoint import read_header

_SAFETENSORS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_CONFIG = "adapter_config.json"
_MODEL = "model.safetensors"
_PICKLED_MODEL = "pytorch_model.bin"

_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def adapter_names(paths: Any) -> list[str]:
    """The adapters that a recipe's key, or the parsed argument, names."""
    if paths is None:
        return []
    return [path.strip() for path in paths.split(",")] if isinstance(paths, str) else list(paths)


def continued_adapter(arguments: Mapping[str, Any]) -> str | None:
    """The adapter that training goes on with, by LLaMA-Factory's arguments: the last one, unless a new one is made."""
    names = adapter_names(arguments.get("adapter_name_or_path"))
    return names[-1] if names and not arguments.get("create_new_adapter") else None


def loading_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """With which LLaMA-Factory, by its arguments, lets PEFT load adapters."""
    return {
        "subfolder": arguments.get("adapter_folder"),
        "revision": arguments.get("model_revision"),
        "cache_dir": arguments.get("cache_dir"),
        "token": arguments.get("hf_hub_token"),
    }


def check_adapter(
    adapter: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> str | None:
    """Refuses an adapter that keeps its routed experts in a layout of another tool, or cannot be looked at safely.

    Args:
        adapter: A folder, or a repository's id on the hub: its files are taken from the local cache or, where they are
            not there, downloaded to it, as PEFT is going to do.
        subfolder: Where in `adapter` the weights are.
        revision: Of the repository.
        cache_dir: The local cache; None for the hub's own.
        token: For the hub.

    Returns:
        The name of a tensor of routed experts, if the adapter has any.

    Raises:
        ConfigError: The adapter has a tensor for each single expert, has its weights in a pickle, or cannot be found.
    """
    weights = _in_folder(Path(adapter, subfolder or "")) or _on_hub(adapter, subfolder, revision, cache_dir, token)
    return _check_adapter_file(weights, adapter)


def check_dropout(dropout: float, merged: Sequence[str], *, unsloth_gc: bool) -> None:
    """Refuses dropout on routed experts where it cannot be trained with.

    Args:
        dropout: Of the adapter that is going to be trained, 0 if it does not cover them.
        merged: Adapters on routed experts that are merged before.
        unsloth_gc: Whether the recipe sets `use_unsloth_gc`.

    Raises:
        ConfigError: It is combined with one of them.
    """
    if dropout and unsloth_gc:
        raise ConfigError(
            "kt_sft: lora_dropout on routed experts needs the same random numbers when layers are computed again, and "
            "use_unsloth_gc does not restore them; remove use_unsloth_gc, or set lora_dropout: 0"
        )
    if dropout and merged:
        raise ConfigError(
            f"kt_sft: lora_dropout {dropout} on routed experts cannot be trained on top of {merged[0]}, which is "
            "merged into them; set lora_dropout: 0, or export the model with that adapter and start from there"
        )


def check_resumed(folder: str, lora_experts: bool | None) -> None:
    """Refuses a checkpoint to resume from that does not fit the run, or cannot be looked at safely.

    Args:
        folder: Of a checkpoint that the Trainer wrote. One that it could not resume from is left for it to say.
        lora_experts: Whether the run's adapter covers routed experts; None where that is not known yet.

    Raises:
        ConfigError: The checkpoint is one of a whole model with routed experts, whose weights would be lost; or its
            adapter covers routed experts and the run's does not, or the other way round; or it is a pickle.
    """
    root = Path(folder)
    if _any(root, _PICKLED_MODEL, f"{_PICKLED_MODEL}.index.json") and not _any(root, _MODEL):
        raise ConfigError(f"kt_sft: resume_from_checkpoint {folder} is a whole model in a pickle; {_RESUME}")
    trained = _experts_key(_model_keys(root))
    if trained:
        raise ConfigError(
            f"kt_sft: resume_from_checkpoint {folder} is a whole model with its routed experts ({trained}), whose "
            f"weights would not be loaded; {_RESUME}, or start from this one as model_name_or_path"
        )
    inner = (entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else ()
    for place in (root, *inner):  # of several adapters each has a folder of its own
        weights = _in_folder(place)
        if weights is None:
            continue
        key = _check_adapter_file(weights, str(place))
        if key is not None and lora_experts is False:
            raise ConfigError(
                f"kt_sft: the adapter {place} has weights for routed experts ({key}), which this run does not train; "
                "set lora_experts: true in the kt_sft block, as the run that it is resumed from"
            )
        if key is None and lora_experts is True:
            raise ConfigError(
                f"kt_sft: lora_experts is set, but the adapter {place} to resume from has no weights for routed "
                "experts; leave lora_experts out, as the run that it is resumed from"
            )


_RESUME = "resume from a checkpoint of a LoRA run"


def _model_keys(folder: Path) -> Iterable[str]:
    """Names of the tensors that the Trainer would load into the model itself."""
    if _any(folder, _MODEL):
        return read_header(folder / _MODEL)
    index = folder / f"{_MODEL}.index.json"
    if not index.exists():
        return ()
    try:
        return [*json.loads(index.read_text(encoding="utf-8"))["weight_map"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"kt_sft: {index} is no readable index of tensors ({error!r})") from error


def _any(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _experts_key(keys: Iterable[str]) -> str | None:
    """The first tensor of routed experts among `keys`. Every family of transformers calls their module `experts`."""
    return next((key for key in keys if "experts" in key.split(".")), None)


def _check_adapter_file(weights: Path, adapter: str) -> str | None:
    if weights.name == _PICKLED:
        raise ConfigError(
            f"kt_sft: the adapter {adapter} keeps its weights in {_PICKLED}, a pickle, which cannot be inspected "
            f"safely; convert it to {_SAFETENSORS}"
        )
    _check_adapter_config(weights.parent / _CONFIG, adapter)
    trained = _experts_key(read_header(weights))
    if trained and _OF_ONE_EXPERT.search(trained):
        raise ConfigError(
            f"kt_sft: the adapter {adapter} has weights for single experts ({trained}), a layout that PEFT cannot load "
            "either; turn it into PEFT's with `kt-sft convert-adapter`"
        )
    return trained


def _check_adapter_config(path: Path, adapter: str) -> None:
    """PEFT reads it when the model has been loaded, and takes ranks and alphas for whatever they are."""
    from kt_sft.integrations.adapter_files import check_numbers

    if not path.is_file():
        if Path(adapter).is_dir():  # of a repository it may not have been downloaded yet
            raise ConfigError(f"kt_sft: the adapter {adapter} has no {_CONFIG}, without which its weights mean nothing")
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
        if config.get("peft_type") == "LORA":
            check_numbers(config, "it")
    except ValueError as error:
        raise ConfigError(f"kt_sft: the adapter {adapter} has no usable config, {path}: {error}") from error


def _in_folder(folder: Path) -> Path | None:
    """The file that PEFT would take in a local folder, in its order."""
    return next((folder / name for name in (_SAFETENSORS, _PICKLED) if (folder / name).exists()), None)


def _on_hub(
    adapter: str, subfolder: str | None, revision: str | None, cache_dir: str | None, token: str | None
) -> Path:
    for name in (_SAFETENSORS, _PICKLED):
        try:
            path = hf_hub_download(
                adapter, name, subfolder=subfolder, revision=revision, cache_dir=cache_dir, token=token
            )
        except EntryNotFoundError:  # not in the repository; offline: not in the cache
            continue
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise _not_found(adapter, subfolder) from error
        return Path(path)
    raise _not_found(adapter, subfolder)


def _not_found(adapter: str, subfolder: str | None) -> ConfigError:
    where = f" (adapter_folder {subfolder})" if subfolder else ""
    return ConfigError(
        f"kt_sft: the adapter {adapter}{where} has no {_SAFETENSORS}: it is neither a folder with one nor a repository "
        "in the hub's cache or within reach; correct the path, or download it first"
    )
