"""`kt-sft migrate`: every form of recipe that the KTransformers backend has had, and what is no such recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from llamafactory.hparams import get_infer_args, get_train_args
from llamafactory.hparams.model_args import KTransformersArguments
from typer.testing import CliRunner

from kt_sft.cli.app import app
from kt_sft.cli.migrate_keys import KEYS, MigrateError, is_backend_key
from kt_sft.cli.migrate_recipe import Migration
from kt_sft.cli.migrate_recipe import migrate as rewrite
from kt_sft.config import KTConfig

runner = CliRunner()

TRAIN = """\
### model
model_name_or_path: some/model

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity  # and others
template: qwen3
cutoff_len: 512

### output
output_dir: saves/out
overwrite_output_dir: true
report_to: none

### train
per_device_train_batch_size: 1
learning_rate: 1.0e-4
bf16: true
resume_from_checkpoint: null

### ktransformers
"""
SERVE = """\
model_name_or_path: some/model
template: deepseek
"""
ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
mixed_precision: bf16
"""


@dataclasses.dataclass(frozen=True)
class Form:
    """A recipe as one version's documentation would have it, and what it must become."""

    recipe: str
    settings: dict[str, Any]
    dropped: set[str]
    accelerate: str = ""


FORMS = {
    # LLaMA-Factory 0.9.4 and the guides of its time
    "0.9.4 train": Form(
        TRAIN
        + "use_kt: true # use KTransformers as LoRA sft backend\n"
        + "kt_optimize_rule: rules/DeepSeek-V3-Chat-sft-amx.yaml\ncpu_infer: 32\nchunk_size: 8192\n",
        {"expert_format": "bf16", "num_threads": 32},
        {"kt_optimize_rule", "chunk_size"},
    ),
    "0.9.4 serve": Form(
        SERVE
        + "infer_backend: ktransformers  # choices: [huggingface, vllm, sglang, ktransformers]\n"
        + "use_kt: true\nkt_optimize_rule: rules/a.yaml\ncpu_infer: 16\nchunk_size: 8192\nmode: normal\n"
        + "kt_maxlen: 4096\nkt_use_cuda_graph: false\nkt_mode: normal\nkt_force_think: false\n",
        {"expert_format": "bf16", "num_threads": 16},
        {"kt_optimize_rule", "chunk_size", "mode", "kt_maxlen", "kt_use_cuda_graph", "kt_mode", "kt_force_think"},
    ),
    # 0.9.5: top-level keys here, the block in the Accelerate file
    "0.9.5 bf16": Form(
        TRAIN + "use_kt: true\n# Pair with accelerate/fsdp2_kt_bf16.yaml for BF16 checkpoints.\n",
        {"expert_format": "bf16", "num_threads": 96, "lora_experts": True},
        {"f.yaml: kt_config.kt_tp_enabled", "f.yaml: kt_config.kt_threadpool_count"},
        ACCELERATE
        + "kt_config:\n  enabled: true\n  kt_backend: AMXBF16\n  kt_num_threads: 96\n  kt_tp_enabled: true\n"
        + "  kt_threadpool_count: 2\n  lora_rank: 8\n",
    ),
    "0.9.5 int8": Form(
        TRAIN + "use_kt: true\nkt_weight_path: /weights/int8\n",
        {"expert_format": "int8", "num_threads": 60},
        {"kt_weight_path", "f.yaml: kt_config.kt_max_cache_depth", "f.yaml: kt_config.kt_share_backward_bb"},
        ACCELERATE
        + "kt_config:\n  kt_backend: AMXINT8_SkipLoRA\n  kt_num_threads: 60\n  kt_max_cache_depth: 2\n"
        + "  kt_share_backward_bb: true\n",
    ),
    "0.9.5 without its Accelerate file": Form(
        TRAIN
        + "use_kt: true\nkt_weight_path: /weights/int8\nkt_expert_checkpoint_path: /bf16\nkt_use_lora_experts: true\n"
        + "kt_lora_expert_num: 2\nkt_lora_expert_intermediate_size: 1024\n",
        {"expert_format": "int8", "lora_experts": True},
        {
            *("kt_weight_path", "kt_expert_checkpoint_path", "kt_use_lora_experts", "kt_lora_expert_num"),
            "kt_lora_expert_intermediate_size",
        },
    ),
    # after 0.9.5: the recipe owns everything
    "newest bf16": Form(
        TRAIN
        + "use_kt: true\nkt_cpu_activation: retain\nkt_config:\n  kt_expert_weight_format: bf16\n"
        + "  kt_backend: AMXBF16\n  kt_num_threads: 64  # physical cores\n  kt_num_gpu_experts: 0\n"
        + "  kt_model_max_length: 2176  # Includes the dummy-image tokens.\n# Accelerate files hold FSDP only.\n",
        {"expert_format": "bf16", "num_threads": 64, "activation_policy": "retain", "lora_experts": True},
        {"kt_config.kt_num_gpu_experts", "kt_config.kt_model_max_length"},
    ),
    "newest int8": Form(
        TRAIN
        + "use_kt: true\nkt_weight_path: /int8\nkt_non_expert_weight_path: /rest\nkt_config:\n"
        + "  kt_expert_weight_format: int8\n  kt_backend: auto\n  kt_weight_lifecycle: persistent\n"
        + "  kt_activation_policy: {cpu: recompute, gpu: recompute}\n  kt_lora_rank: 8\n  kt_train_mode: lora\n",
        {"expert_format": "int8", "activation_policy": "recompute", "lora_experts": True},
        {"kt_weight_path", "kt_non_expert_weight_path", "kt_config.kt_weight_lifecycle"},
    ),
    "newest fp8": Form(
        TRAIN + "use_kt: true\nkt_config: {kt_backend: auto, kt_expert_weight_format: fp8}\n",
        {"expert_format": "fp8", "lora_experts": True},
        set(),
    ),
    "newest int4": Form(
        TRAIN + "use_kt: true\nkt_weight_path: /int4\nkt_config:\n  kt_backend: AMXINT4\n",
        {"expert_format": "int4", "lora_experts": True},
        {"kt_weight_path"},
    ),
    "newest mxfp4": Form(
        TRAIN.replace("lora_target: all", "lora_target: self_attn.q_a_proj,mlp.shared_experts.gate_up")
        + "use_kt: true\nkt_config:\n  kt_expert_weight_format: mxfp4\n  kt_force_fused_expert_lora: true\n"
        + "  kt_skip_expert_loading: true\n",
        {"expert_format": "mxfp4", "lora_experts": True},
        {"kt_config.kt_skip_expert_loading"},
    ),
    "newest serve": Form(
        SERVE + "use_kt: true\nkt_config:\n  kt_backend: INT8\n",
        {"expert_format": "int8"},
        set(),
    ),
    "block as JSON": Form(
        TRAIN + 'use_kt: true\nkt_config: \'{"kt_backend": "AMXINT8", "kt_share_cache_pool": true}\'\n',
        {"expert_format": "int8", "lora_experts": True},
        {"kt_config.kt_share_cache_pool"},
    ),
}


