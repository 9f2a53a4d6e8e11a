"""The packed layout of the Hopper kernels, for decode and prefill: this file is its specification.

Weights are the left operand of the matrix instruction. What a lane holds of it in registers is what
a lane loads, 16 bytes at a time, in the order of use: no shared memory, no shuffle. `hopper_codes`
has the bits within those 16 bytes; here is everything else. One expert's matrix becomes:

    data       int32 [row tiles, chunks, loads, 4 warps, 32 lanes, 4 words]
    scale      int32 or a float type, per group of columns; see below
    zero       int32, for int4 with zero points
    row_scale  fp32 [row tiles, 64], multiplies the accumulators of whole rows at the end

Rows. A row tile is 64 rows, 16 for each of 4 warps. Lane = 4 * g + t owns rows g and g + 8 of its
warp's 16 ("b = 0, 1"). w13 with a gate has gate rows in b = 0 and the up rows of the same outputs
in b = 1, so that the activation is a lane's own affair; all other matrices are in plain order:

        gated w13: tile of 32 outputs             w2, and w13 without a gate: tile of 64 rows
        warp w   b=0, g  gate row 32 T + 8 w + g   row 64 T + 16 w + g
                 b=1, g  up   row 32 T + 8 w + g   row 64 T + 16 w + 8 + g

Columns. A chunk is 64 columns, two blocks (c) of 32. In every block lane t of a quad owns the 8
contiguous columns 8 t .. 8 t + 7, so that it loads its activations as 16 contiguous bytes, and a
group of 32 is two whole matrix instructions (s), whatever their own order of columns:

        k = 64 * chunk + 32 * c + 8 * t + 4 * s + 2 * j + h                            (`K_ORDER`)

        column of a block   0 1 2 3 4 5 6 7 8 9 ...                           31
        lane t              0 . . . . . . . 1 . . . . . . . 2 . . . . . . . 3 . .
        step s              0 0 0 0 1 1 1 1 0 0 0 0 1 1 1 1 ...
        register pair j     0 0 1 1 0 0 1 1 0 0 1 1 ...
        half of register h  0 1 0 1 0 1 0 1 0 1 ...

For m16n8k16 (and wgmma with the left operand in registers) j = 1 is the fragment's "k + 8" half.

Loads. 4-bit codes need 1 load per chunk (words: c, then A and B of `hopper_codes`), 8-bit codes 2
(load: c; words: s, then A and B), 16-bit 4 (load: 2 c + s; words: j, then b: the fragment itself).

Row parameters lie beside the codes for super-blocks of 256 columns, scales of their halves apart,
so that one load serves two chunks. The four lanes of a quad read the same ones, but for NVFP4's:

    mxfp4, mxfp8    scale  int32 [row tiles, 2 * super-blocks, 4 w, 8 g, 2 chunks]
                    `E8M0_PAIRS`: pairs c = 0, 1 of exponents e + bias - shift, modulo 255;
                    row_scale = 2**shift, almost always 1
    nvfp4           scale  int32 [row tiles, 2 * super-blocks, 4 w, 8 g, 2 halves of the quad,
                           2 chunks]
                    `E5M3_*_PAIRS`: pairs c = 0, 1 of the group of 16 that lanes t = 0, 1 or 2, 3
                    have in each block, as the five bits of exponent and three of mantissa that
                    fp16 has of 128 times them; row_scale = global_scale
    int4, fp8, int8 in groups of 32, 64 or 128 along K
                    scale  bf16, fp16 or fp32 (e8m0 becomes fp32)
                           [row tiles, 2 * super-blocks, 4 w, 8 g, groups in 128 columns, 2 b]
                    zero   int32 [row tiles, super-blocks, 4 w, 8 g, 2 words (g32) or 1]
                    `ZERO_*_PAIRS`: a word has the pairs of four groups (g128: two)
                    row_scale = 2**-shift for int4 with bf16 scales, which are stored times 2**shift
    128 x 128 blocks       fp32 [row tiles, 2 * super-blocks, 2 b]
    per row or matrix      row_scale alone; zero int32 [row tiles, 1, 4 w, 8 g, 1], pair 0

A matrix ends with its last row and column; tiles, chunks and super-blocks are filled up with codes
that decode to zero under scales that are finite. The least and the largest numbers are refused
where they could not be exact, NaN codes, which the bit moves would take for numbers, and negative
scales of nvfp4, which are stored without a sign. Codes under a scale of zero are stored as zeros,
and come back so: sums that are kept in units of the scale at hand (`hopper_prefill`) have no unit
for them, and what nvfp4's become in bf16 is not zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from moelten.errors import FormatError
from moelten.formats import NVFP4, Format
from moelten.kernels.hopper_bits import Bits, Code, PairCode
from moelten.kernels.hopper_codes import Storage, storage
from moelten.qtensor import QTensor, decode_codes, decode_scale, expand_blocks

ROWS, WARPS, LANES_G, LANES_T = 64, 4, 8, 4
CHUNK, BLOCK, SUPER_BLOCK = 64, 32, 256
K_ORDER = {"c": 32, "t": 8, "s": 4, "j": 2, "h": 1}
"""Columns within a chunk that each index of a lane's registers steps over, outermost first."""

