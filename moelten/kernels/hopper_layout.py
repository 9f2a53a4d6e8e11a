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

Scales lie beside the codes for super-blocks of 256 columns, so that one or two 16-byte loads serve
four chunks. The four lanes of a quad read the same ones, unless there is an axis t.

    mxfp4, mxfp8   int32 [row tiles, super-blocks, 4 warps, 8 g, 4 chunks]: `E8M0_PAIRS`, exponents
                   e + bias - shift modulo 255; row_scale is 2**shift, almost always 1

A matrix ends with its last row and column; tiles, chunks and super-blocks are filled up with codes
that decode to zero under scales that are finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from moelten.errors import FormatError, UnsupportedError
from moelten.formats import MXFP4, Format
from moelten.kernels.hopper_codes import E2M1_BF16, Bits, Code
from moelten.qtensor import QTensor

ROWS, WARPS, LANES_G, LANES_T = 64, 4, 8, 4
CHUNK, BLOCK, SUPER_BLOCK = 64, 32, 256
K_ORDER = {"c": 32, "t": 8, "s": 4, "j": 2, "h": 1}
"""Columns within a chunk that each index of a lane's registers steps over, outermost first."""

_SLAB_BYTES = 16 << 20
_EXPONENTS: dict[type[Format], tuple[int, int]] = {MXFP4: (126, -5)}
"""What a stored exponent adds to e, and the least e - shift whose products are exact in bf16."""