def run(form: Form, folder: Path) -> Migration:
    (folder / "old.yaml").write_text(form.recipe)
    if form.accelerate:
        (folder / "f.yaml").write_text(form.accelerate)
    return rewrite(folder / "old.yaml", folder / "f.yaml" if form.accelerate else None)


def migrated(extra: str, folder: Path, base: str = TRAIN) -> Migration:
    return run(Form(base + extra, {}, set()), folder)


@pytest.mark.parametrize("name", FORMS)
class TestForms:
    def test_settings_and_what_is_left_out(self, name: str, tmp_path: Path) -> None:
        migration = run(FORMS[name], tmp_path)
        assert migration.settings == FORMS[name].settings
        assert {place for place, _, _ in migration.dropped} == FORMS[name].dropped
        assert all(reason for _, _, reason in migration.dropped)

    def test_kt_sft_and_llamafactory_accept_the_result(self, name: str, tmp_path: Path) -> None:
        recipe = yaml.safe_load(run(FORMS[name], tmp_path).text)
        assert KTConfig.from_dict(recipe["kt_sft"]).to_dict().items() >= FORMS[name].settings.items()
        assert not [key for key in recipe if is_backend_key(key)]
        if recipe.get("do_train"):
            parsed = get_train_args(recipe | {"output_dir": str(tmp_path / "out"), "use_cpu": True})
        else:
            parsed = get_infer_args(recipe)
        model_args = parsed[0]
        assert model_args.kt_sft == FORMS[name].settings
        assert model_args.infer_backend == "huggingface"

    def test_all_other_lines_stay(self, name: str, tmp_path: Path) -> None:
        form = FORMS[name]
        base = TRAIN if form.recipe.startswith("###") else SERVE
        kept = [line for line in base.splitlines() if line not in ("### ktransformers", "lora_target: all")]
        new = iter(run(form, tmp_path).text.splitlines())
        assert all(line in new for line in kept)  # the iterator moves on: in this order