_SPAN = 2.0**-60  # between the scales of a row
_SLAB_BYTES = 4 << 20  # of a matrix at a time: little enough for caches, and few launches


@dataclass(frozen=True)
class HopperLayout:
    """The layout for one type of operands, which decides where the bits of a code go.

    operand: "bf16" or "fp16": what the activations are multiplied as
    """

    operand: str = "bf16"
    version: int = 5

    @property
    def name(self) -> str:
        return "hopper" if self.operand == "bf16" else f"hopper-{self.operand}"

    def pack(self, matrix: QTensor) -> dict[str, Tensor]:
        stored = storage(matrix.format, self.operand)
        _check(matrix, stored)
        if stored.in_units:
            _check_spans(matrix)
        if stored.in_units or isinstance(matrix.format, NVFP4):
            matrix = _silence(matrix)
        parts = {"data": _pack_data(matrix, stored.code)}
        parts |= _pack_scale(matrix, stored)
        if matrix.zero is not None:
            parts["zero"] = _pack_zero(matrix.zero, stored)
        return parts

    def unpack(self, parts: dict[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> QTensor:
        stored = storage(fmt, self.operand)
        matrix = _Shape(list(shape[:-2]), *shape[-2:])
        stored_columns = matrix.columns * stored.code.bits // 8
        data = matrix.untile(_unpack_data(parts["data"], stored.code), stored_columns)
        scales = _unpack_scale(parts, stored, fmt, matrix)
        if "zero" in parts:
            scales["zero"] = _unpack_zero(parts["zero"], stored, fmt, matrix)
        # Copies, because views of a single row or group have strides that later views refuse.
        scales = {n: s.clone(memory_format=torch.contiguous_format) for n, s in scales.items()}
        return QTensor(data.view(fmt.data_dtype), fmt, **scales)


def _check(matrix: QTensor, stored: Storage) -> None:
    """Refuse numbers that the bit moves would misread."""
    if stored.code.name == "e4m3":
        bad = ((matrix.data.view(torch.uint8) & 0x7F) == 0x7F).nonzero()
        if len(bad):
            raise FormatError(
                f"{len(bad)} e4m3 codes are NaN, the first at {bad[0].tolist()}; the checkpoint is "
                "damaged or is not e4m3"
            )
    if isinstance(matrix.format, NVFP4):
        assert matrix.scale is not None
        bad = (matrix.scale.float() < 0).nonzero()
        if len(bad):
            raise FormatError(
                f"{len(bad)} nvfp4 scales are negative, the first at {bad[0].tolist()}, and are "
                "stored without a sign; the checkpoint is damaged, or use another backend"
            )
    if matrix.zero is not None and bool((matrix.zero < -8).any() | (matrix.zero > 7).any()):
        raise FormatError(
            f"int4 zero points are -8..7, got {int(matrix.zero.min())}..{int(matrix.zero.max())}"
        )


def _check_spans(matrix: QTensor) -> None:
    """Refuse rows whose scales are further apart than sums in units of a scale can be brought."""
    assert matrix.scale is not None
    scale = decode_scale(matrix.scale).abs()
    most = scale.amax(-1, keepdim=True) * _SPAN
    if not bool(((scale <= most) & (scale > 0)).any()):
        return
    # Scales of nothing but zeros may be as small as they like.
    live = _live_blocks(matrix)
    bad = ((scale <= most) & (scale > 0) & live).nonzero()
    if len(bad):
        raise FormatError(
            f"{len(bad)} {matrix.format.name} scales, the first at {bad[0].tolist()}, are not over "
            "2**-60 of the largest of their rows; the checkpoint is damaged, or use another backend"
        )


def _live_blocks(matrix: QTensor) -> Tensor:
    """Whether a block has a code that does not decode to zero; bool, the shape of scale."""
    codes, (rows, columns) = decode_codes(matrix), matrix.format.block
    if matrix.zero is not None:
        codes = codes - expand_blocks(matrix.zero, matrix.format.block, matrix.shape)
    live = _fill(codes != 0, rows or 1, columns or 1)
    live = torch.unflatten(live, -1, (-1, columns or 1)).any(-1)
    return torch.unflatten(live, -2, (-1, rows or 1)).any(-2)


def _silence(matrix: QTensor) -> QTensor:
    """The same matrix with codes that decode to zero under every scale of zero."""
    assert matrix.scale is not None
    if not matrix.scale.is_floating_point():  # exponents: no power of two is zero
        return matrix
    dead = matrix.scale.float() == 0
    if not bool(dead.any()):
        return matrix
    rows, columns = matrix.format.block
    raw = matrix.data.contiguous().view(torch.uint8)
    block = rows, None if columns is None else columns * matrix.format.bits // 8
    nothing: Tensor | int = 0
    if matrix.zero is not None:
        nothing = expand_blocks((matrix.zero.view(torch.uint8) & 0xF) * 0x11, block, raw.shape)
    silent = torch.where(expand_blocks(dead, block, raw.shape), nothing, raw).to(torch.uint8)
    return matrix.with_parts({**matrix.tensors(), "data": silent.view(matrix.data.dtype)})


# Rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """A matrix [*batch, rows, columns]; batch is [2] for gate and up, else [1] or []."""

    batch: list[int]
    rows: int
    columns: int

    def untile(self, tiles: Tensor, columns: int) -> Tensor:
        """Inverse of `_tile_rows`, cut to the matrix's rows and to `columns`."""
        order = (3, 0, 1, 2, 4) if self.batch == [2] else (0, 1, 3, 2, 4)
        flat = tiles.permute(order).reshape(math.prod(self.batch), -1, tiles.shape[-1])
        cut = flat[:, : self.rows, :columns].contiguous()
        return cut.view(*self.batch, self.rows, columns)


def _fill(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros at the end of the last two axes up to multiples of `rows` and `columns`."""
    missing = (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows)
    return pad(x, missing) if any(missing) else x


def _tile_rows(x: Tensor, columns: int = 1) -> Tensor:
    """[2, I, C], [1, R, C] or [R, C], filled up with zeros, to [row tiles, 4 w, 8 g, 2 b, C]."""
    if x.dim() == 3 and x.shape[0] == 2:
        filled = _fill(x, ROWS // 2, columns)
        return filled.view(2, -1, WARPS, LANES_G, filled.shape[-1]).permute(1, 2, 3, 0, 4)
    filled = _fill(x.reshape(x.shape[-2:]), ROWS, columns)
    return filled.view(-1, WARPS, 2, LANES_G, filled.shape[-1]).transpose(2, 3)


def _pack_rows(x: Tensor) -> Tensor:
    """One number per row, [*batch, rows], to [row tiles, 64] in the order 16 w + 8 b + g."""
    return _tile_rows(x[..., None])[..., 0].transpose(2, 3).reshape(-1, ROWS)


def _unpack_rows(x: Tensor, matrix: _Shape) -> Tensor:
    """Inverse of `_pack_rows`."""
    return matrix.untile(x.view(-1, WARPS, 2, LANES_G).transpose(2, 3)[..., None], 1)[..., 0]


# Codes --------------------------------------------------------------------------------------------


def _runs(code: Code) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of a run of 8 columns, (loads per block, units per load and block), and the order of
    [tile, w, g, b, chunk, c, t, load, unit] in storage, b last."""
    # A load is two units: of 4-bit codes those of two blocks, else two of one run.
    if code.bits == 4:
        return (1, 1), (0, 4, 7, 1, 2, 6, 5, 8, 3)
    return (code.bits // 8, 2), (0, 4, 5, 7, 1, 2, 6, 8, 3)


def _pack_data(matrix: QTensor, code: Code) -> Tensor:
    """int32 [row tiles, chunks, loads, 4, 32, 4]"""
    raw, per_chunk = matrix.data.contiguous().view(torch.uint8), CHUNK * code.bits // 8
    missing = -raw.shape[-1] % per_chunk
    if missing and matrix.zero is not None and matrix.format.block[1] is None:
        # One zero point serves the whole row: only its own code decodes to zero.
        zeros = (matrix.zero.view(torch.uint8) & 0xF) * 0x11
        raw = torch.cat((raw, zeros.expand(*raw.shape[:-1], missing)), -1)
    words = _tile_rows(raw, per_chunk).view(torch.int32)
    axes, order = _runs(code)
    units = torch.unflatten(words, -1, (-1, 2, LANES_T, *axes)).permute(order)
    placed = _map_bits(units, code.placement, before=code.flip)
    return placed.view(words.shape[0], -1, code.bits // 4, WARPS, LANES_G * LANES_T, 4)


def _unpack_data(packed: Tensor, code: Code) -> Tensor:
    """Bytes [row tiles, 4 w, 8 g, 2 b, stored columns]."""
    axes, order = _runs(code)
    sizes = (packed.shape[0], WARPS, LANES_G, 2, packed.shape[1], 2, LANES_T, *axes)
    units = packed.contiguous().view([sizes[axis] for axis in order])
    words = _map_bits(units, _inverse(code.placement), after=code.flip)
    return words.permute(_inverse(order)).flatten(4).view(torch.uint8)


def _map_bits(units: Tensor, placement: Bits, before: int = 0, after: int = 0) -> Tensor:
    """Move bit i of every unit (int32 [tiles, ..., 2]) to bit placement[i], between two XORs."""
    if placement == tuple(range(64)) and before == after:
        return units.clone(memory_format=torch.contiguous_format)
    out = torch.empty(units.shape, dtype=torch.int32, device=units.device)
    tables = _tables(placement).to(units.device)
    step = max(_SLAB_BYTES // out[0].nbytes, 1)
    for first in range(0, units.shape[0], step):
        slab = units[first : first + step]
        stored = (slab.contiguous() ^ _signed(before, 32)).view(torch.uint8).view(-1, 8)
        moved = torch.zeros(stored.shape[0], dtype=torch.int64, device=units.device)
        for byte in range(8):
            moved |= tables[byte].index_select(0, stored[:, byte].int())
        out[first : first + step] = moved.view(torch.int32).view(slab.shape) ^ _signed(after, 32)
    return out


@lru_cache(maxsize=64)
def _tables(placement: Bits) -> Tensor:
    """int64 [8, 256]: where the bits of each value of each byte of a unit go."""
    values = torch.arange(256)
    tables = torch.zeros(8, 256, dtype=torch.int64)
    for bit, to in enumerate(placement):
        tables[bit // 8] |= (values >> bit % 8 & 1) * _signed(1 << to, 64)
    return tables


@lru_cache(maxsize=64)
def _inverse(order: Bits) -> Bits:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


# Row parameters -----------------------------------------------------------------------------------


def _pack_scale(matrix: QTensor, stored: Storage) -> dict[str, Tensor]:
    scale, rows = matrix.scale, matrix.shape[-2]
    if scale is None:
        return {}
    if stored.scale == "row":
        per_row = decode_scale(scale)[..., 0].expand(*matrix.shape[:-1])
        return {"row_scale": _pack_rows(per_row)}
    if isinstance(matrix.format, NVFP4):
        assert matrix.global_scale is not None and stored.pairs is not None
        wide = matrix.global_scale.reshape(*matrix.shape[:-2], -1).expand(*matrix.shape[:-1])
        fields = _pack_words(_to_e5m3(scale), (2, 2, 2), stored.pairs)
        return {"scale": fields, "row_scale": _pack_rows(wide)}
    if stored.pairs is not None:
        exponents, shift = _shift_exponents(matrix, stored)
        fields = _pack_words(exponents, (2, 2, 1), stored.pairs)
        return {"scale": fields, "row_scale": _pack_rows(torch.exp2(shift.float()))}
    numbers = decode_scale(scale) if scale.dtype == torch.uint8 else scale
    if stored.scale == "block":
        return {"scale": _pack_blocks(numbers.float(), rows)}
    parts = {}
    if stored.folds:
        # The largest of a row to 2**14 .. 2**15; a row_scale must not be subnormal.
        _, exponent = torch.frexp(numbers.abs().amax(-1).float())
        shift = (15 - exponent).clamp(max=126)
        numbers = torch.ldexp(numbers.float(), shift[..., None]).to(numbers.dtype)
        parts["row_scale"] = _pack_rows(torch.exp2(-shift.float()))
    groups = SUPER_BLOCK // 2 // stored.group
    tiles = torch.unflatten(_tile_rows(numbers, 2 * groups), -1, (-1, groups))
    return {"scale": tiles.permute(0, 4, 1, 2, 5, 3).contiguous(), **parts}


def _unpack_scale(
    parts: dict[str, Tensor], stored: Storage, fmt: Format, matrix: _Shape
) -> dict[str, Tensor]:
    """scale and global_scale, where the format has them."""
    if stored.scale == "none":
        return {}
    assert fmt.scale_dtype is not None
    high, groups = fmt.scale_shape(matrix.rows, matrix.columns)
    if stored.scale == "row":
        per_row = _unpack_rows(parts["row_scale"], matrix)[..., :high, None]
        return {"scale": _encode_scale(per_row, fmt.scale_dtype)}
    if isinstance(fmt, NVFP4):
        assert stored.pairs is not None
        fields = matrix.untile(_unpack_words(parts["scale"], (2, 2, 2), stored.pairs), groups)
        per_row = _unpack_rows(parts["row_scale"], matrix)
        wide = per_row if fmt.per_token else per_row[..., 0]
        return {"scale": _from_e5m3(fields), "global_scale": wide}
    if stored.pairs is not None:
        fields = matrix.untile(_unpack_words(parts["scale"], (2, 2, 1), stored.pairs), groups)
        shift = _unpack_rows(parts["row_scale"], matrix).log2().int()
        return {"scale": ((fields.int() - stored.bias + shift[..., None]) % 255).to(torch.uint8)}
    if stored.scale == "block":
        return {
            "scale": _encode_scale(_unpack_blocks(parts["scale"], fmt, matrix), fmt.scale_dtype)
        }
    tiles = parts["scale"].permute(0, 2, 3, 5, 1, 4).flatten(4)
    numbers = matrix.untile(tiles, groups)
    if stored.folds:
        numbers = numbers * _unpack_rows(parts["row_scale"], matrix)[..., None]
    return {"scale": _encode_scale(numbers, fmt.scale_dtype)}


def _encode_scale(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `decode_scale`, exactly: of e8m0 bytes only the exponents remain."""
    if dtype != torch.uint8:
        return numbers.to(dtype)
    return (numbers.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def _to_e5m3(scale: Tensor) -> Tensor:
    """Bytes of e4m3 numbers that are not negative: 128 times them as fp16, exactly, less zeros."""
    return ((scale.float() * 128).half().view(torch.int16) >> 7).to(torch.uint8)


def _from_e5m3(fields: Tensor) -> Tensor:
    """Inverse of `_to_e5m3`."""
    numbers = (fields.to(torch.int16) << 7).view(torch.float16).float() / 128
    return numbers.to(torch.float8_e4m3fn)


def _shift_exponents(matrix: QTensor, stored: Storage) -> tuple[Tensor, Tensor]:
    """e8m0 exponents as stored (uint8, the shape of scale) and the shift of each row.

    A bf16 multiplier has 254 exponents, and the product of a scale and its codes must be exact,
    subnormal or not. Modulo 255 the exponents of groups of zeros, which may lie outside, come back.
    """
    assert matrix.scale is not None
    e = matrix.scale.int()
    if int(e.max()) <= 254 - stored.bias and int(e.min()) >= stored.least:
        return (e + stored.bias).to(torch.uint8), torch.zeros_like(e[..., 0])
    live = _live_blocks(matrix)
    least = torch.where(live, e, -1 << 9).amax(-1) + stored.bias - 254
    most = torch.where(live, e, 1 << 9).amin(-1) - stored.least
    if bool((least > most).any()):
        bad = (least > most).nonzero()
        raise FormatError(
            f"{len(bad)} rows, the first {bad[0].tolist()}, have {matrix.format.name} scales that "
            f"span more than {254 - stored.bias - stored.least} powers of two, which no one factor "
            "brings into bf16; use another backend"
        )
    shift = least.clamp(min=0).minimum(most)
    return ((e + stored.bias - shift[..., None]) % 255).to(torch.uint8), shift


def _pack_words(values: Tensor, axes: tuple[int, int, int], pairs: PairCode) -> Tensor:
    """Bytes [*batch, rows, groups] to int32 [row tiles, 2 * super-blocks, 4, 8, (th), words].

    axes: of the groups of half a super-block: words, pairs of a word, halves of a quad (th; or 1)
    """
    tiles = torch.unflatten(_tile_rows(values, 2 * math.prod(axes)), -1, (-1, *axes))
    canonical = tiles.permute(0, 4, 1, 2, 7, 5, 6, 3).flatten(-2)
    return _place_words(canonical, pairs.placement).squeeze(4)


def _unpack_words(packed: Tensor, axes: tuple[int, int, int], pairs: PairCode) -> Tensor:
    """Inverse of `_pack_words`: bytes [row tiles, 4, 8, 2 b, groups]."""
    words = packed.view(*packed.shape[:4], axes[2], axes[0]).contiguous()
    units = _map_bits(words.view(words.shape[0], -1, 2), _inverse(_twice(pairs.placement)))
    canonical = units.view(words.shape)[..., None].view(torch.uint8)
    tiles = torch.unflatten(canonical, -1, (axes[1], 2))
    return tiles.permute(0, 2, 3, 7, 1, 5, 6, 4).flatten(4)


def _place_words(canonical: Tensor, placement: Bits) -> Tensor:
    """Bytes [row tiles, ..., 4] to int32 [row tiles, ...]."""
    words = canonical.contiguous().view(torch.int32)[..., 0]
    return _map_bits(words.reshape(words.shape[0], -1, 2), _twice(placement)).view(words.shape)


def _twice(placement: Bits) -> Bits:
    """A word's placement for two of them."""
    return (*placement, *(32 + to for to in placement))


def _pack_blocks(scale: Tensor, rows: int) -> Tensor:
    """[*batch, row blocks, column blocks] to [row tiles, 2 * super-blocks, 2 b]."""
    gated = scale.dim() == 3 and scale.shape[0] == 2
    height = ROWS // 2 if gated else ROWS
    halves = scale if gated else scale.reshape(1, *scale.shape[-2:]).expand(2, -1, -1)
    tiles = torch.arange(-(-rows // height), device=scale.device) * height // 128
    return _fill(halves[:, tiles].permute(1, 2, 0), 2, 1)


def _unpack_blocks(packed: Tensor, fmt: Format, matrix: _Shape) -> Tensor:
    """Inverse of `_pack_blocks`."""
    height = ROWS // 2 if matrix.batch == [2] else ROWS
    halves = packed[:: 128 // height].permute(2, 0, 1)[: math.prod(matrix.batch)]
    high, wide = fmt.scale_shape(matrix.rows, matrix.columns)
    return halves[..., :wide].reshape(*matrix.batch, high, wide)


def _pack_zero(zero: Tensor, stored: Storage) -> Tensor:
    """int8 [*batch, rows, groups] to int32 [row tiles, super-blocks, 4, 8, words]."""
    assert stored.zeros is not None
    groups = SUPER_BLOCK // stored.group if stored.group else 1
    nibbles = _tile_rows(zero.view(torch.uint8) & 0xF, groups) ^ 8
    pairs = nibbles[:, :, :, 0] | (nibbles[:, :, :, 1] << 4)
    pairs = torch.unflatten(pairs, -1, (-1, groups)).permute(0, 3, 1, 2, 4)
    pairs = torch.unflatten(pad(pairs, (0, -groups % 4), value=0x88), -1, (-1, 4))
    return _place_words(pairs, stored.zeros.placement)


def _unpack_zero(packed: Tensor, stored: Storage, fmt: Format, matrix: _Shape) -> Tensor:
    """Inverse of `_pack_zero`."""
    assert stored.zeros is not None
    groups = SUPER_BLOCK // stored.group if stored.group else 1
    units = packed.contiguous().view(packed.shape[0], -1, 2)
    units = _map_bits(units, _inverse(_twice(stored.zeros.placement)))
    pairs = units.view(*packed.shape, 1).view(torch.uint8).flatten(4)[..., :groups]
    pairs = pairs.permute(0, 2, 3, 1, 4).flatten(3)
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), 3)
    values = matrix.untile(nibbles, fmt.scale_shape(matrix.rows, matrix.columns)[1])
    return values.view(torch.int8) - 8
