"""transformers' Trainer on the tiny model, with what it computes recorded; LLaMA-Factory's model to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import kt_sft

Gradients = dict[str, Tensor]

#: Of two layers: forward and backward of one micro-batch; either of them of two.
PLAIN, PAIR = "SA" * 4, "SSASASAA"


def load(folder: Path, interleave: bool | None, lora: dict[str, Any] | None = None, **settings: Any) -> Any:
    config = kt_sft.KTConfig(interleave_micro_batches=interleave, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, num_experts_per_tok=8, quantization_config=config
    )
    torch.manual_seed(0)
    arguments = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**arguments | (lora or {})))


def train_model(parse: Callable[..., Any], **changes: Any) -> Any:
    """As LLaMA-Factory's stages load the model that they train, of the recipe that `parse` parses."""
    from llamafactory.model import load_model, load_tokenizer

    model_args, _, _, finetuning_args, _ = parse(**changes)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    return load_model(tokenizer, model_args, finetuning_args, is_trainable=True)


def rows(count: int) -> list[dict[str, list[int]]]:
    """Of different lengths."""
    random = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(3, 200, (5 + number % 4,), generator=random).tolist()} for number in range(count)
    ]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Recorder(transformers.TrainerCallback):
    """The gradients of each step, and of those so far at each micro-batch before the last."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []
        self.substeps: list[Gradients] = []

    @staticmethod
    def _gradients(model: Any) -> Gradients:
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def on_substep_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.substeps.append(self._gradients(model))

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.steps.append(self._gradients(model))


def trainer_of(
    model: Any,
    out: Path,
    accumulation: int = 2,
    steps: int = 3,
    batch: int = 2,
    left_out: int = 0,
    replicas: int = 1,
    kind: type[transformers.Trainer] = transformers.Trainer,
    data_collator: Any = padded,
    **arguments: Any,
) -> tuple[transformers.Trainer, Recorder]:
    recorder = Recorder()
    settings = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        logging_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        **arguments,
    )
    data: Any = rows(batch * accumulation * steps * replicas - left_out)
    trainer = kind(model, settings, train_dataset=data, data_collator=data_collator, callbacks=[recorder])
    return trainer, recorder


def losses(trainer: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(one: list[Gradients], other: list[Gradients]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )
