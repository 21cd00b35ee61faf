"""KTConfig: the one owner of every setting, its default and its check, and the only reader of environment variables.

A KTConfig is a transformers quantization config, so it can be handed to ``from_pretrained`` as it is; the ``kt_sft:``
block of a recipe holds the same fields.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "kt_sft"
#: What the config.json of a ready store has: another name, for what to do with a store is not in it.
STORE_METHOD = "kt_sft_store"

#: Instruction tiers, lowest first. `KT_SFT_ISA` takes one of these and can only lower what the CPU offers.
TIERS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

#: What the engine decodes.
AVAILABLE_FORMATS = ("bf16", "int8", "int4", "nf4", "fp8", "mxfp4")
EXPERT_FORMATS = ("auto", *AVAILABLE_FORMATS)
#: The group sizes of formats that have a fixed one; the others take 0 or a power of two from LEAST_GROUP on.
_FIXED_GROUPS = {"fp8": (0, 128), "mxfp4": (32,)}
LEAST_GROUP = 32
MOST_GROUP = 65536

#: Threads of one engine.
MOST_THREADS = 1024

COMPUTE_TYPES = ("bf16", "int8")
#: The formats that compute "int8" multiplies.
INTEGER_FORMATS = ("int8", "int4")
ACTIVATION_POLICIES = ("retain", "recompute")
STORES = ("auto", "resident", "mapped")
LORA_MEMORIES = ("accelerator", "host")
METRICS = ("off", "step", "layers")


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or not possible; the message names it and the way out."""


