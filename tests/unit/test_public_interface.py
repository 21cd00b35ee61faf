"""The public interface, line by line: what is here stays as it is from the first release on.

Where numbers count, they are compared with float64 on `dequantized()`, within the bound of tests/numerics/reference.py.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import kt_sft
from kt_sft.config import AVAILABLE_FORMATS, TIERS
from kt_sft.engine.engine import available_tiers
from tests.numerics.reference import LayerResult, moe_layer

E, H, I, T, K = 6, 72, 40, 30, 2
ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu2", "swiglu_oai"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"

formats = pytest.mark.parametrize("expert_format", AVAILABLE_FORMATS)


@dataclasses.dataclass
class Layer:
    """A layer's weights and what it is called with, random; the weights' sizes keep activations near 1."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    biases: dict[str, torch.Tensor]
    hidden_states: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    dy: torch.Tensor

    def check(self, experts: kt_sft.CpuExperts, activation: str) -> None:
        """Compares output and gradients of `experts` with float64."""
        x, w = self.hidden_states.clone().requires_grad_(), self.top_k_weights.clone().requires_grad_()
        y = experts(x, self.top_k_index, w)
        y.backward(self.dy)
        gate_up, down = experts.dequantized()
        expected: LayerResult = moe_layer(
            self.hidden_states,
            self.top_k_index,
            self.top_k_weights,
            self.dy,
            gate_up,
            down,
            activation,
            tier=kt_sft.system_info()["tier"],
            expert_format=experts.config.stored_format,
            **self.biases,
        )
        for bounded, actual in ((expected.y, y), (expected.dx, x.grad), (expected.dw, w.grad)):
            assert bounded.excess(actual) <= 1


def make_layer(*, gated: bool = True, biased: bool = False, dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(0)
    rows = 2 * I if gated else I
    biases = {"gate_up_bias": torch.randn(E, rows), "down_bias": torch.randn(E, H)} if biased else {}
    return Layer(
        torch.randn(E, rows, H) / H**0.5,
        torch.randn(E, H, I) / I**0.5,
        biases,
        torch.randn(T, H).to(dtype),
        torch.randint(0, E, (T, K)),
        torch.rand(T, K),
        torch.randn(T, H).to(dtype),
    )


def assert_stored(stored: torch.Tensor, weights: torch.Tensor, expert_format: str) -> None:
    """What is stored is `weights` in that format."""
    assert stored.dtype == torch.float32
    assert stored.shape == weights.shape
    if expert_format == "bf16":
        assert torch.equal(stored, weights.bfloat16().float())
    else:  # a quarter is as far off as one value can be in the coarsest format, mxfp4; unrelated weights are 1.4 off
        assert (stored - weights.float()).norm() <= 0.25 * weights.float().norm()


class TestFromPretrained:
    """`from_pretrained(path, quantization_config=kt_sft.KTConfig(expert_format=...))`."""

    @pytest.mark.parametrize("expert_format", ["auto", *AVAILABLE_FORMATS])
    def test_a_model_with_its_experts_on_the_engine(self, expert_format: str, tiny_moe: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            tiny_moe, quantization_config=kt_sft.KTConfig(expert_format=expert_format)
        )

        plain = AutoModelForCausalLM.from_pretrained(tiny_moe)
        for layer, plain_layer in zip(model.model.layers, plain.model.layers, strict=True):
            experts, source = layer.mlp.experts, plain_layer.mlp.experts
            assert isinstance(experts, kt_sft.CpuExperts)
            stored_as = "bf16" if expert_format == "auto" else expert_format  # "auto": what the checkpoint holds
            gate_up, down = experts.dequantized()
            assert_stored(gate_up, source.gate_up_proj.detach(), stored_as)
            assert_stored(down, source.down_proj.detach(), stored_as)
        embedded = model.get_input_embeddings()(torch.arange(12).reshape(1, 12)).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.float().square().mean().backward()
        assert embedded.grad.isfinite().all()
        assert embedded.grad.any()

    def test_dequantized_is_the_same_whatever_the_source_layout(self, tmp_path: Path) -> None:
        """gpt-oss' weights are transposed, gate and up interleaved, and biased."""
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "num_local_experts": 4, "vocab_size": 96}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        plain = GptOssForCausalLM(GptOssConfig(**sizes, **heads, rope_parameters=rope)).bfloat16()
        source = plain.model.layers[0].mlp.experts
        for bias in (source.gate_up_proj_bias, source.down_proj_bias):
            torch.nn.init.normal_(bias)
        plain.save_pretrained(tmp_path)

        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kt_sft.KTConfig())

        gate_up, down = model.model.layers[0].mlp.experts.dequantized()
        gate, up = source.gate_up_proj[..., 0::2], source.gate_up_proj[..., 1::2]
        assert torch.equal(gate_up, torch.cat([gate, up], dim=-1).transpose(1, 2).float())
        assert torch.equal(down, source.down_proj.transpose(1, 2).float())


