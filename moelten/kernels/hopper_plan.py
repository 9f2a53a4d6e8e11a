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
from moelten.kernels.triton_ops import Rows, TilePlan, make_tile_plan

_SCAN = 1024
_MAX_PAIRS = 8192
_GATHERED = 4  # rows of a program, whose loads overlap


def plan_tiles(ids: Tensor, num_experts: int, first_expert: int, plan: TilePlan) -> None:
    """What `triton_ops.make_tile_plan` writes to `plan`, in one launch up to 8192 pairs."""
    size = ids.numel()
    if size > _MAX_PAIRS:
        make_tile_plan(ids, num_experts, first_expert, plan.block, plan)
        return
    launch(
        plan_kernel, (num_experts,),
        ids.contiguous(), plan.pairs, plan.tiles, plan.count, size, num_experts, first_expert,
        plan.max_tiles, BLOCK=plan.block, EXPERTS=triton.next_power_of_2(num_experts),
        SCAN=min(max(triton.next_power_of_2(size), 32), _SCAN),
    )  # fmt: skip


@triton.jit(do_not_specialize=["size", "first_expert", "max_tiles"])
def plan_kernel(
    ids_ptr, pairs_ptr, tiles_ptr, count_ptr, size, num_experts, first_expert, max_tiles,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Count all experts' pairs, in every program; write the pairs and tiles of its own."""
    gdc_launch_dependents()
    expert = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, size, SCAN):
        i = start + tl.arange(0, SCAN)
        local = tl.load(ids_ptr + i, mask=i < size, other=0).to(tl.int64) - first_expert
        valid = (i < size) & (local >= 0) & (local < num_experts)
        counts += tl.histogram(tl.where(valid, local, 0).to(tl.int32), EXPERTS, mask=valid)
    tiles = (counts + BLOCK - 1) // BLOCK
    position = tl.sum(tl.where(e < expert, counts, 0))
    tile = tl.sum(tl.where(e < expert, tiles, 0))
    stop = position + tl.sum(tl.where(e == expert, counts, 0))
    if expert == 0:
        tl.store(count_ptr, tl.sum(tiles))
    first = position
    while first < stop:
        tl.store(tiles_ptr + tile, expert)
        tl.store(tiles_ptr + max_tiles + tile, first)
        tl.store(tiles_ptr + 2 * max_tiles + tile, tl.minimum(first + BLOCK, stop))
        tile += 1
        first += BLOCK
    if position < stop:
        for start in range(0, size, SCAN):
            i = start + tl.arange(0, SCAN)
            local = tl.load(ids_ptr + i, mask=i < size, other=0).to(tl.int64) - first_expert
            mine = ((local == expert) & (i < size)).to(tl.int32)
            tl.store(pairs_ptr + position + tl.cumsum(mine, 0) - mine, i, mask=mine != 0)
            position += tl.sum(mine)


def gather(x: Rows, rows_per_source: int, plan: TilePlan, out: Rows, inverse: Tensor) -> None:
    """out[i] = row pairs[i] // rows_per_source of x, and inverse[pairs[i]] = i, for positions i.

    x:       [R, K] of 16 bits, and a scale of each row or none
    out:     [P, K rounded up to 32], columns in the order of `hopper_layout`'s operands, then zeros
    inverse: int32 [P], undefined for pairs that are not valid
    """
    words, width = x.data.shape[1] // 2, out.data.shape[1] // 2
    block = min(triton.next_power_of_2(width), 1024)
    launch(
        gather_kernel, (triton.cdiv(len(inverse), _GATHERED), triton.cdiv(width, block)),
        x.data.view(torch.int32), x.scale, plan.pairs, plan.tiles, plan.count,
        out.data.view(torch.int32), out.scale, inverse,
        len(inverse), plan.max_tiles, rows_per_source,
        WORDS=words, WIDTH=width, ROWS=_GATHERED, BLOCK=block,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size", "max_tiles", "rows_per_source"])
def gather_kernel(
    x_ptr, scale_ptr, pairs_ptr, tiles_ptr, count_ptr, out_ptr, out_scale_ptr, inverse_ptr,
    size, max_tiles, rows_per_source,
    WORDS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    to = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    valid = tl.load(tiles_ptr + 2 * max_tiles + count - 1, mask=count > 0, other=0)
    inside = position < tl.minimum(valid, size)
    pair = tl.load(pairs_ptr + position, mask=inside, other=0)
    if tl.program_id(1) == 0:
        tl.store(inverse_ptr + pair, position, mask=inside)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + pair // rows_per_source, mask=inside, other=0.0)
            tl.store(out_scale_ptr + position, scale, mask=inside)
    source = (pair // rows_per_source).to(tl.int64)[:, None] * WORDS
    # Words of 32 columns: s j t in the order of operands, t s j in memory.
    column = to // 16 * 16 + to % 4 * 4 + to // 4 % 4
    known = inside[:, None] & (column < WORDS)[None, :]
    word = tl.load(x_ptr + source + column[None, :], mask=known, other=0)
    at = position.to(tl.int64)[:, None] * WIDTH + to[None, :]
    tl.store(out_ptr + at, word, mask=inside[:, None] & (to < WIDTH)[None, :])


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

    inverse: int32 [T*k], where the row of each pair is; that of the pair by default
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
        local = tl.load(ids_ptr + pair).to(tl.int64) - first_expert
        valid = (local >= 0) & (local < num_experts)
        row = pair
        if inverse_ptr is not None:
            row = tl.load(inverse_ptr + pair, mask=valid, other=0).to(tl.int64)
        brought = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            at = y_ptr + split * split_stride + row * width + column
            brought += tl.load(at, mask=inside & valid, other=0.0)
        if router_ptr is not None:
            brought *= tl.load(router_ptr + pair).to(tl.float32)
        total += brought
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)
