"""What an adapter's base model is, from its config.json: enough to check an adapter and to name its tensors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from kt_sft.integrations.adapter_layouts import DEFAULT_NAMES, AdapterFileError

#: Model types whose experts are stored [in, out].
_TRANSPOSED = ("gpt_oss", "openai_privacy_filter")
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


@dataclass(frozen=True)
class BaseFacts:
    """Facts about a base model."""

    path: Path
    model_type: str
    hidden_size: int | None
    num_experts: int | None  # None where config.json does not say it, or not as one number

    @property
    def transposed(self) -> bool:
        """Whether experts are stored [in, out]."""
        return self.model_type in _TRANSPOSED

    @property
    def matrix_names(self) -> dict[str, str]:
        """What checkpoints of this model call gate, up and down of an expert."""
        parameters = {".gate_up_proj": ("gate", "up"), ".up_proj": ("up",), ".down_proj": ("down",)}
        names: dict[str, str] = {}
        for conversion in self._conversions():
            if not isinstance(conversion, WeightConverter):
                continue
            for suffix, matrices in parameters.items():
                sources = [source for source in conversion.source_patterns if ".experts.*." in source]
                if conversion.target_patterns[0].endswith(f".experts{suffix}") and len(sources) == len(matrices):
                    leaves = (source.rpartition(".*.")[2].removesuffix(".weight") for source in sources)
                    names |= dict(zip(matrices, leaves, strict=True))
        return DEFAULT_NAMES | names

    @property
    def renamings(self) -> list[tuple[str, str]]:
        """(name in checkpoints, name in transformers) of the block around the experts, where they differ."""
        return [
            (conversion.source_patterns[0], conversion.target_patterns[0])
            for conversion in self._conversions()
            if isinstance(conversion, WeightRenaming) and conversion.source_patterns == [".block_sparse_moe."]
        ]

    def _conversions(self) -> list[Any]:
        return get_checkpoint_conversion_mapping(self.model_type) or []


def base_facts(given: Path | None, named: Any) -> BaseFacts | None:
    """Reads the config.json in `given`, or in `named` by an adapter where that is a local folder that has one.

    Of a base model that is only a name, the one thing that must not be missed is that its experts lie differently.

    Raises:
        AdapterFileError: `given` has no readable config.json.
    """
    folder = given if given is not None else Path(named) if isinstance(named, str) and named else None
    path = folder / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        if given is not None:
            raise AdapterFileError(f"{given} is no folder with the base model's config.json")
        if isinstance(named, str) and re.search(r"gpt[-_]oss", named.lower()):
            return BaseFacts(Path(named), "gpt_oss", None, None)
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path} holds no JSON object")
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    count = next((inner[key] for key in _COUNTS if key in inner), None)
    hidden = inner.get("hidden_size")
    return BaseFacts(
        path,
        str(config.get("model_type")),
        hidden if isinstance(hidden, int) else None,
        count if isinstance(count, int) else None,
    )
