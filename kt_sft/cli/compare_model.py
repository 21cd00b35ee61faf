"""What `kt-sft compare` trains where no checkpoint is given: random weights of a known architecture, and plain text.

`python -m kt_sft.cli.compare_model REQUEST` reads a JSON object: `folder`, and the fields of `ModelRequest`. It is a
process of its own because it imports torch (see training_runs.py).
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.cli.shapes import MODELS, LayerShape, ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_QWEN3 = {"norm_topk_prob": True}
#: Name -> (class of its config in transformers, sizes that are neither in `shapes.MODELS` nor the class's defaults,
#: what that class calls experts and their intermediate size). What LLaMA-Factory alone cannot load has no place here.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        {
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 10944,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
        "n_routed_experts",
        "moe_intermediate_size",
    ),
    "deepseek-v3": ("DeepseekV3Config", {"num_hidden_layers": 61}, "n_routed_experts", "moe_intermediate_size"),
    "glm-4.5-air": (
        "Glm4MoeConfig",
        {"num_hidden_layers": 46, "head_dim": 128, "attention_bias": True},
        "n_routed_experts",
        "moe_intermediate_size",
    ),
    "mixtral-8x7b": ("MixtralConfig", {"num_hidden_layers": 32}, "num_local_experts", "intermediate_size"),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128} | _QWEN3,
        "num_experts",
        "moe_intermediate_size",
    ),
    "qwen3-235b-a22b": (
        "Qwen3MoeConfig",
        {"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128} | _QWEN3,
        "num_experts",
        "moe_intermediate_size",
    ),
}
#: Weights in one file of the checkpoint, which bounds the memory that writing it takes.
_SHARD_WEIGHTS = 1 << 30
#: Makes what routed experts add as large as the rest: gated activations are about 0.36, and weighted sums of K smaller.
_EXPERTS_GAIN = 4.0
_WORDS, _WORDS_A_LINE = 2000, 200


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """A random model and the text it is trained on."""

    name: str
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    experts: int | None = None
    top_k: int | None = None
    #: Tokens of the vocabulary; None: those of the tokenizer, one a byte.
    vocabulary: int | None = None
    #: Tokens of text that the data must have.
    tokens: int = 1 << 16

    @property
    def shape(self) -> LayerShape:
        """One layer's sizes.

        Raises:
            ShapeError: There is no such architecture, or K > E.
        """
        if self.name not in ARCHITECTURES:
            raise ShapeError(
                f"there are no random weights for {self.name!r}: give the folder of a checkpoint, or one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        sizes = (self.hidden, self.intermediate, self.experts, self.top_k)
        return LayerShape(self.name, *(own or known for own, known in zip(sizes, MODELS[self.name], strict=True)))


def architecture(request: ModelRequest, vocabulary: int) -> PreTrainedConfig:
    """The config of a requested model.

    Raises:
        ShapeError: There is no such architecture, or its sizes do not fit.
    """
    import transformers

    shape = request.shape
    class_name, sizes, experts, intermediate = ARCHITECTURES[request.name]
    sizes = sizes | {"hidden_size": shape.hidden, intermediate: shape.intermediate, experts: shape.experts}
    if request.layers is not None:
        sizes |= {"num_hidden_layers": request.layers}
    config = getattr(transformers, class_name)(vocab_size=vocabulary, num_experts_per_tok=shape.top_k, **sizes)
    if (groups := getattr(config, "n_group", None)) and shape.experts % groups:
        raise ShapeError(f"{shape.experts} experts cannot be divided among the {groups} groups of {request.name}")
    if request.layers is not None and getattr(config, "first_k_dense_replace", 0) >= request.layers:
        config.first_k_dense_replace = 0  # a model of few layers is one of experts
    return config


def write_model(request: ModelRequest, folder: Path) -> None:
    """Writes a checkpoint of random BF16 weights with a tokenizer of bytes, file by file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = architecture(request, max(request.vocabulary or 0, write_tokenizer(folder)))
    config.dtype = "bfloat16"
    config.architectures = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    index: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if sum(part.numel() for part in shards[-1].values()) + tensor.numel() > _SHARD_WEIGHTS and shards[-1]:
            _save_shard(shards.pop(), index, folder, save_file)
            shards.append({})
        shards[-1][name] = random_values(name, tensor, generator)
    _save_shard(shards.pop(), index, folder, save_file)
    record = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record, indent=1))


def _save_shard(shard: dict[str, Any], index: dict[str, str], folder: Path, save: Any) -> None:
    name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
    save(shard, folder / name, metadata={"format": "pt"})
    index.update(dict.fromkeys(shard, name))


def random_values(name: str, like: Any, generator: Any) -> Any:
    """Norms are ones, other vectors zeros; matrices keep activations near 1, so that all layers matter to the loss."""
    import torch

    if like.dim() < 2:
        return torch.full(like.shape, float("norm" in name.split(".")[-2]), dtype=torch.bfloat16)
    spread = 1.0 if "embed_tokens" in name else like.shape[-1] ** -0.5
    if name.endswith("experts.down_proj"):
        spread *= _EXPERTS_GAIN
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, spread, generator=generator)


def write_tokenizer(folder: Path) -> int:
    """One token a byte, and an end of text; returns how many there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|end|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    return len(fast)


def write_text(folder: Path, tokens: int) -> None:
    """Writes a LLaMA-Factory dataset `compare_text` of random words.

    Args:
        folder: Where `dataset_info.json` goes.
        tokens: How many it must come to, for a tokenizer that takes up to eight characters a token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(_WORDS)]
    written, lines = 0, []
    while written < 8 * tokens:
        line = " ".join(chance.choices(words, k=_WORDS_A_LINE))
        lines.append(json.dumps({"text": line}))
        written += len(line)
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    info = {"compare_text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def main() -> None:
    """Writes what the request on the command line asks for."""
    request = json.loads(sys.argv[1])
    write_model(
        ModelRequest(**{key: value for key, value in request.items() if key != "folder"}), Path(request["folder"])
    )


if __name__ == "__main__":
    main()
