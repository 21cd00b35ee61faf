"""Where kt_sft attaches to PEFT's configs: adapters on experts keep their dropout beside the file that PEFT reads."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError, safe_open

from kt_sft.integrations.adapter_saving import whole_file

logger = logging.getLogger("kt_sft")

#: The file beside adapter_config.json that keeps what PEFT would not load from there.
_BESIDE = "kt_sft_adapter.json"

#: Where a config that was loaded says from what: an adapter, and the settings that PEFT was given to load it.
_SOURCE = "_kt_sft_source"


def extend_lora_config(module: ModuleType) -> None:
    """Wraps saving and loading of a `LoraConfig`: PEFT loads none that has both `target_parameters` and dropout.

    What is saved then says dropout 0, and the value lies beside it for training to go on with.

    Args:
        module: `peft.tuners.lora.config`.
    """
    config_class: Any = module.LoraConfig
    owner: Any = next(base for base in config_class.__mro__ if "from_pretrained" in vars(base))
    save, load = config_class.save_pretrained, owner.from_pretrained.__func__

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, **kwargs: Any) -> None:
        from peft.utils import CONFIG_NAME

        beside = Path(save_directory, _BESIDE)
        if not self.target_parameters:
            save(self, save_directory, **kwargs)
            beside.unlink(missing_ok=True)
            return
        config = copy.copy(self)
        config.lora_dropout = 0.0
        beside.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole_file(beside.with_name(CONFIG_NAME)) as partial,
            tempfile.TemporaryDirectory(dir=partial.parent) as new,
        ):
            save(config, new, **kwargs)
            os.replace(Path(new, CONFIG_NAME), partial)
        if self.lora_dropout:
            with whole_file(beside) as partial:
                partial.write_text(json.dumps({"lora_dropout": self.lora_dropout}), encoding="utf-8")
        else:
            beside.unlink(missing_ok=True)

    @functools.wraps(load)
    def from_pretrained(
        cls: type, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = load(cls, pretrained_model_name_or_path, subfolder, **kwargs)
        if isinstance(config, config_class):
            setattr(config, _SOURCE, (pretrained_model_name_or_path, kwargs | {"subfolder": subfolder}))
        return config

    read = owner.from_json_file.__func__

    @functools.wraps(read)
    def from_json_file(cls: type, path_json_file: Any, **kwargs: Any) -> Any:
        try:
            return read(cls, path_json_file, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:  # which name no file
            raise ValueError(f"kt_sft: the adapter's config {path_json_file} is no JSON ({error})") from error

    owner.from_json_file = classmethod(from_json_file)
    config_class.save_pretrained = save_pretrained
    # For configs that are asked for as PeftConfig, too: so a user, or AutoPeftModel, gets the one of a folder.
    owner.from_pretrained = classmethod(from_pretrained)


def restore_dropout(config: Any) -> None:
    """Gives a config that was loaded the dropout that its adapter was trained with.

    Args:
        config: Of an adapter that is about to be put on a model with experts in the engine. One that has been made or
            given a dropout by hand keeps its own.

    Raises:
        ValueError: What lies beside the adapter's config cannot be read.
    """
    source = getattr(config, _SOURCE, None)
    if source is None or not getattr(config, "target_parameters", None) or config.lora_dropout:
        return
    config.lora_dropout = trained_dropout(source[0], source[1])


def trained_dropout(model_id: Any, settings: Mapping[str, Any]) -> float:
    """The dropout that an adapter on experts was trained with, 0 if none is kept beside its config.

    Args:
        model_id: A folder, or a repository's id on the hub.
        settings: Keyword arguments that PEFT is given to load the adapter.

    Raises:
        ValueError: What lies there cannot be read.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _dropout_in(_file_of(model_id, _BESIDE, settings))
    except LocalEntryNotFoundError:
        logger.warning(
            "the hub is out of reach and its cache has no %s of %s, which would say a dropout on experts that it was "
            "trained with; if it is trained on, that is without",
            _BESIDE,
            model_id,
        )
    except EntryNotFoundError:
        pass
    return 0.0


def _dropout_in(path: Path) -> float:
    try:
        dropout = json.loads(path.read_text(encoding="utf-8"))["lora_dropout"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"kt_sft: {path} does not say an adapter's lora_dropout ({error!r})") from error
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"kt_sft: {path} says lora_dropout {dropout!r}, which must be at least 0 and less than 1")
    return dropout


def stored_config(model_id: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter_config.json that PEFT is going to read.

    Args:
        model_id: A folder, or a repository's id on the hub.
        settings: Keyword arguments that PEFT was given to load the adapter.

    Raises:
        ValueError: It is none, or there is none.
    """
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError
    from peft.utils import CONFIG_NAME

    try:
        path = _file_of(model_id, CONFIG_NAME, settings)
    except (EntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"kt_sft: {model_id} has no {CONFIG_NAME}: it is neither an adapter's folder nor its repository on the hub"
        ) from error
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"kt_sft: {path} is no adapter's config ({error})") from error
    if not isinstance(stored, dict):
        raise ValueError(f"kt_sft: {path} is no adapter's config")
    return stored


def check_weights(model_id: Any, settings: Mapping[str, Any]) -> None:
    """Looks at the header of the weights that PEFT is going to read; what it says itself of damaged ones names no file.

    Raises:
        CheckpointError: They are cut off or damaged, or a local folder has none.
    """
    from huggingface_hub.errors import EntryNotFoundError
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    from kt_sft.loading.checkpoint import read_header
    from kt_sft.loading.errors import CheckpointError

    folder = Path(model_id, settings.get("subfolder") or "")
    try:
        path = _file_of(model_id, SAFETENSORS_WEIGHTS_NAME, settings)
    except EntryNotFoundError as error:
        if folder.is_dir() and not (folder / WEIGHTS_NAME).is_file():
            raise CheckpointError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}, no adapter's weights") from error
        return
    read_header(path)
    try:
        with safe_open(path, framework="pt"):  # every byte must be of some tensor
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def _file_of(model_id: Any, name: str, settings: Mapping[str, Any]) -> Path:
    """A file of an adapter, in its folder or, downloaded, in the hub's cache.

    Raises:
        EntryNotFoundError: There is none.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    subfolder = settings.get("subfolder")
    path = Path(model_id, subfolder or "", name)
    if path.is_file():
        return path
    if Path(model_id).is_dir():
        raise EntryNotFoundError(f"kt_sft: {path.parent} has no {name}")
    names = ("revision", "cache_dir", "token", "local_files_only")
    hub = {key: settings[key] for key in names if settings.get(key) is not None}
    return Path(hf_hub_download(str(model_id), name, subfolder=subfolder, **hub))
