"""The engine's copies of adapters: what is in them, and when they are made anew."""

from __future__ import annotations

import copy

import pytest
import torch

from kt_sft.engine import operands as operands_module
from kt_sft.engine.operands import Factors, OperandCache, Operands, Term, pack, split_gradients

EXPERTS, HIDDEN, INTERMEDIATE = 2, 6, 4
GATE_UP, DOWN = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)


def factors(rows: int, columns: int, rank: int, scale: float = 1.0) -> Factors:
    a, b = torch.randn(EXPERTS, rank, columns), torch.randn(EXPERTS, rows, rank)
    return Factors(a.requires_grad_(), b.requires_grad_(), scale)


def term(rank: int, scale: float = 1.0) -> Term:
    return Term(factors(*GATE_UP, rank, scale), factors(*DOWN, rank, scale))


def test_terms_lie_one_after_the_other_with_their_scales_in_b() -> None:
    first, second = term(2, 0.5), Term(None, factors(*DOWN, 1, 3.0))
    operands = pack([first, second], GATE_UP, DOWN, EXPERTS)
    assert operands.gate_up_a.shape == (EXPERTS, 4, HIDDEN)  # 2 + 1, padded
    assert torch.equal(operands.gate_up_b[:, :, :2], (first.gate_up.b * 0.5).bfloat16())
    assert not operands.gate_up_a[:, 2:].any()
    assert torch.equal(operands.down_a[:, 2:3], second.down.a.bfloat16())
    assert torch.equal(operands.down_b[:, :, 2:3], (second.down.b * 3).bfloat16())
    assert not operands.down_b[:, :, 3:].any()


def test_gradients_go_back_the_same_way() -> None:
    terms = [term(2, 0.5), Term(None, factors(*DOWN, 1, 3.0))]
    operands = pack(terms, GATE_UP, DOWN, EXPERTS)
    gradients = [torch.randn(tensor.shape) for tensor in operands.tensors]
    split = split_gradients(terms, gradients)
    assert [part.shape for part in split] == [tensor.shape for term in terms for tensor in term.tensors]
    assert torch.equal(split[1], gradients[1][:, :, :2] * 0.5)
    assert torch.equal(split[4], gradients[2][:, 2:3])
    assert torch.equal(split[5], gradients[3][:, :, 2:3] * 3)


class TestCache:
    @pytest.fixture
    def cache(self) -> OperandCache:
        return OperandCache()

    def operands(self, cache: OperandCache, *terms: Term) -> Operands:
        return cache.operands(terms, GATE_UP, DOWN, EXPERTS)

    def test_nothing_is_copied_twice(self, cache: OperandCache) -> None:
        adapter = term(2)
        first = self.operands(cache, adapter)
        # As layers make them for every call: other views of the same parameters.
        again = Term(*(Factors(part.a.view_as(part.a), part.b, part.scale) for part in (adapter.gate_up, adapter.down)))
        assert self.operands(cache, again) is first

    def test_a_change_in_place(self, cache: OperandCache) -> None:
        adapter = term(2)
        first = self.operands(cache, adapter)
        with torch.no_grad():
            adapter.down.b.add_(1)
        assert torch.equal(self.operands(cache, adapter).down_b, adapter.down.b.bfloat16())
        assert self.operands(cache, adapter) is not first

    def test_a_change_past_autograd_that_an_optimizer_makes(self, cache: OperandCache) -> None:
        class Plain(torch.optim.Optimizer):
            def step(self) -> None:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.data.add_(1)

        adapter = term(2)
        self.operands(cache, adapter)
        Plain([*adapter.tensors], {}).step()
        assert torch.equal(self.operands(cache, adapter).down_b, adapter.down.b.bfloat16())

    def test_steps_do_not_matter_to_what_is_not_trained(self, cache: OperandCache) -> None:
        adapter = term(2)
        for tensor in adapter.tensors:
            tensor.requires_grad_(False)
        first = self.operands(cache, adapter)
        torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
        assert self.operands(cache, adapter) is first

    def test_another_adapter_or_scale(self, cache: OperandCache) -> None:
        adapter = term(2)
        first = self.operands(cache, adapter)
        louder = Term(adapter.gate_up, Factors(adapter.down.a, adapter.down.b, 2.0))
        assert self.operands(cache, louder) is not first
        assert torch.equal(self.operands(cache, louder).down_b, (adapter.down.b * 2).bfloat16())
        other = term(2)
        assert torch.equal(self.operands(cache, other).down_a, other.down.a.bfloat16())

    def test_all_on_an_accelerator_are_renewed_with_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that the last step had used: later ones would wait for what the device was given meanwhile."""
        monkeypatch.setattr(operands_module, "_is_far", lambda terms: True)
        packed: list[int] = []
        pack_them = operands_module.pack
        monkeypatch.setattr(operands_module, "pack", lambda *given: packed.append(1) or pack_them(*given))
        caches, adapters = [OperandCache() for _ in range(3)], [term(2) for _ in range(3)]
        optimizer = torch.optim.SGD([tensor for each in adapters for tensor in each.tensors], lr=0.1)

        def step(used: int) -> list[int]:
            """How many were packed at each layer."""
            counts = []
            for cache, adapter in list(zip(caches, adapters, strict=True))[:used]:
                packed.clear()
                down_b = self.operands(cache, adapter).down_b
                counts.append(len(packed))
                assert torch.equal(down_b, adapter.down.b.bfloat16())
            for tensor in optimizer.param_groups[0]["params"]:
                tensor.grad = torch.ones_like(tensor)
            optimizer.step()
            return counts

        assert step(3) == [1, 1, 1]
        assert step(3) == [3, 0, 0]
        assert step(2) == [3, 0]
        assert step(3) == [2, 0, 1]  # the third was not used

    def test_on_the_cpu_each_is_renewed_when_it_is_used(self) -> None:
        caches, adapters = [OperandCache() for _ in range(2)], [term(2) for _ in range(2)]
        optimizer = torch.optim.SGD([tensor for each in adapters for tensor in each.tensors], lr=0.1)
        for cache, adapter in zip(caches, adapters, strict=True):
            self.operands(cache, adapter)
        before = caches[1]._last
        optimizer.step()
        self.operands(caches[0], adapters[0])
        assert caches[1]._last is before

    def test_what_inference_mode_made_has_no_counter(self, cache: OperandCache) -> None:
        with torch.inference_mode():
            adapter = term(2)
            self.operands(cache, adapter)
            adapter.down.b.add_(1)
            assert torch.equal(self.operands(cache, adapter).down_b, adapter.down.b.bfloat16())

    def test_copies_of_a_model_copy_nothing_of_it(self, cache: OperandCache) -> None:
        self.operands(cache, term(2))
        assert copy.deepcopy(cache) is not cache
