"""Experts are recognised by what they are and compute; what cannot be taken is refused by its class's name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from kt_sft.loading.errors import UnsupportedModelError
from kt_sft.loading.layout import ExpertLayout, find_experts

E, H, I = 4, 6, 10


@use_experts_implementation
class Modern(nn.Module):
    """A gated experts class that no version of transformers has."""

    def __init__(self, _config: object, act_fn: object = functional.silu, shape: tuple[int, ...] = (E, 2 * I, H)):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(shape))
        self.down_proj = nn.Parameter(torch.zeros(E, H, I))
        self.act_fn = act_fn


def only(model: nn.Module) -> ExpertLayout:
    (layout,) = find_experts(model).values()
    return layout


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
        ("gelu_new", "gelu_pytorch_tanh"),
        ("relu2", "relu2"),
    ],
)
def test_activation_is_found_by_its_values(name: str, activation: str) -> None:
    model = nn.ModuleDict({"experts": Modern(None, ACT2FN[name])})
    assert only(model) == ExpertLayout("Modern", E, H, I, activation, True, False, False, False)


def test_recognition_works_where_models_are_built() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"experts": Modern(None)})
        assert only(model).activation == "silu"


@pytest.mark.parametrize("name", ["quick_gelu", "relu", "tanh", "gelu_10"])
def test_other_activations_are_refused(name: str) -> None:
    model = nn.ModuleDict({"experts": Modern(None, ACT2FN[name])})
    with pytest.raises(UnsupportedModelError, match="Modern at 'experts' gates its experts in a way"):
        find_experts(model)


class _Gating(Modern):
    alpha, limit, shift = 1.702, 7.0, 1.0

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.shift) * gate * torch.sigmoid(self.alpha * gate)


def test_clamped_swiglu_is_recognised_by_its_values() -> None:
    layout = only(nn.ModuleDict({"experts": _Gating(None)}))
    assert (layout.activation, layout.interleaved) == ("swiglu_oai", True)


@pytest.mark.parametrize(("constant", "value"), [("alpha", 1.7), ("limit", 6.0), ("shift", 0.0)])
def test_clamped_swiglu_with_other_constants_is_refused(
    constant: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Gating, constant, value)
    with pytest.raises(UnsupportedModelError, match="gpt-oss' clamped SwiGLU"):
        find_experts(nn.ModuleDict({"experts": _Gating(None)}))


def test_unexpected_shapes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Modern at 'experts' has parameters"):
        find_experts(nn.ModuleDict({"experts": Modern(None, shape=(E, 3 * I, H))}))


def test_unexpected_parameters_are_refused() -> None:
    experts = Modern(None)
    experts.scale = nn.Parameter(torch.ones(E))
    with pytest.raises(UnsupportedModelError, match="Modern at 'experts' has parameters"):
        find_experts(nn.ModuleDict({"experts": experts}))


def _tiny(config: transformers.PreTrainedConfig, model_class: type[nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.device("meta"):
            return model_class(config)

    return make


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
_SIZES |= {"intermediate_size": 40, "num_key_value_heads": 2}

UNSUPPORTED = {
    "Llama4TextExperts": _tiny(
        transformers.Llama4TextConfig(**_SIZES, num_local_experts=4, intermediate_size_mlp=40),
        transformers.Llama4ForCausalLM,
    ),
    "GraniteMoeParallelExperts": _tiny(
        transformers.GraniteMoeConfig(**_SIZES, num_local_experts=4), transformers.GraniteMoeForCausalLM
    ),
    "JetMoeParallelExperts": _tiny(
        transformers.JetMoeConfig(**_SIZES, num_local_experts=4, kv_channels=8), transformers.JetMoeForCausalLM
    ),
    "LongcatFlashExperts": _tiny(
        transformers.LongcatFlashConfig(
            hidden_size=32,
            num_layers=1,
            num_attention_heads=4,
            vocab_size=96,
            n_routed_experts=4,
            expert_ffn_hidden_size=16,
            ffn_hidden_size=16,
        ),
        transformers.LongcatFlashForCausalLM,
    ),
}


@pytest.mark.parametrize(("class_name", "make"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_models_whose_experts_cannot_be_taken_are_refused_by_name(
    class_name: str, make: Callable[[], nn.Module]
) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError) as error:
        find_experts(model)
    assert class_name in str(error.value)
    assert type(model).__name__ in str(error.value)


def test_a_dense_model_has_no_experts() -> None:
    model = _tiny(transformers.LlamaConfig(**_SIZES), transformers.LlamaForCausalLM)()
    assert find_experts(model) == {}


def test_shared_experts_are_not_routed_experts() -> None:
    model = nn.ModuleDict({"shared_experts": nn.Linear(3, 3), "mlp": nn.ModuleDict({"shared_expert": nn.Linear(3, 3)})})
    assert find_experts(model) == {}


def test_experts_in_a_list_of_modules_are_refused() -> None:
    # How models outside transformers, which bring their own code, often hold them.
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3)])})})
    with pytest.raises(UnsupportedModelError, match=r"ModuleList at 'mlp.experts'"):
        find_experts(model)
