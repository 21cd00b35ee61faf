"""kt_sft: fine-tune Mixture-of-Experts models whose routed experts live, and are computed, on the CPU.

Importing this package is cheap: names are resolved on first use, because torch imports it in every process (see
`integrations.autoload`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kt_sft.config import ConfigError, KTConfig
    from kt_sft.engine.info import system_info
    from kt_sft.experts import CpuExperts

__version__ = "0.1.0"
__all__ = ["ConfigError", "CpuExperts", "KTConfig", "__version__", "system_info"]

_HOMES = {
    "ConfigError": "kt_sft.config",
    "CpuExperts": "kt_sft.experts",
    "KTConfig": "kt_sft.config",
    "system_info": "kt_sft.engine.info",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kt_sft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


# torch calls this in every process through an entry point; a script that switched that off gets it with the import.
from kt_sft.integrations.autoload import arm as _arm  # noqa: E402

_arm()
