"""Shared experts run between submitting and awaiting the routed ones, in every family that has them.

The order of what happens is written as a string: S a pass is submitted to the engine, s a linear layer of the shared
experts has been computed, A the pass has been awaited.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, VOCABULARY, make
from recording import record_engine
from torch import Tensor, nn

import kt_sft
from kt_sft.offload.shared import _PLAN, overlap_shared_experts

H = 32  # of the families' models

#: Families whose blocks call shared experts before the routed ones, and those that call them after.
EARLY = ("afmoe", "ernie4_5_moe", "ernie4_5_vl_moe", "hunyuan_v1_moe")
EARLY += ("qwen2_moe", "qwen3_5_moe", "qwen3_next", "qwen3_omni_moe")
LATE = ("deepseek_v2", "deepseek_v3", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa")
LATE += ("hy_v3", "mistral4", "nemotron_h", "solar_open")


def load(family: str, folder: Path, **settings: Any) -> nn.Module:
    model = make(FAMILIES[family][-1])
    model.save_pretrained(folder)
    config = kt_sft.KTConfig(overlap_shared_experts=True, **settings)
    return type(model).from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


@pytest.fixture(scope="module", params=EARLY + LATE)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module", params=["qwen2_moe", "deepseek_v3"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A model of a family that calls shared experts before the routed ones, and one that calls them after."""
    return load(request.param, tmp_path_factory.mktemp("either"))


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, _PLAN)]


def shared_children(block: nn.Module) -> list[nn.Module]:
    return [child for name, child in block.named_children() if "shared" in name and len(list(child.children())) > 1]


def set_overlap(model: nn.Module, monkeypatch: pytest.MonkeyPatch, overlap: bool | None) -> None:
    for experts in model.modules():
        if isinstance(experts, kt_sft.CpuExperts):
            monkeypatch.setattr(experts.config, "overlap_shared_experts", overlap)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engine's, as they happen; `watch` adds those of shared experts."""
    happened: list[str] = []
    record_engine(monkeypatch, happened.append)
    return happened


def watch(block: nn.Module, events: list[str]) -> Iterator[Any]:
    """Records the linear layers of `block`'s shared experts; gives the handles of its hooks."""
    for shared in shared_children(block):
        for linear in shared.modules():
            if isinstance(linear, nn.Linear):
                yield linear.register_forward_hook(lambda *_: events.append("s"))
                yield linear.register_full_backward_hook(lambda *_: events.append("s"))


def block_input() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(2, 7, H)


def run(block: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(output, gradient of the hidden states, gradients of parameters) of one call."""
    x = block_input().requires_grad_()
    block.zero_grad()
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
    assert x.grad is not None
    return y.detach(), x.grad, {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def test_every_family_with_shared_experts_is_here() -> None:
    """Families come and go with transformers: those with something shared beside routed experts must be recognised."""
    found = set()
    for family, makers in FAMILIES.items():
        with torch.device("meta"):
            names = [name for name, _ in makers[-1]().named_modules()]
        beside = {name.rpartition(".")[0] for name in names if name.endswith(".experts")}
        beside |= {name.rpartition(".")[0] for name in beside}
        if any(name.rpartition(".")[0] in beside and "shared" in name.rpartition(".")[2] for name in names):
            found.add(family)
    assert found == {*EARLY, *LATE}


def test_they_run_between_submitting_and_awaiting(model: nn.Module, events: list[str]) -> None:
    sparse = {name.rpartition(".experts")[0] for name, m in model.named_modules() if isinstance(m, kt_sft.CpuExperts)}
    assert len(blocks(model)) == len({name.removesuffix(".text_moe").removesuffix(".vision_moe") for name in sparse})
    for block in blocks(model):
        kinds = {"moe_mm_token_type_ids": torch.arange(7).expand(2, 7) % 2} if hasattr(block, "vision_moe") else {}
        handles = list(watch(block, events))
        y = block(block_input().requires_grad_(), **kinds)
        forward = "".join(events)
        events.clear()
        (y[0] if isinstance(y, tuple) else y).sum().backward()
        backward = "".join(events)
        events.clear()
        for handle in handles:
            handle.remove()
        # Text and images have experts of their own in Ernie VL: a second pass of the engine, awaited at once.
        assert re.fullmatch("Ss+A(SA)?", forward), forward
        assert re.fullmatch("(SA)?Ss+A", backward), backward
        assert forward.count("s") == backward.count("s") == len(handles) // 2


def test_results_stay_the_same(family: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; only the terms of the hidden states' gradient are added in another order in early blocks.

    n terms of FP32, added in any order, are within (n - 1) 2**-24 times the sum of their magnitudes of the exact sum
    (Higham 2002, 4.2, to first order), so two orders are within twice that of each other.
    """
    for block in blocks(model):
        y, dx, gradients = run(block)
        with monkeypatch.context() as patch:
            set_overlap(model, patch, False)
            expected_y, expected_dx, expected = run(block)
            terms = terms_of_the_gradient(block) if family in EARLY else []
        assert torch.equal(y, expected_y)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name]), name
        if family in LATE:
            assert torch.equal(dx, expected_dx)
            continue
        magnitude = torch.stack(terms).abs().sum(0).view_as(dx)
        assert ((dx - expected_dx).abs() <= 2 * (len(terms) - 1) * 2.0**-24 * magnitude).all()
        assert (magnitude <= 100 * expected_dx.abs().max()).all()  # so a missing term would not hide in the bound


