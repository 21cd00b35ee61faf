"""Loading a checkpoint of more than 1 GB takes hardly more memory than what stays resident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run_command
from safetensors.torch import save_file

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 8, 16, 1024, 1408

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


@pytest.fixture
def large_checkpoint(tmp_path: Path) -> Path:
    """A Qwen3-MoE checkpoint of about 1.1 GB in shards of one layer, as large models come."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=64,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Qwen3MoeForCausalLM(config).state_dict().items()}
    dense = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items() if ".experts." not in key}
    up = torch.rand(INTERMEDIATE, HIDDEN).bfloat16()
    down = torch.rand(HIDDEN, INTERMEDIATE).bfloat16()
    weight_map = dict.fromkeys(dense, "model-dense.safetensors")
    save_file(dense, tmp_path / "model-dense.safetensors", metadata={"format": "pt"})
    for layer in range(LAYERS):
        tensors = {}
        for expert in range(EXPERTS):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors |= {f"{prefix}.{name}_proj.weight": up.clone() for name in ("gate", "up")}
            tensors[f"{prefix}.down_proj.weight"] = down.clone()
        name = f"model-{layer}.safetensors"
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_peak_memory_of_loading(large_checkpoint: Path) -> None:
    result = run_command(["python", "-c", MEASURE, str(large_checkpoint)])

    assert result.returncode == 0, result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    measured = json.loads(line[7:])
    assert measured["experts"] >= 1 << 30
    resident = measured["experts"] + measured["dense"]
    assert measured["peak"] < 1.2 * resident, measured
