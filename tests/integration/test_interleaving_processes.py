"""Micro-batches interleaved under DDP, in two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run_command

# Each rank trains three times with the same data, and writes down whether it got the same bits.
RANK = """
import json, os, sys
from pathlib import Path
import torch
from trainers import load, losses, same, trainer_of

model, out = Path(sys.argv[1]), Path(sys.argv[2])
rank = int(os.environ["RANK"])
lora = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

def train(interleave, accumulation, batch, **settings):
    settings |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    trainer, recorder = trainer_of(
        load(model, interleave, lora), out / f"rank{rank}", accumulation, batch=batch, replicas=2, **settings
    )
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert any(True for _ in trainer.model_wrapped.buffers())  # which DDP sends around in forward
    return losses(trainer), recorder.steps, bool(trainer._kt_sft_interleaving)

found = [train(interleave, 2, 2) for interleave in (False, True, rank == 0)]
halves = [train(interleave, 1, 2, learning_rate=0.0) for interleave in (False, rank == 0)]
facts = {
    "interleaved": [active for *_, active in found],
    "same losses": [each[0] == found[0][0] for each in found],
    "same gradients": [same(each[1], found[0][1]) for each in found],
    "first": [float(steps[0]["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"][0, 0])
              for _, steps, _ in found + halves],
    "losses of halves": [each[0] for each in halves],
}
(out / f"rank{rank}.json").write_text(json.dumps(facts))
"""


def test_two_processes_get_the_same_bits(tiny_moe: Path, tmp_path: Path) -> None:
    """Also where only one of them interleaves: what they exchange, and when, is the same."""
    (tmp_path / "rank.py").write_text(RANK)
    launch = ["torchrun", "--standalone", "--nproc_per_node", "2", str(tmp_path / "rank.py")]
    path = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
    result = run_command([*launch, str(tiny_moe), str(tmp_path)], environment={"PYTHONPATH": path})

    assert result.returncode == 0, result.stdout
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [facts["interleaved"] for facts in ranks] == [[False, True, True], [False, True, False]]
    for facts in ranks:
        assert facts["same losses"] == facts["same gradients"] == [True] * 3
        # Weights stay as they are, so all that differs is the order of sums and, by it, where an expert rounds to BF16:
        # a mean over tokens of such errors of either sign, less than one unit roundoff of the loss.
        plain, halves = facts["losses of halves"]
        assert halves == pytest.approx(plain, rel=2.0**-9)
    assert ranks[0]["first"] == ranks[1]["first"]  # gradients were exchanged
