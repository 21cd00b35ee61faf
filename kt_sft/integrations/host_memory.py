"""Adapters on experts in host memory, by `lora_memory: host`: what their training cannot be combined with.

The model then has parameters on two types of devices, which torch's own optimizers and gradient clipping handle one
after the other. What flattens or exchanges parameters, or has kernels for one type only, does not.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from kt_sft.config import ConfigError, KTConfig, launched_processes, local_rank_and_size

#: Of the Trainer's `optim`: those that take parameters on two types of devices.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")

#: LLaMA-Factory's own optimizers, whose code has not been made for that.
_EXCLUDED = ("use_adam_mini", "use_muon")

logger = logging.getLogger("kt_sft")

_WAY_OUT = "set lora_memory: accelerator, with a lower lora_rank or fewer targets if it does not fit"


def check_parallel(config: KTConfig) -> None:
    """Refuses host memory in a process that trains with others, or under DeepSpeed.

    Raises:
        ConfigError: It does.
    """
    from transformers.integrations.deepspeed import deepspeed_config

    if config.lora_memory != "host":
        return
    processes = launched_processes()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = max(processes, torch.distributed.get_world_size())
    if processes > 1:
        raise ConfigError(
            f"kt_sft: lora_memory 'host' is for one process, and this run has {processes}: DDP cannot exchange the "
            f"gradients of parameters on two types of devices; start one process, or {_WAY_OUT}"
        )
    if deepspeed_config() is not None:
        raise ConfigError(f"kt_sft: lora_memory 'host' cannot be combined with DeepSpeed; leave it out, or {_WAY_OUT}")


def check_training(config: KTConfig, training_args: Any, finetuning_args: Any) -> None:
    """Refuses a recipe whose training cannot have adapters in host memory, before anything is loaded.

    Args:
        config: Of the recipe.
        training_args: As LLaMA-Factory has parsed them.
        finetuning_args: Likewise.

    Raises:
        ConfigError: It trains in several processes or replicas, under DeepSpeed, or with an optimizer of one device.
    """
    if config.lora_memory != "host" or not training_args.do_train:
        return
    check_parallel(config)
    if training_args.deepspeed or training_args.deepspeed_plugin:
        raise ConfigError(f"kt_sft: lora_memory 'host' cannot be combined with DeepSpeed; leave it out, or {_WAY_OUT}")
    if training_args.n_gpu > 1:
        raise ConfigError(
            f"kt_sft: lora_memory 'host' is for one accelerator, and the Trainer would copy the model to "
            f"{training_args.n_gpu}; make one visible (CUDA_VISIBLE_DEVICES), or {_WAY_OUT}"
        )
    optimizer = str(getattr(training_args.optim, "value", training_args.optim))
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"kt_sft: lora_memory 'host' needs an optimizer that takes parameters on two types of devices, which optim "
            f"{optimizer} does not; use one of {', '.join(OPTIMIZERS)}"
        )
    for name in _EXCLUDED:
        if getattr(finetuning_args, name, False):
            raise ConfigError(
                f"kt_sft: lora_memory 'host' cannot be combined with {name}; leave it out and use one of "
                f"{', '.join(OPTIMIZERS)} as optim"
            )


def require_memory(parameters: int, trained: bool) -> None:
    """Checks that adapters on experts which lie in host memory fit there, before they are made.

    Args:
        parameters: How many they have. Each takes 4 bytes, and 2 for the engine's copy.
        trained: Whether each has a gradient, 4 bytes more. What optimizers keep differs: AdamW, which takes 8, is
            named in the log.

    Raises:
        NotEnoughMemoryError: They do not fit.
    """
    from kt_sft.loading.memory import readable, require_bytes  # not for processes that only import PEFT

    if not parameters:
        return
    what = f"adapters on experts with {parameters / 1e6:.1f} million parameters"
    need = parameters * (10 if trained else 6)
    require_bytes(need, f"{what}{' and their gradients' if trained else ''}", local_rank_and_size()[1])
    if trained:
        logger.info(
            "%s in host memory: %s with gradients, AdamW's state and the engine's copies",
            what,
            readable(need + 8 * parameters),
        )
