"""The entry point that torch calls at the end of `import torch`, in every process.

It must be cheap and never raise, so it only arms hooks that run when a host's module is imported; nothing of a host is
imported here. A process that imports no host pays for one entry in `sys.meta_path`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Host module -> (our module, function) to call with the host's module once it has run its own code.
_HOOKS = {
    "transformers.quantizers.auto": ("kt_sft.integrations.transformers", "register"),
    "transformers.modeling_utils": ("kt_sft.integrations.transformers", "extend_models"),
    "transformers.trainer": ("kt_sft.integrations.trainer", "extend_trainer"),
    "llamafactory.hparams.model_args": ("kt_sft.integrations.llamafactory", "extend_model_arguments"),
    "llamafactory.hparams.parser": ("kt_sft.integrations.llamafactory", "check_parsed_arguments"),
    "llamafactory.hparams": ("kt_sft.integrations.llamafactory", "settle_package"),
    "llamafactory.model.adapter": ("kt_sft.integrations.llamafactory", "extend_adapters"),
    "llamafactory.model.model_utils.attention": ("kt_sft.integrations.gpt_oss", "extend_attention"),
    "llamafactory.model.model_utils.quantization": ("kt_sft.integrations.llamafactory", "extend_quantization"),
    "llamafactory.model.patcher": ("kt_sft.integrations.llamafactory", "check_loaded_model"),
    "peft.tuners.lora.model": ("kt_sft.integrations.peft", "extend_lora_model"),
    "peft.tuners.lora.config": ("kt_sft.integrations.peft_configs", "extend_lora_config"),
    "peft.peft_model": ("kt_sft.integrations.peft", "extend_peft_model"),
    "llamafactory.v1.plugins.model_plugins.peft": ("kt_sft.integrations.llamafactory", "extend_v1_adapters"),
    "llamafactory.v1.plugins.model_plugins.quantization": ("kt_sft.integrations.llamafactory", "register_v1"),
}

#: Host modules whose hooks must have run before a recipe with our key may go on.
_REQUIRED = (
    "llamafactory.hparams.parser",
    "llamafactory.model.adapter",
    "llamafactory.model.model_utils.attention",
    "llamafactory.model.model_utils.quantization",
    "llamafactory.model.patcher",
    "peft.tuners.lora.model",
    "peft.tuners.lora.config",
    "peft.peft_model",
)

#: What became of this process's hooks: (our module, function) -> the failure, or "" where it is attached.
_outcomes: dict[tuple[str, str], str] = {}

#: Host modules that were already running when we were armed, in the order of _HOOKS: one of them imported torch first.
_running: list[str] = []


class _HookFinder:
    """A meta path finder that finds nothing itself: it adds our calls to the loader that the others find."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        _catch_up()
        if name not in _HOOKS or name in self._searching:
            return None
        self._searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None:
            _wrap(spec.loader, name)
        return spec


def _wrap(loader: object, name: str) -> None:
    execute: Callable[[ModuleType], None] = loader.exec_module  # type: ignore[attr-defined]

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _call(_HOOKS[name], module)

    loader.exec_module = exec_module  # type: ignore[attr-defined]


def _catch_up() -> None:
    """Calls the hooks of the modules that were running when we were armed and have finished since.

    Called at every import: before a host makes use of such a module it imports others.
    """
    for name in [name for name in _running if not _is_running(name)]:
        _running.remove(name)
        if name in sys.modules:
            _call(_HOOKS[name], sys.modules[name])


def _is_running(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


def _call(hook: tuple[str, str], module: ModuleType) -> None:
    """Calls a hook; a host that has moved must go on working without us, and a recipe with our key is then refused."""
    try:
        getattr(importlib.import_module(hook[0]), hook[1])(module)
        _outcomes[hook] = ""
    except Exception as error:
        _outcomes[hook] = f"could not attach to {module.__name__}: {error!r}"
        warnings.warn(
            f"kt_sft could not attach to {module.__name__}: {error!r}; recipes with a kt_sft block will not run",
            RuntimeWarning,
            stacklevel=2,
        )


def failures() -> list[str]:
    """What could not be attached in this process, one sentence each."""
    return [failure for failure in _outcomes.values() if failure]


def unattached() -> list[str]:
    """Imports what a recipe of LLaMA-Factory's is going to use; returns one sentence for each hook not in place."""
    missing = []
    for name in _REQUIRED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} cannot be imported: {error!r}")
            continue
        if _HOOKS[name] not in _outcomes:
            missing.append(f"{name} was imported before kt_sft could attach to it")
    return failures() + missing


def arm() -> None:
    """Prepares the hooks that make the `kt_sft:` key of a recipe known; cheap, and never raises."""
    if any(isinstance(finder, _HookFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _HookFinder())
    _running.extend(name for name in _HOOKS if name in sys.modules)
    _catch_up()