class TestOneLayer:
    """`kt_sft.CpuExperts.from_weights(...)`, without a model."""

    @formats
    def test_forward_and_backward(self, expert_format: str) -> None:
        layer = make_layer()
        experts = kt_sft.CpuExperts.from_weights(
            layer.gate_up_proj,
            layer.down_proj,
            config=kt_sft.KTConfig(expert_format=expert_format),
            activation="silu",
        )
        layer.check(experts, "silu")
        gate_up, down = experts.dequantized()
        assert_stored(gate_up, layer.gate_up_proj, expert_format)
        assert_stored(down, layer.down_proj, expert_format)

    def test_without_a_config_it_is_bf16_and_silu(self) -> None:
        layer = make_layer()
        experts = kt_sft.CpuExperts.from_weights(layer.gate_up_proj, layer.down_proj)
        layer.check(experts, "silu")
        assert_stored(experts.dequantized()[0], layer.gate_up_proj, "bf16")

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations_and_biases(self, activation: str, biased: bool) -> None:
        layer = make_layer(biased=biased)
        experts = kt_sft.CpuExperts.from_weights(
            layer.gate_up_proj, layer.down_proj, activation=activation, **layer.biases
        )
        layer.check(experts, activation)
        assert_stored(experts.dequantized()[0], layer.gate_up_proj, "bf16")  # without biases

    def test_swiglu_oai_is_gpt_oss(self) -> None:
        """clamp 7, alpha 1.702, up + 1."""
        gate, up = torch.tensor([-3.0, 0.5, 9.0, 2.0]), torch.tensor([0.25, -9.0, 1.0, 8.0])
        weights = torch.stack([gate, up]).reshape(1, 2 * 4, 1)  # of a hidden size of 1, fed with 1
        experts = kt_sft.CpuExperts.from_weights(weights, torch.ones(1, 1, 4), activation="swiglu_oai")
        y = experts(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        expected = (gate * torch.sigmoid(1.702 * gate) * (up + 1)).sum()
        # Four values that add up to 32 in size, each rounded to BF16 once.
        assert abs(y.item() - expected.item()) <= 32 * 2**-8

    def test_another_activation_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="activation must be silu, gelu, gelu_pytorch_tanh, relu2 or swiglu_oai"):
            kt_sft.CpuExperts.from_weights(torch.zeros(1, 4, 3), torch.zeros(1, 3, 2), activation="tanh")

    @formats
    @pytest.mark.parametrize("activation", ["silu", "relu2"])
    def test_ungated_experts_pass_one_matrix(self, activation: str, expert_format: str) -> None:
        layer = make_layer(gated=False, biased=True)
        config = kt_sft.KTConfig(expert_format=expert_format)
        experts = kt_sft.CpuExperts.from_weights(
            layer.gate_up_proj, layer.down_proj, config, activation, **layer.biases
        )
        layer.check(experts, activation)
        assert experts.dequantized()[0].shape == (E, I, H)

    @formats
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_sizes_and_float_dtypes(self, dtype: torch.dtype, expert_format: str) -> None:
        torch.manual_seed(0)
        for experts, hidden, intermediate in ((1, 1, 1), (3, 5, 3), (2, 131, 67)):
            gate_up = torch.randn(experts, 2 * intermediate, hidden).to(dtype)
            down = torch.randn(experts, hidden, intermediate).to(dtype)
            config = kt_sft.KTConfig(expert_format=expert_format)
            stored = kt_sft.CpuExperts.from_weights(gate_up, down, config).dequantized()
            assert_stored(stored[0], gate_up, expert_format)
            assert_stored(stored[1], down, expert_format)


