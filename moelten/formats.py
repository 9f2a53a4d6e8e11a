"""Formats: typed values that say how a matrix is stored, and schemes, which pair two of them.

A format fixes the element, which block of elements shares a scale (`block = (rows, columns)`,
`None` meaning all of them), and the dtype of that scale. A scheme is (weight format, activation
format). Both are frozen values: nothing in moelten changes its meaning by a flag, and a group size
is never inferred from a shape. What formats do *not* do is compute: `casts` and `quantize` do.

Conventions: matrices are [..., rows, columns] with columns along the reduction axis K; scales
multiply when decoding; a scale of dtype uint8 is an e8m0 byte b, worth 2**(b - 127).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from moelten.errors import FormatError, UnsupportedError

Block = tuple[int | None, int | None]
_SCALE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "e8m0": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Format:
    """Base of all formats.

    bits:        per element
    max_code:    the largest magnitude of a code
    data_dtype:  how codes are stored; two 4-bit codes share a uint8, low nibble first
    """

    bits: ClassVar[int]
    max_code: ClassVar[float]
    data_dtype: ClassVar[torch.dtype]

    @property
    def block(self) -> Block:
        """The (rows, columns) that share one scale; None spans the whole axis."""
        raise NotImplementedError

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """Storage dtype of the scales; None for formats without scales."""
        return None

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def packed(self) -> bool:
        return self.bits == 4

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of a [rows, columns] matrix: one per (partial) block."""
        return _blocks(rows, self.block[0]), _blocks(columns, self.block[1])

    def check_columns(self, columns: int, what: str) -> None:
        """Refuse a reduction length that the group size does not divide."""
        group = self.block[1]
        if self.packed and group is not None and columns % group:
            raise FormatError(
                f"{what}: {self.name} needs K to be a multiple of its group of {group}, got "
                f"K={columns}; use a group size that divides K or per-channel scales"
            )
        if self.packed and columns % 2:
            raise FormatError(f"{what}: 4-bit codes are stored in pairs along K, got odd {columns}")


def _blocks(length: int, block: int | None) -> int:
    return 1 if block is None else -(-length // block)


@dataclass(frozen=True)
class Float(Format):
    """Unquantized elements: bfloat16, float16 or float32."""

    dtype: str = "bfloat16"
    max_code: ClassVar[float] = float("inf")

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise FormatError(f"Float is bfloat16, float16 or float32, got {self.dtype!r}")

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.data_dtype.itemsize * 8

    @property
    def block(self) -> Block:
        return (None, None)

    @property
    def data_dtype(self) -> torch.dtype:  # type: ignore[override]
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.dtype, torch.float32)

    @property
    def name(self) -> str:
        return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]


@dataclass(frozen=True)
class Int4(Format):
    """Two's complement int4 in groups along K (None: one scale per row), optional zero points.

    value = (code - zero) * scale, code and zero in -8..7.
    """

    group_size: int | None = None
    zero_point: bool = False
    scale: str = "bfloat16"
    bits: ClassVar[int] = 4
    max_code: ClassVar[float] = 7.0
    data_dtype: ClassVar[torch.dtype] = torch.uint8

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.group_size < 16 or self.group_size % 16):
            raise FormatError(f"int4 groups are multiples of 16 along K, got {self.group_size}")
        _check_scale_dtype(self, ("bfloat16", "float16", "float32"))

    @property
    def block(self) -> Block:
        return (1, self.group_size)

    @property
    def scale_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale]

    @property
    def name(self) -> str:
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"int4{group}{'z' if self.zero_point else ''}"


@dataclass(frozen=True)
class _Bytes(Format):
    """8-bit codes, one scale per tensor, row, 1x128 group or 128x128 block."""

    blocks: Block = (1, None)
    scale: str = "float32"
    bits: ClassVar[int] = 8
    kind: ClassVar[str]
    scales: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")

    def __post_init__(self) -> None:
        if tuple(self.blocks) not in _BLOCK_NAMES:
            raise FormatError(
                f"{type(self).__name__} scales span {' or '.join(map(str, _BLOCK_NAMES))} "
                f"(rows, columns; None = all), got {self.blocks}"
            )
        _check_scale_dtype(self, self.scales)

    @property
    def block(self) -> Block:
        return self.blocks

    @property
    def scale_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale]

    @property
    def name(self) -> str:
        return self.kind + _BLOCK_NAMES[self.blocks]


@dataclass(frozen=True)
class Int8(_Bytes):
    """int8, one scale per row (weight channel or token), per 1x128 group or per 128x128 block."""

    max_code: ClassVar[float] = 127.0
    data_dtype: ClassVar[torch.dtype] = torch.int8
    kind: ClassVar[str] = "int8"


@dataclass(frozen=True)
class FP8(_Bytes):
    """e4m3 with fp32, bf16 or e8m0 scales per tensor, row, 1x128 group or 128x128 block."""

    max_code: ClassVar[float] = 448.0
    data_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    kind: ClassVar[str] = "fp8"
    scales: ClassVar[tuple[str, ...]] = (*_Bytes.scales, "e8m0")


@dataclass(frozen=True)
class MXFP4(Format):
    """OCP MXFP4: e2m1 in groups of 32 along K, one e8m0 scale each."""

    bits: ClassVar[int] = 4
    max_code: ClassVar[float] = 6.0
    data_dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def block(self) -> Block:
        return (1, 32)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def name(self) -> str:
        return "mxfp4"


@dataclass(frozen=True)
class MXFP8(Format):
    """OCP MXFP8: e4m3 in groups of 32 along K, one e8m0 scale each."""

    bits: ClassVar[int] = 8
    max_code: ClassVar[float] = 448.0
    data_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    @property
    def block(self) -> Block:
        return (1, 32)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def name(self) -> str:
        return "mxfp8"


