"""What a step without values predicts of memory is what a real one takes, allocator's habits left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import run_command

from kt_sft.cli.compare_model import ModelRequest, write_model
from kt_sft.planning.activations import step_cost
from kt_sft.planning.machine import this_machine
from kt_sft.planning.memory import memory_of
from kt_sft.planning.model import read_model
from kt_sft.planning.setup import setup_of

TOKENS = 256

# One step of what LLaMA-Factory trains, after a shorter one that leaves compiled kernels and threads' memory behind.
STEP = """
import json, sys
import torch, kt_sft
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

recipe = json.load(open(sys.argv[1]))
checkpointing = not recipe['disable_gradient_checkpointing']

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('RssAnon'))

class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    highest = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        Peak.highest = max(Peak.highest, anonymous())
        return result

model = AutoModelForCausalLM.from_pretrained(
    recipe['model_name_or_path'], quantization_config=kt_sft.KTConfig(**recipe['kt_sft']), attn_implementation='sdpa')
if checkpointing:
    model.gradient_checkpointing_enable({'use_reentrant': True})
model = get_peft_model(model, LoraConfig(r=8, target_modules=['q_proj', 'o_proj'], task_type='CAUSAL_LM')).train()
model.config.use_cache = False

@convert_outputs_to_fp32
def forward(**inputs):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        return model(**inputs)

def step(tokens):
    ids = torch.arange(tokens)[None] % 99
    forward(input_ids=ids, labels=ids)['loss'].backward()

step(16)
before = anonymous()
with Peak():
    step(int(sys.argv[2]))
print('RESULT', Peak.highest - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers whose output layer is large, so that intermediate results take most of the memory."""
    folder = tmp_path_factory.mktemp("planned")
    write_model(ModelRequest("qwen3-30b-a3b", 2, 256, 128, 8, 2, vocabulary=32000), folder)
    return folder


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_takes_what_is_predicted(model: Path, tmp_path: Path, checkpointing: bool) -> None:
    recipe: dict[str, Any] = {
        "model_name_or_path": str(model),
        "kt_sft": {"num_threads": 1},
        "stage": "pt",
        "lora_target": "q_proj,o_proj",
        "cutoff_len": TOKENS,
        "per_device_train_batch_size": 1,
        "bf16": True,
        "flash_attn": "sdpa",
        "use_cpu": True,
        "disable_gradient_checkpointing": not checkpointing,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    # Every block of more than a page or two goes back when it is freed: what is left is what is alive.
    environment = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}
    command = ["python", "-c", STEP, str(tmp_path / "recipe.json"), str(TOKENS)]
    result = run_command(command, environment=environment)
    assert result.returncode == 0, result.stdout
    measured = next(int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("RESULT "))

    setup = setup_of(recipe)
    facts = read_model(setup)
    cost = step_cost(facts, setup)
    memory = memory_of(facts, setup, this_machine(1), cost, base=0, is_mapped=False)
    # Without the allocator's part, and without what the shorter step has taken already: gradients and scratch's panels.
    experts = memory.host.activations - int(cost.heap_bytes)
    predicted = int(cost.peak_bytes) + experts + memory.host.buffers

    logits = 4 * TOKENS * 32000
    assert predicted > 3 * logits  # in FP32: as they are, as the loss has them, and one of their gradients
    assert measured == pytest.approx(predicted, rel=0.1)
