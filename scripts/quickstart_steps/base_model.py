"""Makes the quickstart's base model: a small Qwen3-MoE, trained from scratch on the base skills until it has them.

Run as `python -m quickstart_steps.base_model --out DIRECTORY`. The experts are fine-grained (16, of which a
token uses 4) and wide for the hidden size: they are most of a training step's work, as in the models that this package
is for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from quickstart_steps.corpus import Example, base_examples
from quickstart_steps.tokenizer import encode_example, train_tokenizer

#: Holds the settings a base model was made with; written last, so its presence means the model is complete.
STAMP = "quickstart.json"
#: A change of any of these files makes another model.
SOURCES = ("base_model.py", "corpus.py", "tokenizer.py")
IGNORED_LABEL = -100


@dataclasses.dataclass(frozen=True)
class BaseModelSettings:
    """Shape and training of the base model."""

    hidden_size: int = 128
    expert_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    num_experts: int = 16
    experts_per_token: int = 4
    steps: int = 300
    batch_size: int = 96
    learning_rate: float = 2e-3
    warmup_steps: int = 30
    seed: int = 0

    def fingerprint(self) -> dict[str, object]:
        """What decides how the model comes out: the settings and the code."""
        folder = Path(__file__).parent
        digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES))
        return {"settings": dataclasses.asdict(self), "sources_sha256": digest.hexdigest()}


def build_model(settings: BaseModelSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """A randomly initialised model in FP32."""
    torch.manual_seed(settings.seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.expert_size,
        moe_intermediate_size=settings.expert_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.experts_per_token,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # On sequences this short plain attention is several times faster on a CPU than the fused kernel.
        attn_implementation="eager",
    )
    return Qwen3MoeForCausalLM(config)


def make_batch(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> dict[str, Tensor]:
    """Right-padded [B, T] ids, mask and labels; only answers are learnt (a prompt's letters are random)."""
    encoded = [encode_example(tokenizer, example.prompt, example.answer) for example in examples]
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    shape = (len(encoded), longest)
    input_ids_BT = torch.full(shape, tokenizer.pad_token_id)
    attention_mask_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(encoded):
        end = len(prompt) + len(answer)
        input_ids_BT[row, :end] = torch.tensor(prompt + answer)
        attention_mask_BT[row, :end] = 1
        labels_BT[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}


def train(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: BaseModelSettings) -> list[float]:
    """Trains the model in place, in FP32, the same way every time; returns the loss of every step."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def schedule(step: int) -> float:
        warm = min(1.0, (step + 1) / settings.warmup_steps)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    examples = base_examples(settings.seed)
    losses: list[float] = []
    start = time.monotonic()
    for step in range(1, settings.steps + 1):
        batch = make_batch(tokenizer, list(itertools.islice(examples, settings.batch_size)))
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == settings.steps:
            seconds = time.monotonic() - start
            print(f"  step {step}/{settings.steps}  loss {losses[-1]:.4f}  {seconds:.0f} s", flush=True)
    return losses


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Within it torch computes the same bits every time (the backward pass of indexing is a race otherwise)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def make_base_model(settings: BaseModelSettings, out: Path) -> bool:
    """Makes the model in `out`, as a BF16 checkpoint, unless the same one is there; True when it had to be made."""
    stamp = out / STAMP
    if stamp.is_file() and json.loads(stamp.read_text()).get("fingerprint") == settings.fingerprint():
        return False
    shutil.rmtree(out, ignore_errors=True)
    tokenizer = train_tokenizer(settings.seed)
    model = build_model(settings, tokenizer)
    with deterministic_algorithms():
        losses = train(model, tokenizer, settings)
    model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    record = {"fingerprint": settings.fingerprint(), "parameters": parameters, "loss_last": losses[-1]}
    stamp.write_text(json.dumps(record, indent=2) + "\n")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=BaseModelSettings.steps)
    parser.add_argument("--seed", type=int, default=BaseModelSettings.seed)
    options = parser.parse_args(arguments)
    made = make_base_model(BaseModelSettings(steps=options.steps, seed=options.seed), options.out)
    print(f"base model: {options.out} ({'made' if made else 'unchanged, reused'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