@dataclass(frozen=True)
class NVFP4(Format):
    """NVFP4: e2m1 in groups of 16 along K with e4m3 scales, under one global fp32 scale.

    The global scale is one per matrix, or one per row (`per_token=True`). Both decode:
    value = code * scale * global_scale.
    """

    per_token: bool = False
    bits: ClassVar[int] = 4
    max_code: ClassVar[float] = 6.0
    data_dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def block(self) -> Block:
        return (1, 16)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    @property
    def name(self) -> str:
        return "nvfp4t" if self.per_token else "nvfp4"


_BLOCK_NAMES: dict[Block, str] = {
    (None, None): "tensor",
    (1, None): "",
    (1, 128): "g128",
    (128, 128): "block",
}


def _check_scale_dtype(fmt: Any, allowed: tuple[str, ...]) -> None:
    if fmt.scale not in allowed:
        raise FormatError(
            f"{type(fmt).__name__} scales are {' or '.join(allowed)}, got {fmt.scale!r}"
        )


BF16, FP16, FP32 = Float("bfloat16"), Float("float16"), Float("float32")
FP8_TENSOR, FP8_ROW = FP8((None, None)), FP8((1, None))
FP8_GROUP, FP8_BLOCK = FP8((1, 128)), FP8((128, 128))
INT8_ROW, INT8_GROUP, INT8_BLOCK = Int8((1, None)), Int8((1, 128)), Int8((128, 128))
_KINDS: dict[str, type[Format]] = {
    kind.__name__: kind for kind in (Float, Int4, Int8, FP8, MXFP4, MXFP8, NVFP4)
}


@dataclass(frozen=True)
class Scheme:
    """How one MoE layer computes: the format of its weights and that of its activations.

    Activation formats per tensor (`FP8_TENSOR`, `NVFP4()`) are static: their scale comes with the
    weights. All others are dynamic, per token or per group of a token, so that no token's result
    depends on another's.

    >>> Scheme(Int4(32), BF16).name
    'int4g32_bf16'
    """

    weights: Format
    activations: Format

    @property
    def name(self) -> str:
        # A 128x128 weight block implies 1x128 activation groups; the field calls the pair by one.
        paired = self.weights.block == (128, 128) and self.activations.block == (1, 128)
        suffix = self.activations.name.removesuffix("g128") if paired else self.activations.name
        return f"{self.weights.name}_{suffix}"

    @property
    def static(self) -> bool:
        """Whether activations are quantized with scales that come with the weights."""
        return self.activations in (FP8_TENSOR, NVFP4())

    def check(self) -> None:
        """Refuse a pair that is not in the table, naming the pairs this weight format has."""
        if self.name not in SCHEMES:
            same = [n for n in SCHEMES if n.split("_")[0] == self.weights.name]
            raise UnsupportedError(
                f"scheme {self.name} is not supported; {self.weights.name} weights run with "
                + (", ".join(n.split("_")[1] for n in same) or "no activation format")
                + " activations"
            )


def _schemes() -> dict[str, Scheme]:
    """The table of pairs: every quantized weight with 16/32-bit activations, and these others."""
    sixteen = (BF16, FP16, FP32)
    int4 = tuple(Int4(g, z) for z in (False, True) for g in (32, 64, 128, None))
    pairs: list[tuple[Format, Format]] = [(f, f) for f in sixteen]
    fp8 = (FP8_BLOCK, FP8_GROUP, FP8_ROW, FP8_TENSOR)
    for weights in (*int4, MXFP4(), MXFP8(), NVFP4(), *fp8, INT8_ROW, INT8_BLOCK):
        pairs += [(weights, a) for a in sixteen]
    for weights in (*int4, MXFP4()):
        pairs += [(weights, a) for a in (FP8_ROW, FP8_TENSOR, FP8_GROUP, INT8_ROW)]
    pairs += [(MXFP4(), MXFP8()), (MXFP8(), MXFP8())]
    pairs += [(NVFP4(), a) for a in (NVFP4(), NVFP4(per_token=True), FP8_ROW)]
    pairs += [(FP8_BLOCK, FP8_GROUP), (FP8_GROUP, FP8_GROUP), (FP8_ROW, FP8_ROW)]
    pairs += [(FP8_ROW, FP8_TENSOR), (FP8_TENSOR, FP8_TENSOR), (FP8_TENSOR, FP8_ROW)]
    pairs += [(INT8_ROW, INT8_ROW), (INT8_BLOCK, INT8_GROUP)]
    return {s.name: s for s in (Scheme(w, a) for w, a in pairs)}


SCHEMES: dict[str, Scheme] = _schemes()


def scheme(name: str) -> Scheme:
    """Look up a scheme by `<weights>_<activations>`.

    >>> scheme("mxfp4_bf16").weights
    MXFP4()
    """
    if name not in SCHEMES:
        raise UnsupportedError(f"unknown scheme {name!r}; supported: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def encode_format(fmt: Format) -> str:
    """Write a format as JSON, e.g. for a checkpoint's configuration; `decode_format` inverts it."""
    return json.dumps({"format": type(fmt).__name__, **asdict(fmt)})


def decode_format(text: str) -> Format:
    """Read what `encode_format` wrote."""
    record = json.loads(text)
    kind = _KINDS.get(record.pop("format", ""))
    if kind is None or set(record) - {f.name for f in fields(kind)}:
        raise FormatError(f"not a moelten format: {text}; known: {', '.join(_KINDS)}")
    if "blocks" in record:
        record["blocks"] = tuple(record["blocks"])
    return kind(**record)
