#!/usr/bin/env python
"""kt_sft against DeepSpeed's parameter offload over the size of a micro-batch: what the project claims, to be repeated.

Runs `kt-sft compare` on random weights of Qwen3-30B-A3B's layers, 256 to 8192 tokens a micro-batch, with every
contender that the machine has. ZeRO-3 keeps up to 2e9 weights gathered, so four layers (2.4e9 weights in experts) are
the least that makes it stream. Any option of `kt-sft compare` may follow, and a later one replaces these:

    scripts/compare_zero_offload.py
    scripts/compare_zero_offload.py --layers 48                      # the whole model: 57 GiB of weights
    scripts/compare_zero_offload.py --tokens 128,512 --hidden 512 --intermediate 256 --experts 64    # a CPU alone
"""

from __future__ import annotations

import sys

from kt_sft.cli.app import app

OPTIONS = ["--model", "qwen3-30b-a3b", "--layers", "4", "--tokens", "256,512,1024,2048,4096,8192", "--rounds", "3"]

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
    app(["compare", *OPTIONS, *sys.argv[1:]])
