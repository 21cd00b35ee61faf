"""LayerStore: what is written comes out, from memory and from files, and what is wrong is refused with its place."""

from __future__ import annotations

import pytest
import torch

from kt_sft.engine.store import LayerStore, formats, matrix_bytes

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
    with pytest.raises(ValueError, match="no format 'int3'; it has bf16, int8, int4, nf4, fp8, mxfp4"):
        make_store(expert_format="int3")
    for options, message in (
        ({"expert_format": "bf16", "group_size": 32}, "group size of 32 is not possible with bf16: it has no scales"),
        ({"expert_format": "int8", "group_size": 48}, "48 is not possible with int8: it is 0 .whole rows. or a power"),
        ({"expert_format": "int4", "group_size": 16}, "16 is not possible with int4"),
        ({"expert_format": "nf4", "group_size": 1 << 17}, "131072 is not possible with nf4"),
        ({"expert_format": "fp8", "group_size": 64}, "64 is not possible with fp8: it is 128"),
        ({"expert_format": "mxfp4", "group_size": 64}, "64 is not possible with mxfp4: it is 32"),
        ({"expert_format": "int8", "zero_point": True}, "a zero point belongs to int4; int8 has none"),
    ):
        with pytest.raises(ValueError, match=message):
            make_store(**options)


#: Bits of a code and of what comes with each group, columns and rows of a group (0: the whole row).
LAYOUTS = {
    "bf16": (16, 0, 0, 1),
    "int8": (8, 32, 0, 1),
    "int4": (4, 16, 32, 1),
    "nf4": (4, 16, 64, 1),
    "fp8": (8, 32, 128, 128),
    "mxfp4": (4, 8, 32, 1),
}


@pytest.mark.parametrize("expert_format", formats())
def test_memory_is_one_copy_of_codes_and_scales(expert_format):
    hidden, intermediate = 512, 256
    bits, scale_bits, columns, rows = LAYOUTS[expert_format]

    def expected(height, width):
        return height * width * bits // 8 + height // rows * (width // (columns or width)) * scale_bits // 8

    matrices = 2 * expected(intermediate, hidden) + expected(hidden, intermediate)
    assert matrix_bytes(intermediate, hidden, expert_format, None, False) == expected(intermediate, hidden)
    store = LayerStore(
        num_experts=8,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation="silu",
        expert_format=expert_format,
    )
    huge_page = 2 << 20  # large blocks are whole ones
    assert 8 * matrices <= store.nbytes < 8 * matrices + huge_page


def test_zero_points_take_a_byte_for_each_group():
    plain = matrix_bytes(64, 256, "int4", 64, False)
    assert matrix_bytes(64, 256, "int4", 64, True) == plain + 64 * (256 // 64)


@pytest.mark.parametrize("expert_format", formats())
def test_every_format_keeps_what_it_can_represent_and_says_how_far_off_it_is(expert_format):
    """Codes x 1: values that the format has exactly, in every group; then values that it has not."""
    torch.manual_seed(0)
    values = {"bf16": torch.tensor([0.0, 1.5, -2.0]), "int8": torch.tensor([127.0, -1.0, 5.0, 0.0])}
    values["int4"] = torch.tensor([-8.0, 7.0, 3.0, 0.0, -1.0])
    values["nf4"] = torch.tensor([-1.0, 1.0, 0.0])
    values["fp8"] = torch.tensor([448.0, -3.25, 0.0, 2.0**-9])
    values["mxfp4"] = torch.tensor([6.0, -6.0, 0.5, 0.0, -3.0])
    store = make_store(expert_format=expert_format)
    some = values[expert_format]
    weights = {m: some[torch.arange(store.shape(m)[0] * store.shape(m)[1]) % len(some)] for m in store.matrices}
    for matrix, flat in weights.items():
        for expert in range(E):
            store.write(matrix, expert, flat.reshape(store.shape(matrix)))
    gate_up, down = store.dequantized()
    exact = torch.cat([weights["gate"].reshape(I, H), weights["up"].reshape(I, H)])
    assert torch.equal(gate_up, exact.expand(E, -1, -1))
    assert torch.equal(down, weights["down"].reshape(H, I).expand(E, -1, -1))
    assert store.relative_error == 0

    other = make_store(expert_format=expert_format)
    squared_error = squared_values = 0.0
    sources = {}
    for matrix in other.matrices:
        for expert in range(E):
            sources[matrix, expert] = torch.randn(other.shape(matrix))
            other.write(matrix, expert, sources[matrix, expert])
    gate_up, down = other.dequantized()
    for (matrix, expert), source in sources.items():
        rows = down[expert] if matrix == "down" else gate_up[expert].chunk(2)[("gate", "up").index(matrix)]
        squared_error += float((rows - source).double().square().sum())
        squared_values += float(source.double().square().sum())
    # Sums of squares of FP32 differences; the engine's may be of float32 terms.
    assert other.relative_error == pytest.approx((squared_error / squared_values) ** 0.5, rel=1e-5)
    assert other.relative_error > 0


def test_codes_come_out_as_they_went_in(tmp_path):
    codes = torch.randint(0, 127, (H, I), dtype=torch.uint8)
    scales = torch.rand(H, 1)
    expected = codes.view(torch.float8_e4m3fn).float() * scales
    path = tmp_path / "codes"
    path.write_bytes(b"head" + codes.repeat_interleave(2, dim=0).numpy().tobytes())
    store = make_store(expert_format="fp8", group_size=0)

    store.write_codes("down", 0, codes, scales)
    store.read_codes("down", 2, path=path, offset=4, row_stride=2 * I, scales=scales)

    for expert in (0, 2):
        assert torch.equal(store.dequantized()[1][expert], expected)
    assert ("down", 0) not in store.missing()
    assert store.relative_error == 0


def test_codes_of_another_shape_or_kind_are_refused():
    store = make_store(expert_format="int4", zero_point=True)
    codes, scales, zeros = torch.zeros(H, 3, dtype=torch.uint8), torch.ones(H, 1).bfloat16(), torch.zeros(H, 1).byte()
    store.write_codes("down", 0, codes, scales, zeros)
    for wrong in (codes[:, :2], codes.to(torch.int8), codes.T.contiguous().T):
        with pytest.raises(ValueError, match=r"codes of down must be \(10, 3\) bytes"):
            store.write_codes("down", 1, wrong, scales, zeros)
    for wrong in (scales.float(), scales[:9], scales.repeat(1, 2)):
        with pytest.raises(ValueError, match=r"scales of down must be \(10, 1\) of torch.bfloat16"):
            store.write_codes("down", 1, codes, wrong, zeros)
    with pytest.raises(ValueError, match="zero points of down must be"):
        store.write_codes("down", 1, codes, scales, zeros.int())
    with pytest.raises(ValueError, match="not the scales and zero points of int4"):
        store.write_codes("down", 1, codes, scales)
    with pytest.raises(ValueError, match="not the scales and zero points of bf16"):
        make_store().write_codes("down", 1, codes, scales)
    assert ("down", 1) in store.missing()
