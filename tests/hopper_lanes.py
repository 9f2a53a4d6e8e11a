"""What the lanes of a Hopper kernel read, by the book: packed tensors back to weights.

Written from the PTX ISA's picture of m16n8k16 and from how a lane loads its
activations, not from the packer: offsets are those of a kernel's pointers, bit moves are the PTX
that kernels run, in an interpreter. All words are int64 tensors [tiles, chunks, 4 warps, 32 lanes].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelten.formats import FP8, MXFP4, MXFP8, NVFP4, Float, Format, Int4
from moelten.kernels.hopper_codes import Storage
from moelten.qtensor import QTensor
from tests import ptx


def weights(parts: dict[str, Tensor], stored_as: Storage, shape: tuple[int, ...]) -> Tensor:
    """Weights (fp64, `shape`) as lanes decode and scale them; also checks that padding is zero."""
    stored = _rows_and_columns(Lanes(parts, stored_as))
    *batch, rows, columns = shape
    # Row r of the tiles: tile T = r // 64, warp w, row half b, g.
    r = torch.arange(stored.shape[0])
    tile, w, b, g = r // 64, r // 16 % 4, r // 8 % 2, r % 8
    if batch == [2]:
        out = torch.full((2, 32 * (int(tile[-1]) + 1), stored.shape[1]), torch.nan).double()
        out[b, 32 * tile + 8 * w + g] = stored
    else:
        out = stored[None]
    assert (out[:, rows:] == 0).all() and (out[:, :, columns:] == 0).all(), "padding is not zero"
    return out[:, :rows, :columns].reshape(shape)


def _rows_and_columns(lanes: Lanes) -> Tensor:
    """Stored rows x columns: each lane's registers where the instruction takes them from."""
    out = torch.full((64 * lanes.tiles, 64 * lanes.chunks), torch.nan).double()
    for (row, column), value in lanes.values():
        out[row, column] = value
    return out


