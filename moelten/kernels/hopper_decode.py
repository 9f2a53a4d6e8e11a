"""The Hopper grouped GEMM for few tokens per expert, in Gluon: weights stream once, at full speed.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

A program owns a tile: 64 rows of one expert's matrix by up to `block` of its tokens. Its warps
split the columns, so that every byte of weights and of activations goes from memory straight to the
registers of the one warp that uses it; nothing in the loop is shared, nothing waits for another
warp. A row group's next load is issued as soon as its registers are free, and has until the loop
comes round. At the end the warps' sums meet in shared memory, are added in order, and the epilogue
follows: scales of rows, bias, activation, router weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moelten.formats import Format
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_fragments import (
    load_layout,
    multiply,
    parameter_strides,
    scale_offsets,
    sum_layout,
    token_layout,
    tokens,
    zero_offsets,
)
from moelten.kernels.hopper_schedule import Variant
from moelten.kernels.triton_epilogue import NO_EPILOGUE, Epilogue, activate
from moelten.kernels.triton_ops import TilePlan

_RUNTIME = ("max_tiles", "splits", "per_split", "split_stride", "alpha", "beta", "limit",
            "rows_per_source")  # fmt: skip
_OPERANDS = {"bf16": gl.bfloat16, "fp16": gl.float16}


def grouped_gemm(
    x: Tensor,
    matrix: dict[str, Tensor],
    fmt: Format,
    operand: str,
    shape: tuple[int, int, int],
    plan: TilePlan,
    out: Tensor,
    variant: Variant,
    *,
    first: bool,
    rows_per_source: int = 1,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Write out[s, p] for every valid pair p, from row p // rows_per_source of x.

    x:       [R, K rounded up to 8] in the operand type, "bf16" or "fp16"
    matrix:  the tensors of `hopper_layout` for weights in `fmt`, expert-major
    shape:   halves, N and K of one expert's matrix
    out:     [splits, P, N rounded up to 8], what each split of K brings; rows of invalid pairs are
             not written
    first:   whether this is the first GEMM after the plan
    """
    halves, rows, columns = shape
    scale = matrix.get("scale")
    stored = storage(fmt, operand)
    table = epilogue.parameters if isinstance(epilogue.parameters, Tensor) else None
    alpha, beta, limit = (1.0, 0.0, 0.0) if table is not None else epilogue.parameters
    steps = -(-columns // (64 * variant.warps))
    row_tiles = -(-rows * halves // 64)
    decode_kernel[(plan.max_tiles * row_tiles * variant.splits,)](
        _words(x), _words(matrix["data"]), None if scale is None else _words(scale),
        _words(matrix["zero"]) if "zero" in matrix else None, matrix.get("row_scale"),
        plan.pairs, plan.tiles, plan.count, plan.max_tiles,
        epilogue.bias, table, epilogue.post_scale,
        None if epilogue.router is None else epilogue.router.contiguous(),
        out, variant.splits, -(-steps // variant.splits), out.stride(0),
        alpha, beta, limit, rows_per_source,
        K=columns, N=rows, HALVES=halves, W=stored, SCALE=_scale_type(scale),
        OPERAND=_OPERANDS[operand], ACTIVATION=epilogue.activation,
        LIMITED=table is not None or limit != float("inf"),
        BLOCK=plan.block, WARPS=variant.warps, FIRST=first,
        num_warps=variant.warps, maxnreg=variant.registers, launch_pdl=True,
    )  # fmt: skip


def _words(part: Tensor) -> Tensor:
    return part.view(torch.int32).view(torch.uint32)


def _scale_type(scale: Tensor | None) -> str:
    return "" if scale is None else str(scale.dtype).removeprefix("torch.")


@gluon.jit
def _load_words(at, offset, GROUP: gl.constexpr):
    return gl.load(at + (offset + GROUP * 128), eviction_policy="evict_first")


@gluon.jit
def _sums(
    x_ptr, w_ptr, scale_ptr, zero_ptr, first_pair, stop_pair, pairs_ptr, matrix, split, per_split,
    rows_per_source,
    K: gl.constexpr, W: gl.constexpr, SCALE: gl.constexpr, OPERAND: gl.constexpr,
    TOKENS: gl.constexpr, WARPS: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Sums [row group, b, g, tokens] of one tile over one split of the columns."""
    CHUNKS: gl.constexpr = (K + 63) // 64
    STEPS: gl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    CHUNK_WORDS: gl.constexpr = W.code.bits * 128
    SUPER_BLOCKS: gl.constexpr = (CHUNKS + 3) // 4
    # A count known only at run time, lest the loop be unrolled and its loads sink to their use.
    start = split * per_split
    stop = gl.minimum(start + per_split, STEPS)

    LOAD: gl.constexpr = load_layout(WARPS, W.code.bits // 4)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LOAD)))[:, None, None]
    load = gl.arange(0, W.code.bits // 4, gl.SliceLayout(0, gl.SliceLayout(2, LOAD)))[None, :, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, LOAD)))[None, None, :]
    w_at = w_ptr + matrix * (CHUNKS * CHUNK_WORDS) + (load * 512 + word)
    at = _chunk(start, warp, WARPS, CHUNKS) * CHUNK_WORDS
    w0 = _load_words(w_at, at, 0)
    w1 = _load_words(w_at, at, 1)
    w2 = _load_words(w_at, at, 2)
    w3 = _load_words(w_at, at, 3)
    SCALED: gl.constexpr = scale_ptr is not None
    s0 = w0
    s1 = w0
    s2 = w0
    s3 = w0
    if SCALED:
        S: gl.constexpr = parameter_strides(W, SCALE, False)
        s_offset, s_super = scale_offsets(W, SCALE, WARPS)
        s_at = scale_ptr + matrix * (SUPER_BLOCKS * S[0]) + s_offset
        s_step = _super_block(start, s_super, WARPS, SUPER_BLOCKS) * S[0]
        s0 = gl.load(s_at + s_step)
        s1 = gl.load(s_at + (s_step + S[1]))
        s2 = gl.load(s_at + (s_step + 2 * S[1]))
        s3 = gl.load(s_at + (s_step + 3 * S[1]))
    z0 = w0
    z1 = w0
    z2 = w0
    z3 = w0
    z_bit = 0
    if zero_ptr is not None:
        Z: gl.constexpr = parameter_strides(W, SCALE, True)
        z_offset, z_super, z_bit = zero_offsets(W, WARPS)
        Z_BLOCKS: gl.constexpr = 1 if W.group == 0 else SUPER_BLOCKS
        z_at = zero_ptr + matrix * (Z_BLOCKS * Z[0]) + z_offset
        z_step = _super_block(start, z_super, WARPS, Z_BLOCKS) * Z[0]
        z0 = gl.load(z_at + z_step)
        z1 = gl.load(z_at + (z_step + Z[1]))
        z2 = gl.load(z_at + (z_step + 2 * Z[1]))
        z3 = gl.load(z_at + (z_step + 3 * Z[1]))
    if WAIT:
        gdc_wait()

    TOKEN: gl.constexpr = token_layout(WARPS, TOKENS)
    ROW_WORDS: gl.constexpr = (K + 7) // 8 * 4
    token = first_pair + gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, TOKEN)))
    inside = token < stop_pair
    pair = gl.load(pairs_ptr + token, mask=inside, other=0)
    source = (pair // rows_per_source).to(gl.int64) * ROW_WORDS
    block = gl.arange(0, 2 * WARPS, gl.SliceLayout(1, gl.SliceLayout(2, TOKEN)))[:, None, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, TOKEN)))[None, None, :]
    column = block * 16 + column
    x_at = x_ptr + source[None, :, None] + column
    inside = inside[None, :, None]
    x = _load_tokens(x_at, inside, column, start, WARPS, ROW_WORDS)

    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    acc0 = gl.zeros([WARPS, 16, TOKENS], gl.float32, MMA)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for step in range(start + 1, stop):
        at = _chunk(step, warp, WARPS, CHUNKS) * CHUNK_WORDS
        b = tokens(x, WARPS, TOKENS, OPERAND)
        x = _load_tokens(x_at, inside, column, step, WARPS, ROW_WORDS)
        if SCALED:
            s_step = _super_block(step, s_super, WARPS, SUPER_BLOCKS) * S[0]
        if zero_ptr is not None:
            z_step = _super_block(step, z_super, WARPS, Z_BLOCKS) * Z[0]
        acc0 = multiply(acc0, w0, s0, z0 >> z_bit, b, W, SCALE, OPERAND)
        w0 = _load_words(w_at, at, 0)
        if SCALED:
            s0 = gl.load(s_at + s_step)
        if zero_ptr is not None:
            z0 = gl.load(z_at + z_step)
        acc1 = multiply(acc1, w1, s1, z1 >> z_bit, b, W, SCALE, OPERAND)
        w1 = _load_words(w_at, at, 1)
        if SCALED:
            s1 = gl.load(s_at + (s_step + S[1]))
        if zero_ptr is not None:
            z1 = gl.load(z_at + (z_step + Z[1]))
        acc2 = multiply(acc2, w2, s2, z2 >> z_bit, b, W, SCALE, OPERAND)
        w2 = _load_words(w_at, at, 2)
        if SCALED:
            s2 = gl.load(s_at + (s_step + 2 * S[1]))
        if zero_ptr is not None:
            z2 = gl.load(z_at + (z_step + 2 * Z[1]))
        acc3 = multiply(acc3, w3, s3, z3 >> z_bit, b, W, SCALE, OPERAND)
        w3 = _load_words(w_at, at, 3)
        if SCALED:
            s3 = gl.load(s_at + (s_step + 3 * S[1]))
        if zero_ptr is not None:
            z3 = gl.load(z_at + (z_step + 3 * Z[1]))
    b = tokens(x, WARPS, TOKENS, OPERAND)
    acc0 = multiply(acc0, w0, s0, z0 >> z_bit, b, W, SCALE, OPERAND)
    acc1 = multiply(acc1, w1, s1, z1 >> z_bit, b, W, SCALE, OPERAND)
    acc2 = multiply(acc2, w2, s2, z2 >> z_bit, b, W, SCALE, OPERAND)
    acc3 = multiply(acc3, w3, s3, z3 >> z_bit, b, W, SCALE, OPERAND)
    acc = gl.join(gl.join(acc0, acc1), gl.join(acc2, acc3))  # warp b g, token, row group
    acc = acc.permute((0, 4, 3, 1, 2)).reshape([WARPS, 4, 2, 8, TOKENS])
    return gl.sum(gl.convert_layout(acc, sum_layout(WARPS, TOKENS)), 0)


@gluon.jit
def _chunk(step, warp, WARPS: gl.constexpr, CHUNKS: gl.constexpr):
    """A warp's chunk; past the last one, that again, where activations are zeros."""
    chunk = step * WARPS + warp
    if CHUNKS % WARPS != 0:
        chunk = gl.minimum(chunk, CHUNKS - 1)
    return chunk


@gluon.jit
def _super_block(step, own, WARPS: gl.constexpr, SUPER_BLOCKS: gl.constexpr):
    block = step * (WARPS // 4) + own
    if WARPS > 4 or SUPER_BLOCKS == 1:
        block = gl.minimum(block, SUPER_BLOCKS - 1)
    return block


@gluon.jit
def _load_tokens(at, inside, column, step, WARPS: gl.constexpr, ROW_WORDS: gl.constexpr):
    if ROW_WORDS % (32 * WARPS) != 0:
        inside = inside & (step * (32 * WARPS) + column < ROW_WORDS)
    return gl.load(at + step * (32 * WARPS), mask=inside, other=0)


@gluon.jit
def _finish(
    acc, row_scale_ptr, bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr, pairs_ptr,
    first_pair, stop_pair, expert, row_tile, split, matrix, alpha, beta, limit,
    N: gl.constexpr, W: gl.constexpr, HALVES: gl.constexpr, ACTIVATION: gl.constexpr,
    LIMITED: gl.constexpr,
):  # fmt: skip
    """What follows the sums [row group, b, g, tokens] in fp32, one rounding, and the store."""
    TOKENS: gl.constexpr = acc.shape[3]
    ROWS: gl.constexpr = 64 // HALVES
    if row_scale_ptr is not None:
        L: gl.constexpr = acc.type.layout
        group = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))
        b = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
        g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))
        row = group[:, None, None, None] * 16 + b[None, :, None, None] * 8 + g[None, None, :, None]
        acc = acc * gl.load(row_scale_ptr + matrix * 64 + row)
    if W.code.epilogue != 1.0:
        acc = acc * W.code.epilogue
    if HALVES == 2:
        h0, h1 = gl.split(acc.permute((0, 2, 3, 1)))
        h0 = h0.reshape([ROWS, TOKENS])
        h1 = h1.reshape([ROWS, TOKENS])
    else:
        h0 = acc.reshape([ROWS, TOKENS])
        h1 = h0
    OUT: gl.constexpr = h0.type.layout
    n = row_tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    token = first_pair + gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))
    inside = token < stop_pair
    pair = gl.load(pairs_ptr + token, mask=inside, other=0)
    if bias_ptr is not None:
        # The first of several splits brings the bias.
        biased = (n < N) & (split == 0)
        at = bias_ptr + expert * (HALVES * N) + n
        h0 = h0 + gl.load(at, mask=biased, other=0.0)[:, None]
        if HALVES == 2:
            h1 = h1 + gl.load(at + N, mask=biased, other=0.0)[:, None]
    if table_ptr is not None:
        alpha = gl.load(table_ptr + expert * 3)
        beta = gl.load(table_ptr + expert * 3 + 1)
        limit = gl.load(table_ptr + expert * 3 + 2)
    y = activate(h0, h1, alpha, beta, limit, ACTIVATION, LIMITED)
    if post_ptr is not None:
        y = y * gl.load(post_ptr + expert * N + n, mask=n < N, other=0.0)[:, None]
    if router_ptr is not None:
        y = y * gl.load(router_ptr + pair, mask=inside, other=0.0).to(gl.float32)[None, :]
    # Rows are padded to 16 bytes, with zeros: those are what codes past the last row decode to.
    WIDTH: gl.constexpr = (N + 7) // 8 * 8
    at = out_ptr + pair.to(gl.int64)[None, :] * WIDTH + n[:, None]
    gl.store(at, y.to(out_ptr.dtype.element_ty), mask=(n < WIDTH)[:, None] & inside[None, :])


