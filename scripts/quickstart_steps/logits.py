"""Whether an adapter on experts computes in plain PEFT, without kt_sft, what it computes in the engine.

Run first as `python -m quickstart_steps.logits --base DIRECTORY --adapter DIRECTORY --save FILE` with
TORCH_DEVICE_BACKEND_AUTOLOAD=0, then with `--compare FILE --out FILE` instead of `--save`. Every token goes to all
experts: where only a few are chosen, a rounding can choose others, and then logits differ by more than roundings do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quickstart_steps.corpus import NEW_SKILL, skill_examples
from quickstart_steps.dataset import HELD_OUT_SEED
from quickstart_steps.tokenizer import encode_prompt

PROMPTS = 32
#: Half the spacing of BF16 at 1: the largest relative error of a rounding to it.
UNIT_ROUNDOFF = 2.0**-9
#: What the engine rounds to BF16 in a layer of experts and plain PEFT in FP32 does not: the tokens, the activations
#: between up and down, the low-rank values, and the adapter's matrices.
ROUNDINGS_OF_A_LAYER = 4


def compute_logits(model: Any, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Logits [positions, vocabulary] at every position of PROMPTS held-out prompts."""
    model.eval()
    prompts = [example.prompt for example in skill_examples(NEW_SKILL, PROMPTS, HELD_OUT_SEED, held_out=True)]
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([encode_prompt(tokenizer, prompt)])).logits[0] for prompt in prompts]
    return torch.cat(logits)


def load_and_compute(base: str, adapter: str, **options: Any) -> dict[str, Tensor]:
    """Logits of the base model and of the adapter on it, in FP32 on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        num_experts_per_tok=AutoConfig.from_pretrained(base, local_files_only=True).num_experts,
        **options,
    )
    plain = compute_logits(model, tokenizer)
    return {"base": plain, "adapted": compute_logits(PeftModel.from_pretrained(model, adapter), tokenizer)}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], layers: int) -> dict[str, float]:
    """The largest difference, what it may be, and how far the adapter moves the logits.

    Each rounding moves a value by at most UNIT_ROUNDOFF of it, so all of them move the logits by that much of the
    largest one if none cancels another.
    """
    largest = theirs["adapted"].abs().max()
    return {
        "largest_difference": (ours["adapted"] - theirs["adapted"]).abs().max().item(),
        "allowed_difference": (layers * ROUNDINGS_OF_A_LAYER * UNIT_ROUNDOFF * largest).item(),
        "adapter_moves_them_by": (theirs["adapted"] - theirs["base"]).abs().max().item(),
        "largest_logit": largest.item(),
        "same_next_token": (ours["adapted"].argmax(-1) == theirs["adapted"].argmax(-1)).float().mean().item(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--save", type=Path, help="compute without kt_sft, and save the logits")
    way.add_argument("--compare", type=Path, help="compute in the engine, and compare with what --save saved")
    parser.add_argument("--out", type=Path, help="of --compare")
    options = parser.parse_args(arguments)
    if options.save:
        logits = load_and_compute(options.base, options.adapter)
        if any(name.partition(".")[0] == "kt_sft" for name in sys.modules):
            parser.error("kt_sft is loaded in this process; set TORCH_DEVICE_BACKEND_AUTOLOAD=0")
        torch.save(logits, options.save)
        return 0
    import kt_sft

    settings = kt_sft.KTConfig(expert_format="bf16")
    ours = load_and_compute(options.base, options.adapter, quantization_config=settings)
    layers = AutoConfig.from_pretrained(options.base, local_files_only=True).num_hidden_layers
    figures = compare(ours, torch.load(options.compare), layers)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
