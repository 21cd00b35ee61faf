"""From a recipe for LLaMA-Factory's KTransformers backend to one for kt_sft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from kt_sft.cli.migrate_keys import (
    BLOCK,
    BLOCK_ALIASES,
    KEYS,
    MigrateError,
    backend_format,
    check_value,
    is_backend_key,
)
from kt_sft.cli.migrate_text import RecipeText, read_mapping
from kt_sft.config import ConfigError, KTConfig

#: Names in `lora_target` that reach the experts of a KTransformers run.
_EXPERT_TARGETS = {"all", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "experts"}
#: Settings of the recipe itself that belong to how that backend is launched.
_FSDP = ("fsdp", "fsdp_config")
#: What an Accelerate file has and a recipe has not.
_ACCELERATE = {"compute_environment", "distributed_type"}


@dataclasses.dataclass(frozen=True)
class Given:
    """A key of the old recipe."""

    value: Any
    #: What to call it in a message.
    place: str
    #: The comment behind it.
    comment: str = ""


@dataclasses.dataclass(frozen=True)
class Migration:
    """A rewritten recipe, and what there is to say about it."""

    text: str
    #: The `kt_sft:` block.
    settings: dict[str, Any]
    #: New key -> where it comes from.
    translated: dict[str, str]
    #: (key as it stood, value, why it has no counterpart).
    dropped: list[tuple[str, Any, str]]
    notes: list[str]


def migrate(recipe: Path, accelerate: Path | None = None) -> Migration:
    """Rewrites a recipe.

    Args:
        recipe: One with `use_kt: true`, or `infer_backend: ktransformers`.
        accelerate: The Accelerate file of the same run. That of LLaMA-Factory 0.9.5 holds the `kt_config:` block.

    Raises:
        MigrateError: A file is no such recipe, a key is unknown, a value is out of range, or two contradict each other.
    """
    text, old = read_mapping(recipe, "recipe")
    _check_recipe(recipe, old)
    source = RecipeText(text)
    given = _collect(old, source, accelerate)
    return _Translation(old, given, source, accelerate is not None).result()


def _check_recipe(path: Path, old: dict[str, Any]) -> None:
    if "kt_sft" in old:
        raise MigrateError(f"{path} has a kt_sft block already")
    if _ACCELERATE & set(old):
        raise MigrateError(f"{path} is an Accelerate file; give the recipe, and this file with --accelerate")
    backend_keys = [name for name in old if is_backend_key(name)]
    serves = old.get("infer_backend") == "ktransformers"
    if not serves and not [name for name in backend_keys if name.startswith(("use_kt", "kt_"))]:
        raise MigrateError(f"{path} is no recipe for KTransformers: it has neither use_kt nor any kt_ key")
    if old.get("use_kt") is False or ("use_kt" not in old and not serves):
        raise MigrateError(
            f"{path} does not use KTransformers: it has {', '.join(backend_keys)} without `use_kt: true`; "
            "set that, or remove these keys and the recipe is an ordinary one"
        )


def _collect(old: dict[str, Any], source: RecipeText, accelerate: Path | None) -> dict[str, Given]:
    """Every key of the backend that is set, wherever it stands."""
    given: dict[str, Given] = {}
    for name, value in old.items():
        if is_backend_key(name) and name != BLOCK:
            _add(given, name, Given(value, name, source.comment(name)))
    for name, value in _block(old.get(BLOCK), BLOCK).items():
        _add(given, name, Given(value, f"{BLOCK}.{name}", source.comment(BLOCK, name)))
    if accelerate is not None:
        _, content = read_mapping(accelerate, "Accelerate file")
        if not _ACCELERATE & set(content):
            raise MigrateError(f"{accelerate} is no Accelerate file: it has none of {', '.join(sorted(_ACCELERATE))}")
        for name, value in _block(content.get(BLOCK), f"{accelerate.name}: {BLOCK}").items():
            _add(given, name, Given(value, f"{accelerate.name}: {BLOCK}.{name}"))
    return given


def _block(block: Any, place: str) -> dict[str, Any]:
    if isinstance(block, str):
        try:
            block = json.loads(block)
        except json.JSONDecodeError as error:
            raise MigrateError(f"{place} is no JSON object: {error}") from error
    if block is None:
        return {}
    if not isinstance(block, dict):
        raise MigrateError(f"{place} must be a block of settings, got {block!r}")
    return block


def _add(given: dict[str, Given], name: str, new: Given) -> None:
    if name == "enabled":  # of the block: the backend's own switch
        if new.value is False:
            raise MigrateError(f"{new.place} is false and contradicts use_kt: true; keep one")
        return
    name = BLOCK_ALIASES.get(name, name)
    check_value(name, new.value, new.place)
    if new.value is None:
        return
    known = given.setdefault(name, new)
    if known.value != new.value:
        raise _contradiction(known, new)


def _contradiction(one: Given, other: Given) -> MigrateError:
    return MigrateError(f"{one.place}: {one.value} contradicts {other.place}: {other.value}; keep one")


class _Translation:
    """One recipe on its way; every method looks at one matter."""

    def __init__(self, old: dict[str, Any], given: dict[str, Given], source: RecipeText, has_accelerate: bool) -> None:
        self._old = old
        self._given = given
        self._source = source
        self._has_accelerate = has_accelerate
        self._settings: dict[str, Any] = {}
        self._comments: dict[str, str] = {}
        self._top: dict[str, Any] = {}
        self._replaced: dict[str, str] = {}
        self._translated: dict[str, str] = {}
        self._dropped: list[tuple[str, Any, str]] = []
        self._notes: list[str] = []

    def result(self) -> Migration:
        self._check_tuning()
        self._expert_format()
        self._threads()
        self._activations()
        self._lora_settings()
        self._lora_experts()
        self._inference()
        for given, key in ((self._given[name], KEYS[name]) for name in KEYS if name in self._given):
            if key.reason is not None:
                idle = " (which is what it asks for)" if given.value == key.idle and key.idle is not None else ""
                self._dropped.append((given.place, given.value, key.reason + idle))
        for name in _FSDP:
            if self._old.get(name):
                self._dropped.append((name, self._old[name], "kt_sft runs on one process or with DDP"))
        self._remarks()
        return self._written()

    def _take(self, setting: str, value: Any, *sources: Given) -> None:
        self._settings[setting] = value
        self._comments[setting] = next((source.comment for source in sources if source.comment), "")
        self._translated[f"kt_sft.{setting}"] = " and ".join(f"{given.place}: {given.value}" for given in sources)

    def _check_tuning(self) -> None:
        tuning, mode = self._old.get("finetuning_type", "lora"), self._given.get("kt_train_mode")
        if mode is not None and mode.value != "lora":
            raise MigrateError(f"{mode.place}: {mode.value} has no counterpart: kt_sft trains LoRA, on frozen experts")
        full = self._given.get("kt_full_weight_grad")
        if full is not None and full.value:
            raise MigrateError(f"{full.place}: true has no counterpart: kt_sft trains LoRA, on frozen experts")
        if self._old.get("do_train") and tuning != "lora":
            raise MigrateError(f"finetuning_type: {tuning} has no counterpart: kt_sft trains LoRA, on frozen experts")
        from kt_sft.integrations.llamafactory import exclusions

        others = {name: value for name, value in self._old.items() if name != "use_kt"}
        if excluded := exclusions(others):
            raise MigrateError("; ".join(excluded))

    def _expert_format(self) -> None:
        backend, stored = self._given.get("kt_backend"), self._given.get("kt_expert_weight_format")
        from_backend = backend_format(backend.value)[0] if backend else None
        if backend and stored and from_backend not in (None, stored.value):
            raise _contradiction(backend, stored)
        sources = [given for given in (stored, backend) if given]
        if stored or from_backend:
            self._take("expert_format", stored.value if stored else from_backend, *sources)
            return
        weights = self._given.get("kt_weight_path")
        if weights and not self._has_accelerate:
            self._take("expert_format", "int8", weights)
            self._notes.append(
                f"{weights.place} holds converted experts, INT8 as a rule, and nothing here says otherwise; if the "
                "Accelerate file of the run has a kt_backend, give that file with --accelerate"
            )
            return
        self._take("expert_format", "bf16", *sources)
        rule = self._given.get("kt_optimize_rule")
        self._translated["kt_sft.expert_format"] = "the backend's default"
        if rule:
            self._notes.append(
                f"the experts' format stood in {rule.value}; expert_format says bf16: if that file has another, set it"
            )

    def _threads(self) -> None:
        new, older = self._given.get("kt_num_threads"), self._given.get("cpu_infer")
        if new and older and new.value != older.value:
            raise _contradiction(new, older)
        if given := new or older:
            self._take("num_threads", given.value, given)

    def _activations(self) -> None:
        policy, given = self._given.get("kt_activation_policy"), self._given.get("kt_cpu_activation")
        if policy:
            cpu = dataclasses.replace(policy, value=policy.value["cpu"], place=f"{policy.place}.cpu")
            if given and given.value != cpu.value:
                raise _contradiction(given, cpu)
            given = given or cpu
            self._checkpointing(dataclasses.replace(policy, value=policy.value["gpu"], place=f"{policy.place}.gpu"))
        if given:
            self._take("activation_policy", given.value, given)

    def _checkpointing(self, gpu: Given) -> None:
        """What the accelerator keeps is LLaMA-Factory's own setting."""
        name = "disable_gradient_checkpointing"
        disabled = self._old.get(name)
        if disabled is not None and disabled != (gpu.value == "retain"):
            raise _contradiction(gpu, Given(disabled, name))
        if disabled is None and gpu.value == "retain":
            self._top[name] = True
            self._translated[name] = f"{gpu.place}: {gpu.value}"

    def _lora_settings(self) -> None:
        """Rank, alpha and dropout are the recipe's own keys."""
        for name in ("lora_rank", "lora_alpha", "lora_dropout"):
            if not (given := self._given.get(f"kt_{name}")):
                continue
            own = self._old.get(name)
            if own is not None and own != given.value:
                raise _contradiction(given, Given(own, name))
            if own is None:
                self._top[name] = given.value
            self._translated[name] = f"{given.place}: {given.value}"

    def _lora_experts(self) -> None:
        backend, skip = self._given.get("kt_backend"), self._given.get("kt_skip_expert_lora_adaptation")
        fused = self._given.get("kt_force_fused_expert_lora")
        skips = [given for given in (skip,) if given and given.value]
        if backend and backend_format(backend.value)[1]:
            skips.append(backend)
        if fused and fused.value and skips:
            raise _contradiction(fused, skips[0])
        if not self._old.get("do_train") or skips or "kt_optimize_rule" in self._given:
            return  # serving attaches what an adapter has; the oldest backend had no LoRA on experts
        target = self._old.get("lora_target", "all")
        target = ",".join(target) if isinstance(target, list) else str(target)
        names = {name.strip().rpartition(".")[2] for name in target.split(",")}
        if fused and fused.value:
            self._take("lora_experts", True, fused)
        elif names & _EXPERT_TARGETS:
            self._take("lora_experts", True, Given(target, "lora_target"))
        else:
            self._notes.append(f"lora_target: {target} names no experts, so they get no LoRA (lora_experts: true)")

    def _inference(self) -> None:
        if self._old.get("infer_backend") == "ktransformers":
            self._replaced["infer_backend"] = "huggingface"
            self._translated["infer_backend"] = "infer_backend: ktransformers"

    def _remarks(self) -> None:
        if self._old.get("do_train"):
            self._notes.append(
                "run it with `llamafactory-cli train`, or torchrun for several GPUs; an Accelerate file with FSDP is "
                "refused"
            )
        if self._old.get("adapter_name_or_path"):
            self._notes.append(
                "adapter_name_or_path must name an ordinary PEFT adapter; one with a tensor for each expert is turned "
                "by `kt-sft convert-adapter --to peft`"
            )
        if self._old.get("trust_remote_code"):
            self._notes.append(
                "trust_remote_code: true loads a repository's own model code where there is any (DeepSeek), whose "
                "experts kt_sft cannot take over: remove it for models that transformers has a class for"
            )

    def _written(self) -> Migration:
        try:
            KTConfig.from_dict(self._settings)
        except ConfigError as error:
            raise MigrateError(f"the settings do not fit each other: {error}") from error
        removed = [name for name in self._old if is_backend_key(name) or name in _FSDP]
        lines = [_line(name, value, "") for name, value in self._top.items()]
        lines += [
            "kt_sft:",
            *(_line(name, value, self._comments[name], "  ") for name, value in self._settings.items()),
        ]
        text = self._source.rewrite(removed, self._replaced, lines)
        expected = {name: value for name, value in self._old.items() if name not in removed}
        expected |= self._replaced | self._top | {"kt_sft": self._settings}
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError:
            found = None
        if found != expected:
            raise MigrateError(
                "the recipe's YAML cannot be changed line by line (anchors, or several keys on a line?); write each "
                "top-level key on a line of its own"
            )
        return Migration(text, self._settings, self._translated, self._dropped, self._notes)


def _line(name: str, value: Any, comment: str, indent: str = "") -> str:
    text = yaml.safe_dump({name: value}, default_flow_style=False).rstrip()
    return f"{indent}{text}{f'  {comment}' if comment else ''}"