def test_every_key_of_the_installed_llamafactory_is_known() -> None:
    assert {field.name for field in dataclasses.fields(KTransformersArguments)} <= set(KEYS)


class TestText:
    def test_the_block_takes_the_old_keys_place_with_their_comments(self, tmp_path: Path) -> None:
        text = run(FORMS["newest bf16"], tmp_path).text
        assert text.endswith(
            "### routed experts: kt_sft\nkt_sft:\n  expert_format: bf16\n  num_threads: 64  # physical cores\n"
            "  activation_policy: retain\n  lora_experts: true\n# Accelerate files hold FSDP only.\n"
        )

    def test_lines_that_follow_a_block_stay(self, tmp_path: Path) -> None:
        text = migrated(
            "use_kt: true\nkt_config:\n  kt_backend: INT8\n  # inner\n\n\n### eval\n# later: 1\nval_size: 0.1\n",
            tmp_path,
        ).text
        assert text.endswith("  lora_experts: true\n\n\n### eval\n# later: 1\nval_size: 0.1\n")
        assert "# inner" not in text

    def test_line_ends_of_windows_stay(self, tmp_path: Path) -> None:
        (tmp_path / "old.yaml").write_bytes((TRAIN + "use_kt: true").replace("\n", "\r\n").encode())
        text = rewrite(tmp_path / "old.yaml").text
        assert text.count("\n") == text.count("\r\n") > 20

    def test_a_recipe_in_json(self, tmp_path: Path) -> None:
        text = run(Form('{"model_name_or_path": "m", "use_kt": true, "learning_rate": 1e-4}', {}, set()), tmp_path).text
        assert text == "model_name_or_path: m\nkt_sft:\n  expert_format: bf16\nlearning_rate: 1e-4\n"

    def test_anchors_that_reach_into_removed_lines_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(MigrateError, match="line by line"):
            migrated("use_kt: true\nkt_config:\n  kt_weight_path: &path /weights\nexport_dir: *path\n", tmp_path)


class TestOwnKeysOfTheRecipe:
    def test_lora_settings_move_up(self, tmp_path: Path) -> None:
        text = migrated("use_kt: true\nkt_config:\n  kt_lora_alpha: 32\n  kt_lora_dropout: 0.05\n", tmp_path).text
        recipe = yaml.safe_load(text)
        assert (recipe["lora_rank"], recipe["lora_alpha"], recipe["lora_dropout"]) == (8, 32, 0.05)

    def test_kept_activations_of_the_accelerator_are_its_own_switch(self, tmp_path: Path) -> None:
        text = migrated("use_kt: true\nkt_config:\n  kt_activation_policy: {cpu: retain, gpu: retain}\n", tmp_path).text
        assert yaml.safe_load(text)["disable_gradient_checkpointing"] is True

    def test_fsdp_of_the_recipe_is_left_out(self, tmp_path: Path) -> None:
        migration = migrated("use_kt: true\nfsdp: full_shard auto_wrap\n", tmp_path)
        assert "fsdp" not in yaml.safe_load(migration.text)
        assert "fsdp" in {place for place, _, _ in migration.dropped}

    def test_attention_alone_gets_no_lora_on_experts(self, tmp_path: Path) -> None:
        migration = migrated("use_kt: true\n", tmp_path, TRAIN.replace("target: all", "target: q_proj,v_proj"))
        assert "lora_experts" not in migration.settings
        assert any("names no experts" in note for note in migration.notes)


