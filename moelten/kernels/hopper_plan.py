"""What stands before and behind the decode GEMMs: the plan in one launch, and the sum over slots.

Within a layer each kernel is launched while the one before it drains, and waits (`gdc_wait`) before
it reads what that one writes; GEMM1 waits for the plan, so later kernels may rely on that. Layers
follow each other without overlap: the plan waits for all before it, as any kernel does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moelten.kernels.launches import launch
from moelten.kernels.triton_casts import abs_bits, round_to
from moelten.kernels.triton_ops import Rows
from moelten.kernels.triton_plan import (
    TilePlan,
    histogram,
    local_experts,
    make_tile_plan,
    store_count,
    tile_start,
)

_SCAN = 1024
_MAX_PAIRS = 8192
_GATHERED = 4096  # words that a program holds at once
_ORDERED = 64  # positions of a program


def plan_tiles(ids: Tensor, num_experts: int, first_expert: int, plan: TilePlan) -> None:
    """What `triton_plan.make_tile_plan` writes to `plan`, in one launch up to 8192 pairs."""
    size = ids.numel()
    if size > _MAX_PAIRS:
        make_tile_plan(ids, num_experts, first_expert, plan)
        return
    launch(
        plan_kernel, (num_experts,),
        ids.contiguous(), plan.pairs, plan.tiles, plan.count, plan.inverse,
        size, num_experts, first_expert, plan.max_tiles,
        BLOCK=plan.block, UNIT=plan.unit, EXPERTS=triton.next_power_of_2(num_experts),
        SCAN=min(max(triton.next_power_of_2(size), 32), _SCAN),
    )  # fmt: skip


@triton.jit(do_not_specialize=["size", "first_expert", "max_tiles"])
def plan_kernel(
    ids_ptr, pairs_ptr, tiles_ptr, count_ptr, inverse_ptr,
    size, num_experts, first_expert, max_tiles,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, EXPERTS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Count all experts' pairs, in every program; write the pairs and tiles of its own."""
    gdc_launch_dependents()
    expert = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    start = expert * 0
    while start < size:
        i = start + tl.arange(0, SCAN)
        local = local_experts(ids_ptr, i, size, num_experts, first_expert)
        counts += histogram(local, num_experts, EXPERTS)
        if inverse_ptr is not None:
            nowhere = (local == num_experts) & (i < size) & (expert == 0)
            tl.store(inverse_ptr + i, -1, mask=nowhere)
        start += SCAN
    tiles = (counts + BLOCK - 1) // BLOCK
    position = tl.sum(tl.where(e < expert, counts, 0))
    tile = tl.sum(tl.where(e < expert, tiles, 0))
    rows = tl.sum(tl.where(e == expert, counts, 0))
    if expert == 0:
        store_count(count_ptr, tl.sum(tiles))
    own = (rows + BLOCK - 1) // BLOCK
    nth = expert * 0
    while nth < own:
        first = position + tile_start(nth, own, rows, UNIT)
        stop = position + tile_start(nth + 1, own, rows, UNIT)
        tl.store(tiles_ptr + tile + nth, expert)
        tl.store(tiles_ptr + max_tiles + tile + nth, first)
        tl.store(tiles_ptr + 2 * max_tiles + tile + nth, stop)
        nth += 1
    if rows > 0:
        start = expert * 0
        while start < size:
            i = start + tl.arange(0, SCAN)
            local = local_experts(ids_ptr, i, size, num_experts, first_expert)
            mine = (local == expert).to(tl.int32)
            at = position + tl.cumsum(mine, 0) - mine
            tl.store(pairs_ptr + at, i, mask=mine != 0)
            if inverse_ptr is not None:
                tl.store(inverse_ptr + i, at, mask=mine != 0)
            position += tl.sum(mine)
            start += SCAN


