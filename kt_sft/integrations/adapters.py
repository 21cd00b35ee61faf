"""Adapters that a recipe names: looked at before anything is loaded.

PEFT drops tensors of modules that a model does not have without a word. The routed experts' linear layers are such
modules once the experts run in the engine, so an adapter with weights for them would silently lose those.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from kt_sft.config import ConfigError
from kt_sft.loading.checkpoint import read_header

_SAFETENSORS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"


def check_adapter(
    adapter: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> None:
    """Refuses an adapter that has weights for routed experts, or whose weights cannot be looked at safely.

    Args:
        adapter: A folder, or a repository's id on the hub: its files are taken from the local cache or, where they
            are not there, downloaded to it, as PEFT is going to do.
        subfolder: Where in `adapter` the weights are.
        revision: Of the repository.
        cache_dir: The local cache; None for the hub's own.
        token: For the hub.

    Raises:
        ConfigError: The adapter has weights for routed experts, has its weights in a pickle, or cannot be found.
    """
    weights = _in_folder(Path(adapter, subfolder or "")) or _on_hub(adapter, subfolder, revision, cache_dir, token)
    if weights.name == _PICKLED:
        raise ConfigError(
            f"kt_sft: the adapter {adapter} keeps its weights in {_PICKLED}, a pickle, which cannot be inspected "
            f"safely; convert it to {_SAFETENSORS}"
        )
    trained = [key for key in read_header(weights) if ".experts." in key]
    if trained:
        raise ConfigError(
            f"kt_sft: the adapter {adapter} has weights for routed experts ({trained[0]}), which this version cannot "
            "apply; use it without kt_sft"
        )


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