def terms_of_the_gradient(block: nn.Module) -> list[Tensor]:
    """What each module that reads the hidden states adds to their gradient."""
    terms: list[Tensor] = []
    tokens = block_input().numel()

    def add(_: nn.Module, grad_input: tuple[Tensor | None, ...], __: Any) -> None:
        terms.extend(grad.flatten() for grad in grad_input[:1] if grad is not None and grad.numel() == tokens)

    readers = [m for m in block.modules() if isinstance(m, kt_sft.CpuExperts) or list(m.parameters(recurse=False))]
    handles = [reader.register_full_backward_hook(add) for reader in readers]
    run(block)
    for handle in handles:
        handle.remove()
    return terms


def model_gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(6)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(either: nn.Module, use_reentrant: bool, events: list[str]) -> None:
    model = either.train()
    expected = model_gradients(model)
    events.clear()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    handles = [handle for block in blocks(model) for handle in watch(block, events)]
    try:
        found = model_gradients(model)
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        for handle in handles:
            handle.remove()
    assert same(found, expected)
    # Forward of both layers; then, for each, forward again, of which the routed experts' result is there, and backward.
    assert re.fullmatch("(Ss+A){2}(s+Ss+A){2}", "".join(events))


def test_generation_is_the_same(either: nn.Module, monkeypatch: pytest.MonkeyPatch, events: list[str]) -> None:
    prompt = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(7))
    handles = [handle for block in blocks(either) for handle in watch(block, events)]
    found = either.eval().generate(prompt, max_new_tokens=5, do_sample=False)
    for handle in handles:
        handle.remove()
    assert re.fullmatch("(Ss+A)+", "".join(events))
    set_overlap(either, monkeypatch, False)
    assert torch.equal(found, either.generate(prompt, max_new_tokens=5, do_sample=False))


def test_on_the_cpu_they_run_in_the_models_order_by_default(
    either: nn.Module, monkeypatch: pytest.MonkeyPatch, events: list[str]
) -> None:
    set_overlap(either, monkeypatch, None)
    block = blocks(either)[0]
    handles = list(watch(block, events))
    with torch.no_grad():
        block(block_input())
    for handle in handles:
        handle.remove()
    assert re.fullmatch("s+SA|SAs+", "".join(events))


