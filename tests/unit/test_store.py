"""LayerStore: what is written comes out, from memory and from files, and what is wrong is refused with its place."""

from __future__ import annotations

import pytest
import torch

from kt_sft.engine.store import LayerStore

E, H, I = 3, 10, 6


def make_store(**options):
    return LayerStore(num_experts=E, hidden_size=H, intermediate_size=I, activation="silu", **options)


def test_missing_names_what_was_not_written():
    store = make_store()
    assert len(store.missing()) == 3 * E
    for expert in range(E):
        for matrix in store.matrices:
            store.write(matrix, expert, torch.zeros(store.shape(matrix)))
    assert store.missing() == []
    assert make_store(gated=False).missing() == [(m, e) for e in range(E) for m in ("up", "down")]


def test_views_with_any_strides(tmp_path):
    # gpt-oss keeps [E, H, 2I] with gate and up interleaved along the last dimension.
    fused = torch.arange(H * 2 * I, dtype=torch.float32).reshape(H, 2 * I) / 8
    store, from_file = make_store(), make_store()
    path = tmp_path / "weights"
    path.write_bytes(b"header" + fused.numpy().tobytes())
    for part, matrix in enumerate(("gate", "up")):
        store.write(matrix, 0, fused[:, part::2].T)
        options = {"dtype": torch.float32, "row_stride": 2, "col_stride": 2 * I}
        from_file.read_file(matrix, 0, path=path, offset=6 + 4 * part, **options)
    gate, up = store.dequantized()[0][0].chunk(2)
    assert torch.equal(gate, fused[:, ::2].T.bfloat16().float())
    assert torch.equal(up, fused[:, 1::2].T.bfloat16().float())
    assert torch.equal(from_file.dequantized()[0][0], store.dequantized()[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_files_of_every_dtype(tmp_path, dtype):
    down = torch.randn(H, I).to(dtype)
    path = tmp_path / "weights"
    path.write_bytes(down.view(torch.uint8).numpy().tobytes())
    store = make_store()
    store.read_file("down", 1, path=path, offset=0, dtype=dtype, row_stride=I, col_stride=1)
    assert torch.equal(store.dequantized()[1][1], down.bfloat16().float())


def test_bad_sources_are_named(tmp_path):
    store = make_store()
    with pytest.raises(ValueError, match=r"gate must be \(6, 10\), got \(10, 6\)"):
        store.write("gate", 0, torch.zeros(H, I))
    with pytest.raises(TypeError, match=r"gate has dtype torch.int8"):
        store.write("gate", 0, torch.zeros(I, H, dtype=torch.int8))
    with pytest.raises(IndexError, match="expert 3 is out of range: the layer has 3"):
        store.write("gate", E, torch.zeros(I, H))
    with pytest.raises(ValueError, match="no gate"):
        make_store(gated=False).write("gate", 0, torch.zeros(I, H))
    with pytest.raises(ValueError, match="gate is on meta; move it to the CPU first"):
        store.write("gate", 0, torch.zeros(I, H, device="meta"))
    bad = torch.zeros(H, I)
    bad[4, 2] = float("nan")
    with pytest.raises(ValueError, match="row 4, column 2 is"):
        store.write("down", 0, bad)
    path = tmp_path / "short"
    path.write_bytes(b"\0" * (H * I * 2 - 1))
    options = {"dtype": torch.bfloat16, "row_stride": I, "col_stride": 1}
    with pytest.raises(RuntimeError, match="short is truncated"):
        store.read_file("down", 0, path=path, offset=0, **options)
    with pytest.raises(RuntimeError, match=r"cannot open .*nothing"):
        store.read_file("down", 0, path=tmp_path / "nothing", offset=0, **options)
    assert ("down", 0) in store.missing()


def test_sizes_and_formats_that_cannot_be():
    with pytest.raises(ValueError, match="must be between 1 and"):
        LayerStore(num_experts=0, hidden_size=H, intermediate_size=I, activation="silu")
    with pytest.raises(MemoryError):
        LayerStore(num_experts=2**24, hidden_size=2**24, intermediate_size=2**24, activation="silu")
    with pytest.raises(ValueError, match="no format 'int4'"):
        make_store(expert_format="int4")


def test_memory_is_one_bf16_copy():
    store = LayerStore(num_experts=8, hidden_size=256, intermediate_size=512, activation="silu")
    weights = 8 * 3 * 256 * 512 * 2
    assert weights <= store.nbytes <= 1.05 * weights
