"""QTensor, a matrix that knows its format, and the two maps `quantize` and `dequantize`.

A QTensor holds codes, scales, zero points and a global scale, in the canonical layout: leading
batch axes, K-contiguous codes, linear scales that *multiply* when decoding. Quantization follows
one rule per format (`formats` names them, the docstring of `quantize` gives the formulas); reading
never depends on which rule wrote the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moelten import casts, packing
from moelten.errors import FormatError
from moelten.formats import FP8, MXFP4, MXFP8, NVFP4, Block, Float, Format, Int4, Int8

# Largest |value| that NVFP4 reaches under a global scale of one: e4m3 max times e2m1 max.
NVFP4_RANGE = 448.0 * 6.0
_FLT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class QTensor:
    """A [..., rows, columns] matrix in `format`; checked against it when it is made.

    data:          [..., rows, columns] codes, or uint8 [..., rows, columns/2] for 4-bit formats
    scale:         [..., *format.scale_shape(rows, columns)] of format.scale_dtype
    zero:          int8, the shape of scale; only for Int4 with zero points
    global_scale:  fp32 [...] or, per token, [..., rows]; only for NVFP4
    """

    data: Tensor
    format: Format
    scale: Tensor | None = None
    zero: Tensor | None = None
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        fmt = self.format
        _expect("data", self.data, fmt.data_dtype, None, fmt)
        if self.data.dim() < 2:
            raise FormatError(f"data: expected [..., rows, K], got {tuple(self.data.shape)}")
        *batch, rows, columns = self.shape
        fmt.check_columns(columns, "data")
        scales = (*batch, *fmt.scale_shape(rows, columns))
        _expect("scale", self.scale, fmt.scale_dtype, scales, fmt)
        zeros = isinstance(fmt, Int4) and fmt.zero_point
        _expect("zero", self.zero, torch.int8 if zeros else None, scales, fmt)
        per_row = (*batch, rows) if isinstance(fmt, NVFP4) and fmt.per_token else tuple(batch)
        dtype = torch.float32 if isinstance(fmt, NVFP4) else None
        _expect("global_scale", self.global_scale, dtype, per_row, fmt)
        if len({t.device for t in self.tensors().values()}) > 1:
            raise FormatError(f"all parts of a QTensor share a device, got {self._devices()}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, counting elements and not bytes."""
        *batch, stored = self.data.shape
        return (*batch, stored * 2 if self.format.packed else stored)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        return self.data.device

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are present, by name."""
        parts = {
            "data": self.data,
            "scale": self.scale,
            "zero": self.zero,
            "global_scale": self.global_scale,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> QTensor:
        """Apply `function` to every part, e.g. to index batch axes or to move devices."""
        return self.with_parts({name: function(part) for name, part in self.tensors().items()})

    def with_parts(self, parts: dict[str, Tensor]) -> QTensor:
        """The same format with some parts replaced."""
        return QTensor(format=self.format, **(self.tensors() | parts))

    def __getitem__(self, index: int | slice) -> QTensor:
        """Index the first batch axis (experts) of every part."""
        if self.data.dim() < 3:
            raise IndexError(f"a {len(self.shape)}-D QTensor has no batch axis to index")
        return self.map(lambda part: part[index])

    def to(self, device: torch.device | str) -> QTensor:
        return self.map(lambda part: part.to(device))

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows start..stop-1; a cut inside a scale block is refused."""
        return self._cut(-2, start, stop)

    def columns(self, start: int, stop: int) -> QTensor:
        """Columns start..stop-1 along K; a cut inside a scale group is refused."""
        return self._cut(-1, start, stop)

    def _cut(self, axis: int, start: int, stop: int) -> QTensor:
        size, block = self.shape[axis], self.format.block[axis]
        unit = 2 if axis == -1 and self.format.packed and block is None else block or 1
        if start % unit or (stop % unit and stop != size):
            raise FormatError(
                f"cannot cut {self.format.name} at {start}:{stop}: the cut must fall on multiples "
                f"of {unit} (of {size}), or codes would lose their scale"
            )
        per_byte = 2 if axis == -1 and self.format.packed else 1
        parts = {"data": self.data.narrow(axis, start // per_byte, (stop - start) // per_byte)}
        for name in ("scale", "zero"):
            part = getattr(self, name)
            if part is not None and block is not None:
                parts[name] = part.narrow(axis, start // block, -(-stop // block) - start // block)
        if self.global_scale is not None and self.global_scale.dim() == self.data.dim() - 1:
            if axis == -2:
                parts["global_scale"] = self.global_scale[..., start:stop]
        return self.with_parts(parts)

    def _devices(self) -> str:
        return ", ".join(f"{name} on {part.device}" for name, part in self.tensors().items())


def _expect(
    part: str,
    tensor: Tensor | None,
    dtype: torch.dtype | None,
    shape: tuple[int, ...] | None,
    fmt: Format,
) -> None:
    if dtype is None:
        if tensor is not None:
            raise FormatError(f"{fmt.name} has no {part}, got {_describe(tensor)}; drop it")
        return
    wanted = f"{part} of {fmt.name}: expected {dtype}" + (f" {list(shape)}" if shape else "")
    if tensor is None:
        raise FormatError(f"{wanted}, got none")
    if tensor.dtype != dtype or (shape is not None and tuple(tensor.shape) != shape):
        hint = ""
        if shape is not None and tuple(tensor.shape) == (*shape[:-2], *shape[:-3:-1]):
            hint = "; it looks transposed: scales are [..., rows, groups]"
        raise FormatError(f"{wanted}, got {_describe(tensor)}{hint}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    scale: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> QTensor:
    """Quantize a [..., rows, columns] tensor (bf16, fp16 or fp32) to `fmt`.

    With amax over each block of `fmt.block`, everything in fp32:

        Int4             s = amax/7;            q = rne(x/s) in -8..7
        Int4, zero point s = (max-min)/15, 0 counted in; z = rne(-min/s) - 8; q = rne(x/s) + z
        Int8             s = amax/127;          q = rne(x/s) in -127..127
        FP8              s = amax/448;          q = e4m3(x/s);  e8m0 scales: s = RCEIL(amax/448)
        MXFP4, MXFP8     s = RCEIL(amax/6), RCEIL(amax/448);  q = e2m1(x/s), e4m3(x/s)
        NVFP4            g = 2688/amax over the matrix (or row); s = e4m3(amax * (g * 1/6));
                         q = e2m1(x * min(1/(s * (1/g)), FLT_MAX)); global_scale = 1/g

    Scales are rounded to their storage dtype before they divide. A zero block has scale 1 (NVFP4:
    block scale 0 under global scale 1) and codes 0, never NaN. NVFP4 is bit-exact with Transformer
    Engine's reference except for all-zero tensors, where theirs stores 1/FLT_MAX.

    `scale` (FP8 and Int8) and `global_scale` (NVFP4), fp32 decode scales, make it static.

    >>> q = quantize(torch.tensor([[0.5, -1.0, 2.0, 7.0] * 8]), Int4(32))
    >>> q.scale.item(), dequantize(q)[0, :4].tolist()
    (1.0, [0.0, -1.0, 2.0, 7.0])
    """
    if not x.is_floating_point() or x.element_size() < 2:
        raise FormatError(f"quantize expects bf16, fp16, fp32 or fp64, got {_describe(x)}")
    if x.dim() < 2:
        raise FormatError(f"quantize expects [..., rows, columns], got {list(x.shape)}")
    fmt.check_columns(x.shape[-1], "quantize")
    if isinstance(fmt, Float):
        return QTensor(x.to(fmt.data_dtype), fmt)
    x = x.float().contiguous()
    if isinstance(fmt, NVFP4):
        return _quantize_nvfp4(x, fmt, global_scale)
    if global_scale is not None:
        raise FormatError(f"{fmt.name} has no global scale")
    if isinstance(fmt, Int4) and fmt.zero_point:
        return _quantize_int4_zero(x, fmt)
    if scale is None:
        scale = _dynamic_scale(_block_amax(x, fmt.block), fmt)
    elif not isinstance(fmt, FP8 | Int8):
        raise FormatError(f"only fp8 and int8 take a static scale, got one for {fmt.name}")
    return QTensor(_encode(x, scale, fmt), fmt, scale)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode to `dtype`: code * scale (* global_scale) in fp32 (or fp64), then one rounding.

    Integer codes lose their zero point first: (code - zero) * scale.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = decode_codes(q).to(wide)
    if q.scale is None:
        return values.to(dtype)
    if q.zero is not None:
        values = values - expand_blocks(q.zero, q.format.block, q.shape)
    values = values * expand_blocks(decode_scale(q.scale).to(wide), q.format.block, q.shape)
    if q.global_scale is not None:
        per_token = isinstance(q.format, NVFP4) and q.format.per_token
        values = values * (
            q.global_scale[..., None] if per_token else q.global_scale[..., None, None]
        )
    return values.to(dtype)


def round_activations(x: Tensor, fmt: Format, static_scale: Tensor | None) -> Tensor:
    """The values (fp32, or fmt's own 16-bit dtype) that rows x [P, K] have after quantization.

    static_scale [P] (fp32 decode scales) is for the per-tensor formats, whose scale is given.
    """
    if isinstance(fmt, Float):
        return x.to(fmt.data_dtype)
    if static_scale is None:
        return dequantize(quantize(x, fmt))
    if isinstance(fmt, NVFP4):
        return dequantize(quantize(x, NVFP4(per_token=True), global_scale=static_scale))
    return dequantize(quantize(x, FP8(), scale=static_scale[:, None].float()))


def decode_codes(q: QTensor) -> Tensor:
    """Codes as fp32 values, without scales."""
    if isinstance(q.format, Int4):
        return packing.sign_extend(packing.unpack_nibbles(q.data)).float()
    if q.format.packed:
        return casts.decode_e2m1(packing.unpack_nibbles(q.data))
    return q.data.float()


def decode_scale(scale: Tensor) -> Tensor:
    """Scales as fp32 values; uint8 scales are e8m0 bytes."""
    return casts.decode_e8m0(scale) if scale.dtype == torch.uint8 else scale.float()


def expand_blocks(scale: Tensor, block: Block, shape: tuple[int, ...]) -> Tensor:
    """Repeat one value per block over the elements of a [..., rows, columns] matrix."""
    for axis, size in zip((-2, -1), block, strict=True):
        if size is not None and size > 1:
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scale


def _block_amax(x: Tensor, block: Block) -> Tensor:
    """max |x| of every block, [..., row blocks, column blocks]; partial blocks see zeros."""
    rows, columns = x.shape[-2:]
    high = block[0] or max(rows, 1)
    wide = block[1] or max(columns, 1)
    padded = pad(x.abs(), (0, -columns % wide, 0, -rows % high))
    *batch, rows, columns = padded.shape
    return padded.view(*batch, rows // high, high, columns // wide, wide).amax((-3, -1))


def _divide(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once on every device."""
    # NOTE: CUDA divides by a Python scalar by multiplying with its reciprocal: two roundings.
    return x / torch.full_like(x, number)


def _dynamic_scale(amax: Tensor, fmt: Format) -> Tensor:
    assert fmt.scale_dtype is not None
    if fmt.scale_dtype == torch.uint8:
        return casts.encode_e8m0(_divide(amax, fmt.max_code))
    scale = _divide(amax, fmt.max_code).to(fmt.scale_dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _encode(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    scaled = x / expand_blocks(decode_scale(scale), fmt.block, tuple(x.shape))
    if isinstance(fmt, Int4):
        return packing.pack_nibbles(casts.encode_int(scaled, -8, 7))
    if isinstance(fmt, Int8):
        return casts.encode_int(scaled, -127, 127)
    if isinstance(fmt, MXFP4):
        return packing.pack_nibbles(casts.encode_e2m1(scaled))
    assert isinstance(fmt, FP8 | MXFP8)
    return casts.encode_e4m3(scaled)


def _quantize_int4_zero(x: Tensor, fmt: Int4) -> QTensor:
    group = fmt.group_size or x.shape[-1]
    groups = x.view(*x.shape[:-1], -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = _divide(high - low, 15.0).to(fmt.scale_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = casts.encode_int((-low / scale.float()).round() - 8, -8, 7)
    codes = (groups / scale.float()[..., None]).round() + zero[..., None]
    data = packing.pack_nibbles(casts.encode_int(codes, -8, 7).flatten(-2))
    return QTensor(data, fmt, scale, zero)


def _quantize_nvfp4(x: Tensor, fmt: NVFP4, global_scale: Tensor | None) -> QTensor:
    if global_scale is None:
        amax = x.abs().amax(-1 if fmt.per_token else (-2, -1))
        # NOTE: a Python scalar over a tensor is reciprocal times scalar: two roundings, not one.
        encode = torch.full_like(amax, NVFP4_RANGE).div(amax).clamp(max=_FLT_MAX)
        encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    else:
        encode = 1.0 / global_scale.float()
    decode = 1.0 / encode
    wide = encode[..., None, None] if not fmt.per_token else encode[..., None]
    vmax = _block_amax(x, fmt.block)
    sixth = torch.reciprocal(torch.tensor(6.0, dtype=torch.float32, device=x.device))
    scale = casts.encode_e4m3(vmax * (wide * sixth))
    inverse = (1.0 / (scale.float() * (1.0 / wide))).clamp(max=_FLT_MAX)
    inverse = torch.where(vmax == 0, 0.0, inverse)
    codes = casts.encode_e2m1(x * expand_blocks(inverse, fmt.block, tuple(x.shape)))
    return QTensor(packing.pack_nibbles(codes), fmt, scale, None, decode)