class Lanes:
    """The grid of lanes over one packed matrix, and what each of them computes."""

    def __init__(self, parts: dict[str, Tensor], stored: Storage) -> None:
        self.parts, self.stored = parts, stored
        self.tiles, self.chunks, self.loads = parts["data"].shape[:3]
        sizes = (self.tiles, self.chunks, 4, 32)
        grid = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
        self.tile, self.chunk, self.warp, lane = grid
        self.lane, self.g, self.t = lane, lane // 4, lane % 4

    def read(self, name: str, *index: Tensor | int) -> Tensor:
        """Element of a part at an index, by its offset from the start."""
        part = self.parts[name]
        flat = part.reshape(-1)
        flat = flat.long() & ptx.MASK if flat.dtype == torch.int32 else flat.double()
        offset: Tensor | int = 0
        for at, size in zip(index, part.shape, strict=True):
            offset = offset * size + at
        return flat[offset]

    def bf16(self, name: str, *index: Tensor | int) -> Tensor:
        """Bits of an element of a bf16 part."""
        return ptx.encode_float(self.read(name, *index), "bf16")

    def values(self):
        """((row, column) of the stored matrix, weight) of every register element."""
        for c in (0, 1):
            for key, register in self.registers(c).items():
                b, columns = key[0], self.columns(c, *key[1:])
                row = 64 * self.tile + 16 * self.warp + self.g + 8 * b
                scale = self.multiplier(c, b) * self.stored.code.epilogue
                for element, column in enumerate(columns):
                    value = self.element(register, element) * scale
                    yield (row, 64 * self.chunk + 32 * c + column), value

    def columns(self, c: int, j: int, s: int) -> list[Tensor]:
        """Columns within 32 of a register's elements.

        A lane loads its activations as 8 columns from 8 t. That is four registers, and step s feeds
        two of them (j) to the instruction.
        """
        return [8 * self.t + 2 * (2 * s + j) + h for h in (0, 1)]

    def element(self, register: Tensor, element: int) -> Tensor:
        kind = self.stored.code.operand.replace("fp", "f")
        return ptx.decode_float(register >> 16 * element & 0xFFFF, kind)

    def registers(self, c: int) -> dict[tuple[int, ...], Tensor]:
        """Registers of block c by (b, j, s)."""
        code, halves = self.stored.code, (0, 1)
        keys = [(b, j, s) for b in halves for j in halves for s in halves]
        if code.bits == 4:
            out = self.decode(0)
            return {(b, j, s): out[c + 2 * (b + 2 * j + 4 * s)] for b, j, s in keys}
        if code.bits == 8:
            out = self.decode(c)
            return {(b, j, s): out[s + 2 * (b + 2 * j)] for b, j, s in keys}
        return {(b, j, s): self.decode(2 * c + s)[j + 2 * b] for b, j, s in keys}

    def decode(self, nth: int) -> list[Tensor]:
        """Registers of the nth load of a chunk."""
        code = self.stored.code
        words = [
            self.read("data", self.tile, self.chunk, nth, self.warp, self.lane, i) for i in range(4)
        ]
        if code.pair:
            # A 4-bit load has both blocks, a load of 8-bit codes the nth.
            blocks = (0, 0, 1, 1) if code.bits == 4 else (nth,) * 4
            words += [self.pair(code.pair, c) for c in blocks]
        inputs = {f"${code.registers + i}": word for i, word in enumerate(words)}
        return ptx.run(code.ptx, inputs, code.registers)

    def pair(self, kind: str, c: int) -> Tensor:
        """The pair register for block c of the lane's chunk."""
        stored, place = self.stored, (self.tile, self.chunk // 4, self.warp, self.g)
        half = (self.tile, self.chunk // 2, self.warp, self.g)
        if kind == "scale" and stored.pairs.registers == 1:
            # A word has a group's two rows, low and high.
            pairs, nth = stored.pairs, 0
            group = (64 * self.chunk + 32 * c) % 128 // stored.group
            low, high = (self.bf16("scale", *half, group, b) for b in (0, 1))
            word = low | high << 16
        elif kind == "scale":
            pairs, nth = stored.pairs, c
            quad_half = (self.t // 2,) if stored.group == 16 else ()
            word = self.read("scale", *half, *quad_half, self.chunk % 2)
        elif stored.group:
            pairs, nth = stored.zeros, (64 * self.chunk + 32 * c) % 256 // stored.group
            word = self.read("zero", *place, nth // 4)
            nth = nth % 4
        else:
            pairs, nth = stored.zeros, 0
            word = self.read("zero", self.tile, 0, self.warp, self.g, 0)
        assert pairs is not None
        out = ptx.run(pairs.ptx, {f"${pairs.registers}": word}, pairs.registers)
        return torch.stack(out).gather(0, torch.zeros_like(word)[None] + nth)[0]

    def multiplier(self, c: int, b: int) -> Tensor:
        """What a lane multiplies its accumulators of row half b by, for block c."""
        stored, one = self.stored, torch.ones(1).double()
        if "row_scale" in self.parts:
            one = self.read("row_scale", self.tile, 16 * self.warp + 8 * b + self.g)
        if stored.scale == "block":
            return one * self.read("scale", self.tile, self.chunk // 2, b)
        if stored.scale != "group":
            return one
        if stored.pairs is not None:
            return one * ptx.decode_float(self.pair("scale", c) >> 16 * b & 0xFFFF, "bf16")
        nth = (64 * self.chunk + 32 * c) % 128 // stored.group
        place = (self.tile, self.chunk // 2, self.warp, self.g)
        return one * self.read("scale", *place, nth, b)


def matrix(fmt: Format, shape: tuple[int, ...], seed: int = 0) -> QTensor:
    """Every code, and scales that differ from group to group over all that is exact."""
    *batch, rows, columns = shape
    g = torch.Generator().manual_seed(seed)

    def scatter(values: Tensor, size: tuple[int, ...]) -> Tensor:
        count = torch.Size(size).numel()
        order = torch.randperm(count, generator=g)
        return values.repeat(-(-count // len(values)))[order].view(size)

    byte = torch.arange(256, dtype=torch.uint8)
    finite = byte[(byte & 0x7F) != 0x7F]
    if isinstance(fmt, Float):
        data = torch.randn(shape, generator=g) * torch.exp2(torch.randn(shape, generator=g) * 5)
        return QTensor(data.to(fmt.data_dtype), fmt)
    stored = (*batch, rows, columns * fmt.bits // 8)
    data = scatter(finite if isinstance(fmt, FP8 | MXFP8) else byte, stored)
    scales = (*batch, *fmt.scale_shape(rows, columns))
    parts = {}
    if fmt.scale_dtype == torch.uint8:
        # All that the matrix may have, see `Storage.least`, and as many as a row may.
        low, high = {MXFP4: (0, 129), MXFP8: (3, 135)}.get(type(fmt), (0, 255))
        first = torch.randint(low, high - 58, (*scales[:-1], 1), generator=g)
        scale = (first + scatter(torch.arange(59), scales)).to(torch.uint8)
    elif fmt.scale_dtype == torch.float8_e4m3fn:
        scale = scatter(byte[1:127], scales).view(torch.float8_e4m3fn)
    else:
        scale = torch.randn(scales, generator=g) * torch.exp2(torch.randn(scales, generator=g) * 3)
    if isinstance(fmt, Int4) and fmt.zero_point:
        parts["zero"] = scatter(torch.arange(-8, 8, dtype=torch.int8), scales)
    if isinstance(fmt, NVFP4):
        size = (*batch, rows) if fmt.per_token else tuple(batch)
        parts["global_scale"] = torch.rand(size, generator=g) + 0.5
    return QTensor(data.view(fmt.data_dtype), fmt, scale.to(fmt.scale_dtype), **parts)
