"""Writes a checkpoint's weights as FP32: `python -m quickstart_steps.convert_fp32 --source DIRECTORY --out DIRECTORY`.

LLaMA-Factory computes in the dtype that a checkpoint names wherever it can; an FP32 run needs an FP32 checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32).save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.source).save_pretrained(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
