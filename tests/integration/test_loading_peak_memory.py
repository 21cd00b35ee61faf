"""Loading a checkpoint of more than 1 GB takes hardly more memory than what stays resident."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import write_large
from commands import run_command

# Runs in its own process: the peak is that of the process, taken back to the present before loading.
MEASURE = """
import json, sys
import torch, kt_sft
from transformers import AutoModelForCausalLM
import transformers.models.qwen3_moe.modeling_qwen3_moe
import kt_sft.loading.quantizer

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(field))

kt_sft.system_info()
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=kt_sft.KTConfig(), dtype=torch.bfloat16)
peak = status('VmHWM') - before
experts = sum(m.store.nbytes for m in model.modules() if isinstance(m, kt_sft.CpuExperts))
dense = sum(p.nbytes for p in model.parameters())
print('RESULT', json.dumps({'peak': peak, 'experts': experts, 'dense': dense}))
"""


def test_peak_memory_of_loading(tmp_path: Path) -> None:
    write_large(tmp_path, intermediate=1408)

    result = run_command(["python", "-c", MEASURE, str(tmp_path)])

    assert result.returncode == 0, result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    measured = json.loads(line[7:])
    assert measured["experts"] >= 1 << 30
    resident = measured["experts"] + measured["dense"]
    assert measured["peak"] < 1.2 * resident, measured
