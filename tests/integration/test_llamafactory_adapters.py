"""What a recipe brings with it, adapters and checkpoints to resume from, is looked at before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from kt_sft.config import ConfigError
from kt_sft.integrations.checkpoints import check_complete
from kt_sft.integrations.llamafactory import ABSENT
from kt_sft.loading.errors import CheckpointError

ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SHARED = "base_model.model.model.layers.0.mlp.shared_experts.up_proj.lora_A.weight"
EXPERTS = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
SINGLE = "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight"
REFUSED = r"has weights for single experts .* turn it into PEFT's with `kt-sft convert-adapter`"


def write_adapter(folder: Path, key: str) -> Path:
    folder.mkdir(parents=True)
    save_file({key: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


def write_checkpoint(folder: Path, key: str) -> Path:
    """What the Trainer writes, as far as anything of it is looked at before a model is there."""
    write_adapter(folder, key)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    return folder


def test_an_adapter_of_single_experts_is_refused(parse: Callable[..., Any], tmp_path: Path) -> None:
    attention, shared = write_adapter(tmp_path / "attention", ATTENTION), write_adapter(tmp_path / "shared", SHARED)
    experts, single = write_adapter(tmp_path / "experts", EXPERTS), write_adapter(tmp_path / "single", SINGLE)

    assert parse(kt_sft={}, adapter_name_or_path=f"{attention},{shared},{experts}")[0].kt_sft == {}
    with pytest.raises(ConfigError, match=REFUSED):
        parse(kt_sft={}, adapter_name_or_path=f"{attention},{shared},{single}")


def test_an_adapter_named_twice_is_refused(parse: Callable[..., Any], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", EXPERTS)
    with pytest.raises(ConfigError, match="adapter_name_or_path names an adapter twice"):
        parse(kt_sft={}, adapter_name_or_path=f"{adapter},{adapter}")
    (tmp_path / "link").symlink_to(adapter)
    with pytest.raises(ConfigError, match="adapter_name_or_path names an adapter twice"):
        parse(kt_sft={}, adapter_name_or_path=f"{adapter},{tmp_path / 'link'}")


def test_dropout_on_experts_that_cannot_be_trained_is_refused(parse: Callable[..., Any], tmp_path: Path) -> None:
    """Of the recipe for a new adapter, and of the file beside an adapter that training goes on with."""
    attention, experts = write_adapter(tmp_path / "attention", ATTENTION), write_adapter(tmp_path / "experts", EXPERTS)
    dropped = write_adapter(tmp_path / "dropped", EXPERTS)
    (dropped / "kt_sft_adapter.json").write_text('{"lora_dropout": 0.1}')
    new = {"kt_sft": {"lora_experts": True}, "create_new_adapter": True, "lora_dropout": 0.1}

    parse(**new, adapter_name_or_path=str(attention))
    parse(**new | {"lora_dropout": 0.0}, adapter_name_or_path=str(experts))
    parse(kt_sft={}, adapter_name_or_path=f"{dropped},{experts}")
    parse(kt_sft={}, adapter_name_or_path=str(experts), use_unsloth_gc=True)
    with pytest.raises(ConfigError, match=f"lora_dropout 0.1 on routed experts cannot be trained on top of {experts}"):
        parse(**new, adapter_name_or_path=str(experts))
    with pytest.raises(ConfigError, match=f"cannot be trained on top of {experts}, which is"):
        parse(kt_sft={}, adapter_name_or_path=f"{experts},{dropped}")
    with pytest.raises(ConfigError, match="use_unsloth_gc does not restore them"):
        parse(kt_sft={}, adapter_name_or_path=str(dropped), use_unsloth_gc=True)


def test_training_goes_on_with_an_adapter_that_covers_what_the_recipe_says(
    parse: Callable[..., Any], tmp_path: Path
) -> None:
    attention, experts = write_adapter(tmp_path / "attention", ATTENTION), write_adapter(tmp_path / "experts", EXPERTS)
    block = {"lora_experts": True}

    assert parse(kt_sft=block, adapter_name_or_path=str(experts))[0].kt_sft == block
    assert parse(kt_sft={}, adapter_name_or_path=str(experts))[0].kt_sft == {}
    assert parse(kt_sft=block, adapter_name_or_path=str(attention), create_new_adapter=True)[0].kt_sft == block
    with pytest.raises(ConfigError, match="which has no weights for routed experts; set create_new_adapter: true"):
        parse(kt_sft=block, adapter_name_or_path=str(attention))


def test_the_adapter_is_looked_for_in_adapter_folder(parse: Callable[..., Any], tmp_path: Path) -> None:
    write_adapter(tmp_path / "fine", ATTENTION)
    write_adapter(tmp_path / "experts", SINGLE)

    parse(kt_sft={}, adapter_name_or_path=str(tmp_path), adapter_folder="fine")
    with pytest.raises(ConfigError, match=REFUSED):
        parse(kt_sft={}, adapter_name_or_path=str(tmp_path), adapter_folder="experts")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no adapter_config.json, without which"),
        ('{"peft_type": "LO', "has no usable config, .*adapter_config.json: Unterminated string"),
        ("[]", "it holds no JSON object"),
        ('{"peft_type": "LORA", "r": "8", "lora_alpha": 4}', "no usable rank and alpha: r is '8', lora_alpha is 4"),
        ('{"peft_type": "LORA", "r": true, "lora_alpha": 4}', "r is True"),
        ('{"peft_type": "LORA", "r": 8, "lora_alpha": NaN}', "lora_alpha is nan"),
        (
            '{"peft_type": "LORA", "r": 8, "lora_alpha": 4, "rank_pattern": [1]}',
            r"rank_pattern is \[1\], not an object",
        ),
    ],
)
def test_a_damaged_config_is_refused(
    config: str | None, message: str, parse: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "adapter", EXPERTS)
    (folder / "adapter_config.json").unlink()
    if config is not None:
        (folder / "adapter_config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        parse(kt_sft={}, adapter_name_or_path=str(folder))
    with pytest.raises(ConfigError, match=message):
        parse(kt_sft={"lora_experts": True}, resume_from_checkpoint=str(folder))


def test_a_pickled_adapter_is_refused(parse: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"convert it to adapter_model\.safetensors"):
        parse(kt_sft={}, adapter_name_or_path=str(tmp_path))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache of the hub, offline, with the repositories tiny/attention and tiny/experts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, key in {"attention": ATTENTION, "experts": SINGLE}.items():
        repository = tmp_path / "hub" / f"models--tiny--{name}"
        write_adapter(repository / "snapshots" / "0" / "inner", key)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
    return tmp_path / "hub"


def test_adapters_of_the_hub_are_looked_at_in_its_cache(parse: Callable[..., Any], hub_cache: Path) -> None:
    settings = {"kt_sft": {}, "cache_dir": str(hub_cache), "adapter_folder": "inner"}

    assert parse(**settings, adapter_name_or_path="tiny/attention")[0].kt_sft == {}
    with pytest.raises(ConfigError, match=f"tiny/experts {REFUSED}"):
        parse(**settings, adapter_name_or_path="tiny/experts")
    with pytest.raises(ConfigError, match=r"tiny/missing .* neither a folder with one nor a repository"):
        parse(**settings, adapter_name_or_path="tiny/missing")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"stage": "dpo", "ref_model": "MODEL", "ref_model_adapters": "SINGLE"}, id="reference"),
        pytest.param({"stage": "ppo", "reward_model": "SINGLE"}, id="reward adapter"),
        pytest.param(
            {"stage": "ppo", "reward_model_type": "full", "reward_model": "MODEL", "reward_model_adapters": "SINGLE"},
            id="adapter of a reward model",
        ),
    ],
)
def test_adapters_of_other_models_are_looked_at(
    changes: dict[str, str], parse: Callable[..., Any], tiny_moe: Path, tmp_path: Path
) -> None:
    paths = {"MODEL": str(tiny_moe), "SINGLE": str(write_adapter(tmp_path / "experts", SINGLE))}
    changes = {key: paths.get(value, value) for key, value in changes.items()}

    assert parse(**changes)[0].kt_sft is ABSENT
    with pytest.raises(ConfigError, match=REFUSED):
        parse(kt_sft={}, **changes)


class TestResume:
    """`resume_from_checkpoint`, given or found by LLaMA-Factory in the output folder."""

    def test_a_checkpoint_of_an_adapter_on_attention(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        folder = str(write_checkpoint(tmp_path / "out" / "checkpoint-2", ATTENTION))

        assert parse(kt_sft={}, resume_from_checkpoint=folder)[2].resume_from_checkpoint == folder
        assert parse(kt_sft={}, overwrite_output_dir=False)[2].resume_from_checkpoint == folder
        with pytest.raises(ConfigError, match="to resume from has no weights for routed experts; leave lora_experts"):
            parse(kt_sft={"lora_experts": True}, resume_from_checkpoint=folder)

    @pytest.mark.parametrize(
        "given",
        [{"resume_from_checkpoint": "CHECKPOINT"}, {"resume_from_checkpoint": True}, {"overwrite_output_dir": False}],
        ids=["named", "the last one", "found"],
    )
    def test_an_adapter_on_experts(self, given: dict[str, Any], parse: Callable[..., Any], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "out" / "checkpoint-2", EXPERTS)
        given = {key: str(folder) if value == "CHECKPOINT" else value for key, value in given.items()}

        assert parse(kt_sft={"lora_experts": True}, **given)[0].kt_sft == {"lora_experts": True}
        with pytest.raises(
            ConfigError, match=f"the adapter {folder} has weights for routed experts .* lora_experts: t"
        ):
            parse(kt_sft={}, **given)
        assert parse(**given)[0].kt_sft is ABSENT

    def test_the_second_of_several_adapters(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        write_adapter(tmp_path / "checkpoint" / "default", ATTENTION)
        second = write_adapter(tmp_path / "checkpoint" / "other", EXPERTS)
        with pytest.raises(ConfigError, match=f"the adapter {second} has weights for routed experts"):
            parse(kt_sft={}, resume_from_checkpoint=str(tmp_path / "checkpoint"))

    @pytest.mark.parametrize("shard", ["5GB", "40KB"])
    def test_a_whole_model(self, shard: str, parse: Callable[..., Any], tiny_moe: Path, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint"
        AutoModelForCausalLM.from_pretrained(tiny_moe).save_pretrained(folder, max_shard_size=shard)
        message = r"checkpoint is a whole model with its routed experts \(model\.layers\.0\.mlp\.experts\."
        with pytest.raises(ConfigError, match=message):
            parse(kt_sft={}, resume_from_checkpoint=str(folder))
        assert parse(resume_from_checkpoint=str(folder))[0].kt_sft is ABSENT

    def test_a_pickle(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ConfigError, match="is a whole model in a pickle; resume from a checkpoint of a LoRA run"):
            parse(kt_sft={}, resume_from_checkpoint=str(tmp_path))

    def test_a_damaged_index(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(ConfigError, match=r"index\.json is no readable index of tensors"):
            parse(kt_sft={}, resume_from_checkpoint=str(tmp_path))

    @pytest.mark.parametrize(("name", "defect"), [("", "trainer_state.json, which is"), ("missing", "no such folder")])
    def test_what_is_no_checkpoint(self, name: str, defect: str, parse: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"is no complete checkpoint: .*{defect}"):
            parse(kt_sft={}, resume_from_checkpoint=str(tmp_path / name))
        assert parse(resume_from_checkpoint=str(tmp_path / name))[0].kt_sft is ABSENT

    def test_a_run_that_does_not_train_resumes_nothing(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "checkpoint", EXPERTS)
        changes = {"do_train": False, "do_eval": True, "eval_dataset": "sft"}
        assert parse(kt_sft={}, resume_from_checkpoint=str(folder), **changes)[0].kt_sft == {}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


#: What a kill leaves, or a disk that lost the last writes -> what is said of it.
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "state not written": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json, which is writ"),
    "state cut off": (lambda folder: (folder / "trainer_state.json").write_text('{"glo'), "trainer_state.json cannot "),
    "state of something else": (lambda folder: (folder / "trainer_state.json").write_text("[]"), "cannot be read"),
    "no step": (lambda folder: (folder / "trainer_state.json").write_text('{"global_step": null}'), "number of steps"),
    "adapter not written": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors is missing",
    ),
    "optimizer cut off": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut off"),
    "optimizer not written": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "schedule not written": (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "random numbers not written": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "random numbers empty": (lambda folder: (folder / "rng_state.pth").write_bytes(b""), "rng_state.pth is cut off"),
}


class TestDamagedCheckpoint:
    """A run that was killed goes on from the newest complete checkpoint; a damaged one that is named is refused."""

    @pytest.mark.parametrize("given", [{"resume_from_checkpoint": True}, {"overwrite_output_dir": False}])
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_is_skipped_and_named(
        self,
        damage: str,
        given: dict[str, Any],
        parse: Callable[..., Any],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        out = tmp_path / "out"
        for step in (2, 10, 9):
            write_checkpoint(out / f"checkpoint-{step}", ATTENTION)
        change, said = DAMAGE[damage]
        change(out / "checkpoint-10")

        with caplog.at_level("WARNING", logger="kt_sft"):
            resumed = parse(kt_sft={}, **given)[2].resume_from_checkpoint

        assert resumed == str(out / "checkpoint-9")
        (warning,) = (record.getMessage() for record in caplog.records if record.name == "kt_sft")
        assert f"{out / 'checkpoint-10'} (" in warning
        assert said in warning
        assert warning.endswith(f"training resumes from {out / 'checkpoint-9'}")
        without_us = parse(**given)[2].resume_from_checkpoint
        assert without_us is True or (without_us, type(without_us)) == (str(out / "checkpoint-10"), str)

    def test_one_of_a_reward_model_without_its_value_head(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        """LLaMA-Factory takes it out of the model that the Trainer has written, when that has said it is done."""
        recipe = {"kt_sft": {}, "stage": "rm", "dataset": "pair"}
        folder = write_checkpoint(tmp_path / "out" / "checkpoint-10", ATTENTION)
        with pytest.raises(ConfigError, match=r"value_head\.safetensors is missing"):
            parse(**recipe, resume_from_checkpoint=str(folder))
        save_file({"v_head.summary.bias": torch.zeros(1)}, folder / "value_head.safetensors")
        assert parse(**recipe, resume_from_checkpoint=True)[2].resume_from_checkpoint == str(folder)

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_is_refused_where_it_is_named(self, damage: str, parse: Callable[..., Any], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "out" / "checkpoint-10", ATTENTION)
        write_checkpoint(tmp_path / "out" / "checkpoint-9", ATTENTION)
        change, said = DAMAGE[damage]
        change(folder)
        with pytest.raises(ConfigError, match=f"{folder} is no complete checkpoint: .*{said}.*; name another one, or"):
            parse(kt_sft={}, resume_from_checkpoint=str(folder))

    def test_a_named_one_whose_adapter_is_cut_off(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "checkpoint-2", ATTENTION)
        cut(folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=str(folder / "adapter_model.safetensors")):
            parse(kt_sft={}, resume_from_checkpoint=str(folder))

    @pytest.mark.parametrize(
        ("present", "processes", "missing"),
        [
            ({0, 1}, 2, None),
            ({0}, 2, 1),
            ({1}, 2, 0),
            (set(), 2, 0),
            ({0, 2, 3}, 4, 1),
            ({None}, 2, None),  # of a run in one process: random numbers begin anew, as the Trainer says
            ({0, 1}, 1, None),  # of a run in two
            ({0}, 1, 1),
            ({0, 2}, 1, 1),
        ],
    )
    def test_random_numbers_of_every_process(
        self,
        present: set[int | None],
        processes: int,
        missing: int | None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = write_checkpoint(tmp_path / "checkpoint-2", ATTENTION)
        (folder / "rng_state.pth").unlink()
        for rank in present:
            torch.save({}, folder / ("rng_state.pth" if rank is None else f"rng_state_{rank}.pth"))
        monkeypatch.setenv("LOCAL_RANK", str(processes - 1))  # every process must come to the same answer
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        arguments = SimpleNamespace(
            world_size=processes, process_index=processes - 1, save_only_model=False, deepspeed=None
        )
        if missing is None:
            check_complete(str(folder), arguments, "sft")
        else:
            with pytest.raises(ConfigError, match=f"no complete checkpoint: rng_state_{missing}.pth is missing"):
                check_complete(str(folder), arguments, "sft")

    def test_training_starts_anew_where_none_is_complete(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "out" / "checkpoint-2", ATTENTION)
        cut(folder / "adapter_model.safetensors")
        assert parse(kt_sft={}, overwrite_output_dir=False)[2].resume_from_checkpoint is None
        with pytest.raises(ConfigError, match=r"asks for the last checkpoint .* none is complete \(.*checkpoint-2 \("):
            parse(kt_sft={}, resume_from_checkpoint=True)

    def test_a_checkpoint_of_the_model_alone(self, parse: Callable[..., Any], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "out" / "checkpoint-2", ATTENTION)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).unlink()
        given = {"kt_sft": {}, "resume_from_checkpoint": str(folder)}
        assert parse(**given, save_only_model=True)[2].resume_from_checkpoint == str(folder)
        with pytest.raises(ConfigError, match=r"optimizer\.pt is missing"):
            parse(**given)
