"""The Hopper grouped GEMM for many tokens per expert, in Gluon: tensor cores never wait.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

Programs stay on their multiprocessors and walk through pieces of work: 256 rows of one expert's
matrix by up to `block` of its tokens. One warp brings packed weights and activations
(`hopper_ring`) while two warpgroups, 128 rows each, decode weights in registers and multiply from
there: a row tile's stage while the other's is decoded. Activations come sorted by expert, columns
in the order of operands, so that a tile's are one block of memory. A tile of few tokens multiplies
quarters of the block.

Scales of groups do not get sums of their own: sums are kept in units of the scale at hand, and
brought to the next one's before its products are added. That is one multiplication per element, as
adding up sums of groups would be, but needs no second set of registers, so tiles stay large.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moelten.kernels.hopper_epilogue import finish, scale_tokens
from moelten.kernels.hopper_fragments import halves, zero_words
from moelten.kernels.hopper_ring import TILES, piece_of_work, produce, take_scale, take_stage

# Registers of a thread of the second warpgroup, and of the producer.
_REGISTERS = gl.constexpr([232, 40])


@gluon.constexpr_function
def _sum_layout(tokens):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 16])


@gluon.constexpr_function
def _pieces(block, quarters):
    """A tile's tokens as powers of two, which is what tensors can have."""
    quarter = block // 4
    return ((quarter,), (2 * quarter,), (2 * quarter, quarter), (block,))[quarters - 1]


@gluon.constexpr_function
def _size(pieces, index):
    return pieces[index]


@gluon.constexpr_function
def _start(pieces, index):
    return sum(pieces[:index])


@gluon.jit
def _zeros(PIECES: gl.constexpr):
    acc = ()
    for i in gl.static_range(len(PIECES)):
        acc = acc + (gl.zeros([64, _size(PIECES, i)], gl.float32, _sum_layout(_size(PIECES, i))),)
    return acc


@gluon.jit
def _multiply(
    acc, a, x, slot, group: gl.constexpr, PIECES: gl.constexpr, P: gl.constexpr
):  # fmt: skip
    """acc + a row tile's stage, or a group of it, @ x: in flight."""
    K: gl.constexpr = 64 // P.groups
    STAGE: gl.constexpr = P.stage
    for c in gl.static_range(STAGE):
        left = a[c]
        if P.groups == 2:
            left = halves(left)[group]
        left = left.reshape([64, K])
        out = ()
        for i in gl.static_range(len(acc)):
            own = gl.convert_layout(
                left,
                gl.DotOperandLayout(0, _sum_layout(_size(PIECES, i)), 2),
                assert_trivial=True,
            )
            b = x.index(slot * P.stage + c).slice(_start(PIECES, i), _size(PIECES, i), 0)
            b = b.slice(group * K, K, 1).permute((1, 0))
            out = out + (warpgroup_mma(own, b, acc[i], is_async=True),)
        acc = out
    return acc


@gluon.jit
def _wait(acc):
    """Sums, complete."""
    if len(acc) == 1:
        return (warpgroup_mma_wait(0, deps=[acc[0]]),)
    else:
        return warpgroup_mma_wait(0, deps=[acc[0], acc[1]])


@gluon.jit
def _times(acc, rows):
    """Every row of the sums times a number [64]."""
    out = ()
    for i in gl.static_range(len(acc)):
        own = gl.convert_layout(rows, gl.SliceLayout(1, acc[i].type.layout), assert_trivial=True)
        out = out + (acc[i] * own.expand_dims(1),)
    return out


@gluon.jit
def _rescale(acc, unit, scale):
    """Sums in units of `unit`, fp32 [64], brought to units of a scale: (sums, the new unit).

    Nothing but codes of zero has a scale of 0 or below 2**-60 of another's (`hopper_layout`): there
    the unit stays, and sums stay finite.
    """
    scale = gl.where(gl.abs(scale) <= gl.abs(unit) * 8.673617379884035e-19, unit, scale)
    return _times(acc, gl.fdiv(unit, scale)), scale


