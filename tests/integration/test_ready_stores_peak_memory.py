"""Quantising takes memory for a few matrices, whatever the size of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import write_large
from commands import run_command
from safetensors.torch import load_file

#: What threads hold: 4 MiB of a file each, one expert as it is stored, a band of rows in FP32, a piece to be hashed.
BUFFERS = 2 * (24 << 20)

# Runs in its own process: the peak is that of the process, taken back to the present before quantising.
MEASURE = """
import json, sys
from pathlib import Path
from kt_sft.config import KTConfig
from kt_sft.loading.ready.planning import plan_store
from kt_sft.loading.ready.writing import StoreWriter

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(field))

plan = plan_store(Path(sys.argv[1]), KTConfig(expert_format="int4"))
writer = StoreWriter(plan, Path(sys.argv[2]), threads=2)
writer.prepare()
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
writer.write()
print('RESULT', json.dumps({'peak': status('VmHWM') - before, 'source': plan.source_bytes, 'store': plan.nbytes}))
"""


def test_peak_memory(tmp_path: Path) -> None:
    write_large(tmp_path / "source", intermediate=256)

    result = run_command(["python", "-c", MEASURE, str(tmp_path / "source"), str(tmp_path / "store")])

    assert result.returncode == 0, result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    measured = json.loads(line[7:])
    files = (tmp_path / "source").glob("*.safetensors")
    largest = max(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert measured["source"] > 3 * (2 * largest + BUFFERS)  # or the bound would say nothing
    assert measured["peak"] < 2 * largest + BUFFERS, measured
