"""The stages around the GEMMs, in Triton: plan, quantization of activations, combine.

Rows live in pair space: row token * k + slot belongs to that (token, slot), valid or not, so sizes
follow from T and k alone and nothing waits for the device. The plan only orders the valid pairs by
expert and cuts each expert's run into tiles; a pair whose id is out of range appears in no tile, is
never read and adds nothing. Quantized rows are bit for bit those of `moelten.qtensor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelten.formats import FP8, MXFP8, NVFP4, Float, Format, Int8
from moelten.kernels.arena import Take, heap
from moelten.kernels.launches import launch
from moelten.kernels.triton_casts import (
    abs_bits,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    encode_int8,
    round_to,
    widen,
)
from moelten.layouts import ROW_TILES, swizzled_size

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

    pairs:   int32 [P]; the sorted pairs, the rest undefined
    tiles:   int32 [3, max_tiles]: local expert, first position and last position + 1 of each tile
    count:   int32 [1]: how many tiles there are
    counts:  int32 [programs, E], scratch
    inverse: int32 [P]: where each pair stands in `pairs`, -1 for one that is not valid; None where
             nobody asks
    """

    pairs: Tensor
    tiles: Tensor
    count: Tensor
    counts: Tensor
    block: int
    inverse: Tensor | None = None

    @property
    def max_tiles(self) -> int:
        return self.tiles.shape[1]


