"""Training with LoRA on experts takes no more memory the longer it goes on, and hardly more while it saves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from checkpoints import write_large
from commands import run_command

STEPS, SAVES = 500, 20
#: By then every kind of step and save has been seen, and allocators have what they keep.
SETTLED = 100

# Runs in its own process, once for both tests. Pages that are only mapped from files (the model that is read from disk)
# are not counted: the kernel can drop them at any time.
MEASURE = """
import json, sys
import torch, kt_sft
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments

large, folder, steps, saves = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(field))

def adapted(path, rank):
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=kt_sft.KTConfig(num_threads=1))
    experts = ['experts.gate_up_proj', 'experts.down_proj']
    settings = LoraConfig(r=rank, lora_dropout=0.1, target_modules=['q_proj'], target_parameters=experts)
    return get_peft_model(model, settings)

class Watched(Trainer):
    def __init__(self, model, name, **arguments):
        arguments = TrainingArguments(
            f'{folder}/{name}', per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=100, disable_tqdm=True,
            report_to='none', use_cpu=True, **arguments)
        data = [{key: (torch.arange(16) + n) % 64 for key in ('input_ids', 'labels')} for n in range(64)]
        super().__init__(model, arguments, train_dataset=data)
        self.after_steps, self.saving = [], []

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.after_steps.append(status('RssAnon'))
        return loss

    def _save_checkpoint(self, *args, **kwargs):
        before = status('VmRSS')
        open('/proc/self/clear_refs', 'w').write('5')
        super()._save_checkpoint(*args, **kwargs)
        self.saving.append(status('VmHWM') - before)

def trained(model):
    return sum(value.numel() for value in model.parameters() if value.requires_grad)

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=64, hidden_size=64, intermediate_size=8, moe_intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=16, num_experts_per_tok=2)
Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(f'{folder}/small')
model = adapted(f'{folder}/small', 32)
small = Watched(model, 'long', max_steps=steps, save_steps=steps // saves, save_total_limit=2)
small.train()
found = {'after_steps': small.after_steps, 'saves': len(small.saving), 'adapter': 4 * trained(model)}

model = adapted(large, 8)
short = Watched(model, 'short', max_steps=2, save_steps=1, gradient_checkpointing=True)
short.train()
size = sum(m.store.nbytes for m in model.modules() if isinstance(m, kt_sft.CpuExperts))
found |= {'saving': short.saving, 'model': size, 'large_adapter': 4 * trained(model)}
print('RESULT', json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("memory")
    write_large(folder / "large", intermediate=256)
    arguments = [str(folder / "large"), str(folder), str(STEPS), str(SAVES)]
    result = run_command(["python", "-c", MEASURE, *arguments])
    assert result.returncode == 0, result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line[7:])


def test_steps_and_saves_leave_nothing_behind(measured: dict[str, Any]) -> None:
    """What could be left behind is at least as large as an adapter: its copies, gradients, or what a save collects.

    Left behind once a save that is an adapter for each; half of this is allowed, for what allocators and Python keep.
    Once a step it would be fifty times as much as is allowed.
    """
    memory = measured["after_steps"]
    assert len(memory) == STEPS
    assert measured["saves"] == SAVES
    saves = SAVES * (STEPS - SETTLED) // STEPS
    grown = min(memory[-20:]) - min(memory[SETTLED : SETTLED + 20])
    assert grown < saves * measured["adapter"] / 2, (grown, memory[::25])


def test_saving_takes_hardly_any_memory_beside_the_model(measured: dict[str, Any]) -> None:
    assert measured["model"] >= 200_000_000
    assert len(measured["saving"]) == 2
    assert max(measured["saving"]) < 0.1 * measured["model"], measured["saving"]