def test_a_copy_computes_with_its_own_weights(either: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = copy.deepcopy(either)
    with torch.no_grad():
        for block in blocks(clone):
            for shared in shared_children(block):
                for weight in shared.parameters():
                    weight.mul_(2)
    found, original = run(blocks(clone)[0])[0], run(blocks(either)[0])[0]
    set_overlap(clone, monkeypatch, False)
    assert torch.equal(found, run(blocks(clone)[0])[0])
    assert not torch.equal(found, original)


def test_ddp_gives_the_same_bits(either: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(either).train()
    expected = model_gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        found = {name.removeprefix("module."): grad for name, grad in model_gradients(wrapped).items()}
    finally:
        torch.distributed.destroy_process_group()
    assert same(found, expected)


class TestAdapters:
    LINEARS = ("gate_proj", "up_proj", "down_proj")  # attention's are others

    def adapted(self, model: nn.Module, **settings: Any) -> nn.Module:
        torch.manual_seed(8)
        config = peft.LoraConfig(r=2, init_lora_weights=False, **settings)
        return peft.get_peft_model(copy.deepcopy(model), config).train()

    @pytest.mark.parametrize("routed", [False, True])
    def test_lora_on_shared_and_on_routed_experts(
        self, either: nn.Module, routed: bool, monkeypatch: pytest.MonkeyPatch, events: list[str]
    ) -> None:
        targets = ["experts.gate_up_proj", "experts.down_proj"] if routed else None
        model = self.adapted(either, target_modules=list(self.LINEARS), target_parameters=targets)
        block = blocks(model)[-1]
        handles = list(watch(block, events))
        found = run(block)
        for handle in handles:
            handle.remove()
        assert re.fullmatch("Ss+ASs+A", "".join(events))
        set_overlap(model, monkeypatch, False)
        expected = run(block)
        assert torch.equal(found[0], expected[0])
        assert any("lora_A" in name and "shared" in name for name in expected[2])
        assert any("experts" in name and "shared" not in name for name in expected[2]) == routed
        assert same(found[2], expected[2])

    def test_a_module_that_peft_replaced_runs_in_the_models_order(
        self, either: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        name = next(name for name, _ in blocks(either)[0].named_children() if "shared" in name)
        model = self.adapted(either, target_modules=["o_proj"], modules_to_save=[name])
        with caplog.at_level(logging.INFO, "kt_sft"):
            found = run(blocks(model)[0])
            run(blocks(model)[0])
        assert [r.getMessage() for r in caplog.records if f"{name} was replaced" in r.getMessage()] != []
        assert len(caplog.records) == 1
        assert any("modules_to_save" in key for key in found[2])
        set_overlap(model, monkeypatch, False)
        assert same(found[2], run(blocks(model)[0])[2])


def test_an_error_of_theirs_leaves_everything_usable(either: nn.Module) -> None:
    block = blocks(either)[0]
    expected = run(block)[0]

    def fail(*_: Any) -> None:
        raise MemoryError("the accelerator is full")

    handle = next(m for m in shared_children(block)[0].modules() if isinstance(m, nn.Linear))
    handle = handle.register_forward_hook(fail)
    with pytest.raises(MemoryError, match="the accelerator is full"):
        run(block)
    handle.remove()
    assert torch.equal(run(block)[0], expected)


class Block(nn.Module):
    """A block that calls its shared experts as a function says."""

    def __init__(self, call: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.shared_experts = nn.Linear(H, H)
        config = kt_sft.KTConfig(overlap_shared_experts=True)
        self.experts = kt_sft.CpuExperts.from_weights(torch.randn(2, 12, H), torch.randn(2, H, 6), config)

    def routed(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        index = torch.zeros(flat.shape[0], 1, dtype=torch.long)
        return self.experts(flat, index, torch.ones(flat.shape[0], 1)).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


class TestNotRecognised:
    @pytest.mark.parametrize(
        ("call", "reason"),
        [
            (lambda block, x: block.routed(block.shared_experts(x)), "needs their result before"),
            (lambda block, x: block.routed(x + block.shared_experts(x)), "needs their result before"),
            (lambda block, x: block.shared_experts(block.routed(x)), "something else than its routed experts"),
            (lambda block, x: block.routed(x), "something else than its routed experts"),
            (lambda block, x: block.shared_experts(x), "something else than its routed experts"),
            (lambda block, x: x.add_(block.routed(x)) + block.shared_experts(x), "needs their result before"),
            (lambda block, x: block.routed(x, 1), "could not be tried"),
        ],
        ids=["chained", "added before", "after", "not called", "not routed", "changed in place", "failing"],
    )
    def test_blocks_of_another_structure_stay_as_they_are(
        self, call: Callable[[Block, Tensor], Tensor], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = nn.ModuleDict({"block": Block(call)})
        with caplog.at_level(logging.INFO, "kt_sft"):
            overlap_shared_experts(model)
        assert not blocks(model)
        assert "forward" not in vars(model["block"].experts)
        (record,) = caplog.records
        assert "shared experts of Block run in the model's own order: " in record.getMessage()
        assert reason in record.getMessage()

    def test_hooks_that_must_see_the_result_keep_the_order(
        self, caplog: pytest.LogCaptureFixture, events: list[str]
    ) -> None:
        model = nn.ModuleDict({"block": Block(lambda block, x: block.shared_experts(x) + block.routed(x))})
        overlap_shared_experts(model)
        seen: list[Tensor] = []
        handle = model["block"].shared_experts.register_forward_hook(lambda *call: seen.append(call[-1]))
        x = torch.randn(1, 3, H)
        with caplog.at_level(logging.INFO, "kt_sft"):
            hooked = model["block"](x)
        assert type(seen[0]) is Tensor
        assert "shared_experts has hooks that must see its result" in caplog.text
        handle.remove()
        assert torch.equal(model["block"](x), hooked)
