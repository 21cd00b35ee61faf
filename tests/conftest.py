"""Shared fixtures: a tiny real MoE model with a tokenizer and data, made offline once per session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def make_tokenizer(folder: Path) -> int:
    """Writes a byte-level tokenizer with Qwen's special tokens; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    return len(fast)


def make_qwen3_moe(folder: Path, *, vocab_size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Writes a random two-layer Qwen3-MoE checkpoint, experts under per-expert keys."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # large enough that experts matter to the loss
    )
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(folder)


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
