"""The keys of LLaMA-Factory's KTransformers backend, in every form they have had, and what becomes of them.

LLaMA-Factory 0.9.4 and the guides of its time had `kt_optimize_rule`, `cpu_infer`, `chunk_size` and
`infer_backend: ktransformers`; 0.9.5 has six top-level keys beside a `kt_config:` block in the Accelerate file; later
versions keep that block in the recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from kt_sft.config import ACTIVATION_POLICIES, MOST_THREADS


class MigrateError(ValueError):
    """A recipe that cannot be rewritten; the message names what is at fault, and the way out."""


Check = Callable[[str, Any], None]


def _whole(least: int, most: int | None = None) -> Check:
    def check(name: str, value: Any) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            range_ = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise MigrateError(f"{name} must be a whole number {range_}, got {value!r}")

    return check


def _one_of(*choices: str) -> Check:
    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise MigrateError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

    return check


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise MigrateError(f"{name} must be true or false, got {value!r}")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise MigrateError(f"{name} must be text, got {value!r}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise MigrateError(f"{name} must be a number of at least 0, got {value!r}")


def _policies(name: str, value: Any) -> None:
    if not isinstance(value, dict) or set(value) != {"cpu", "gpu"}:
        raise MigrateError(f"{name} must be a block with the keys cpu and gpu, got {value!r}")
    for side, policy in value.items():
        _one_of(*ACTIVATION_POLICIES)(f"{name}.{side}", policy)


#: Backend, in lower case and without `_skiplora` -> our format of experts; None: `kt_expert_weight_format` decides.
_BACKENDS = {
    "auto": None,
    "amxbf16": "bf16",
    "int8": "int8",
    "amxint8": "int8",
    "fp8": "fp8",
    "amxfp8": "fp8",
    "amxint4": "int4",
    "mxfp4": "mxfp4",
}
_SKIP_LORA = "_skiplora"


def backend_format(backend: str) -> tuple[str | None, bool]:
    """The format of experts that a `kt_backend` stands for (None: it leaves that open), and whether they get no LoRA.

    Raises:
        MigrateError: There is no such backend.
    """
    name = backend.lower()
    base = name.removesuffix(_SKIP_LORA)
    if base not in _BACKENDS or (base == "auto" and name != base):
        known = "auto, AMXBF16, INT8, AMXINT8, FP8, AMXFP8, AMXINT4, MXFP4, and the AMX ones with _SkipLoRA"
        raise MigrateError(f"kt_backend {backend!r} is none of KTransformers' ({known})")
    return _BACKENDS[base], name != base


def _backend(name: str, value: Any) -> None:
    _text(name, value)
    backend_format(value)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the backend."""

    check: Check
    #: Why it is left out; None: it is translated.
    reason: str | None = None
    #: The value that asks for nothing, so that leaving it out changes nothing.
    idle: Any = None


_SOURCE = "kt_sft reads the experts from model_name_or_path and quantises them while it loads them"
_NUMA = "the engine spreads its threads and memory over the NUMA nodes by itself"
_ONE_COPY = "forward and backward read the same bytes, so there is no second buffer to share"
_NO_LENGTH = "no buffer of the engine depends on the length; cutoff_len bounds the data"
_GPU_EXPERTS = "kt_sft adds no experts to a model: it trains LoRA on the model's own (lora_experts)"
_ENGINE = (
    "it belongs to the inference engine of KTransformers; kt_sft serves through LLaMA-Factory's huggingface backend"
)

KEYS: dict[str, Key] = {
    # what is translated
    "use_kt": Key(_flag),
    "kt_backend": Key(_backend),
    "kt_expert_weight_format": Key(_one_of("bf16", "int8", "fp8", "mxfp4")),
    "kt_num_threads": Key(_whole(1, MOST_THREADS)),
    "cpu_infer": Key(_whole(1, MOST_THREADS)),
    "kt_cpu_activation": Key(_one_of(*ACTIVATION_POLICIES)),
    "kt_activation_policy": Key(_policies),
    "kt_lora_rank": Key(_whole(1)),
    "kt_lora_alpha": Key(_number),
    "kt_lora_dropout": Key(_number),
    "kt_train_mode": Key(_one_of("lora", "full", "hybrid")),
    "kt_full_weight_grad": Key(_flag),
    "kt_force_fused_expert_lora": Key(_flag),
    "kt_skip_expert_lora_adaptation": Key(_flag),
    # what has no counterpart
    "kt_weight_path": Key(_text, f"{_SOURCE}: no converted experts are needed"),
    "kt_expert_checkpoint_path": Key(
        _text, f"{_SOURCE}; if the experts lie elsewhere, let model_name_or_path name a complete checkpoint"
    ),
    "kt_non_expert_weight_path": Key(_text, "everything but the experts is read from model_name_or_path, too"),
    "kt_weight_lifecycle": Key(_one_of("persistent", "ephemeral"), "experts stay in memory as long as the model"),
    "kt_skip_expert_loading": Key(_flag, "experts never pass through the model: they are streamed to the engine"),
    "kt_num_gpu_experts": Key(_whole(0), "every routed expert is computed on the CPU", 0),
    "kt_tp_enabled": Key(_flag, _NUMA),
    "kt_threadpool_count": Key(_whole(1), _NUMA),
    "kt_share_backward_bb": Key(_flag, _ONE_COPY),
    "kt_share_cache_pool": Key(_flag, _ONE_COPY),
    "kt_max_cache_depth": Key(_whole(1), "activations are kept for as many passes as are open"),
    "kt_model_max_length": Key(_whole(1), _NO_LENGTH),
    "kt_use_lora_experts": Key(_flag, _GPU_EXPERTS, False),
    "kt_lora_expert_num": Key(_whole(1), _GPU_EXPERTS),
    "kt_lora_expert_intermediate_size": Key(_whole(1), _GPU_EXPERTS),
    # of the older guides
    "kt_optimize_rule": Key(_text, "kt_sft finds the routed experts by their structure, without rules"),
    "chunk_size": Key(_whole(1), "long batches are cut by memory, which scratch_mb bounds"),
    "mode": Key(_text, _ENGINE),
    "kt_mode": Key(_text, _ENGINE),
    "kt_maxlen": Key(_whole(1), _ENGINE),
    "kt_use_cuda_graph": Key(_flag, _ENGINE),
    "kt_force_think": Key(_flag, _ENGINE),
}

#: Keys of the backend that do not begin with `kt_`: only in a recipe that uses it are they its keys.
PLAIN_KEYS = ("use_kt", "cpu_infer", "chunk_size", "mode")
#: What the `kt_config:` block of Accelerate files calls some of them.
BLOCK_ALIASES = {"lora_rank": "kt_lora_rank", "lora_alpha": "kt_lora_alpha", "lora_dropout": "kt_lora_dropout"}
BLOCK = "kt_config"


def is_backend_key(name: str) -> bool:
    """Whether a top-level key of a recipe belongs to the backend, known or not."""
    return name in PLAIN_KEYS or (name.startswith("kt_") and name != "kt_sft")


def check_value(name: str, value: Any, place: str) -> None:
    """Checks a key and its value.

    Args:
        name: As in `KEYS`.
        value: None stands for a key that is written and not set.
        place: What to call the key in a message.

    Raises:
        MigrateError: There is no such key, or its value is of the wrong type or out of range.
    """
    if name not in KEYS:
        near = difflib.get_close_matches(name, KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
        raise MigrateError(f"{place} is no key of the KTransformers backend; {hint}")
    if value is not None:
        KEYS[name].check(place, value)
