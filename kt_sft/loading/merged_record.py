"""A saved model says which adapters are merged into its experts, so that none is merged a second time.

The weights do not tell. Beside config.json lies a file that other tools ignore, with a digest of the values of each
part of an adapter: of one layer's down, or of its gate and up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from kt_sft.loading.errors import CheckpointError

RECORD = "kt_sft_merged.json"
_KEY = "merged_into_experts"


def read_record(folder: Path) -> frozenset[str]:
    """Digests of what is merged into the experts of the model in a folder; none where it does not say.

    Raises:
        CheckpointError: The record cannot be read.
    """
    file = folder / RECORD
    try:
        digests = json.loads(file.read_text(encoding="utf-8"))[_KEY]
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} does not say which adapters are merged into the model's experts ({error!r}); restore it, or "
            "remove it if you merge no adapter into this model"
        ) from error
    if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
        raise CheckpointError(f"{file}: {_KEY} is no list of digests; restore it")
    return frozenset(digests)


def write_record(folder: Path, digests: Iterable[str]) -> None:
    """Writes the record into a folder where a model is being saved, if there is anything to say."""
    listed = sorted({*digests})
    if listed:
        (folder / RECORD).write_text(json.dumps({_KEY: listed}, indent=1) + "\n", encoding="utf-8")
