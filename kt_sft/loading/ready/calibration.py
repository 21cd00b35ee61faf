"""Calibration: what reaches the experts when the model reads texts, and codes chosen for that.

The model runs once, with its experts as the checkpoint has them; what every layer of experts is given is written to
files beside the store in the making. Then each expert is quantised with GPTQ's error feedback (feedback.py) for the
tokens that were routed to it.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kt_sft.config import ConfigError, KTConfig
from kt_sft.engine.store import LayerStore
from kt_sft.experts import CpuExperts
from kt_sft.loading.biases import read_bias
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.hashing import hash_file
from kt_sft.loading.mapping import MatrixRead, ModulePlan
from kt_sft.loading.ready.feedback import FEEDBACK_FORMATS, inverse_factor, lost, quantise
from kt_sft.loading.ready.planning import read_settings
from kt_sft.loading.ready.texts import token_sequences
from kt_sft.loading.ready.writing import Plain
from kt_sft.loading.sources.entries import QuantisedEntry, read_span, storage_of

logger = logging.getLogger("kt_sft")

#: Of a sequence, where the model takes so many.
_LENGTH = 2048
_DONE = "done.json"
#: What a module of experts is given, each in a file of its own.
_PARTS = ("hidden", "index", "weights")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
#: Tokens that an expert's own moments must rest on to count as much as those of its layer (for its first matrices), or
#: as much as inputs that have nothing to do with each other (for down).
_PRIOR_TOKENS = 256.0

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: nn.functional.relu(x).square(),
}


@dataclass(frozen=True)
class Calibration:
    """A file of texts, and how many tokens of it."""

    file: Path
    tokens: int

    def facts(self) -> dict[str, Any]:
        """What tells it from another: for the manifest.

        Raises:
            ConfigError: The file cannot be read.
        """
        if not self.file.is_file():
            raise ConfigError(f"kt_sft: {self.file} to calibrate with does not exist")
        return {"method": "gptq", "sha256": hash_file(self.file), "tokens": self.tokens}


def check_format(expert_format: str) -> None:
    """Refuses formats that have nothing to calibrate.

    Raises:
        ConfigError: This is one.
    """
    if expert_format not in FEEDBACK_FORMATS:
        raise ConfigError(
            f"kt_sft: calibration is for formats of four bits ({', '.join(FEEDBACK_FORMATS)}); leave it out for "
            f"{expert_format}"
        )


def capture(source: Path, calibration: Calibration, folder: Path) -> None:
    """Runs the model on the texts, unless a run before has done so, and writes what its experts are given to `folder`.

    Raises:
        ConfigError: There is no tokenizer, or the texts cannot be read.
    """
    if (folder / _DONE).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = _tokenizer_of(source)
    names = read_settings(source).get("architectures") or []
    model_class = getattr(transformers, names[0], None) if names else None
    model = (model_class or transformers.AutoModelForCausalLM).from_pretrained(
        source, quantization_config=KTConfig(), trust_remote_code=False
    )
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LENGTH
    sequences = token_sequences(calibration.file, tokenizer, calibration.tokens, min(_LENGTH, most))
    known = model.get_input_embeddings().weight.size(0)  # type: ignore[operator]
    if (largest := max(int(ids.max()) for ids in sequences)) >= known:
        raise ConfigError(f"kt_sft: the tokenizer in {source} gives token {largest}, the model has {known}")
    _record(model.eval(), sequences, folder)
    (folder / _DONE).write_text(json.dumps({"tokens": sum(ids.numel() for ids in sequences)}))
    del model
    gc.collect()


def _tokenizer_of(source: Path) -> Any:
    # Without a vocabulary transformers makes a tokenizer that knows nothing.
    if not any(file.name in _VOCABULARIES or file.suffix in (".model", ".tiktoken") for file in source.iterdir()):
        raise ConfigError(f"kt_sft: {source} has no tokenizer to calibrate with ({', '.join(_VOCABULARIES)}, ...)")
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"kt_sft: {source}: its tokenizer cannot be read ({error})") from error


def _record(model: transformers.PreTrainedModel, sequences: Sequence[Tensor], folder: Path) -> None:
    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            hidden, index, weights = given[:3]
            for part, values in zip(_PARTS, (hidden.float(), index.int(), weights.float()), strict=True):
                with open(folder / f"{name}.{part}", "ab") as file:
                    file.write(values.detach().cpu().contiguous().numpy().tobytes())

        return before

    experts = {name: module for name, module in model.named_modules() if isinstance(module, CpuExperts)}
    for name in experts:  # texts reach no vision experts, for one: these have empty files
        for part in _PARTS:
            (folder / f"{name}.{part}").touch()
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in experts.items()]
    try:
        with torch.no_grad():
            for ids in sequences:
                model(input_ids=ids.to(model.device))
    finally:
        for handle in hooks:
            handle.remove()


class ErrorFeedback(Plain):
    """Fills stores with codes chosen for what was captured.

    Args:
        folder: Of `capture`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._local = threading.local()
        self._hidden_TH = self._index_TK = self._weights_TK = torch.empty(0)
        self._layer_moments = torch.empty(0)

    def begin(self, plan: ModulePlan) -> None:
        """Reads what one layer was given."""
        hidden = self._given(plan, "hidden", torch.float32).reshape(-1, plan.layout.hidden_size)
        self._hidden_TH = hidden
        slots = (len(hidden), -1) if len(hidden) else (0, 1)
        self._index_TK = self._given(plan, "index", torch.int32).reshape(slots)
        self._weights_TK = self._given(plan, "weights", torch.float32).reshape(slots)
        self._layer_moments = hidden.T @ hidden / max(1, len(hidden))

    def calibration(self, asked: dict[str, Any] | None, plans: Sequence[ModulePlan]) -> dict[str, Any] | None:
        """Counts the experts that are plain because no token came to them with any weight."""
        plain = sum(plan.layout.num_experts - len(self._reached(plan)) for plan in plans)
        if plain:
            logger.warning(
                "no token of the texts came to %d of %d experts, which are quantised without calibration; other texts, "
                "or more, reach more of them",
                plain,
                sum(plan.layout.num_experts for plan in plans),
            )
        return (asked or {}) | {"unreached_experts": plain}

    def _reached(self, plan: ModulePlan) -> set[int]:
        index, weights = self._given(plan, "index", torch.int32), self._given(plan, "weights", torch.float32)
        return {*index[weights.square() > 0].tolist()} & {*range(plan.layout.num_experts)}

    def _given(self, plan: ModulePlan, part: str, dtype: torch.dtype) -> Tensor:
        return _read(self._folder / f"{plan.name}.{part}", dtype)

    def groups(self, plan: ModulePlan) -> list[list[MatrixRead]]:
        """An expert's matrices together: two of them have the same inputs, and the third those that these give."""
        found: dict[int, list[MatrixRead]] = {}
        for read in plan.reads:
            found.setdefault(read.expert, []).append(read)
        return [sorted(reads, key=lambda read: ("gate", "up", "down").index(read.matrix)) for reads in found.values()]

    def fill(self, read: MatrixRead, store: LayerStore, plan: ModulePlan) -> None:
        """Quantises one matrix with error feedback, where that loses less of its products than doing without."""
        super().fill(read, store, plan)
        moments, factor = self._inputs(read, plan)
        if moments is None or factor is None:
            return
        weights = _values(read)
        plain = torch.empty_like(weights)
        store.native.dequantize(read.matrix, 0, plain.data_ptr())
        found = quantise(weights, factor, storage_of(store))
        if lost(weights, found.values, moments) >= lost(weights, plain, moments):
            return
        store.write_codes(read.matrix, 0, found.codes, found.scales, found.zero_points)
        off = (weights - found.values).square().sum(dtype=torch.float64).item()
        store.adopt((off, weights.square().sum(dtype=torch.float64).item()))

    def _inputs(self, read: MatrixRead, plan: ModulePlan) -> tuple[Tensor | None, Tensor | None]:
        """Second moments of a matrix's inputs, and their factor; kept for the next matrix of the expert."""
        kind = "down" if read.matrix == "down" else "first"
        key = (plan.name, read.expert, kind)
        if getattr(self._local, "key", None) != key:
            self._local.key, self._local.found = key, self._moments(read, plan, kind)
        found: tuple[Tensor | None, Tensor | None] = self._local.found
        return found

    def _moments(self, read: MatrixRead, plan: ModulePlan, kind: str) -> tuple[Tensor | None, Tensor | None]:
        chosen_TK = self._index_TK == read.expert
        rows = chosen_TK.any(dim=1)
        weights = (self._weights_TK * chosen_TK).sum(dim=1)[rows].square()
        inputs = self._hidden_TH[rows]
        if not len(inputs) or not bool(weights.any()):
            return None, None
        if kind == "down":
            inputs = _activations(read, plan, inputs)
        own = (inputs * weights[:, None]).T @ inputs / weights.sum()
        prior = self._layer_moments if kind == "first" else torch.eye(len(own), device="cpu") * own.diagonal().mean()
        moments = (len(inputs) * own + _PRIOR_TOKENS * prior) / (len(inputs) + _PRIOR_TOKENS)
        try:
            return moments, inverse_factor(moments)
        except torch.linalg.LinAlgError:  # inputs that are not finite, or as good as none
            return None, None


