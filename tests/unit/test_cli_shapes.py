"""Sizes of MoE layers, by name and from config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from kt_sft.cli.shapes import LayerShape, ShapeError, shape_of


def config(folder: Path, **sizes: object) -> str:
    (folder / "config.json").write_text(json.dumps(sizes))
    return str(folder)


def test_a_known_model_by_any_case() -> None:
    assert shape_of("Qwen3-30B-A3B") == LayerShape("qwen3-30b-a3b", 2048, 768, 128, 8)


def test_names_of_sizes_that_families_use(tmp_path: Path) -> None:
    qwen = config(
        tmp_path, hidden_size=64, intermediate_size=99, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2
    )
    assert shape_of(qwen) == LayerShape(tmp_path.name, 64, 32, 8, 2)
    deepseek = config(tmp_path, hidden_size=64, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2)
    assert shape_of(deepseek) == LayerShape(tmp_path.name, 64, 32, 8, 2)
    mixtral = config(tmp_path, hidden_size=64, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2)
    assert shape_of(str(Path(mixtral) / "config.json")) == LayerShape(tmp_path.name, 64, 32, 8, 2)


def test_the_language_model_within_one_that_sees(tmp_path: Path) -> None:
    inner = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    assert shape_of(config(tmp_path, hidden_size=7, text_config=inner)).hidden == 64


@pytest.mark.parametrize(
    "architecture", [transformers.Qwen3MoeConfig, transformers.GptOssConfig, transformers.MixtralConfig]
)
def test_configs_as_transformers_writes_them(tmp_path: Path, architecture: type) -> None:
    made = architecture()
    made.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert (shape.hidden, shape.top_k) == (made.hidden_size, made.num_experts_per_tok)
    assert shape.experts == getattr(made, "num_experts", None) or made.num_local_experts


def test_a_model_that_is_not_known() -> None:
    with pytest.raises(ShapeError, match=r"'gpt-9' is neither a known model nor a folder.*qwen3-30b-a3b"):
        shape_of("gpt-9")


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="names no experts size of routed experts; looked for num_experts"):
        shape_of(config(tmp_path, hidden_size=64, intermediate_size=32))


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"text"'])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ShapeError, match=r"config\.json"):
        shape_of(str(tmp_path))


def test_more_experts_per_token_than_there_are() -> None:
    with pytest.raises(ShapeError, match="9 experts per token cannot be chosen among 8"):
        LayerShape("odd", 64, 32, 8, 9)


def test_operations_of_a_pass() -> None:
    # gate, up and down: three products of 64 x 32 for each of 8 experts' 5 rows, a multiplication and an addition each
    assert LayerShape("small", 64, 32, 8, 2).flops(5) == 2 * 3 * 64 * 32 * 8 * 5
