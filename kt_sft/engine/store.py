"""LayerStore: one layer's routed experts in engine memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.biases import bias_values, checked_bias
from kt_sft.engine.cpus import engine_nodes, job_nodes
from kt_sft.engine.geometry import OWN_SCALES, row_bytes, scales_shape
from kt_sft.engine.readahead import Neighbours

#: `MappedFile(path)` maps a whole file. Raises RuntimeError, naming it, where that cannot be.
MappedFile = _native.FileMapping

MATRICES = ("gate", "up", "down")

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def dtype_name(dtype: torch.dtype, what: str) -> str:
    """The engine's name of a dtype.

    Raises:
        TypeError: The engine does not take it; the message names `what` has it.
    """
    if dtype not in _DTYPE_NAMES:
        raise TypeError(f"kt_sft: {what} has dtype {dtype}; use torch.float32, torch.bfloat16 or torch.float16")
    return _DTYPE_NAMES[dtype]


def formats() -> list[str]:
    """Names of the weight formats this build decodes."""
    return list(_native.formats())


def matrix_bytes(
    rows: int,
    columns: int,
    expert_format: str,
    group_size: int | None,
    zero_point: bool,
    scale_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that one [rows, columns] matrix takes in a format, scales included.

    Raises:
        ValueError: There is no such format, or it has no such group or no zero point.
    """
    _check_format(expert_format)
    scale_type = _scale_type(scale_dtype)
    return _native.matrix_bytes(expert_format, _native_group(group_size), zero_point, rows, columns, scale_type)