def _activations(read: MatrixRead, plan: ModulePlan, inputs: Tensor) -> Tensor:
    """What the down matrix of an expert multiplies, [tokens, I]: from the weights as the checkpoint has them."""
    layout = plan.layout
    of = {
        other.matrix: _values(other) for other in plan.reads if other.expert == read.expert and other.matrix != "down"
    }
    products = {matrix: inputs @ values.T for matrix, values in of.items()}
    if plan.gate_up_bias is not None:
        bias = read_bias(plan.gate_up_bias, layout, first=True)[read.expert].float()
        for matrix, part in zip(products, bias.chunk(len(products)), strict=True):
            products[matrix] += part
    if not layout.gated:
        return _FUNCTIONS[layout.activation](products["up"])
    if layout.activation == "swiglu_oai":
        gate, up = products["gate"].clamp(max=7.0), products["up"].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return _FUNCTIONS[layout.activation](products["gate"]) * products["up"]


def _values(read: MatrixRead) -> Tensor:
    """FP32 [rows, columns] of one matrix as the checkpoint has it."""
    view, entry = read.view, read.view.entry
    if isinstance(entry, QuantisedEntry):
        return entry.dequantised(entry.rows_of(view))
    strides = (view.row_stride, view.col_stride)
    count = (view.rows - 1) * view.row_stride + (view.cols - 1) * view.col_stride + 1
    span = read_span(entry, (view.offset - entry.offset) // entry.itemsize, count)
    return span.as_strided((view.rows, view.cols), strides).float().contiguous()


def _read(path: Path, dtype: torch.dtype) -> Tensor:
    try:
        data = bytearray(path.read_bytes())
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: what the experts were given cannot be read ({error})") from error
