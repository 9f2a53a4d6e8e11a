"""What stands before and behind the decode GEMMs: the plan in a launch or none, the sum over slots.

Within a layer each kernel is launched while the one before it drains, and waits (`gdc_wait`) before
it reads what that one writes; GEMM1 waits for the plan, so later kernels may rely on that. Layers
follow each other without overlap: the plan waits for all before it, as any kernel does, or GEMM1.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moelten.kernels.hopper_sums import in_columns, load_sums
from moelten.kernels.launches import launch
from moelten.kernels.triton_casts import only_if, round_to
from moelten.kernels.triton_plan import (
    TilePlan,
    histogram,
    local_experts,
    make_tile_plan,
    store_count,
    store_tile,
    tile_start,
)

# Pairs that a program looks at together.
_SCAN = 2048
_MAX_PAIRS = 8192
# Pairs times experts, each of which counts all pairs, from which on two launches take less time.
_MAX_COUNTED = 1 << 19


@dataclass(frozen=True)
class OneToken:
    """A plan that needs no launch, since a token's experts differ: each pair is a tile.

    ids:   int32 or int64 [1, k], contiguous; those of no local expert have no tile
    block: as `TilePlan` has it
    """

    ids: Tensor
    num_experts: int
    first_expert: int
    block: int


def plan_tiles(ids: Tensor, num_experts: int, first_expert: int, plan: TilePlan) -> None:
    """What `triton_plan.make_tile_plan` writes to `plan`, in one launch where that is worth it.

    That is up to 8192 pairs, if the next kernel is launched meanwhile, as those for few tokens per
    expert are; for many, who want to know where pairs are, less (H200: 6144 pairs of 256 experts
    take 20 us in one launch, 9 in two).
    """
    size = ids.numel()
    alone = plan.inverse is not None
    if size > _MAX_PAIRS or (alone and size * num_experts > _MAX_COUNTED):
        make_tile_plan(ids, num_experts, first_expert, plan)
        return
    scan = min(max(triton.next_power_of_2(size), 32), _SCAN)
    launch(
        plan_kernel, (num_experts,),
        ids.contiguous(), plan.pairs, plan.tiles, plan.count, plan.inverse,
        size, num_experts, first_expert, plan.max_tiles, plan.shared,
        BLOCK=plan.block, UNIT=plan.unit, EXPERTS=triton.next_power_of_2(num_experts),
        SCAN=scan, num_warps=4 if scan < 1024 else 8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size", "first_expert", "max_tiles", "shared"])
def plan_kernel(
    ids_ptr, pairs_ptr, tiles_ptr, count_ptr, inverse_ptr,
    size, num_experts, first_expert, max_tiles, shared,
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
            nowhere = only_if(expert == 0, (local == num_experts) & (i < size))
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
        store_tile(tiles_ptr, max_tiles, tile + nth, expert, first, stop)
        nth += 1
    if rows > 0:
        start = expert * 0
        while start < size:
            i = start + tl.arange(0, SCAN)
            local = local_experts(ids_ptr, i, size, num_experts, first_expert)
            mine = (local == expert).to(tl.int32)
            at = position + tl.cumsum(mine, 0) - mine
            tl.store(pairs_ptr + at, i // shared, mask=mine != 0)
            if inverse_ptr is not None:
                tl.store(inverse_ptr + i, at, mask=mine != 0)
            position += tl.sum(mine)
            start += SCAN


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
             ids are not read; then y is uint8 [1, T*k, `slot_bytes`] (`hopper_sums`); by default it
             is fp32, rows by pair, columns as those of out
    router:  [T, k] weights of the rows
    """
    tokens, top_k = ids.shape
    width = out.shape[1]
    columns = y.shape[2] if inverse is None else y.shape[2] // 2
    block = min(triton.next_power_of_2(columns), 512 if inverse is None else 1024)
    launch(
        combine_kernel, (tokens, triton.cdiv(width, block)),
        y, ids.contiguous(), inverse, None if router is None else router.contiguous(), out,
        num_experts, first_expert, width, columns, y.stride(0),
        TOP_K=top_k, SPLITS=y.shape[0], BLOCK=block,
        num_warps=4 if inverse is None else 2, launch_pdl=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_expert", "split_stride"])
def combine_kernel(
    y_ptr, ids_ptr, inverse_ptr, router_ptr, out_ptr, num_experts, first_expert, width, columns,
    split_stride,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    # What GEMM2 does not write, before waiting for it.
    where = ()
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        if inverse_ptr is not None:
            where = where + (tl.load(inverse_ptr + pair).to(tl.int64),)
        else:
            where = where + (tl.load(ids_ptr + pair).to(tl.int64) - first_expert,)
    gdc_wait()
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        if inverse_ptr is not None:
            brought = load_sums(y_ptr, where[slot], first, where[slot] >= 0, columns, BLOCK)
        else:
            valid = (where[slot] >= 0) & (where[slot] < num_experts)
            inside = only_if(valid, column < columns)
            brought = tl.zeros((BLOCK,), tl.float32)
            for split in tl.static_range(SPLITS):
                at = split * split_stride + pair * columns + column
                brought += tl.load(y_ptr + at, mask=inside, other=0.0)
        if router_ptr is not None:
            brought *= tl.load(router_ptr + pair).to(tl.float32)
        total += brought
    if inverse_ptr is not None:
        total = in_columns(total, BLOCK)
    total = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * width + column, total, mask=column < width)
