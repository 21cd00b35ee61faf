"""CpuExperts with tensors of an accelerator gives the same bits as with CPU tensors; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import kt_sft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]


def run(layer, device, dtype):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, 24, generator=random).to(device, dtype).requires_grad_()
    w = torch.rand(50, 2, generator=random).to(device).requires_grad_()
    idx = torch.randint(0, 7, (50, 2), generator=random).to(device)
    y = layer(x, idx, w)
    y.square().sum().backward()
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_same_bits_as_on_the_cpu(dtype, policy):
    torch.manual_seed(0)
    config = kt_sft.KTConfig(activation_policy=policy)
    layer = kt_sft.CpuExperts.from_weights(torch.randn(6, 32, 24) / 5, torch.randn(6, 24, 16) / 4, config)
    device = torch.accelerator.current_accelerator()
    on_device, on_cpu = run(layer, device, dtype), run(layer, "cpu", dtype)
    for there, here in zip(on_device, on_cpu, strict=True):
        assert there.device.type == device.type
        assert there.dtype == here.dtype
    # The loss's own gradient may be rounded differently on the device; y itself must be the same.
    assert torch.equal(on_device[0].cpu(), on_cpu[0])
    for there, here in zip(on_device[1:], on_cpu[1:], strict=True):
        torch.testing.assert_close(there.cpu(), here)


def test_weights_may_come_from_the_accelerator():
    device = torch.accelerator.current_accelerator()
    gate_up, down = torch.randn(2, 8, 6), torch.randn(2, 6, 4)
    from_device = kt_sft.CpuExperts.from_weights(gate_up.to(device), down.to(device))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            from_device.dequantized(), kt_sft.CpuExperts.from_weights(gate_up, down).dequantized(), strict=True
        )
    )