class TestCalls:
    """`y = experts(hidden_states, top_k_index, top_k_weights)`."""

    @pytest.fixture
    def experts(self) -> kt_sft.CpuExperts:
        layer = make_layer()
        return kt_sft.CpuExperts.from_weights(layer.gate_up_proj, layer.down_proj)

    @pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_results_have_their_inputs_dtypes(
        self, dtype: torch.dtype, weights_dtype: torch.dtype, experts: kt_sft.CpuExperts
    ) -> None:
        layer = make_layer(dtype=dtype)
        x, w = layer.hidden_states.requires_grad_(), layer.top_k_weights.to(weights_dtype).requires_grad_()
        y = experts(x, layer.top_k_index, w)
        y.backward(layer.dy)
        assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)
        assert (x.grad.dtype, w.grad.dtype) == (dtype, weights_dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_inputs_of_every_dtype_are_exact(self, dtype: torch.dtype, experts: kt_sft.CpuExperts) -> None:
        make_layer(dtype=dtype).check(experts, "silu")

    def test_int32_and_int64_indices_are_the_same(self, experts: kt_sft.CpuExperts) -> None:
        layer = make_layer()
        x, idx, w = layer.hidden_states, layer.top_k_index, layer.top_k_weights
        assert torch.equal(experts(x, idx.int(), w), experts(x, idx, w))

    def test_strides_do_not_matter(self, experts: kt_sft.CpuExperts) -> None:
        layer = make_layer()
        x, idx, w = layer.hidden_states, layer.top_k_index, layer.top_k_weights
        strided = experts(x.T.contiguous().T, idx.T.contiguous().T, w.T.contiguous().T)
        assert torch.equal(strided, experts(x, idx, w))


class TestKTConfig:
    def test_the_fields_and_their_defaults(self) -> None:
        config = kt_sft.KTConfig()
        defaults = {
            "expert_format": "auto",
            "group_size": None,
            "zero_point": False,
            "compute": "bf16",
            "num_threads": None,
            "activation_policy": "retain",
            "lora_experts": False,
        }
        assert {name: getattr(config, name) for name in defaults} == defaults
        assert defaults.keys() <= {field.name for field in dataclasses.fields(config)}

    def test_a_recipes_block_holds_the_same_fields(self) -> None:
        assert kt_sft.KTConfig.from_dict({}) == kt_sft.KTConfig()
        config = kt_sft.KTConfig(num_threads=2, activation_policy="recompute")
        assert kt_sft.KTConfig.from_dict(config.to_dict()) == config

    @pytest.mark.parametrize("expert_format", ["bf16", "int8", "int4", "nf4", "fp8", "mxfp4"])
    def test_every_format_is_a_setting_and_in_the_engine(self, expert_format: str) -> None:
        assert kt_sft.KTConfig(expert_format=expert_format).expert_format == expert_format
        assert expert_format in kt_sft.system_info()["formats"]

    def test_unknown_fields_are_errors(self) -> None:
        with pytest.raises(TypeError, match="expert_fromat"):
            kt_sft.KTConfig(expert_fromat="bf16")
        with pytest.raises(kt_sft.ConfigError, match="unknown setting 'expert_fromat'"):
            kt_sft.KTConfig.from_dict({"expert_fromat": "bf16"})

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("expert_format", "int3"),
            ("expert_format", None),
            ("group_size", -1),
            ("group_size", "32"),
            ("zero_point", "yes"),
            ("compute", "fp16"),
            ("num_threads", 0),
            ("num_threads", 1.5),
            ("num_threads", True),
            ("activation_policy", "keep"),
            ("lora_experts", 1),
        ],
    )
    def test_ill_typed_fields_are_errors(self, field: str, value: Any) -> None:
        with pytest.raises(kt_sft.ConfigError, match=f"kt_sft: {field} must be"):
            kt_sft.KTConfig(**{field: value})


class TestFacts:
    """`kt_sft.system_info()` and `KT_SFT_ISA`."""

    def test_system_info_is_a_plain_dict(self) -> None:
        info = kt_sft.system_info()
        assert type(info) is dict
        assert info["tier"] in info["tiers"]
        assert set(info["tiers"]) <= {"portable", "avx2", "avx512", "avx512_bf16", "amx"}
        assert info["threads"] >= 1
        assert info["numa_nodes"] >= 1
        assert info["peak_gflops"] > 0
        assert info["read_bandwidth_gbs"] > 0
        assert 0 < info["memory_available_bytes"] <= info["memory_total_bytes"]

    @staticmethod
    def tier_under(isa: str) -> subprocess.CompletedProcess[str]:
        """What a process of its own says about its tier with `KT_SFT_ISA` set."""
        return subprocess.run(
            [sys.executable, "-c", "import kt_sft; print(kt_sft.system_info()['tier'])"],
            env=os.environ | {"KT_SFT_ISA": isa},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
    def test_isa_lowers_the_tier_and_says_so_where_it_cannot(self, isa: str) -> None:
        run = self.tier_under(isa)
        at_most = [tier for tier in available_tiers() if TIERS.index(tier) <= TIERS.index(isa)]
        assert run.stdout.strip() == at_most[-1], run.stderr
        above = TIERS.index(isa) > TIERS.index(available_tiers()[-1])
        assert (f"KT_SFT_ISA={isa} is above what this machine offers" in run.stderr) == above

    def test_another_name_is_an_error(self) -> None:
        run = self.tier_under("sse4")
        assert run.returncode != 0
        assert "KT_SFT_ISA='sse4' is no instruction tier; use one of portable, avx2, avx512" in run.stderr


def test_the_quickstart_runs_as_it_stands_without_an_accelerator() -> None:
    """That it does run is tests/e2e's; here is what people and programs read from it."""
    recipe = yaml.safe_load(QUICKSTART.read_text())
    assert recipe["use_cpu"] is True
    path = Path(recipe["model_name_or_path"])  # at top level, and local: made by `make quickstart`
    assert path.parts[0] == "saves"
    assert not path.is_absolute()
    kt_sft.KTConfig.from_dict(recipe["kt_sft"])
