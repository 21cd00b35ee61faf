"""Saving a model with merged adapters takes hardly any memory beside the model."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import write_large
from commands import run_command

SHARD = 20_000_000

# Runs in its own process. While experts are copied, they are mapped from their source, in pages that the kernel can
# drop at any time: what counts is memory of our own, looked at after each shard. While they are merged, the peak does.
MEASURE = """
import json, sys
import torch, kt_sft
import transformers.modeling_utils as modeling
import kt_sft.loading.quantizer as quantizer
from kt_sft.engine.low_rank import LowRank
from transformers import AutoModelForCausalLM

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(field))

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=kt_sft.KTConfig(), dtype=torch.bfloat16)
experts = [m for m in model.modules() if isinstance(m, kt_sft.CpuExperts)]
for layer in experts:
    E, H, I, R = layer.num_experts, layer.hidden_dim, layer.intermediate_dim, 8
    shapes = ((E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R))
    layer.merged = LowRank(*(torch.randn(shape) for shape in shapes))

copying, merging = [], []
save, merge = modeling.safe_save_file, quantizer.merge_saved

def save_shard(*args, **kwargs):
    save(*args, **kwargs)
    copying.append(status('RssAnon') - before)

def merge_measured(*args):
    resident = status('VmRSS')
    open('/proc/self/clear_refs', 'w').write('5')
    merge(*args)
    merging.append(status('VmHWM') - resident)

modeling.safe_save_file, quantizer.merge_saved = save_shard, merge_measured
before = status('RssAnon')
model.save_pretrained(sys.argv[2], max_shard_size=int(sys.argv[3]))
size = sum(layer.store.nbytes for layer in experts)
print('RESULT', json.dumps({'copying': copying, 'merging': merging, 'experts': size}))
"""


def test_peak_memory_of_exporting(tmp_path: Path) -> None:
    write_large(tmp_path / "source", intermediate=256)

    result = run_command(["python", "-c", MEASURE, str(tmp_path / "source"), str(tmp_path / "target"), str(SHARD)])

    assert result.returncode == 0, result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    measured = json.loads(line[7:])
    assert measured["experts"] >= 200_000_000
    assert len(measured["copying"]) > 10
    assert max(measured["copying"] + measured["merging"]) < 0.1 * measured["experts"], measured