@gluon.jit
def _end_block(turn):
    """The same number. It is never negative, which the compiler does not know: so a basic block
    ends here, and what was decoded before does not sink below the wait that follows."""
    return gl.inline_asm_elementwise(
        """{.reg .pred p;
        again_${:uid}: setp.ge.s32 p, $1, 0; @p bra done_${:uid};
        nanosleep.u32 20; bra again_${:uid};
        done_${:uid}: mov.b32 $0, $1;}""",
        "=r,r",
        [turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _sums(
    words, scales, zeros, x, full, empty, turn, scale_ptr, zero_ptr, expert, row_tile, steps,
    group: gl.constexpr, PIECES: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Sums [64, tokens] of a warpgroup's two row tiles, in pieces of tokens, tile after tile.

    While a row tile multiplies, the other is decoded, and its sums are brought to its next scales.
    """
    TILE: gl.constexpr = 2 * group
    GROUPS: gl.constexpr = P.groups
    matrix0, zero0 = _row_tile(zero_ptr, expert, row_tile, P)
    matrix1, zero1 = _row_tile(zero_ptr, expert, row_tile + 1, P)
    acc0 = _zeros(PIECES)
    acc1 = acc0
    slot = turn % P.slots
    start = turn * 0
    mbarrier.wait(full.index(slot), turn // P.slots & 1)
    unit0 = _first_unit(scales, scale_ptr, matrix0, slot, TILE, start, P)
    unit1 = _first_unit(scales, scale_ptr, matrix1, slot, TILE + 1, start, P)
    a0 = take_stage(words, scales, zeros, zero0, slot, TILE, start, P)
    for step in range(steps):
        slot = turn % P.slots
        chunk = step * P.stage
        next_slot = (turn + 1) % P.slots
        next_phase = (turn + 1) // P.slots & 1
        more = step + 1 < steps
        for g in gl.static_range(GROUPS):
            acc0 = _multiply(acc0, a0, x, slot, g, PIECES, P)
            if P.scaled:
                scale = take_scale(scales, scale_ptr, matrix1, slot, TILE + 1, chunk, g, P)
                acc1, unit1 = _rescale(acc1, unit1, scale)
            if g == 0:
                a1 = take_stage(words, scales, zeros, zero1, slot, TILE + 1, chunk, P)
                turn = _end_block(turn)
            acc0 = _wait(acc0)
            acc1 = _multiply(acc1, a1, x, slot, g, PIECES, P)
            if g < GROUPS - 1:
                scale = take_scale(scales, scale_ptr, matrix0, slot, TILE, chunk, g + 1, P)
                acc0, unit0 = _rescale(acc0, unit0, scale)
            else:
                mbarrier.wait(full.index(next_slot), next_phase, pred=more)
                if P.scaled:
                    after = gl.minimum(chunk + P.stage, P.chunks - 1)
                    scale = take_scale(scales, scale_ptr, matrix0, next_slot, TILE, after, 0, P)
                    # After the last stage a slot holds anything.
                    acc0, unit0 = _rescale(acc0, unit0, gl.where(more, scale, unit0))
                a0 = take_stage(words, scales, zeros, zero0, next_slot, TILE, chunk + P.stage, P)
                turn = _end_block(turn)
            acc1 = _wait(acc1)
        mbarrier.arrive(empty.index(slot))
        turn += 1
    return _final(acc0, unit0, P) + _final(acc1, unit1, P), turn


@gluon.jit
def _row_tile(zero_ptr, expert, row_tile, P: gl.constexpr):
    """Which of all row tiles it is, the last again past it; and a whole row's zero points."""
    matrix = expert * P.row_tiles + gl.minimum(row_tile, P.row_tiles - 1)
    zero = 0
    if zero_ptr is not None:
        W: gl.constexpr = P.weights
        warp, lane = zero_words(W, 4)
        zero = gl.load(zero_ptr + matrix * 32 + (warp * 8 + lane))
    return matrix, zero


@gluon.jit
def _first_unit(scales, scale_ptr, matrix, slot, tile: gl.constexpr, chunk, P: gl.constexpr):
    """The first scales; a first group of zeros has some unit, less than any that follows."""
    if P.scaled:
        unit = take_scale(scales, scale_ptr, matrix, slot, tile, chunk, 0, P)
        return gl.where(unit == 0, 1.1754943508222875e-38, unit)
    else:
        return 0


@gluon.jit
def _final(acc, unit, P: gl.constexpr):
    if P.scaled:
        return _times(acc, unit)
    else:
        return acc


@gluon.jit
def _store(y, out_ptr, first, stop, n0, P: gl.constexpr):
    """[outputs n0 .. , positions first ..] to memory, 16 bytes per lane."""
    OUTPUTS: gl.constexpr = y.shape[0]
    TOKENS: gl.constexpr = y.shape[1]
    WIDTH: gl.constexpr = (P.rows + 31) // 32 * 32 if P.ordered else P.rows
    VECTOR: gl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    L: gl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [32 * VECTOR // OUTPUTS, OUTPUTS // VECTOR], [4, 1], [1, 0]
    )
    y = y.to(out_ptr.dtype.element_ty)
    if P.ordered:
        y = y.reshape([OUTPUTS // 32, 4, 2, 2, 2, TOKENS]).permute((5, 0, 2, 3, 1, 4))
        y = gl.convert_layout(y.reshape([TOKENS, OUTPUTS]), L)
    else:
        y = gl.convert_layout(y.permute((1, 0)), L)
    position = first + gl.arange(0, TOKENS, gl.SliceLayout(1, L))
    n = n0 + gl.arange(0, OUTPUTS, gl.SliceLayout(0, L))
    at = out_ptr + position.to(gl.int64)[:, None] * WIDTH + n[None, :]
    gl.store(at, y, mask=(position < stop)[:, None] & (n < WIDTH)[None, :])


@gluon.jit
def _store_parts(y, out_ptr, first, stop, n0, P: gl.constexpr):
    """`_store`, 32 tokens at a time, for which little shared memory and few registers do."""
    if y.shape[1] > 32:
        HALF: gl.constexpr = y.shape[1] // 2
        low, high = gl.split(y.reshape([y.shape[0], 2, HALF]).permute((0, 2, 1)))
        _store_parts(low, out_ptr, first, stop, n0, P)
        _store_parts(high, out_ptr, first + HALF, stop, n0, P)
    else:
        _store(y, out_ptr, first, stop, n0, P)


@gluon.jit
def _work(
    words, scales, zeros, x, full, empty, turn, scale_ptr, zero_ptr, row_scale_ptr, x_scale_ptr,
    bias_ptr, table_ptr, post_ptr, out_ptr, expert, first, stop, row_tile, steps,
    alpha, beta, limit,
    group: gl.constexpr, PIECES: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of a piece of work."""
    acc, turn = _sums(
        words, scales, zeros, x, full, empty, turn, scale_ptr, zero_ptr, expert, row_tile, steps,
        group, PIECES, P,
    )  # fmt: skip
    # Opaque, lest the addresses that follow from it are computed, and held, before the sums.
    first = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [first], dtype=gl.int32, is_pure=False, pack=1
    )
    W: gl.constexpr = P.weights
    ACTIVATION: gl.constexpr = P.activation
    COUNT: gl.constexpr = len(PIECES)
    for i in gl.static_range(2 * COUNT):
        tile = row_tile + i // COUNT
        at = first + _start(PIECES, i % COUNT)
        sums = acc[i].reshape([4, 2, 8, _size(PIECES, i % COUNT)])
        if x_scale_ptr is not None:
            sums = scale_tokens(sums, x_scale_ptr, at, stop)
        y = finish(
            sums, row_scale_ptr, bias_ptr, table_ptr, post_ptr, expert, tile, 0,
            alpha, beta, limit, P.rows, P.row_tiles, W, P.halves, ACTIVATION, P.limited,
        )  # fmt: skip
        _store_parts(y, out_ptr, at, stop, tile * (64 // P.halves), P)
    return turn


@gluon.jit
def _consume(arguments, group: gl.constexpr, P: gl.constexpr):
    (
        words, scales, zeros, x, full, empty, tiles_ptr, count_ptr, max_tiles, steps, scale_ptr,
        zero_ptr, row_scale_ptr, x_scale_ptr, bias_ptr, table_ptr, post_ptr, out_ptr,
        alpha, beta, limit,
    ) = arguments  # fmt: skip
    turn = 0
    for index in range(gl.program_id(0), gl.load(count_ptr) * P.row_blocks, gl.num_programs(0)):
        expert, first, stop, row_tile = piece_of_work(index, tiles_ptr, max_tiles, P)
        expert = expert.to(gl.int64)
        row_tile += 2 * group
        quarters = (stop - first + P.block // 4 - 1) // (P.block // 4)
        for n in gl.static_range(1, 5):
            if quarters == n:
                turn = _work(
                    words, scales, zeros, x, full, empty, turn, scale_ptr, zero_ptr, row_scale_ptr,
                    x_scale_ptr, bias_ptr, table_ptr, post_ptr, out_ptr, expert, first, stop,
                    row_tile, steps, alpha, beta, limit, group, _pieces(P.block, n), P,
                )  # fmt: skip


@gluon.jit
def _room(desc, COUNT: gl.constexpr):
    """Shared memory for boxes of a descriptor."""
    if desc is None:
        return 0
    else:
        return gl.allocate_shared_memory(
            desc.dtype, [COUNT, desc.block_shape[0], desc.block_shape[1]], desc.layout
        )


@gluon.jit(do_not_specialize=("max_tiles", "steps", "alpha", "beta", "limit"))
def prefill_kernel(
    w_desc, s_desc, z_desc, x_desc, scale_ptr, zero_ptr, row_scale_ptr, x_scale_ptr, tiles_ptr,
    count_ptr, max_tiles, steps, bias_ptr, table_ptr, post_ptr, out_ptr, alpha, beta, limit,
    P: gl.constexpr,
):  # fmt: skip
    """All of one grouped GEMM; steps: stages that the columns make.

    The count is known at run time only, lest loops be unrolled.
    """
    words = _room(w_desc, P.slots * TILES)
    scales = _room(s_desc, P.slots * TILES)
    zeros = _room(z_desc, P.slots * TILES)
    x = gl.allocate_shared_memory(P.operand, [P.slots * P.stage, P.block, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [P.slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [P.slots, 1], mbarrier.MBarrierLayout())
    SLOTS: gl.constexpr = P.slots
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    consumer = (
        words, scales, zeros, x, full, empty, tiles_ptr, count_ptr, max_tiles, steps, scale_ptr,
        zero_ptr, row_scale_ptr, x_scale_ptr, bias_ptr, table_ptr, post_ptr, out_ptr,
        alpha, beta, limit,
    )  # fmt: skip
    producer = (
        w_desc, s_desc, z_desc, x_desc, words, scales, zeros, x, full, empty, tiles_ptr, count_ptr,
        max_tiles, steps,
    )  # fmt: skip
    gl.warp_specialize(
        [(_consume, (consumer, 0, P)), (_consume, (consumer, 1, P)), (produce, (producer, P))],
        [4, 1],
        _REGISTERS,
    )