class LayerStore:
    """The weights of one layer's E experts: one copy, rows in the checkpoint's order, gate and up [I, H], down [H, I].

    It is a plain object, neither module nor tensor: moving or casting a model leaves it alone, copies of one share it.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: silu, gelu, gelu_pytorch_tanh, relu2 or swiglu_oai, as transformers calls them.
        gated: Whether experts have a gate matrix.
        gate_up_bias: [E, 2I], gate first ([E, I] ungated), any float dtype.
        down_bias: [E, H].
        expert_format: How weights are stored; one of `formats()`.
        group_size: Columns that share a scale; None: the format's own default, 0: whole rows.
        zero_point: Asymmetric int4.
        scale_dtype: Of int4's scales, where a checkpoint's own are kept; such a store takes codes only. None: BF16.
        shared: Whether other processes can map the weights' memory, by the store's `descriptor`.
        mapped: Whether the weights stay in files, where `map_file` says.
        descriptor: That of a store of another process, of the same sizes and format. This one reads its memory, which
            that process fills; `adopt` says when it has.

    Raises:
        ValueError: A size, an activation, a bias shape, the format or its group is not possible; or `descriptor` is
            not the memory of such a store.
        MemoryError: The weights do not fit the address space.
        RuntimeError: The system has no memory that can be shared.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        gated: bool = True,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        expert_format: str = "bf16",
        group_size: int | None = None,
        zero_point: bool = False,
        scale_dtype: torch.dtype | None = None,
        shared: bool = False,
        mapped: bool = False,
        descriptor: int | None = None,
    ) -> None:
        _check_format(expert_format)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.gated = gated
        self.expert_format = expert_format
        self.group_size = group_size
        self.zero_point = zero_point
        self.scale_dtype = scale_dtype
        self.mapped = mapped
        self.neighbours: Neighbours | None = None
        self.native = _native.ExpertLayer(
            experts=num_experts,
            hidden=hidden_size,
            intermediate=intermediate_size,
            activation=activation,
            gated=gated,
            format=expert_format,
            group=_native_group(group_size),
            zero_point=zero_point,
            scale_type=_scale_type(scale_dtype),
            nodes=job_nodes() if shared else engine_nodes(),
            shared=shared,
            descriptor=-1 if descriptor is None else descriptor,
            mapped=mapped,
        )
        self.set_biases(gate_up_bias, down_bias)

    @property
    def nbytes(self) -> int:
        """Bytes the weights occupy, scales included: of memory, or of the files they are mapped from."""
        return self.native.nbytes

    @property
    def error(self) -> tuple[float, float]:
        """What storing did to the weights: the sums of (weight - stored weight)^2 and of weight^2."""
        return self.native.error

    @property
    def relative_error(self) -> float:
        """The root of those sums' quotient so far; 0 for exact."""
        squared_error, squared_values = self.error
        return math.sqrt(squared_error / squared_values) if squared_values else 0.0

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices an expert has."""
        return MATRICES if self.gated else MATRICES[1:]

    def shape(self, matrix: str) -> tuple[int, int]:
        """(rows, columns) of one expert's `matrix`."""
        if matrix == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def write(self, matrix: str, expert: int, source: Tensor) -> None:
        """Stores one expert's matrix.

        Args:
            matrix: "gate", "up" or "down".
            expert: Its number.
            source: [rows, columns] on the CPU, FP32, FP16 or BF16, with any strides; rounded to the store's format.

        Raises:
            ValueError: The shape or the device is wrong, or a value is not finite (or becomes infinite in BF16); the
                message names its place.
            TypeError: The dtype is not supported.
        """
        if tuple(source.shape) != self.shape(matrix):
            raise ValueError(f"kt_sft: {matrix} must be {self.shape(matrix)}, got {tuple(source.shape)}")
        if source.device.type != "cpu":
            raise ValueError(f"kt_sft: {matrix} is on {source.device}; move it to the CPU first")
        source = source.detach()
        self.native.write(matrix, expert, source.data_ptr(), dtype_name(source.dtype, matrix), *source.stride())

    def read_file(
        self,
        matrix: str,
        expert: int,
        *,
        path: str | os.PathLike[str],
        offset: int,
        dtype: torch.dtype,
        row_stride: int,
        col_stride: int,
    ) -> None:
        """Stores one expert's matrix from a file, read piece by piece into its place and not mapped.

        Runs without the GIL and may be called from many threads at once.

        Args:
            matrix: "gate", "up" or "down".
            expert: Its number.
            path: The file.
            offset: Byte of the matrix's first value.
            dtype: Of the values in the file.
            row_stride: Values from one row to the next.
            col_stride: Values from one column to the next.

        Raises:
            RuntimeError: The file cannot be read or ends early.
            ValueError: A value is not finite; the message names its place.
            TypeError: The dtype is not supported.
        """
        name = dtype_name(dtype, matrix)
        self.native.read_file(matrix, expert, os.fspath(path), offset, name, row_stride, col_stride)

    def map_file(
        self,
        matrix: str,
        expert: int,
        *,
        file: Any,
        offset: int,
        row_stride: int,
        scales: Tensor | None = None,
        zero_points: Tensor | None = None,
    ) -> None:
        """Takes one expert's matrix for what lies in a file, without reading it; for a `mapped` store.

        Args:
            matrix: "gate", "up" or "down".
            expert: Its number.
            file: A `MappedFile`.
            offset: Byte of the matrix's first value or code; even for bf16.
            row_stride: Bytes from one row to the next; even for bf16.
            scales: As in `write_codes`, of which a copy is kept; None for bf16.
            zero_points: As in `write_codes`.

        Raises:
            ValueError: The rows do not lie in the file one after the other, or not at even bytes; or as in
                `write_codes`, but for codes, which are not looked at.
        """
        if scales is not None or self.expert_format in OWN_SCALES:
            scales, zero_points = self._checked_scales(matrix, scales, zero_points)
        scales_at, zeros_at = (0 if part is None else part.data_ptr() for part in (scales, zero_points))
        self.native.map(matrix, expert, file, offset, row_stride, scales_at, zeros_at)

    def expect(self, routed_rows: int, *, forward: bool) -> None:
        """Called when a pass over this layer begins; may begin to read the layer that comes next.

        Args:
            routed_rows: Of the pass.
            forward: Whether it is a forward pass, after which comes the layer above; else the one below.
        """
        # With fewer rows most experts of the next layer will not be asked.
        if self.neighbours is not None and routed_rows >= self.num_experts:
            self.neighbours.read(forward=forward)

    def write_codes(
        self, matrix: str, expert: int, codes: Tensor, scales: Tensor, zero_points: Tensor | None = None
    ) -> None:
        """Stores one expert's matrix that is in the store's format already, as it is.

        Runs without the GIL and may be called from many threads at once.

        Args:
            matrix: "gate", "up" or "down".
            expert: Its number.
            codes: [rows, bytes of a row] uint8; two four-bit codes to a byte, the even column in the low half.
            scales: One for every group (or block): [rows of scales, groups] in the store's type of scales; uint8
                for mxfp4 (E8M0).
            zero_points: uint8 in the shape of `scales`, for asymmetric int4.

        Raises:
            ValueError: A shape or dtype is wrong, a code is no number, or a scale is not finite, too large or, but for
                int4 and nf4, negative; the message names its place.
        """
        scales, zero_points = self._checked_scales(matrix, scales, zero_points)
        rows, columns = self.shape(matrix)
        shape = rows, row_bytes(self.expert_format, columns)
        if codes.shape != shape or codes.dtype != torch.uint8 or codes.stride(1) != 1:
            raise ValueError(f"kt_sft: codes of {matrix} must be {shape} bytes, got {tuple(codes.shape)}")
        zeros = 0 if zero_points is None else zero_points.data_ptr()
        self.native.write_codes(matrix, expert, codes.data_ptr(), codes.stride(0), scales.data_ptr(), zeros)

    def read_codes(
        self,
        matrix: str,
        expert: int,
        *,
        path: str | os.PathLike[str],
        offset: int,
        row_stride: int,
        scales: Tensor,
        zero_points: Tensor | None = None,
    ) -> None:
        """Like `write_codes`, with the codes read from a file into their place.

        Args:
            matrix: "gate", "up" or "down".
            expert: Its number.
            path: The file.
            offset: Byte of the first code.
            row_stride: Bytes from one row to the next.
            scales: As in `write_codes`.
            zero_points: As in `write_codes`.

        Raises:
            RuntimeError: The file cannot be read or ends early.
            ValueError: As in `write_codes`.
        """
        scales, zero_points = self._checked_scales(matrix, scales, zero_points)
        zeros = 0 if zero_points is None else zero_points.data_ptr()
        self.native.read_codes(matrix, expert, os.fspath(path), offset, row_stride, scales.data_ptr(), zeros)

    def _checked_scales(
        self, matrix: str, scales: Tensor | None, zero_points: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if scales is None or self.expert_format not in OWN_SCALES or (zero_points is not None) != self.zero_point:
            raise ValueError(f"kt_sft: these are not the scales and zero points of {self.expert_format} experts")
        shape = scales_shape(self.expert_format, self.group_size, self.shape(matrix))
        for name, tensor, kind in (
            ("scales", scales, self.scale_dtype or OWN_SCALES[self.expert_format][0]),
            ("zero points", zero_points, torch.uint8),
        ):
            if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != kind):
                raise ValueError(
                    f"kt_sft: {name} of {matrix} must be {shape} of {kind}, got {tuple(tensor.shape)} of {tensor.dtype}"
                )
        return scales.contiguous(), None if zero_points is None else zero_points.contiguous()

    def missing(self) -> list[tuple[str, int]]:
        """The (matrix, expert) pairs that were not stored yet."""
        return [
            (matrix, expert)
            for expert in range(self.num_experts)
            for matrix in self.matrices
            if not self.native.written(matrix, expert)
        ]

    @property
    def descriptor(self) -> int:
        """The open file that a `shared` store's memory is, for another process to map; it lives with the store."""
        return self.native.descriptor

    def take_huge_pages(self) -> None:
        """Takes an empty `shared` store's memory now, in huge pages where the system has them; without the GIL."""
        self.native.take_huge_pages()

    def adopt(self, error: tuple[float, float]) -> None:
        """Takes the memory of another process for filled.

        Args:
            error: That process's.
        """
        self.native.adopt(*error)

    def set_biases(self, gate_up_bias: Tensor | None, down_bias: Tensor | None) -> None:
        """Sets or clears the biases; shapes as in the constructor.

        Raises:
            ValueError: A shape is wrong, or a value is not finite.
        """
        gate_up_shape = (self.num_experts, self.intermediate_size * (2 if self.gated else 1))
        self.gate_up_bias = checked_bias("gate_up_bias", gate_up_bias, gate_up_shape)
        self.down_bias = checked_bias("down_bias", down_bias, (self.num_experts, self.hidden_size))
        self.native.set_biases(bias_values(self.gate_up_bias), bias_values(self.down_bias))

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """What the kernels effectively multiply by, without biases.

        Returns:
            FP32 gate_up [E, 2I, H], gate rows first ([E, I, H] ungated), and down [E, H, I].
        """
        parts = 2 if self.gated else 1
        gate_up = torch.empty(self.num_experts, parts * self.intermediate_size, self.hidden_size)
        down = torch.empty(self.num_experts, self.hidden_size, self.intermediate_size)
        for expert in range(self.num_experts):
            halves: Iterator[Tensor] = iter(gate_up[expert].chunk(parts))
            for matrix in self.matrices:
                target = down[expert] if matrix == "down" else next(halves)
                self.native.dequantize(matrix, expert, target.data_ptr())
        return gate_up, down

    def __deepcopy__(self, memo: dict[int, object]) -> LayerStore:
        # The weights are frozen: copies of a model share them.
        return self


def _scale_type(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else dtype_name(dtype, "scales")


def _check_format(expert_format: str) -> None:
    if expert_format not in formats():
        raise ValueError(f"kt_sft: the engine has no format {expert_format!r}; it has {', '.join(formats())}")


def _native_group(group_size: int | None) -> int:
    return -1 if group_size is None else group_size