def gather(x: Rows, rows_per_source: int, inverse: Tensor, out: Rows) -> None:
    """out[inverse[p]] = row p // rows_per_source of x, for every pair p that has a position.

    x:       [R, K] of 16 bits, a multiple of 2 of them, and the scales of its rows, if any
    inverse: int32 [R * rows_per_source], -1 for pairs that are not valid (`TilePlan`)
    out:     [P, K rounded up to 32], columns in the order of `hopper_layout`'s operands and then
             zeros, and scales if x has some; scales that x has not are those of bf16 rows, written
             in fp16, times the power of two that brings the largest of each to 2**14 .. 2**15: bit
             for bit the rows of `triton_ops.quantize_rows(..., dtype=torch.float16)`
    """
    width, words = out.data.shape[1] // 2, x.data.shape[1] // 2
    block = min(triton.next_power_of_2(width), _GATHERED)
    launch(
        gather_kernel, (x.data.shape[0],),
        x.data.view(torch.int32), x.scale, inverse, out.data.view(torch.int32), out.scale,
        SLOTS=rows_per_source, WORDS=words, WIDTH=width, BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip


@triton.jit
def _load_words(x_ptr, start, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Words start .. start + BLOCK of a row in memory's order, zeros behind the last."""
    word = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + word, mask=word < WORDS, other=0)


@triton.jit
def _low_half(word):
    """The first of two bf16 numbers, in fp32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high_half(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _row_exponent(x_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """The biased exponent of the largest number of a row, within what can be brought to 2**14."""
    top = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, WORDS, BLOCK):
        word = _load_words(x_ptr, start, WORDS, BLOCK)
        top = tl.maximum(top, tl.maximum(abs_bits(_low_half(word)), abs_bits(_high_half(word))))
    return tl.minimum(tl.maximum(tl.max(top, axis=0) >> 23, 15), 254)


@triton.jit
def _to_half(x):
    """fp32 to the bits of fp16."""
    return round_to(x, tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def gather_kernel(
    x_ptr, x_scale_ptr, inverse_ptr, out_ptr, scale_ptr,
    SLOTS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a row once, and write it for each of its pairs."""
    source = tl.program_id(0).to(tl.int64)
    x_ptr += source * WORDS
    # All before the first store, lest each waits for the stores before it.
    positions = ()
    for slot in tl.static_range(SLOTS):
        positions = positions + (tl.load(inverse_ptr + source * SLOTS + slot).to(tl.int64),)
    NORMALIZE: tl.constexpr = scale_ptr is not None and x_scale_ptr is None
    if NORMALIZE:
        exponent = _row_exponent(x_ptr, WORDS, BLOCK)
        up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    for start in range(0, WIDTH, BLOCK):
        word = _load_words(x_ptr, start, WORDS, BLOCK)
        if NORMALIZE:
            word = _to_half(_low_half(word) * up) | (_to_half(_high_half(word) * up) << 16)
        # Words of 32 columns: t s j in memory, s j t in the order of operands.
        word = tl.trans(tl.reshape(word, (BLOCK // 16, 4, 4)), (0, 2, 1)).reshape((BLOCK,))
        to = start + tl.arange(0, BLOCK)
        for slot in tl.static_range(SLOTS):
            known = (to < WIDTH) & (positions[slot] >= 0)
            tl.store(out_ptr + positions[slot] * WIDTH + to, word.to(tl.int32), mask=known)
    if scale_ptr is not None:
        if x_scale_ptr is not None:
            scale = tl.load(x_scale_ptr + source)
        for slot in tl.static_range(SLOTS):
            tl.store(scale_ptr + positions[slot], scale, mask=positions[slot] >= 0)


def order_scales(
    scale: Tensor, out: Rows, pairs: Tensor | None = None, rows_per_source: int = 1
) -> None:
    """Scales of groups of activations, as the GEMMs for many tokens per expert want them.

    scale: fp32 [R, G] of rows
    out:   scale [G, P, 4], of which [..., 0] are written, by position: in rows of 16 bytes copies
           can begin anywhere. With a global_scale [P], sums are kept in units of the group at hand:
           that is the last group's scale, and each group has the scale before over its own, the
           first one 1. No scale counts for less than 2**-90 of its row's largest, lest sums in that
           unit overflow. (Not of less: a group of zeros has a scale of 1, whatever the others have)
    pairs: int32 [P], the pair of each position, whose row is pair // rows_per_source (`TilePlan`);
           by default positions are rows
    """
    assert out.scale is not None
    groups, count = out.scale.shape[:2]
    launch(
        order_kernel, (triton.cdiv(count, _ORDERED),),
        scale, pairs, out.scale, out.global_scale, scale.shape[0], count, rows_per_source,
        GROUPS=groups, WIDTH=triton.next_power_of_2(groups), BLOCK=_ORDERED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "count", "rows_per_source"])
def order_kernel(
    scale_ptr, pairs_ptr, out_ptr, last_ptr, rows, count, rows_per_source,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < count
    row = position
    if pairs_ptr is not None:
        row = tl.load(pairs_ptr + position, mask=inside, other=0) // rows_per_source
    # Behind the last position that the plan gave stands anything.
    row = tl.minimum(tl.maximum(row, 0), rows - 1).to(tl.int64)
    g = tl.arange(0, WIDTH)[None, :]
    known = g < GROUPS
    at = scale_ptr + row[:, None] * GROUPS
    scale = tl.load(at + g, mask=known, other=0.0)
    if last_ptr is not None:
        least = tl.max(scale, axis=1) * 8.077935669463161e-28
        scale = tl.maximum(scale, least[:, None])
        last = tl.sum(tl.where(g == GROUPS - 1, scale, 0.0), axis=1)
        tl.store(last_ptr + position, last, mask=inside)
        before = tl.load(at + tl.maximum(g - 1, 0), mask=known, other=0.0)
        scale = tl.div_rn(tl.maximum(before, least[:, None]), scale)
    to = out_ptr + (g.to(tl.int64) * count + position[:, None]) * 4
    tl.store(to, scale, mask=known & inside[:, None])


def combine(
    y: Tensor,
    ids: Tensor,
    num_experts: int,
    first_expert: int,
    out: Tensor,
    *,
    inverse: Tensor | None = None,
    router: Tensor | None = None,
) -> None:
    """out[t] = sum over slots, then splits, of the valid rows of y [splits, T*k, H], in order.

    inverse: int32 [T*k], where the row of each pair is, -1 for pairs that are not valid, so that
             ids are not read; by default rows are by pair
    router:  [T, k] weights of the rows
    """
    tokens, top_k = ids.shape
    width = out.shape[1]
    block = min(triton.next_power_of_2(width), 512)
    launch(
        combine_kernel, (tokens, triton.cdiv(width, block)),
        y, ids.contiguous(), inverse, None if router is None else router.contiguous(), out,
        num_experts, first_expert, width, y.stride(0),
        TOP_K=top_k, SPLITS=y.shape[0], BLOCK=block, launch_pdl=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_expert", "split_stride"])
def combine_kernel(
    y_ptr, ids_ptr, inverse_ptr, router_ptr, out_ptr, num_experts, first_expert, width,
    split_stride,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    gdc_wait()
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        if inverse_ptr is not None:
            row = tl.load(inverse_ptr + pair).to(tl.int64)
            valid = row >= 0
        else:
            row = pair
            local = tl.load(ids_ptr + pair).to(tl.int64) - first_expert
            valid = (local >= 0) & (local < num_experts)
        brought = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            at = y_ptr + split * split_stride + row * width + column
            brought += tl.load(at, mask=inside & valid, other=0.0)
        if router_ptr is not None:
            brought *= tl.load(router_ptr + pair).to(tl.float32)
        total += brought
    total = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * width + column, total, mask=inside)
