"""Shared fixtures: a tiny real MoE model with a tokenizer and data, made offline once per session."""

from __future__ import annotations

import json
from pathlib import Path

# First of all: it mends what trl 0.24 asks of transformers 5, and whatever imports trl before it breaks DPO.
import llamafactory.extras.packages  # noqa: F401
import pytest

from tests.tiny import make_qwen3_moe, make_tokenizer


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random BF16 Qwen3-MoE model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_moe")
    make_qwen3_moe(folder, vocab_size=make_tokenizer(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-Factory dataset folder with the datasets pt, sft, pair (dpo, rm) and kto, 24 examples each."""
    folder = tmp_path_factory.mktemp("tiny_data")
    words = ["red", "green", "blue", "black", "white", "grey"]
    questions = [f"say {a} {b}" for a in words for b in words[:4]]
    rows: dict[str, list[dict[str, object]]] = {
        "pt": [{"text": f"{q} and again {q}"} for q in questions],
        "sft": [{"instruction": q, "input": "", "output": q[4:]} for q in questions],
        "pair": [{"instruction": q, "input": "", "chosen": q[4:], "rejected": "no"} for q in questions],
        "kto": [
            {"instruction": q, "input": "", "output": q[4:] if i % 2 else "no", "kto_tag": bool(i % 2)}
            for i, q in enumerate(questions)
        ],
    }
    pair_columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    kto_columns = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "kto_tag"}
    info = {
        "pt": {"file_name": "pt.json", "columns": {"prompt": "text"}},
        "sft": {"file_name": "sft.json"},
        "pair": {"file_name": "pair.json", "ranking": True, "columns": pair_columns},
        "kto": {"file_name": "kto.json", "columns": kto_columns},
    }
    for name, examples in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(examples))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder
