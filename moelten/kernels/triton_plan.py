"""The plan of the grouped GEMMs, in Triton: valid pairs by expert, each expert's run in tiles.

Row token * k + slot belongs to that (token, slot), valid or not, so sizes follow from T and k alone
and nothing waits for the device. A pair whose id is out of range appears in no tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelten.kernels.arena import Take
from moelten.kernels.launches import launch

_SMALL_PLAN = 128
# Pairs that a program sorts at once, and programs at most, each of which reads what all counted:
# powers of two.
_CHUNK = 512
_MAX_PROGRAMS = 128
_COUNTS = 8192  # of them, at a time
# Room for tiles is reckoned with this, so that it never shrinks when tokens are added.
_SMALLEST_BLOCK = 8


@dataclass(frozen=True)
class TilePlan:
    """Valid pairs sorted by expert, cut into tiles of up to `block` pairs of one expert.

    An expert's are as few as can be, and as equal as multiples of `unit` can be.

    pairs:   int32 [P]; the sorted pairs, or the rows that `shared` of them have in common; the rest
             undefined
    tiles:   int32 [4, max_tiles]: local expert, first position and last position + 1 of each tile,
             and a counter at 0 of what was done of it
    count:   int32 [3]: how many tiles there are, and two counters at 0 for what shares them out
    counts:  int32 [programs, E], scratch
    inverse: int32 [P]: where each pair stands in `pairs`, -1 for one that is not valid; None where
             nobody asks
    """

    pairs: Tensor
    tiles: Tensor
    count: Tensor
    counts: Tensor
    block: int
    unit: int
    shared: int = 1
    inverse: Tensor | None = None

    @property
    def max_tiles(self) -> int:
        return self.tiles.shape[1]


def empty_plan(
    take: Take, pairs: int, num_experts: int, block: int, *,
    unit: int | None = None, shared: int = 1, inverse: bool = False,
) -> TilePlan:  # fmt: skip
    """Room for the plan of so many pairs, valid or not; unit: by default a block."""
    unit = unit or block
    assert block >= _SMALLEST_BLOCK and block % unit == 0, (block, unit)
    room, max_tiles = (min(pairs, pairs // size + num_experts) for size in (_SMALLEST_BLOCK, block))
    tiles = take(torch.int32, 4 * room)[: 4 * max_tiles].view(4, max_tiles)
    i32 = torch.int32
    counts = take(i32, min(triton.cdiv(pairs, _CHUNK), _MAX_PROGRAMS), num_experts)
    where = take(i32, pairs) if inverse else None
    return TilePlan(take(i32, pairs), tiles, take(i32, 3), counts, block, unit, shared, where)


def make_tile_plan(ids: Tensor, num_experts: int, first_expert: int, plan: TilePlan) -> None:
    """Plan ids [T, k] (int32 or int64) on their device: one launch up to 128 pairs, else two.

    plan: where to write, from `empty_plan` for the same sizes
    """
    size = ids.numel()
    pairs, tiles, count, counts = plan.pairs, plan.tiles, plan.count, plan.counts
    ids = ids.contiguous()
    if size <= _SMALL_PLAN:
        pad = max(triton.next_power_of_2(size), 16)
        launch(
            small_plan_kernel, (1,),
            ids, pairs, tiles, count, plan.inverse, size, num_experts, first_expert,
            plan.max_tiles, plan.shared, BLOCK=plan.block, UNIT=plan.unit, SIZE=pad,
        )  # fmt: skip
        return
    chunks = triton.cdiv(triton.cdiv(size, _CHUNK), _MAX_PROGRAMS)
    programs = triton.cdiv(size, chunks * _CHUNK)
    experts = triton.next_power_of_2(num_experts)
    sizes = (size, num_experts, first_expert, chunks)
    launch(count_kernel, (programs,), ids, counts, *sizes, EXPERTS=experts, CHUNK=_CHUNK)
    launch(
        place_kernel, (programs,),
        ids, counts, pairs, tiles, count, plan.inverse, *sizes, plan.max_tiles,
        plan.shared, BLOCK=plan.block, UNIT=plan.unit, EXPERTS=experts, CHUNK=_CHUNK,
        ROWS=min(max(_COUNTS // experts, 1), _MAX_PROGRAMS), num_warps=8,
    )  # fmt: skip


@triton.jit
def local_experts(ids_ptr, i, size, num_experts, first_expert):
    """The local expert of pairs i, int32; num_experts where there is none."""
    local = tl.load(ids_ptr + i, mask=i < size, other=0).to(tl.int64) - first_expert
    valid = (i < size) & (local >= 0) & (local < num_experts)
    return tl.where(valid, local, num_experts).to(tl.int32)


@triton.jit
def histogram(local, num_experts, EXPERTS: tl.constexpr):
    """How many of these pairs each expert has."""
    valid = local < num_experts
    return tl.histogram(tl.where(valid, local, 0), EXPERTS, mask=valid)


@triton.jit
def tile_start(nth, tiles, rows, UNIT: tl.constexpr):
    """Where the nth of so many tiles of an expert's rows begins, and the one before it stops."""
    units = ((rows + UNIT - 1) // UNIT).to(tl.int64)
    return tl.minimum((nth * units // tl.maximum(tiles, 1)).to(tl.int32) * UNIT, rows)


@triton.jit
def store_count(count_ptr, tiles):
    """What `TilePlan.count` holds."""
    i = tl.arange(0, 4)
    tl.store(count_ptr + i, tl.where(i == 0, tiles, 0), mask=i < 3)


@triton.jit
def store_tile(tiles_ptr, max_tiles, tile, expert, first, stop, mask=None):
    """What `TilePlan.tiles` holds of some tiles."""
    to = tiles_ptr + tile
    tl.store(to, expert, mask=mask)
    tl.store(to + max_tiles, first, mask=mask)
    tl.store(to + 2 * max_tiles, stop, mask=mask)
    tl.store(to + 3 * max_tiles, expert * 0, mask=mask)


# Sizes that follow the tokens: one compiled kernel serves them all.
@triton.jit(do_not_specialize=["size", "first_expert", "max_tiles", "shared"])
def small_plan_kernel(
    ids_ptr, pairs_ptr, tiles_ptr, count_ptr, inverse_ptr,
    size, num_experts, first_expert, max_tiles, shared,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Every pair compares itself with every other; SIZE squared comparisons in one program."""
    i = tl.arange(0, SIZE)
    local = local_experts(ids_ptr, i, size, num_experts, first_expert)
    valid = local < num_experts
    same = local[None, :] == local[:, None]
    earlier = i[None, :] < i[:, None]
    below = local[None, :] < local[:, None]
    rank = tl.sum((same & earlier).to(tl.int32), axis=1)
    run = tl.sum(same.to(tl.int32), axis=1)
    position = tl.sum(below.to(tl.int32), axis=1) + rank
    tl.store(pairs_ptr + position, i // shared, mask=valid)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + i, tl.where(valid, position, -1), mask=i < size)
    tiles = (run + BLOCK - 1) // BLOCK
    units = (run + UNIT - 1) // UNIT
    nth = (rank // UNIT * tiles + units - 1) // units
    starts = valid & (tile_start(nth, tiles, run, UNIT) == rank)
    before = (below | (same & earlier)) & starts[None, :]
    tile = tl.sum(before.to(tl.int32), axis=1)
    stop = position - rank + tile_start(nth + 1, tiles, run, UNIT)
    store_tile(tiles_ptr, max_tiles, tile, local, position, stop, starts)
    store_count(count_ptr, tl.sum(starts.to(tl.int32)))


@triton.jit(do_not_specialize=["size", "first_expert", "chunks"])
def count_kernel(
    ids_ptr, counts_ptr, size, num_experts, first_expert, chunks,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many of its pairs, some chunks of them, each expert has."""
    program = tl.program_id(0)
    start = program * chunks * CHUNK
    stop = tl.minimum(start + chunks * CHUNK, size)
    counts = tl.zeros((EXPERTS,), tl.int32)
    # NOTE: with NumPy 2.4 the interpreter cannot take `range` bounds from arguments; `while` works.
    while start < stop:
        i = start + tl.arange(0, CHUNK)
        local = local_experts(ids_ptr, i, size, num_experts, first_expert)
        counts += histogram(local, num_experts, EXPERTS)
        start += CHUNK
    e = tl.arange(0, EXPERTS)
    tl.store(counts_ptr + program * num_experts + e, counts, mask=e < num_experts)


@triton.jit
def _counts_of_all(counts_ptr, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """How many pairs each expert has, and how many of them programs before this one."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, EXPERTS)
    total = tl.zeros((ROWS, EXPERTS), tl.int32)
    before = tl.zeros((ROWS, EXPERTS), tl.int32)
    start = program * 0
    while start < programs:
        row = start + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & (e < num_experts)[None, :]
        at = counts_ptr + row[:, None] * num_experts + e[None, :]
        counts = tl.load(at, mask=inside, other=0)
        total += counts
        before += tl.where((row < program)[:, None], counts, 0)
        start += ROWS
    return tl.sum(total, axis=0), tl.sum(before, axis=0)


@triton.jit(do_not_specialize=["size", "first_expert", "chunks", "max_tiles", "shared"])
def place_kernel(
    ids_ptr, counts_ptr, pairs_ptr, tiles_ptr, count_ptr, inverse_ptr,
    size, num_experts, first_expert, chunks, max_tiles, shared,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write the positions of a program's pairs, and the nth tile of all experts for its share of n.

    A chunk's pairs are sorted, stably, and an expert's follow those of the chunks before.
    """
    program = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    total, before = _counts_of_all(counts_ptr, num_experts, EXPERTS, ROWS)
    first = tl.cumsum(total, 0) - total
    tiles = (total + BLOCK - 1) // BLOCK
    if program == 0:
        store_count(count_ptr, tl.sum(tiles))
    tile = tl.cumsum(tiles, 0) - tiles
    nth = program
    while nth < tl.max(tiles, 0):
        start = first + tile_start(nth, tiles, total, UNIT)
        stop = first + tile_start(nth + 1, tiles, total, UNIT)
        store_tile(tiles_ptr, max_tiles, tile + nth, e, start, stop, nth < tiles)
        nth += tl.num_programs(0)
    position = first + before
    i = tl.arange(0, CHUNK)
    start = program * chunks * CHUNK
    stop = tl.minimum(start + chunks * CHUNK, size)
    while start < stop:
        local = local_experts(ids_ptr, start + i, size, num_experts, first_expert)
        counts = histogram(local, num_experts, EXPERTS)
        key = tl.sort(local * CHUNK + i)
        local, pair = key // CHUNK, start + key % CHUNK
        valid = local < num_experts
        shift = position - (tl.cumsum(counts, 0) - counts)
        at = tl.gather(shift, tl.where(valid, local, 0), 0) + i
        tl.store(pairs_ptr + at, pair // shared, mask=valid)
        if inverse_ptr is not None:
            tl.store(inverse_ptr + pair, tl.where(valid, at, -1), mask=pair < size)
        position += counts
        start += CHUNK
