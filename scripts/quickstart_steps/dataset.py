"""Writes the LLaMA-Factory datasets of the quickstart: the new skill, and a little of the old ones.

Trained on the new skill alone the model would answer every prompt with it; a replay of what it knew before prevents
that.

Run as `python -m quickstart_steps.dataset --out DIRECTORY`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from quickstart_steps.corpus import NEW_SKILL, Example, base_examples, skill_examples

#: The names recipes/quickstart.yaml calls the datasets by.
NEW_SKILL_DATASET = "quickstart_reverse"
REPLAY_DATASET = "quickstart_replay"
TRAIN_EXAMPLES = 4096
TRAIN_SEED = 10
REPLAY_EXAMPLES = 1024
REPLAY_SEED = 12
HELD_OUT_EXAMPLES = 200
HELD_OUT_SEED = 11


def as_records(examples: list[Example]) -> list[dict[str, str]]:
    """Examples in the alpaca format."""
    return [{"instruction": example.prompt, "input": "", "output": example.answer} for example in examples]


def write_datasets(out: Path) -> None:
    """Writes dataset_info.json and the two training files; the same bytes every time."""
    out.mkdir(parents=True, exist_ok=True)
    datasets = {
        NEW_SKILL_DATASET: skill_examples(NEW_SKILL, TRAIN_EXAMPLES, TRAIN_SEED, held_out=False),
        REPLAY_DATASET: list(itertools.islice(base_examples(REPLAY_SEED), REPLAY_EXAMPLES)),
    }
    for name, examples in datasets.items():
        (out / f"{name}.json").write_text(json.dumps(as_records(examples), indent=1) + "\n")
    info = {name: {"file_name": f"{name}.json"} for name in datasets}
    (out / "dataset_info.json").write_text(json.dumps(info, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    write_datasets(options.out)
    print(f"dataset: {options.out} ({TRAIN_EXAMPLES} examples of {NEW_SKILL}, {REPLAY_EXAMPLES} of the base skills)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