@dataclass(frozen=True)
class HopperLayout:
    """The layout for one type of operands, which decides where the bits of a code go."""

    operand: str = "bf16"
    version: int = 1

    @property
    def name(self) -> str:
        return f"hopper-{self.operand}"

    def pack(self, matrix: QTensor) -> dict[str, Tensor]:
        code = code_of(matrix.format, self.operand)
        parts = {"data": _pack_data(matrix.data, code)}
        assert matrix.scale is not None
        exponents, shift = _shift_exponents(matrix)
        parts["scale"] = _pack_exponents(exponents)
        parts["row_scale"] = _pack_rows(torch.exp2(shift.float()))
        return parts

    def unpack(self, parts: dict[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> QTensor:
        code = code_of(fmt, self.operand)
        *batch, rows, columns = shape
        data = _unpack_data(parts["data"], code, batch, rows, columns)
        shift = _unpack_rows(parts["row_scale"], batch, rows).log2().int()
        groups = fmt.scale_shape(rows, columns)[1]
        exponents = _unpack_exponents(parts["scale"], batch, rows, groups).int()
        e8m0 = (exponents - _EXPONENTS[type(fmt)][0] + shift[..., None]) % 255
        return QTensor(data, fmt, e8m0.to(torch.uint8))


def code_of(fmt: Format, operand: str) -> Code:
    """The code of a weight format as operands of a type ("bf16")."""
    code = {(MXFP4, "bf16"): E2M1_BF16}.get((type(fmt), operand))
    if code is None:
        raise UnsupportedError(f"the Hopper layout has no {fmt.name} weights as {operand} operands")
    return code


# Rows ---------------------------------------------------------------------------------------------


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


def _untile_rows(tiles: Tensor, batch: list[int], rows: int, columns: int) -> Tensor:
    """Inverse of `_tile_rows` for a matrix [*batch, rows, columns]."""
    order = (3, 0, 1, 2, 4) if batch == [2] else (0, 1, 3, 2, 4)
    flat = tiles.permute(order).reshape(math.prod(batch), -1, tiles.shape[-1])
    return flat[:, :rows, :columns].reshape(*batch, rows, columns)


def _pack_rows(x: Tensor) -> Tensor:
    """One number per row, [*batch, rows], to [row tiles, 64] in the order 16 w + 8 b + g."""
    return _tile_rows(x[..., None])[..., 0].transpose(2, 3).reshape(-1, ROWS)


def _unpack_rows(x: Tensor, batch: list[int], rows: int) -> Tensor:
    tiles = x.view(-1, WARPS, 2, LANES_G).transpose(2, 3)[..., None]
    return _untile_rows(tiles, batch, rows, 1)[..., 0]


# Codes --------------------------------------------------------------------------------------------


def _unit_order(bits: int) -> tuple[int, ...]:
    """From [tile, w, g, b, chunk, c, t, load of c, unit] to the order of storage, b last."""
    # Two units make a load: of 4-bit codes those of two blocks, of others two of one run.
    return (0, 4, 7, 1, 2, 6, 5, 8, 3) if bits == 4 else (0, 4, 5, 7, 1, 2, 6, 8, 3)


def _pack_data(data: Tensor, code: Code) -> Tensor:
    """Codes [*batch, rows, stored columns] to int32 [row tiles, chunks, loads, 4, 32, 4]."""
    raw = data.contiguous().view(torch.uint8)
    rows = _tile_rows(raw, CHUNK * code.bits // 8).view(torch.int32)
    words = code.bits // 4  # 32-bit words in a run of 8 columns, and loads per chunk
    runs = rows.unflatten(-1, (-1, 2, LANES_T, max(words // 2, 1), min(words, 2)))
    placed = _map_bits(runs.permute(_unit_order(code.bits)), code.placement, before=code.flip)
    return placed.view(rows.shape[0], -1, words, WARPS, LANES_G * LANES_T, 4)


def _unpack_data(packed: Tensor, code: Code, batch: list[int], rows: int, columns: int) -> Tensor:
    """Inverse of `_pack_data`, as bytes."""
    words = code.bits // 4
    order = _unit_order(code.bits)
    sizes = (packed.shape[0], WARPS, LANES_G, 2, packed.shape[1], 2, LANES_T)
    sizes = (*sizes, max(words // 2, 1), min(words, 2))
    units = packed.view([sizes[axis] for axis in order])
    runs = _map_bits(units, _inverse(code.placement), after=code.flip)
    runs = runs.permute([order.index(axis) for axis in range(9)])
    raw = runs.flatten(4).view(torch.uint8)
    return _untile_rows(raw, batch, rows, columns * code.bits // 8)


def _map_bits(units: Tensor, placement: Bits, before: int = 0, after: int = 0) -> Tensor:
    """Move bit i of every unit (int32 [tiles, ..., 2]) to bit placement[i], between two XORs."""
    out = torch.empty(units.shape, dtype=torch.int32, device=units.device)
    tables = _tables(placement).to(units.device)
    step = max(_SLAB_BYTES // max(out[0].nbytes, 1), 1)
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
def _inverse(placement: Bits) -> Bits:
    return tuple(sorted(range(64), key=placement.__getitem__))


def _signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


# e8m0 scales --------------------------------------------------------------------------------------


def _shift_exponents(matrix: QTensor) -> tuple[Tensor, Tensor]:
    """Exponents as stored (int32, the shape of scale) and the shift of each row.

    A bf16 multiplier has 254 exponents, and the product of a scale and its codes must be exact,
    subnormal or not. Modulo 255 the exponents of groups of zeros, which may lie outside, come back.
    """
    assert matrix.scale is not None
    bias, lowest = _EXPONENTS[type(matrix.format)]
    e = matrix.scale.int()
    live = _live_groups(matrix.data, e.shape[-1])
    least = torch.where(live, e, -1 << 9).amax(-1) + bias - 254
    most = torch.where(live, e, 1 << 9).amin(-1) - lowest
    if bool((least > most).any()):
        row = (least > most).nonzero()[0].tolist()
        raise FormatError(
            f"row {row}: its {matrix.format.name} scales span more than {254 - bias - lowest} "
            "powers of two, which no one factor brings into bf16; use the triton backend"
        )
    shift = least.clamp(min=0).minimum(most)
    return (e + bias - shift[..., None]) % 255, shift


def _live_groups(data: Tensor, groups: int) -> Tensor:
    """Whether a group of 32 codes has one that is not zero; bool [..., rows, groups]."""
    raw, magnitude = (
        data.contiguous().view(torch.uint8),
        0x77 if data.dtype == torch.uint8 else 0x7F,
    )
    size = BLOCK // 2 if data.dtype == torch.uint8 else BLOCK
    return (_fill(raw, 1, size).unflatten(-1, (groups, size)) & magnitude).amax(-1) > 0


def _pack_exponents(fields: Tensor) -> Tensor:
    """int32 [*batch, rows, groups] to int32 [row tiles, super-blocks, 4, 8, 4 chunks]."""
    tiles = _tile_rows(fields, SUPER_BLOCK // BLOCK).long()
    tiles = tiles.unflatten(-1, (-1, 4, 2)).permute(0, 4, 1, 2, 5, 6, 3)  # ... chunk, c, b
    pairs = (tiles[..., 0] << 7) | (tiles[..., 1] << 23)
    first, second = pairs.unbind(-1)
    return (first | (second << 8) | (second >> 24)).to(torch.int32).contiguous()


def _unpack_exponents(packed: Tensor, batch: list[int], rows: int, groups: int) -> Tensor:
    """Inverse of `_pack_exponents`."""
    words = packed.long() & 0xFFFFFFFF
    second = (words >> 8) | (words << 24)
    pairs = torch.stack((words, second), -1)
    tiles = torch.stack((pairs >> 7 & 0xFF, pairs >> 23 & 0xFF), -1).to(torch.int32)
    tiles = tiles.permute(0, 2, 3, 6, 1, 4, 5).flatten(4)
    return _untile_rows(tiles, batch, rows, groups)
