#!/usr/bin/env python
"""What quantising experts costs, and what calibration gives back: perplexity on text that neither has seen.

Run as `python scripts/perplexity.py --model DIRECTORY --calibrate FILE --held-out FILE`; without them the quickstart's
base model (made by scripts/quickstart.py) and examples of its skills, of which the answers count. The model's experts
as they are, quantised, and quantised with calibration, each from a store of `kt-sft quantize`, are measured in turn on
the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from quickstart_steps.corpus import BASE_SKILLS, Example, skill_examples
from quickstart_steps.processes import REPOSITORY
from quickstart_steps.tokenizer import encode_example
from transformers import AutoModelForCausalLM, AutoTokenizer

import kt_sft
from kt_sft.loading.ready.calibration import Calibration, ErrorFeedback, capture
from kt_sft.loading.ready.planning import plan_store
from kt_sft.loading.ready.texts import token_sequences
from kt_sft.loading.ready.writing import StoreWriter

#: Token ids [1, T], and the first that counts.
Scored = tuple[torch.Tensor, int]


def skills(seed: int, count: int, *, held_out: bool) -> list[Example]:
    """Examples of every base skill of the quickstart."""
    return [example for skill in BASE_SKILLS for example in skill_examples(skill, count, seed, held_out=held_out)]


def perplexity(folder: Path, scored: list[Scored], settings: kt_sft.KTConfig) -> float:
    """exp of the mean cross-entropy of the tokens of each sequence from a certain one on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids, start in scored:
            logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
            count += ids.numel() - start
    return math.exp(total / count)


def make_store(model: Path, target: Path, settings: kt_sft.KTConfig, calibration: Calibration | None) -> None:
    """As `kt-sft quantize` does."""
    plan = plan_store(model, settings, None if calibration is None else calibration.facts())
    threads = torch.get_num_threads()
    if calibration is None:
        StoreWriter(plan, target, threads=threads).write()
        return
    folder = target.with_name(f"{target.name}.calibration")
    capture(model, calibration, folder)
    StoreWriter(plan, target, threads=threads, filler=ErrorFeedback(folder)).write()


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "saves/quickstart/base")
    parser.add_argument("--calibrate", type=Path, help="texts to calibrate with")
    parser.add_argument("--held-out", type=Path, help="texts to measure on")
    parser.add_argument("--formats", default="int4", help="of int4, int4:zp, int4:128, nf4, mxfp4; with commas between")
    parser.add_argument("--calibrate-tokens", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=32768, help="that are measured")
    parser.add_argument("--length", type=int, default=512, help="of a sequence")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        calibrate, held_out = options.calibrate, options.held_out
        if calibrate is None:
            calibrate = work / "calibrate.jsonl"
            rows = [{"instruction": one.prompt, "output": one.answer} for one in skills(7, 400, held_out=False)]
            calibrate.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if held_out is None:
            pairs = [encode_example(tokenizer, one.prompt, one.answer) for one in skills(11, 200, held_out=True)]
            scored = [(torch.tensor([prompt + answer]), len(prompt)) for prompt, answer in pairs]
        else:
            scored = [(ids, 1) for ids in token_sequences(held_out, tokenizer, options.tokens, options.length)]
        as_it_is = perplexity(options.model, scored, kt_sft.KTConfig())
        print(f"  as it is: {as_it_is:.6f}")
        for name in options.formats.split(","):
            expert_format, *rest = name.split(":")
            group = next((int(part) for part in rest if part.isdecimal()), None)
            settings = kt_sft.KTConfig(expert_format=expert_format, group_size=group, zero_point="zp" in rest)
            results[name] = {"as it is": as_it_is}
            for kind, calibration in (
                ("plain", None),
                ("calibrated", Calibration(calibrate, options.calibrate_tokens)),
            ):
                target = work / f"{name}-{kind}"
                make_store(options.model, target, settings, calibration)
                results[name][kind] = perplexity(target, scored, kt_sft.KTConfig())
                print(f"  {name}, {kind}: {results[name][kind]:.6f}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
