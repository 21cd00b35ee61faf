"""CpuExperts as a module: special routing, autograd in all its forms, and bad input."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kt_sft

E, H, I, T, K = 6, 24, 16, 20, 2


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5


@pytest.fixture
def experts(weights):
    return kt_sft.CpuExperts.from_weights(*weights)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(T, H), torch.randint(0, E, (T, K)), torch.rand(T, K)


def grads(function, inputs):
    x, w = inputs[0].clone().requires_grad_(), inputs[2].clone().requires_grad_()
    y = function(x, inputs[1], w)
    y.square().sum().backward()
    return y.detach(), x.grad, w.grad


def same(a, b):
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


class TestSpecialRouting:
    def test_no_tokens(self, experts):
        y, dx, dw = grads(experts, (torch.randn(0, H), torch.zeros(0, K, dtype=torch.long), torch.rand(0, K)))
        assert y.shape == dx.shape == (0, H)
        assert dw.shape == (0, K)

    def test_the_sentinel_gives_nothing_and_gets_no_gradient(self, experts, inputs):
        x, idx, w = inputs
        idx = idx.clone()
        idx[3] = E
        idx[4, 1] = E
        y, dx, dw = grads(experts, (x, idx, w))
        assert not y[3].any()
        assert not dx[3].any()
        assert not dw[3].any()
        assert not dw[4, 1]
        assert y[4].any()
        assert dw[4, 0]

    def test_one_expert_gets_everything(self, experts, inputs):
        x, _, w = inputs
        only = experts(x, torch.full((T, K), 2), w)
        # The same expert in both slots: its output times the sum of the weights, up to FP32 rounding of that sum.
        single = experts(x, torch.full((T, 1), 2), w.sum(1, keepdim=True))
        torch.testing.assert_close(only, single, rtol=1e-5, atol=1e-6)

    def test_nan_stays_with_its_token(self, experts, inputs):
        x, idx, w = inputs
        clean = experts(x, idx, w)
        x = x.clone()
        x[7, 3] = float("nan")
        y = experts(x, idx, w)
        assert y[7].isnan().all()
        others = [t for t in range(T) if t != 7]
        assert torch.equal(y[others], clean[others])


class TestAutograd:
    def test_no_grad_builds_no_graph_and_keeps_nothing(self, weights, inputs):
        layer = kt_sft.CpuExperts.from_weights(*weights, kt_sft.KTConfig(num_threads=7))  # an engine of its own
        with torch.no_grad():
            y = layer(inputs[0].requires_grad_(), *inputs[1:])
        assert not y.requires_grad
        assert layer.engine.stats()["kept_bytes"] == 0  # no pre-activations were ever taken

    def test_only_what_is_asked_for_gets_a_gradient(self, experts, inputs):
        x, idx, w = inputs
        full = grads(experts, inputs)
        only_x = x.clone().requires_grad_()
        experts(only_x, idx, w).square().sum().backward()
        assert torch.equal(only_x.grad, full[1])
        only_w = w.clone().requires_grad_()
        experts(x, idx, only_w).square().sum().backward()
        assert torch.equal(only_w.grad, full[2])

    @pytest.mark.parametrize("policy", ["retain", "recompute"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_gives_the_same_bits(self, weights, inputs, use_reentrant, policy):
        layer = kt_sft.CpuExperts.from_weights(*weights, kt_sft.KTConfig(activation_policy=policy))
        plain = grads(layer, inputs)
        checkpointed = grads(lambda *args: checkpoint(layer, *args, use_reentrant=use_reentrant), inputs)
        assert same(plain, checkpointed)

    def test_backward_may_run_on_any_thread(self, experts, inputs):
        expected = grads(experts, inputs)
        x, w = inputs[0].clone().requires_grad_(), inputs[2].clone().requires_grad_()
        loss = experts(x, inputs[1], w).square().sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert torch.equal(x.grad, expected[1])
        assert torch.equal(w.grad, expected[2])

    def test_layers_in_a_row_and_side_by_side(self, weights, inputs):
        first, second = kt_sft.CpuExperts.from_weights(*weights), kt_sft.CpuExperts.from_weights(*weights)
        x, idx, w = inputs
        leaf = x.clone().requires_grad_()
        hidden = first(leaf, idx, w)
        (second(hidden, idx, w) + first(hidden, idx, w)).sum().backward()
        # Both branches are the same function of `hidden`: twice the gradient of one, exactly.
        once = x.clone().requires_grad_()
        second(first(once, idx, w), idx, w).sum().backward()
        torch.testing.assert_close(leaf.grad, 2 * once.grad, rtol=2**-7, atol=1e-6)

    def test_a_retained_graph_can_be_walked_twice(self, experts, inputs):
        x = inputs[0].clone().requires_grad_()
        loss = experts(x, *inputs[1:]).square().sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, x)

    def test_threads_may_walk_one_graph_at_the_same_time(self, experts, inputs):
        x, w = inputs[0].clone().requires_grad_(), inputs[2].clone().requires_grad_()
        y = experts(x, inputs[1], w)
        cotangents = [torch.full_like(y, scale) for scale in (1.0, -2.0)]
        expected = [torch.autograd.grad(y, (x, w), grad, retain_graph=True) for grad in cotangents]
        wrong = []

        def walk(which):
            for _ in range(100):
                if not same(torch.autograd.grad(y, (x, w), cotangents[which], retain_graph=True), expected[which]):
                    wrong.append(which)

        threads = [threading.Thread(target=walk, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_second_derivatives_are_refused(self, experts, inputs):
        x = inputs[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(experts(x, *inputs[1:]).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()

    def test_changing_a_saved_input_in_place_is_noticed(self, weights, inputs):
        layer = kt_sft.CpuExperts.from_weights(*weights, kt_sft.KTConfig(activation_policy="recompute"))
        x = (inputs[0].clone().requires_grad_() * 1.0).contiguous()
        y = layer(x, *inputs[1:])
        with torch.no_grad():
            x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_work_between_submit_and_await_comes_before_the_wait_in_backward(self, experts, inputs, monkeypatch):
        """Autograd visits what lies between the pair before the node that waits, so it overlaps in backward too."""
        from kt_sft import experts as module

        order = []

        class Shared(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 1

            @staticmethod
            def backward(ctx, grad):
                order.append("shared")
                return grad

        for node, name in ((module.Await, "submit backward"), (module.Submit, "await gradients")):
            original = node.backward

            def spy(*args, original=original, name=name):
                order.append(name)
                return original(*args)

            monkeypatch.setattr(node, "backward", staticmethod(spy))
        x = inputs[0].clone().requires_grad_()
        shared = []
        monkeypatch.setattr(experts, "beside", lambda hidden_states: shared.append(Shared.apply(hidden_states)))
        (experts(x, *inputs[1:]) + shared[0]).sum().backward()
        assert order == ["submit backward", "shared", "await gradients"]


class TestModule:
    def test_it_has_nothing_to_move_train_or_save(self, experts):
        assert list(experts.parameters()) == []
        assert list(experts.buffers()) == []
        assert experts.state_dict() == {}

    def test_it_takes_no_weights_and_cannot_be_trained(self, experts):
        experts.load_state_dict({})
        with pytest.raises(ValueError, match="gate_up_proj is a weight of routed experts, which stay frozen"):
            experts.load_state_dict({"gate_up_proj": torch.zeros(1)}, strict=False)
        assert experts.requires_grad_(False) is experts
        with pytest.raises(ValueError, match="routed experts stay frozen in the engine and cannot be trained"):
            experts.requires_grad_(True)

    def test_casting_and_moving_leave_it_alone(self, experts, inputs):
        before = experts(*inputs)
        moved = experts.to(torch.float16).half().to("meta").cpu().eval()
        assert torch.equal(moved(*inputs), before)

    def test_a_deep_copy_shares_the_weights(self, experts, inputs):
        clone = copy.deepcopy(experts)
        assert clone.store is experts.store
        assert torch.equal(clone(*inputs), experts(*inputs))

    def test_ddp_leaves_it_alone(self, experts, inputs, tmp_path):
        model = torch.nn.ModuleDict({"proj": torch.nn.Linear(H, H), "experts": experts})

        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = model

            def forward(self, x, idx, w):
                return self.parts["experts"](self.parts["proj"](x), idx, w)

        plain = Wrapped()
        plain(*inputs).sum().backward()
        expected = model["proj"].weight.grad.clone()
        plain.zero_grad()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            torch.nn.parallel.DistributedDataParallel(plain)(*inputs).sum().backward()
        finally:
            torch.distributed.destroy_process_group()
        assert torch.equal(model["proj"].weight.grad, expected)

    def test_print_says_what_it_is(self, experts):
        assert "num_experts=6" in repr(experts)
        assert "bf16" in repr(experts)

    def test_engine_memory_is_returned(self, weights, inputs):
        layer = kt_sft.CpuExperts.from_weights(*weights, kt_sft.KTConfig(num_threads=6))  # an engine of its own
        layer(inputs[0].clone().requires_grad_(), *inputs[1:]).sum().backward()
        kept = layer.engine.stats()["kept_bytes"]
        assert kept > 0
        for _ in range(50):
            layer(inputs[0].clone().requires_grad_(), *inputs[1:]).sum().backward()
        assert layer.engine.stats()["kept_bytes"] == kept


class TestBadInput:
    @pytest.mark.parametrize("bad", [-1, E + 1])
    def test_index_out_of_range(self, experts, inputs, bad):
        x, idx, w = inputs
        idx = idx.clone()
        idx[2, 1] = bad
        with pytest.raises(IndexError, match=rf"top_k_index holds {bad}; valid are 0 to {E - 1}"):
            experts(x, idx, w)

    def test_shapes_and_dtypes(self, experts, inputs):
        x, idx, w = inputs
        with pytest.raises(ValueError, match="hidden_states must be"):
            experts(x[:, :-1], idx, w)
        with pytest.raises(ValueError, match="top_k_index must be"):
            experts(x, idx[:-1], w)
        with pytest.raises(ValueError, match="top_k_weights must be"):
            experts(x, idx, w[:, :1])
        with pytest.raises(TypeError, match=r"hidden_states has dtype torch\.float64"):
            experts(x.double(), idx, w)
        with pytest.raises(TypeError, match="top_k_index has dtype"):
            experts(x, idx.float(), w)
        with pytest.raises(TypeError, match="top_k_weights has dtype"):
            experts(x, idx, idx)

    def test_weights_that_do_not_fit_each_other(self, weights):
        gate_up, down = weights
        with pytest.raises(ValueError, match="gate_up_proj must be"):
            kt_sft.CpuExperts.from_weights(gate_up[:, :-1], down)
        with pytest.raises(ValueError, match=r"gate_up_proj must be \[E, 2I, H\]"):
            kt_sft.CpuExperts.from_weights(gate_up[0], down)
        with pytest.raises(ValueError, match="gate_up_bias must be"):
            kt_sft.CpuExperts.from_weights(gate_up, down, gate_up_bias=torch.zeros(E, I))
        with pytest.raises(TypeError, match=r"float64"):
            kt_sft.CpuExperts.from_weights(gate_up.double(), down.double())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, weights, bad):
        gate_up, down = weights
        gate_up[3, I + 2, 5] = bad
        with pytest.raises(ValueError, match=rf"up weights of expert 3: row 2, column 5 is {bad}"):
            kt_sft.CpuExperts.from_weights(gate_up, down)
        with pytest.raises(ValueError, match="down_bias holds a value that is not finite"):
            kt_sft.CpuExperts.from_weights(down.transpose(1, 2).contiguous(), down, down_bias=torch.full((E, H), bad))

    def test_activations_that_do_not_exist(self, weights):
        with pytest.raises(ValueError, match="activation must be silu"):
            kt_sft.CpuExperts.from_weights(*weights, activation="tanh")
        with pytest.raises(ValueError, match="swiglu_oai needs a gate"):
            kt_sft.CpuExperts.from_weights(weights[0][:, :I], weights[1], activation="swiglu_oai")