@gluon.jit
def _tile(
    x_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, bias_ptr, table_ptr,
    post_ptr, router_ptr, out_ptr, first_pair, stop_pair, expert, row_tile, split,
    per_split, matrix, rows_per_source, alpha, beta, limit,
    K: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr, W: gl.constexpr, SCALE: gl.constexpr,
    OPERAND: gl.constexpr, ACTIVATION: gl.constexpr, LIMITED: gl.constexpr,
    TOKENS: gl.constexpr, WARPS: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    acc = _sums(
        x_ptr, w_ptr, scale_ptr, zero_ptr, first_pair, stop_pair, pairs_ptr, matrix, split,
        per_split, rows_per_source, K, W, SCALE, OPERAND, TOKENS, WARPS, WAIT,
    )  # fmt: skip
    _finish(
        acc, row_scale_ptr, bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr, pairs_ptr,
        first_pair, stop_pair, expert, row_tile, split, matrix, alpha, beta, limit,
        N, W, HALVES, ACTIVATION, LIMITED,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME)
def decode_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, tiles_ptr, count_ptr, max_tiles,
    bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr, splits, per_split, split_stride,
    alpha, beta, limit, rows_per_source,
    K: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr, W: gl.constexpr, SCALE: gl.constexpr,
    OPERAND: gl.constexpr, ACTIVATION: gl.constexpr, LIMITED: gl.constexpr,
    BLOCK: gl.constexpr, WARPS: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """One tile of one expert: 64 rows (of both halves) by up to BLOCK pairs, one split of K."""
    ROW_TILES: gl.constexpr = (N * HALVES + 63) // 64
    if FIRST:
        # The plan's; later kernels may read it before they wait, for weights that they prefetch.
        gdc_wait()
    gdc_launch_dependents()
    program = gl.program_id(0)
    split = program % splits
    row_tile = program // splits % ROW_TILES
    tile = program // (splits * ROW_TILES)
    if tile >= gl.load(count_ptr):
        return
    expert = gl.load(tiles_ptr + tile).to(gl.int64)
    first = gl.load(tiles_ptr + max_tiles + tile)
    stop = gl.load(tiles_ptr + 2 * max_tiles + tile)
    matrix = expert * ROW_TILES + row_tile
    out_ptr += split * split_stride
    if BLOCK > 8 and stop - first > 8:
        _tile(
            x_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, bias_ptr, table_ptr,
            post_ptr, router_ptr, out_ptr, first, stop, expert, row_tile, split, per_split, matrix,
            rows_per_source, alpha, beta, limit,
            K, N, HALVES, W, SCALE, OPERAND, ACTIVATION, LIMITED, BLOCK, WARPS, not FIRST,
        )  # fmt: skip
    else:
        # Most tiles of small experts: fewer columns than BLOCK cost less.
        _tile(
            x_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, bias_ptr, table_ptr,
            post_ptr, router_ptr, out_ptr, first, stop, expert, row_tile, split, per_split, matrix,
            rows_per_source, alpha, beta, limit,
            K, N, HALVES, W, SCALE, OPERAND, ACTIVATION, LIMITED, 8, WARPS, not FIRST,
        )  # fmt: skip
