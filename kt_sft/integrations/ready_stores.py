"""Ready stores as models of recipes: what cannot be done with them is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kt_sft.config import STORE_METHOD, ConfigError
from kt_sft.loading.ready.manifest import NOT_SAVED


def check_export(model_args: Any) -> None:
    """Refuses to export from a ready store.

    Args:
        model_args: LLaMA-Factory's.

    Raises:
        ConfigError: It is to be; names the way out.
    """
    config = Path(str(model_args.model_name_or_path)) / "config.json"
    if not getattr(model_args, "export_dir", None) or not config.is_file():
        return
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError):
        return  # of a config that cannot be read the host says what it thinks
    if found.get("quant_method") == STORE_METHOD:
        raise ConfigError(f"kt_sft: {model_args.model_name_or_path}: {NOT_SAVED}")