NOT_A_RECIPE = {
    "no YAML": ("model: [1,\n", "is not YAML"),
    "several documents": ("a: 1\n---\nb: 2\n", "is not YAML"),
    "a list": ("- use_kt\n", "is no recipe"),
    "nothing": ("", "is no recipe"),
    "an ordinary recipe": (TRAIN, "neither use_kt nor any kt_ key"),
    "switched off": (TRAIN + "use_kt: false\nkt_weight_path: /w\n", "does not use KTransformers"),
    "never switched on": (TRAIN + "kt_config: {}\n", "has kt_config without `use_kt: true`"),
    "migrated before": (TRAIN + "use_kt: true\nkt_sft: {}\n", "has a kt_sft block already"),
    "an Accelerate file": (ACCELERATE + "kt_config: {kt_backend: INT8}\n", "give the recipe, and this file with"),
    "a key twice": (TRAIN + "use_kt: true\nstage: dpo\n", "stage stands twice, again in line 29"),
}


@pytest.mark.parametrize("name", NOT_A_RECIPE)
def test_what_is_no_recipe_is_told(name: str, tmp_path: Path) -> None:
    text, message = NOT_A_RECIPE[name]
    with pytest.raises(MigrateError) as failure:
        run(Form(text, {}, set()), tmp_path)
    assert message in str(failure.value)
    assert "old.yaml" in str(failure.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("kt_numthreads: 8\n", "kt_numthreads is no key of the KTransformers backend; did you mean kt_num_threads?"),
        ("kt_config: {zz: 1}\n", "kt_config.zz is no key of the KTransformers backend; the keys are use_kt, "),
        ("kt_config: 5\n", "kt_config must be a block of settings, got 5"),
        ("kt_config: '{'\n", "kt_config is no JSON object"),
        ("kt_config: {enabled: false}\n", "kt_config.enabled is false and contradicts use_kt: true"),
        ("kt_config: {kt_num_threads: 0}\n", "kt_config.kt_num_threads must be a whole number from 1 to 1024, got 0"),
        ("cpu_infer: 5000\n", "cpu_infer must be a whole number from 1 to 1024, got 5000"),
        ("kt_config: {kt_num_threads: true}\n", "must be a whole number from 1 to 1024, got True"),
        ("kt_config: {kt_num_gpu_experts: -1}\n", "kt_num_gpu_experts must be a whole number of at least 0, got -1"),
        ("kt_config: {kt_tp_enabled: 1}\n", "kt_config.kt_tp_enabled must be true or false, got 1"),
        ("kt_config: {kt_lora_dropout: -0.1}\n", "kt_lora_dropout must be a number of at least 0, got -0.1"),
        ("kt_weight_path: 5\n", "kt_weight_path must be text, got 5"),
        ("kt_cpu_activation: keep\n", "kt_cpu_activation must be one of retain, recompute, got 'keep'"),
        ("kt_config: {kt_activation_policy: {cpu: retain}}\n", "must be a block with the keys cpu and gpu"),
        ("kt_config: {kt_activation_policy: {cpu: a, gpu: retain}}\n", "kt_activation_policy.cpu must be one of"),
        ("kt_config: {kt_backend: AMXINT2}\n", "kt_backend 'AMXINT2' is none of KTransformers'"),
        ("kt_config: {kt_backend: auto_SkipLoRA}\n", "kt_backend 'auto_SkipLoRA' is none of"),
        (
            "kt_config: {kt_backend: AMXINT4, kt_expert_weight_format: int8}\n",
            "kt_config.kt_backend: AMXINT4 contradicts kt_config.kt_expert_weight_format: int8; keep one",
        ),
        (
            "kt_weight_path: a\nkt_config: {kt_weight_path: b}\n",
            "kt_weight_path: a contradicts kt_config.kt_weight_path",
        ),
        ("cpu_infer: 4\nkt_config: {kt_num_threads: 8}\n", "kt_num_threads: 8 contradicts cpu_infer: 4; keep one"),
        (
            "kt_cpu_activation: retain\nkt_config: {kt_activation_policy: {cpu: recompute, gpu: recompute}}\n",
            "kt_cpu_activation: retain contradicts kt_config.kt_activation_policy.cpu: recompute",
        ),
        (
            "disable_gradient_checkpointing: true\nkt_config: {kt_activation_policy: {cpu: retain, gpu: recompute}}\n",
            "kt_activation_policy.gpu: recompute contradicts disable_gradient_checkpointing: True",
        ),
        ("kt_config: {kt_lora_rank: 16}\n", "kt_config.kt_lora_rank: 16 contradicts lora_rank: 8; keep one"),
        (
            "kt_config: {kt_backend: AMXINT8_SkipLoRA, kt_force_fused_expert_lora: true}\n",
            "kt_force_fused_expert_lora: True contradicts kt_config.kt_backend: AMXINT8_SkipLoRA",
        ),
        ("kt_config: {kt_train_mode: hybrid}\n", "kt_config.kt_train_mode: hybrid has no counterpart"),
        ("kt_config: {kt_full_weight_grad: true}\n", "kt_full_weight_grad: true has no counterpart"),
        ("use_dora: true\n", "use_dora cannot be combined with kt_sft; remove use_dora"),
    ],
)
def test_what_cannot_be_is_one_sentence(extra: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(MigrateError) as failure:
        migrated("use_kt: true\n" + extra, tmp_path)
    assert message in str(failure.value)


def test_full_tuning_has_no_counterpart(tmp_path: Path) -> None:
    with pytest.raises(MigrateError, match="finetuning_type: full has no counterpart"):
        migrated("use_kt: true\n", tmp_path, TRAIN.replace("type: lora", "type: full"))


class TestCommand:
    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        path = tmp_path / "old.yaml"
        path.write_text(FORMS["newest int8"].recipe)
        return path

    def test_the_recipe_goes_to_standard_output_and_the_report_beside_it(self, old: Path) -> None:
        result = runner.invoke(app, ["migrate", str(old)])
        assert result.exit_code == 0, result.output
        assert yaml.safe_load(result.stdout)["kt_sft"] == FORMS["newest int8"].settings
        assert "kt_weight_path: /int8  (kt_sft reads the experts from model_name_or_path" in result.stderr

    def test_a_file_is_overwritten_by_force_only(self, old: Path) -> None:
        new = old.with_name("new.yaml")
        assert runner.invoke(app, ["migrate", str(old), "-o", str(new)]).exit_code == 0
        first = new.read_text()
        new.write_text("mine")
        refused = runner.invoke(app, ["migrate", str(old), "-o", str(new)])
        assert refused.exit_code == 2
        assert "new.yaml exists; name another file, or give --force" in refused.stderr
        assert new.read_text() == "mine"
        assert runner.invoke(app, ["migrate", str(old), "-o", str(new), "--force"]).exit_code == 0
        assert new.read_text() == first

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.yaml"], "nowhere.yaml cannot be read"),
            (["old.yaml", "-o", "nowhere/new.yaml"], "nowhere does not exist"),
            (["old.yaml", "-o", ".", "--force"], ". exists; name another file"),
            (["old.yaml", "--accelerate", "old.yaml"], "old.yaml is no Accelerate file"),
            (["old.yaml", "--accelerate", "plain.yaml"], "plain.yaml is no Accelerate file"),
        ],
    )
    def test_bad_files_are_one_sentence(
        self, arguments: list[str], message: str, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(old.parent)
        (old.parent / "plain.yaml").write_text("a: 1\n")
        result = runner.invoke(app, ["migrate", *arguments])
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("kt-sft migrate: ")
        assert message in result.stderr
