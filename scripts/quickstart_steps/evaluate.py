"""Exact match of the base and the tuned models on held-out prompts, greedily decoded.

Run as `python -m quickstart_steps.evaluate --base DIRECTORY --out FILE [--adapter NAME=DIRECTORY ...]
[--engine-adapter NAME=DIRECTORY ...] [--merged NAME=DIRECTORY ...]`. Engine adapters run on a base model whose experts
are on the CPU engine, the others on plain transformers and PEFT. An answer counts only if it is the expected text,
character by character, ended by the model itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from quickstart_steps.corpus import BASE_SKILLS, MAX_LETTERS, NEW_SKILL, Example, skill_examples
from quickstart_steps.dataset import HELD_OUT_EXAMPLES, HELD_OUT_SEED
from quickstart_steps.tokenizer import END, encode_prompt

#: For the six base skills, each.
BASE_SKILL_EXAMPLES = 50
#: The longest answer doubles every letter; with its end marker and one to spare.
MAX_ANSWER_TOKENS = 2 * MAX_LETTERS + 2


def generate_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """The model's answer to each prompt, cut before the end marker; the marker missing, it ends in "…"."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, encoded))
    input_ids_BT = torch.full((len(encoded), longest), tokenizer.pad_token_id)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for row, ids in enumerate(encoded):
        input_ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask_BT[row, longest - len(ids) :] = 1
    with torch.inference_mode():
        output_BT = model.generate(
            input_ids=input_ids_BT.to(model.device),
            attention_mask=attention_mask_BT.to(model.device),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
        )
    texts = tokenizer.batch_decode(output_BT[:, longest:], skip_special_tokens=False)
    return [text.split(END, 1)[0] if END in text else f"{text}…" for text in texts]


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> float:
    """The share of examples answered exactly, 0 to 1."""
    answers = generate_answers(model, tokenizer, [example.prompt for example in examples])
    return sum(answer == example.answer for answer, example in zip(answers, examples, strict=True)) / len(examples)


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: int) -> dict[str, float]:
    """Exact match on held-out prompts, `examples` at most: of the new skill, and of the base skills (their mean)."""
    model.eval()
    base = [
        example
        for skill in BASE_SKILLS
        for example in skill_examples(skill, min(examples, BASE_SKILL_EXAMPLES), HELD_OUT_SEED, held_out=True)
    ]
    new = skill_examples(NEW_SKILL, examples, HELD_OUT_SEED, held_out=True)
    return {"new_skill": exact_match(model, tokenizer, new), "base_skills": exact_match(model, tokenizer, base)}


def load(directory: str, *, on_engine: bool) -> PreTrainedModel:
    """A model in BF16 on the accelerator, or the CPU where there is none; experts on the engine if asked for."""
    options = {}
    if on_engine:
        import kt_sft

        options["quantization_config"] = kt_sft.KTConfig(expert_format="bf16")
    if torch.accelerator.is_available():
        options["device_map"] = {"": torch.accelerator.current_accelerator()}
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="eager", local_files_only=True, **options
    )


def named_directory(text: str) -> tuple[str, str]:
    """Splits NAME=DIRECTORY."""
    name, separator, directory = text.partition("=")
    if (
        not separator
        or not (Path(directory) / "config.json").is_file() | (Path(directory) / "adapter_config.json").is_file()
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIRECTORY with a model or an adapter in it")
    return name, directory


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", type=named_directory, action="append", default=[])
    parser.add_argument("--engine-adapter", type=named_directory, action="append", default=[])
    parser.add_argument("--merged", type=named_directory, action="append", default=[])
    parser.add_argument(
        "--examples", type=int, default=HELD_OUT_EXAMPLES, help="of the new skill, and at most of others"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.base, local_files_only=True)
    results = {"base": evaluate(load(options.base, on_engine=False), tokenizer, options.examples)}
    for adapters, on_engine in ((options.adapter, False), (options.engine_adapter, True)):
        for name, directory in adapters:
            model = PeftModel.from_pretrained(load(options.base, on_engine=on_engine), directory)
            results[name] = evaluate(model, tokenizer, options.examples)
            del model
            gc.collect()
    for name, directory in options.merged:
        results[name] = evaluate(load(directory, on_engine=False), tokenizer, options.examples)
    for name, scores in results.items():
        print(f"  {name}: new skill {scores['new_skill']:.3f}, base skills {scores['base_skills']:.3f}")
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
