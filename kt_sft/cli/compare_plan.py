"""What `kt-sft compare` runs: the contenders, their recipes, and why one of them cannot run here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kt_sft.cli.training_runs import WITHOUT_PLUGIN

_CHECKOUT = Path(__file__).resolve().parents[2] / "recipes" / "compare"
#: A checkout's folder, or the copy of it in an installed package.
RECIPES = _CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).resolve().parents[1] / "recipes" / "compare"
PLUGIN_KEY = "kt_sft"
#: Beside it: kt_sft without interleaving.
IN_TURN = "kt_sft_in_turn"
#: Formats whose values are the checkpoint's own, so that losses are those of the same weights.
SAME_WEIGHTS = ("auto", "bf16")
#: What reading and holding a model takes beside its weights.
_HEADROOM = 1.1


class CompareError(ValueError):
    """A comparison that cannot be made; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train the same model."""

    name: str
    description: str
    #: The DeepSpeed configuration beside the recipe, for those that have one.
    deepspeed: str | None = None
    #: Settings of kt_sft on top of the recipe's, for those that run with it.
    plugin: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its runs. DeepSpeed must be started by torchrun, also on one device."""
        if self.plugin is not None:
            return {}
        launched = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"} if self.deepspeed else {}
        return WITHOUT_PLUGIN | launched


CONTENDERS = (
    Contender("kt_sft", "routed experts on the CPU engine, the rest on the accelerator where there is one", plugin={}),
    Contender(
        IN_TURN,
        "the same with one micro-batch after the other, to see what interleaving gains",
        plugin={"interleave_micro_batches": False},
    ),
    Contender("llamafactory", "plain LLaMA-Factory, the whole model on the accelerator, or on the CPU"),
    Contender("zero3", "DeepSpeed ZeRO-3, parameters offloaded to the CPU, other settings its own", "zero3_stock.json"),
    Contender(
        "zero3_tuned",
        "the same with pinned memory, prefetch of whole MoE blocks and overlapped transfers",
        "zero3_tuned.json",
    ),
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One size of micro-batch."""

    cutoff: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch, every sequence being full."""
        return self.cutoff * self.batch


@dataclasses.dataclass(frozen=True)
class Length:
    """How long is measured: runs of `steps`, the first `warmup` of them not measured, each contender once a round."""

    steps: int
    warmup: int
    rounds: int

    def __post_init__(self) -> None:
        if self.warmup >= self.steps:
            raise CompareError(f"--warmup: {self.warmup} of {self.steps} steps leave none to measure")


def choose(names: str | None) -> list[Contender]:
    """The contenders of a comma-separated list, in the order of `CONTENDERS`; all for None.

    Raises:
        CompareError: A name is none of theirs, or there are fewer than two.
    """
    if names is None:
        return list(CONTENDERS)
    wanted = {name.strip() for name in names.split(",")}
    known = [contender.name for contender in CONTENDERS]
    if unknown := wanted - set(known):
        raise CompareError(f"--contenders: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    if len(wanted) < 2:
        raise CompareError("--contenders: name at least two; one cannot be compared")
    return [contender for contender in CONTENDERS if contender.name in wanted]


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe that all contenders share.

    Raises:
        CompareError: It cannot be read, or is no training recipe with a `kt_sft:` block.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CompareError(f"--recipe: {path} cannot be read as YAML: {error}") from error
    if not isinstance(recipe, dict) or not recipe.get("do_train") or PLUGIN_KEY not in recipe:
        raise CompareError(f"--recipe: {path} is no training recipe with a kt_sft block; kt_sft runs it as it is")
    if recipe.get("deepspeed"):
        raise CompareError(f"--recipe: {path} has deepspeed: already; take it out, it is put in for DeepSpeed's runs")
    if (recipe[PLUGIN_KEY] or {}).get("lora_experts"):
        raise CompareError(f"--recipe: {path} has lora_experts, which the others cannot train; leave it out")
    return recipe


def workloads(recipe: dict[str, Any], tokens: str | None) -> list[Workload]:
    """The sizes of micro-batch: the recipe's own, or one for each number of tokens.

    A number up to the recipe's `cutoff_len` becomes one sequence of that length, a multiple of it several sequences.

    Raises:
        CompareError: A number is none, or no multiple of a longer sequence.
    """
    cutoff = int(recipe.get("cutoff_len", 2048))
    if tokens is None:
        return [Workload(cutoff, int(recipe.get("per_device_train_batch_size", 8)))]
    found = []
    for text in tokens.split(","):
        if not text.strip().isdecimal() or int(text) < 1:
            raise CompareError(f"--tokens: {text.strip()!r} is no number of tokens")
        number = int(text)
        if number > cutoff and number % cutoff:
            raise CompareError(f"--tokens: {number} is no multiple of the recipe's cutoff_len {cutoff}")
        found.append(Workload(min(number, cutoff), max(number // cutoff, 1)))
    return found


def recipe_for(contender: Contender, recipe: dict[str, Any], settings: dict[str, Any], configs: Path) -> dict[str, Any]:
    """One contender's recipe: the common one with this run's settings, without what is not its own.

    Args:
        contender: Whose.
        recipe: The common one.
        settings: What the command puts in.
        configs: The folder of the DeepSpeed configurations.
    """
    own = recipe | settings
    block = own.pop(PLUGIN_KEY)
    if contender.plugin is not None:
        own[PLUGIN_KEY] = (block or {}) | dict(contender.plugin)
    if contender.deepspeed:
        own["deepspeed"] = str(configs / contender.deepspeed)
    return own


def obstacle(contender: Contender, facts: dict[str, Any], weight_bytes: int | None) -> str | None:
    """Why a contender cannot run on a machine, or None.

    Args:
        contender: Which.
        facts: From `compare_machine.facts`.
        weight_bytes: Of the checkpoint; None where nobody knows before it is fetched.
    """
    if contender.deepspeed and facts["deepspeed_error"] is not None:
        return f"DeepSpeed cannot be imported ({facts['deepspeed_error']}); pip install 'kt_sft[deepspeed]'"
    if contender.name == IN_TURN and not facts["accelerators"]:
        return "without an accelerator kt_sft computes one micro-batch after the other by itself"
    if contender.plugin is not None or weight_bytes is None:
        return None
    host = facts["engine"]["memory_available_bytes"]
    device = facts["accelerators"][0]["memory_bytes"] if facts["accelerators"] else None
    have, where = (host, "memory") if device is None or contender.deepspeed else (device, "the accelerator")
    if have is not None and weight_bytes * _HEADROOM > have:
        return f"its weights need {weight_bytes * _HEADROOM / 2**30:.1f} GiB, {where} has {have / 2**30:.1f}"
    return None


def weight_bytes(folder: Path) -> int | None:
    """Bytes of a checkpoint's safetensors files; None where it is not a local folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None


def layers_of(folder: Path) -> int | None:
    """Layers of a local checkpoint; None where its config.json does not say."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config.get("num_hidden_layers") or config.get("text_config", {}).get("num_hidden_layers")


def alternating(contenders: list[Contender], rounds: int) -> list[tuple[int, Contender]]:
    """The order of the runs: every contender once a round, each round beginning with another one."""
    order = []
    for number in range(rounds):
        start = number % len(contenders)
        order += [(number, contender) for contender in [*contenders[start:], *contenders[:start]]]
    return order


Note = Callable[[str], None]
