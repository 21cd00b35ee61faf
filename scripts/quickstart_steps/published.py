"""Writes a small model the way that large ones are published: FP8 in blocks as Qwen3-FP8, or MXFP4 as gpt-oss.

Run as `python -m quickstart_steps.published --kind fp8|mxfp4 --base DIRECTORY --out DIRECTORY`. FP8 is made of the
quickstart's base model. MXFP4 is gpt-oss' own format, so a model of that family, of the same size, is trained from
scratch on the same skills first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from quickstart_steps.base_model import BaseModelSettings, deterministic_algorithms, train
from quickstart_steps.tokenizer import train_tokenizer

#: Written last, so its presence means that the model is complete; holds what it was made with.
STAMP = "published.json"
WEIGHTS = "model.safetensors"
BLOCK = 128
LARGEST_FP8 = 448.0
#: The magnitudes of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3), its codes 0 to 7; code 8 is the sign.
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GROUP = 32


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes [rows, columns] and a BF16 scale for each block of 128 x 128, which a code is multiplied by."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = (blocks.abs().amax(dim=(1, 3)) / LARGEST_FP8).clamp(min=1e-12).bfloat16()
    codes = (blocks / scales.float()[:, None, :, None]).clamp(-LARGEST_FP8, LARGEST_FP8)
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn), scales


def to_mxfp4(weight_EKN: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter [E, K, N] as blocks [E, N, K / 32, 16] of two codes to a byte, and scales [E, N, K / 32], E8M0."""
    groups = weight_EKN.float().transpose(1, 2).contiguous().unflatten(2, (-1, GROUP))
    exponents = torch.floor(torch.log2(groups.abs().amax(dim=3).clamp(min=1e-30))) - 2
    scaled = groups / torch.exp2(exponents).unsqueeze(3)
    codes = torch.bucketize(scaled.abs(), (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2) + 8 * (scaled < 0)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks.to(torch.uint8), (exponents + 127).clamp(0, 254).to(torch.uint8)


def fp8_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linear layers quantised; embeddings, norms and routers stay."""
    found = {}
    for key, value in tensors.items():
        if not key.endswith("_proj.weight"):
            found[key] = value
            continue
        found[key], found[f"{key}_scale_inv"] = to_fp8(value)
    return found


def mxfp4_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts quantised; everything else stays."""
    found = {}
    for key, value in tensors.items():
        if not re.search(r"experts\.(gate_up|down)_proj$", key):
            found[key] = value
            continue
        found[f"{key}_blocks"], found[f"{key}_scales"] = to_mxfp4(value)
    return found


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8": (
        fp8_tensors,
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        },
    ),
    "mxfp4": (
        mxfp4_tensors,
        {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    ),
}


def build_gpt_oss(settings: BaseModelSettings, tokenizer: PreTrainedTokenizerFast) -> GptOssForCausalLM:
    """A randomly initialised model of gpt-oss' family, in FP32."""
    torch.manual_seed(settings.seed)
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.expert_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        num_local_experts=settings.num_experts,
        num_experts_per_tok=settings.experts_per_token,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return GptOssForCausalLM(config)


def publish(kind: str, folder: Path) -> None:
    """Quantises the BF16 checkpoint in `folder` in place."""
    convert, quantization = KINDS[kind]
    tensors = {key: value.contiguous() for key, value in convert(load_file(folder / WEIGHTS)).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=2) + "\n")


def make(kind: str, base: Path, out: Path, settings: BaseModelSettings) -> bool:
    """Makes the model in `out` unless the same one is there; True when it had to be made."""
    made_with = {"kind": kind, "base": settings.fingerprint(), "code": Path(__file__).read_text()}
    if (out / STAMP).is_file() and json.loads((out / STAMP).read_text()) == made_with:
        return False
    shutil.rmtree(out, ignore_errors=True)
    if kind == "fp8":
        shutil.copytree(base, out)
    else:
        tokenizer = train_tokenizer(settings.seed)
        model = build_gpt_oss(settings, tokenizer)
        with deterministic_algorithms():
            train(model, tokenizer, settings)
        model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
    publish(kind, out)
    (out / STAMP).write_text(json.dumps(made_with) + "\n")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--base", type=Path, required=True, help="the quickstart's base model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=BaseModelSettings.steps, help="of training a model from scratch")
    options = parser.parse_args(arguments)
    settings = dataclasses.replace(BaseModelSettings(), steps=options.steps)
    made = make(options.kind, options.base, options.out, settings)
    print(f"{options.kind} checkpoint: {options.out} ({'made' if made else 'unchanged, reused'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