def empty_plan(
    take: Take, pairs: int, num_experts: int, block: int, *, inverse: bool = False
) -> TilePlan:
    """Room for the plan of so many pairs, valid or not."""
    assert block >= _SMALLEST_BLOCK, block
    room, max_tiles = (min(pairs, pairs // size + num_experts) for size in (_SMALLEST_BLOCK, block))
    tiles = take(torch.int32, 3 * room)[: 3 * max_tiles].view(3, max_tiles)
    i32 = torch.int32
    counts = take(i32, min(triton.cdiv(pairs, _CHUNK), _MAX_PROGRAMS), num_experts)
    where = take(i32, pairs) if inverse else None
    return TilePlan(take(i32, pairs), tiles, take(i32, 1), counts, block, where)


def make_tile_plan(
    ids: Tensor, num_experts: int, first_expert: int, block: int, plan: TilePlan | None = None
) -> TilePlan:
    """Plan ids [T, k] (int32 or int64) on their device: one launch up to 128 pairs, else two.

    plan: where to write, from `empty_plan` for the same sizes; a new one by default.
    """
    size = ids.numel()
    if plan is None:
        plan = empty_plan(heap(ids.device), size, num_experts, block)
    pairs, tiles, count, counts = plan.pairs, plan.tiles, plan.count, plan.counts
    ids = ids.contiguous()
    if size <= _SMALL_PLAN:
        pad = max(triton.next_power_of_2(size), 16)
        launch(
            small_plan_kernel, (1,),
            ids, pairs, tiles, count, plan.inverse, size, num_experts, first_expert,
            plan.max_tiles, BLOCK=block, SIZE=pad,
        )  # fmt: skip
        return plan
    chunks = triton.cdiv(triton.cdiv(size, _CHUNK), _MAX_PROGRAMS)
    programs = triton.cdiv(size, chunks * _CHUNK)
    experts = triton.next_power_of_2(num_experts)
    sizes = (size, num_experts, first_expert, chunks)
    launch(count_kernel, (programs,), ids, counts, *sizes, EXPERTS=experts, CHUNK=_CHUNK)
    launch(
        place_kernel, (programs,),
        ids, counts, pairs, tiles, count, plan.inverse, *sizes, plan.max_tiles,
        BLOCK=block, EXPERTS=experts, CHUNK=_CHUNK,
        ROWS=min(max(_COUNTS // experts, 1), _MAX_PROGRAMS), num_warps=8,
    )  # fmt: skip
    return plan


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


# Sizes that follow the tokens: one compiled kernel serves them all.
@triton.jit(do_not_specialize=["size", "first_expert", "max_tiles"])
def small_plan_kernel(
    ids_ptr, pairs_ptr, tiles_ptr, count_ptr, inverse_ptr,
    size, num_experts, first_expert, max_tiles,
    BLOCK: tl.constexpr, SIZE: tl.constexpr,
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
    tl.store(pairs_ptr + position, i, mask=valid)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + i, tl.where(valid, position, -1), mask=i < size)
    starts = valid & (rank % BLOCK == 0)
    before = (below | (same & earlier)) & starts[None, :]
    tile = tl.sum(before.to(tl.int32), axis=1)
    tl.store(tiles_ptr + tile, local, mask=starts)
    tl.store(tiles_ptr + max_tiles + tile, position, mask=starts)
    stop = position + tl.minimum(run - rank, BLOCK)
    tl.store(tiles_ptr + 2 * max_tiles + tile, stop, mask=starts)
    tl.store(count_ptr, tl.sum(starts.to(tl.int32)))


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


@triton.jit(do_not_specialize=["size", "first_expert", "chunks", "max_tiles"])
def place_kernel(
    ids_ptr, counts_ptr, pairs_ptr, tiles_ptr, count_ptr, inverse_ptr,
    size, num_experts, first_expert, chunks, max_tiles,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
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
        tl.store(count_ptr, tl.sum(tiles))
    to = tiles_ptr + tl.cumsum(tiles, 0) - tiles
    nth = program
    while nth < tl.max(tiles, 0):
        start = first + nth * BLOCK
        tl.store(to + nth, e, mask=nth < tiles)
        tl.store(to + max_tiles + nth, start, mask=nth < tiles)
        stop = tl.minimum(start + BLOCK, first + total)
        tl.store(to + 2 * max_tiles + nth, stop, mask=nth < tiles)
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
        tl.store(pairs_ptr + at, pair, mask=valid)
        if inverse_ptr is not None:
            tl.store(inverse_ptr + pair, tl.where(valid, at, -1), mask=pair < size)
        position += counts
        start += CHUNK


@dataclass(frozen=True)
class Rows:
    """Quantized rows: codes [R, K] (or K/2 bytes), scale [R, groups], global_scale [R].

    Swizzled scales (see `moelten.layouts`) are flat, with their padding.
    """

    data: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """What makes rows differ by pair: ids [T, k], and whatever multiplies before quantization."""

    ids: Tensor
    num_experts: int
    first_expert: int
    router: Tensor | None = None
    pre_scale: Tensor | None = None
    static_scale: Tensor | None = None


def empty_rows(
    take: Take,
    count: int,
    columns: int,
    fmt: Format,
    scale_layout: str = "linear",
    dtype: torch.dtype | None = None,
) -> Rows:
    """Room for `count` rows in an activation format; dtype: see `triton_variants.row_dtype`."""
    if isinstance(fmt, Float) and dtype is not None:
        return Rows(take(dtype, count, columns), take(torch.float32, count, 1))
    if isinstance(fmt, Float):
        return Rows(take(fmt.data_dtype, count, columns))
    assert isinstance(fmt, FP8 | MXFP8 | NVFP4 | Int8)
    groups = -(-columns // (fmt.block[1] or columns))
    scales: tuple[int, ...] = (count, groups)
    if scale_layout != "linear":
        scales = (swizzled_size(count, groups, scale_layout),)
    if isinstance(fmt, NVFP4):
        data = take(torch.uint8, count, columns // 2)
        return Rows(data, take(torch.uint8, *scales), take(torch.float32, count))
    code = dtype or (torch.int8 if isinstance(fmt, Int8) else torch.uint8)
    scale_dtype = torch.uint8 if isinstance(fmt, MXFP8) else torch.float32
    return Rows(take(code, count, columns), take(scale_dtype, *scales))


def quantize_rows(
    x: Tensor,
    fmt: Format,
    pairs: Pairs | None = None,
    *,
    by_token: bool = False,
    static_scale: Tensor | None = None,
    scale_layout: str = "linear",
    dtype: torch.dtype | None = None,
    rows: Rows | None = None,
) -> Rows:
    """Quantize x [R, K] to an activation format; with `by_token`, row r of T*k reads x[r // k].

        row = x * router * pre_scale[expert], in fp32;  codes, scales = quantize(row, fmt)

    static_scale: fp32, one decode scale for all rows (`pairs` has its own, by expert)
    dtype:        what codes are stored as, see `triton_variants.row_dtype`
    rows:         where to write, from `empty_rows` for the same sizes; new ones by default

    Rows of pairs whose id is out of range are left unwritten. Padding of swizzled scales is zero.
    """
    count = pairs.ids.numel() if pairs is not None else x.shape[0]
    columns = x.shape[1]
    if rows is None:
        rows = empty_rows(heap(x.device), count, columns, fmt, scale_layout, dtype)
    group = fmt.block[1] or triton.next_power_of_2(columns)
    groups = triton.next_power_of_2(-(-columns // group))
    tile = ROW_TILES[scale_layout]
    kind = type(fmt).__name__.lower()
    if isinstance(fmt, Float) and rows.scale is not None:
        kind = "normalized"
    extra = pairs or Pairs(x, 1, 0, static_scale=static_scale)
    launch(
        quantize_kernel, (-(-count // tile) * tile,),
        x, rows.data, rows.scale, rows.global_scale,
        None if pairs is None else extra.ids.contiguous(),
        None if extra.router is None else extra.router.contiguous(),
        extra.pre_scale, extra.static_scale,
        1 if pairs is None else extra.ids.shape[1], extra.num_experts, extra.first_expert,
        count, columns,
        KIND=kind, GROUP=group, GROUPS=groups if tile == 1 else max(groups, 4),
        BY_TOKEN=by_token, ROW_TILE=tile,
        num_warps=4 if group * groups <= 4096 else 8,
    )  # fmt: skip
    return rows


@triton.jit
def _scale_offset(row, g, groups, ROW_TILE: tl.constexpr):
    """Where `moelten.layouts` puts the scale of group g of a row; a tile of one row is linear."""
    if ROW_TILE == 1:
        return row * groups + g
    else:
        tiles = (groups + 3) // 4
        start = row // ROW_TILE * tiles * (ROW_TILE * 4) + g // 4 * (ROW_TILE * 4) + g % 4
        if ROW_TILE == 8:
            return start + row % 8 * 4
        else:
            return start + row % 32 * 16 + row % 128 // 32 * 4


@triton.jit(do_not_specialize=["first_expert", "count"])
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, global_ptr, ids_ptr, router_ptr, pre_ptr, static_ptr,
    top_k, num_experts, first_expert, count, columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BY_TOKEN: tl.constexpr, ROW_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = row * 0
    if ids_ptr is not None:
        expert = tl.load(ids_ptr + row).to(tl.int64) - first_expert
        if (expert < 0) | (expert >= num_experts):
            return
    source = row
    if BY_TOKEN:
        source = row // top_k
    g = tl.arange(0, GROUPS)
    group_count = (columns + GROUP - 1) // GROUP
    stored = group_count
    if ROW_TILE > 1:
        stored = (group_count + 3) // 4 * 4
        if row >= count:
            at = scale_ptr + _scale_offset(row, g, group_count, ROW_TILE)
            tl.store(at, tl.zeros((GROUPS,), tl.uint8), mask=g < stored)
            return
    k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = k < columns
    x = widen(tl.load(x_ptr + source * columns + k, mask=inside, other=0.0))
    if router_ptr is not None:
        x = x * widen(tl.load(router_ptr + row))
    if pre_ptr is not None:
        x = x * tl.load(pre_ptr + expert * columns + k, mask=inside, other=0.0)
    if KIND == "float":
        tl.store(
            codes_ptr + row * columns + k, round_to(x, codes_ptr.dtype.element_ty), mask=inside
        )
    elif KIND == "normalized":
        # bf16, times the power of two that brings the row's largest to 2**14 .. 2**15 in fp16.
        x = widen(round_to(x, tl.bfloat16))
        exponent = tl.minimum(tl.maximum(tl.max(abs_bits(x), axis=1) >> 23, 15), 254)
        up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(codes_ptr + row * columns + k, round_to(x * up[:, None], tl.float16), mask=inside)
        scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        tl.store(scale_ptr + row + g, scale, mask=g < 1)
    else:
        amax = tl.max(abs_bits(x), axis=1).to(tl.float32, bitcast=True)
        scale_at = scale_ptr + _scale_offset(row, g, group_count, ROW_TILE)
        if KIND == "nvfp4":
            _quantize_nvfp4(
                x, amax, scale_at, codes_ptr + row * (columns // 2), global_ptr + row, static_ptr,
                expert, columns, stored, GROUP, GROUPS,
            )  # fmt: skip
        else:
            if KIND == "mxfp8":
                byte = encode_e8m0(tl.div_rn(amax, 448.0))
                scale = decode_e8m0(byte)
                byte = tl.where(g < group_count, byte, 0)
                tl.store(scale_at, byte.to(tl.uint8), mask=g < stored)
            else:
                if static_ptr is not None:
                    scale = tl.zeros_like(amax) + tl.load(static_ptr + expert)
                else:
                    scale = tl.div_rn(amax, 127.0 if KIND == "int8" else 448.0)
                    scale = tl.where(scale == 0.0, 1.0, scale)
                tl.store(scale_at, scale, mask=g < group_count)
            scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], (GROUPS, GROUP)))
            codes = encode_int8(scaled) if KIND == "int8" else encode_e4m3(scaled)
            if codes_ptr.dtype.element_ty.is_floating():
                # Exact in 16 bits.
                codes = codes.to(tl.float32) if KIND == "int8" else decode_e4m3(codes, False)
                codes = round_to(codes, codes_ptr.dtype.element_ty)
            tl.store(codes_ptr + row * columns + k, codes, mask=inside)


@triton.jit
def _quantize_nvfp4(
    x, amax, scale_at, codes_ptr, global_ptr, static_ptr, expert, columns, stored,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    one = tl.full((1,), 1.0, tl.float32)
    largest = tl.full((1,), 3.4028234663852886e38, tl.float32)
    if static_ptr is not None:
        encode = tl.div_rn(one, tl.zeros_like(one) + tl.load(static_ptr + expert))
    else:
        # Reduce as integers, so that NaN in any block reaches the row's scale.
        top = tl.max(abs_bits(amax), axis=0) + tl.zeros_like(one).to(tl.int32)
        row_amax = top.to(tl.float32, bitcast=True)
        encode = tl.div_rn(one * 2688.0, row_amax)
        encode = tl.where(encode > largest, largest, encode)
        encode = tl.where((row_amax == 0.0) | (encode == 0.0), 1.0, encode)
    decode = tl.div_rn(one, encode)
    tl.store(global_ptr + tl.arange(0, 1), decode)
    # fp32 nearest to 1/6, as the formula has it.
    code = encode_e4m3(amax * (encode * 0.1666666716337204))
    g = tl.arange(0, GROUPS)
    tl.store(scale_at, tl.where(g < columns // GROUP, code, 0).to(tl.uint8), mask=g < stored)
    scale = decode_e4m3(code, False)
    inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale * tl.div_rn(one, encode))
    inverse = tl.where(inverse > largest, largest, inverse)
    inverse = tl.where(amax == 0.0, 0.0, inverse)
    codes = encode_e2m1(x * inverse[:, None])
    low, high = tl.split(tl.reshape(codes, (GROUPS, GROUP // 2, 2)))
    k = g[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    tl.store(codes_ptr + k, (low | (high << 4)).to(tl.uint8), mask=k < columns // 2)


def combine(y: Tensor, ids: Tensor, num_experts: int, first_expert: int, out: Tensor) -> None:
    """out[t] = sum of the valid rows of y [T*k, H], in slot order, in fp32, rounded once."""
    tokens, top_k = ids.shape
    width = out.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    grid = (tokens, triton.cdiv(width, block))
    launch(
        combine_kernel, grid,
        y, ids.contiguous(), out, num_experts, first_expert, width, TOP_K=top_k, BLOCK=block,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_expert"])
def combine_kernel(
    y_ptr, ids_ptr, out_ptr, num_experts, first_expert, width,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        row = token * TOP_K + slot
        local = tl.load(ids_ptr + row).to(tl.int64) - first_expert
        valid = (local >= 0) & (local < num_experts)
        total += tl.load(y_ptr + row * width + column, mask=inside & valid, other=0.0)
    tl.store(
        out_ptr + token * width + column, round_to(total, out_ptr.dtype.element_ty), mask=inside
    )
