"""Says once, after loading, what runs where."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kt_sft.config import KTConfig, local_rank_and_size
from kt_sft.engine.info import system_info
from kt_sft.engine.store import LayerStore
from kt_sft.loading.mapping import ModulePlan
from kt_sft.loading.memory import readable

logger = logging.getLogger("kt_sft")


def announce(config: KTConfig, plans: Sequence[ModulePlan], stores: Sequence[LayerStore], sharers: int) -> None:
    """Logs, on the first process of this machine, the tier, threads, layers, format and memory of the experts.

    Args:
        config: Settings.
        plans: Of all layers.
        stores: Theirs.
        sharers: Processes that hold the stores' memory together.
    """
    if local_rank_and_size()[0] != 0:
        return
    info = system_info(config.num_threads)
    experts = sum(plan.layout.num_experts for plan in plans)
    size = readable(sum({id(store): store.nbytes for store in stores}.values()))
    held = f"{size} resident"
    if any(store.mapped for store in stores):
        held = f"{size} mapped from the checkpoint's files, which must stay as they are; values are not checked"
    elif sharers > 1:
        held += f" once for all {sharers} processes of this machine"
    logger.info(
        "routed experts on the CPU: %d experts in %d layers, %s, %s; tier %s, %s threads",
        experts,
        len(plans),
        " and ".join(sorted({store.expert_format for store in stores})),
        held,
        info["tier"],
        info["threads"],
    )
    errors = sorted({store.relative_error for store in stores})
    if errors and errors[-1] > 0:
        for plan, store in zip(plans, stores, strict=True):
            logger.debug("%s: relative error of the stored weights %.2e", plan.name, store.relative_error)
        logger.info("relative error of the stored weights: %.2e to %.2e by layer", errors[0], errors[-1])
    converted = sorted({read.view.entry.dtype_name for plan in plans for read in plan.reads} - {"BF16"})
    if converted and any(store.expert_format == "bf16" for store in stores):
        logger.warning("the checkpoint's %s experts are stored rounded to BF16", " and ".join(converted))


def announce_untouched(class_name: str) -> None:
    """Says that kt_sft has nothing to do for a model without routed experts."""
    if local_rank_and_size()[0] == 0:
        logger.warning("%s has no routed experts; kt_sft leaves it as it is", class_name)
