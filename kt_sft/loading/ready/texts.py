"""Texts to calibrate with, or to measure a perplexity on: plain, or rows of a dataset as LLaMA-Factory has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kt_sft.config import ConfigError

_ROLES = {"human": "user", "gpt": "assistant"}
#: What a row has instead of a conversation: the user's part, and the model's.
_ASKED, _ANSWERED = ("instruction", "prompt", "input", "query"), ("output", "response", "chosen")


def token_sequences(file: Path, tokenizer: Any, tokens: int, length: int) -> list[Tensor]:
    """The first `tokens` tokens of a file's texts, each text in sequences of its own, of `length` at most.

    Args:
        file: `.jsonl` or `.json`: rows with `text`, with `messages` or `conversations`, or with an instruction and an
            output; anything else is plain text.
        tokenizer: The model's.
        tokens: How many, at most.
        length: Of a sequence.

    Returns:
        Sequences [1, T] of token ids.

    Raises:
        ConfigError: The file cannot be read, has rows of another kind, or has no text.
    """
    found: list[Tensor] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in _texts(file, tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, *(end if ids[-1:] != end else [])][:tokens]
        found += [torch.tensor([ids[start : start + length]], device="cpu") for start in range(0, len(ids), length)]
        tokens -= len(ids)
        if tokens <= 0:
            break
    if sum(ids.numel() for ids in found) < 2:
        raise ConfigError(f"kt_sft: {file} holds no text")
    return found


def _texts(file: Path, tokenizer: Any) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix not in (".json", ".jsonl"):
            yield content
            return
        rows = (
            [json.loads(line) for line in content.splitlines() if line.strip()]
            if file.suffix == ".jsonl"
            else json.loads(content)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"kt_sft: {file} cannot be read ({error})") from error
    for place, row in enumerate(rows if isinstance(rows, list) else [rows]):
        text = _text(row, tokenizer) if isinstance(row, dict) else None
        if text is None:
            raise ConfigError(
                f"kt_sft: {file}: row {place} has neither text, nor messages or conversations, nor an instruction and "
                "an output"
            )
        yield text


def _text(row: dict[str, Any], tokenizer: Any) -> str | None:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return _conversation(
            [
                {
                    "role": _ROLES.get(role := str(turn.get("role", turn.get("from"))), role),
                    "content": str(turn.get("content", turn.get("value"))),
                }
                for turn in turns
            ],
            tokenizer,
        )
    asked = "\n".join(str(row[key]) for key in _ASKED if row.get(key))
    answered = next((str(row[key]) for key in _ANSWERED if isinstance(row.get(key), str)), None)
    if answered is None:
        return None
    turns = [{"role": "user", "content": asked}] if asked else []
    return _conversation([*turns, {"role": "assistant", "content": answered}], tokenizer)


def _conversation(turns: list[dict[str, str]], tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    return "\n".join(turn["content"] for turn in turns)