@dataclasses.dataclass
class KTConfig(QuantizationConfigMixin):
    """Settings of the expert engine; every field is optional.

    Args:
        expert_format: How the routed experts' weights are stored: "auto" (what the checkpoint holds; bf16 in
            ``CpuExperts.from_weights``), "bf16", "int8", "int4", "nf4", "fp8" or "mxfp4".
        group_size: Weights that share a scale along the contraction dimension. None: the format's own default;
            0: one scale per row.
        zero_point: Asymmetric int4.
        compute: What the forward products multiply: "bf16", or "int8" for int8 and int4 experts. The latter rounds
            tokens to 8 bits, with a scale for each token and group of at most 256 columns: faster, but rounded.
            Few tokens for an expert, which wait for memory anyway, and backward are computed as with "bf16".
        store: Where a checkpoint's experts are kept: "resident", in memory of their own; "mapped", in the checkpoint's
            files, of which the system keeps in memory what there is room for; "auto", resident where they fit the
            memory that is available beside all else (in training what is predicted, too), and mapped otherwise. Mapped
            are rows that the engine reads as they lie on disk (docs/settings.md); their values are not checked, and the
            files must stay as they are.
        num_threads: Engine threads. None: the CPUs this process may use, divided among the processes of this machine.
        activation_policy: "retain" keeps the experts' gate and up activations for backward (2·S·I·2 bytes a layer,
            S routed rows, I expert intermediate size), and their forward is not run a second time where layers are
            checkpointed; "recompute" computes them again.
        retained_mb: MiB of host memory that retained activations may take; where it is full the oldest are computed
            again. None: half of what is free when the first are retained.
        lora_experts: Whether new adapters cover the routed experts.
        lora_memory: Where adapters on routed experts lie, with their gradients and optimizer state: "accelerator" (with
            the model's other parameters) or "host", for those that would not fit there.
        overlap_shared_experts: Whether shared experts are computed while the engine computes the routed ones, forward
            and backward. None: where their tokens come from an accelerator; on the CPU both would share its cores.
        interleave_micro_batches: Whether two micro-batches of a step are computed at a time, so that the accelerator
            works on one while the engine computes the experts of the other. None: where there is an accelerator. Where
            it would change more than the order of a sum, as with dropout, it is off, and the log says why.
        await_in_stream: Whether an accelerator that can waits for the experts' results by itself in training, while the
            model's code goes on: the error of a pass that fails shows some layers later, at the latest at the end of
            backward. Otherwise the host waits, and the error shows in the call that failed. None: where there is one
            process; gradients of several are added up before that.
        metrics: What the Trainer logs of the engine's work: "step" (a step's times, share hidden, load, speed, memory),
            "layers" (that, and times and load of every layer), or "off".
        profile: Where to write a Chrome trace of two steps, the engine's work beside the accelerator's; Perfetto and
            chrome://tracing show it. None: none is made.
        check_memory: Whether training is refused, before weights are loaded, where host memory has no room for weights,
            adapters and optimizer. Without it only the weights' room is checked.
        scratch_mb: MiB that one layer's intermediate results take at most; longer batches are worked on in pieces, to
            the same bits. One token is never cut, and engine threads take up to 1 MiB each besides.

    Raises:
        ConfigError: A field is unknown, ill-typed, or asks for something this version does not have.
    """

    expert_format: str = "auto"
    group_size: int | None = None
    zero_point: bool = False
    compute: str = "bf16"
    store: str = "auto"
    num_threads: int | None = None
    activation_policy: str = "retain"
    lora_experts: bool = False
    lora_memory: str = "accelerator"
    retained_mb: int | None = None
    overlap_shared_experts: bool | None = None
    interleave_micro_batches: bool | None = None
    await_in_stream: bool | None = None
    metrics: str = "step"
    profile: str | None = None
    scratch_mb: int = 1024
    check_memory: bool = True
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # upstream types it as its own enum

    def __post_init__(self) -> None:
        self._check_choice("expert_format", EXPERT_FORMATS)
        self._check_choice("compute", COMPUTE_TYPES)
        self._check_choice("store", STORES)
        self._check_choice("activation_policy", ACTIVATION_POLICIES)
        self._check_choice("lora_memory", LORA_MEMORIES)
        self._check_choice("metrics", METRICS)
        self._check_profile()
        self._check_flag("zero_point")
        self._check_flag("lora_experts")
        self._check_flag("overlap_shared_experts")
        self._check_flag("interleave_micro_batches")
        self._check_flag("await_in_stream")
        self._check_flag("check_memory")
        self._check_count("group_size", least=0)
        self._check_count("num_threads", least=1, most=MOST_THREADS)
        self._check_count("retained_mb", least=0, most=1 << 30)
        self._check_count("scratch_mb", least=1, most=1 << 20)
        if self.quant_method != QUANT_METHOD:
            raise ConfigError(f"kt_sft: quant_method is always {QUANT_METHOD!r}, got {self.quant_method!r}")
        self._check_available()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Builds a config from a mapping, for example the ``kt_sft:`` block of a recipe.

        Raises:
            ConfigError: `config_dict` is no mapping, or has a key that is no field.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(
                f"kt_sft: must be a block of settings (`kt_sft: {{}}` for the defaults), got {config_dict!r}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        config_dict = dict(config_dict) | {key: kwargs.pop(key) for key in known if key in kwargs}
        for key in config_dict:
            if key not in known:
                settings = ", ".join(name for name in known if name != "quant_method")
                raise ConfigError(f"kt_sft: unknown setting {key!r}; the settings are {settings}")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, ready for JSON."""
        return dataclasses.asdict(self)

    @property
    def stored_format(self) -> str:
        """The format weights without one of their own are stored in."""
        return "bf16" if self.expert_format == "auto" else self.expert_format

    @property
    def storage(self) -> dict[str, Any]:
        """How weights are stored, as keyword arguments of the engine's stores."""
        return {"expert_format": self.stored_format, "group_size": self.group_size, "zero_point": self.zero_point}

    def check_compute(self, stored_format: str) -> None:
        """Refuses products of integers for experts that are stored in a format without them.

        Raises:
            ConfigError: `compute` asks for them.
        """
        if self.compute == "int8" and stored_format not in INTEGER_FORMATS:
            raise ConfigError(
                f"kt_sft: compute 'int8' needs experts in {' or '.join(INTEGER_FORMATS)}, whose codes are integers; "
                f"set expert_format to one of them, or compute: bf16 for {stored_format} experts"
            )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"kt_sft: {name} must be one of {', '.join(choices)}, got {value!r}")

    def _check_flag(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and getattr(KTConfig, name) is None:  # the default: to be chosen for the user
            return
        if not isinstance(value, bool):
            raise ConfigError(f"kt_sft: {name} must be true or false, got {value!r}")

    def _check_profile(self) -> None:
        if self.profile is None:
            return
        if not isinstance(self.profile, str) or not self.profile.endswith(".json") or os.path.isdir(self.profile):
            raise ConfigError(
                f"kt_sft: profile must be the path of a file to write, ending in .json, got {self.profile!r}"
            )

    def _check_count(self, name: str, least: int, most: int = sys.maxsize) -> None:
        value = getattr(self, name)
        if value is None and getattr(KTConfig, name) is None:  # the default: to be chosen for the user
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"kt_sft: {name} must be a whole number of at least {least}, got {value!r}")
        if value > most:
            raise ConfigError(f"kt_sft: {name} must be at most {most}, got {value}")

    def _check_available(self) -> None:
        if self.expert_format != "auto":
            self.check_compute(self.expert_format)
        if self.zero_point and self.stored_format != "int4":
            raise ConfigError(
                f"kt_sft: zero_point applies to expert_format int4 only; leave it out for {self.stored_format} experts"
            )
        self._check_group()
        if self.lora_experts and self.compute == "int8":
            raise ConfigError(
                "kt_sft: lora_experts cannot be combined with compute 'int8', which rounds what adapters multiply; set "
                "compute: bf16, or leave lora_experts out"
            )

    def _check_group(self) -> None:
        group, name = self.group_size, self.stored_format
        if group is None:
            return
        if name == "bf16":
            raise ConfigError("kt_sft: group_size applies to quantised formats only; leave it out for bf16 experts")
        if name in _FIXED_GROUPS:
            if group not in _FIXED_GROUPS[name]:
                possible = " or ".join(str(size) for size in _FIXED_GROUPS[name])
                raise ConfigError(f"kt_sft: group_size must be {possible} for {name} experts, got {group}")
        elif group != 0 and (group < LEAST_GROUP or group > MOST_GROUP or group & (group - 1)):
            raise ConfigError(
                f"kt_sft: group_size must be 0 (one scale per row) or a power of two from {LEAST_GROUP} to "
                f"{MOST_GROUP}, got {group}"
            )


