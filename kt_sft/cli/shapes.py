"""The sizes of MoE layers: of well-known models, and of a model's own config.json.

H hidden size, I expert intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

#: Name -> (H, I, E, K), from the models' published config.json files.
MODELS = {
    "deepseek-v2-lite": (2048, 1408, 64, 6),
    "deepseek-v3": (7168, 2048, 256, 8),
    "glm-4.5-air": (4096, 1408, 128, 8),
    "glm-4.6": (5120, 1536, 160, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "kimi-k2": (7168, 2048, 384, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "qwen3-235b-a22b": (4096, 1536, 128, 8),
}

# What model families call the same size in config.json, the more specific name first.
_KEYS = {
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk"),
}


class ShapeError(ValueError):
    """A model is not known, its config.json does not say a size, or sizes do not fit; the message says which."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One MoE layer's sizes."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise ShapeError(f"{self.top_k} experts per token cannot be chosen among {self.experts}")

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    def flops(self, rows_per_expert: int) -> float:
        """Floating-point operations of one pass over all experts, 2·S·3·H·I with S routed rows.

        Forward needs as many as the backward of frozen weights.
        """
        return 2.0 * self.expert_weights * self.experts * rows_per_expert


def shape_of(model: str) -> LayerShape:
    """The routed experts' sizes of a model.

    Args:
        model: A name in `MODELS`, or a path of a config.json or of a folder that holds one.

    Raises:
        ShapeError: There is no such name or file, or the file does not say a size.
    """
    if model.lower() in MODELS:
        return LayerShape(model.lower(), *MODELS[model.lower()])
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ShapeError(
            f"{model!r} is neither a known model nor a folder with a config.json; known are {', '.join(MODELS)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ShapeError(f"{path} cannot be read as JSON: {error}") from error
    return _from_config(config, path)


def _from_config(config: Any, path: Path) -> LayerShape:
    if not isinstance(config, dict):
        raise ShapeError(f"{path} holds no JSON object")
    # Models that also see or hear keep their language model's sizes one level down.
    candidates = [config, *(config[key] for key in ("text_config", "llm_config") if key in config)]
    problems = []
    for candidate in reversed(candidates):
        sizes = {size: _first(candidate, keys) for size, keys in _KEYS.items()}
        missing = [size for size, value in sizes.items() if value is None]
        if not missing:
            return LayerShape(path.parent.name or str(path), **sizes)  # type: ignore[arg-type]
        problems.append(missing)
    size = problems[-1][0]
    raise ShapeError(f"{path} names no {size} size of routed experts; looked for {', '.join(_KEYS[size])}")


def _first(config: Any, keys: tuple[str, ...]) -> int | None:
    if not isinstance(config, dict):  # a part that some model keeps as a name
        return None
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)