class StoreOnItsOwn(QuantizationConfigMixin):
    """Stands for a ready store that somebody loads without saying that kt_sft is to run it."""

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuses.

        Raises:
            ConfigError: Always; says what is missing.
        """
        raise ConfigError(
            "kt_sft: this model is a ready store, made by `kt-sft quantize`, which only kt_sft reads; pass "
            "quantization_config=kt_sft.KTConfig() to from_pretrained, or add `kt_sft: {}` to the recipe"
        )


def requested_tier() -> str | None:
    """The tier that `KT_SFT_ISA` asks for, or None.

    Raises:
        ConfigError: The variable holds no tier's name.
    """
    name = os.environ.get("KT_SFT_ISA")
    if not name:
        return None
    if name not in TIERS:
        raise ConfigError(f"KT_SFT_ISA={name!r} is no instruction tier; use one of {', '.join(TIERS)}")
    return name


def local_rank_and_size() -> tuple[int, int]:
    """This process's place among the ones a launcher started on this machine: (rank, number).

    (0, 1) where the launcher does not say both `LOCAL_RANK` and `LOCAL_WORLD_SIZE`.

    Raises:
        ConfigError: One of them is no number, or the rank lies outside the size.
    """
    rank, size = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
    if not rank or not size:
        return 0, 1
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(
            f"LOCAL_RANK={rank!r} and LOCAL_WORLD_SIZE={size!r} do not fit each other; a launcher sets both, "
            "the rank counted from 0"
        )
    return int(rank), int(size)


def local_job() -> tuple[str, ...] | None:
    """What the processes that a launcher started together on this machine have in common, and those of no other do.

    None for a process alone, and where the launcher gives no `MASTER_PORT`, so that processes cannot find each other.

    Raises:
        ConfigError: As `local_rank_and_size`.
    """
    if local_rank_and_size()[1] == 1 or not os.environ.get("MASTER_PORT"):
        return None
    # GROUP_RANK tells two launchers apart that play two machines on one; the count of restarts, a job from its former
    # self.
    names = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return tuple(os.environ.get(name, "") for name in names)


def launched_processes() -> int:
    """How many processes a launcher started for this run, on all machines; 1 where it does not say `WORLD_SIZE`.

    Raises:
        ConfigError: It is no number.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"WORLD_SIZE={size!r} is no number of processes; a launcher sets it")
    return int(size)


def openmp_wait_policy() -> str | None:
    """What `OMP_WAIT_POLICY` asks of torch's OpenMP threads: "active", "passive", or None where it is not set."""
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() or None


def openmp_threads() -> str | None:
    """What `OMP_NUM_THREADS` asks of torch, or None where it is not set."""
    return os.environ.get("OMP_NUM_THREADS", "").strip() or None
