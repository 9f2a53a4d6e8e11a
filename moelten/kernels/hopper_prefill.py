"""The Hopper grouped GEMM for more than a few tokens per expert, in Gluon.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

Programs stay on their multiprocessors and walk through pieces of work: `tiles` times 64 rows of one
expert's matrix by up to `block` of its tokens. One warp brings packed weights and activations
(`hopper_ring`), which for GEMM1 two more may gather (`hopper_gather`), while two or four
warpgroups, each with one row tile of every band, decode weights in registers and multiply from
there. They run the same instructions, but in a matrix's last piece, where each does what it has row
tiles for: two loops, one each, are more than the caches of instructions hold, which on H200 takes
up to 40 % of the time. Products are made by instructions of whole warpgroups for many tokens
(`hopper_wide`) and for less than about a hundred (`hopper_narrow`), of single warps for few
(`hopper_mma`). Columns of activations come in the order of operands, and where rows are not
gathered they are sorted by expert, so that a tile's are one block of memory. What a tile costs
grows by units of a few tokens.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from moelten.kernels.gluon_names import reinterpret, wait_for_all
from moelten.kernels.hopper_fragments import no_sums
from moelten.kernels.hopper_gather import gather_rows
from moelten.kernels.hopper_mma import WARP_SUMS, warp_sums
from moelten.kernels.hopper_narrow import narrow_sums
from moelten.kernels.hopper_products import (
    TOKEN_BOXES,
    TOKENS,
    find,
    number_memory,
    sums_layout,
)
from moelten.kernels.hopper_results import announce, finish_piece, row_factors
from moelten.kernels.hopper_ring import (
    BARRIERS,
    GATHERERS,
    leave,
    place_of,
    produce,
    take_work,
    wait_until_full,
)
from moelten.kernels.hopper_wide import wide_sums


@gluon.jit
def _opaque(number):
    """The same number; addresses that follow from it are not computed, and held, before."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _team(number):
    """Which warpgroup this is, asked anew where it is needed; the same for all lanes, as the last
    instruction tells the assembler."""
    return gl.inline_asm_elementwise(
        """{.reg .b32 team; mov.u32 team, %tid.x; shr.u32 team, team, 7;
        redux.sync.max.s32 $0, team, 0xffffffff;}""",
        "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _layout(P):
    """Of sums."""
    return WARP_SUMS.value if P.variant.by_warp else sums_layout(P.variant.warps)


@gluon.jit
def _pass_by(ring, turn, steps, P: gl.constexpr):
    """A piece of work of which this warpgroup has nothing."""
    for _ in range(steps):
        leave(wait_until_full(ring, place_of(turn, P)), P)
        turn += 1
    return turn


@gluon.jit
def _sums(
    ring, turn, zero_ptr, expert, row_tile, steps,
    N: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """A piece of work of so many tokens and bands: a block's sums of each band there may be."""
    FEW: gl.constexpr = warp_sums if P.variant.by_warp else narrow_sums
    SUMS_OF: gl.constexpr = FEW if P.variant.few else wide_sums
    LAYOUT: gl.constexpr = _layout(P)
    ALL: gl.constexpr = P.variant.bands
    HELD: gl.constexpr = P.held
    out = ()
    if BANDS == 0:
        turn = _pass_by(ring, turn, steps, P)
    else:
        acc, turn = SUMS_OF(ring, turn, zero_ptr, expert, row_tile, steps, N, BANDS, P)
        UNITS: gl.constexpr = len(acc) // BANDS
        none = no_sums(HELD - UNITS, TOKENS, LAYOUT)
        for b in gl.static_range(BANDS):
            out = out + acc[b * UNITS : (b + 1) * UNITS] + none
    return out + no_sums((ALL - BANDS) * HELD, TOKENS, LAYOUT), turn


@gluon.constexpr_function
def _widths(P, bands):
    """Numbers of tokens that so many bands are multiplied for. Fewer of a last piece, which is a
    small part of a matrix, lest there is much to compile."""
    if bands == P.variant.bands:
        return P.widths
    return P.widths[::-2][::-1] if P.variant.few and bands > 0 else P.widths[-1:]


@gluon.jit
def _sums_of(
    ring, turn, zero_ptr, expert, row_tile, steps, tokens,
    i: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """`_sums` of a number of tokens, the i-th one or more, known at run time."""
    WIDTHS: gl.constexpr = _widths(P, BANDS)
    N: gl.constexpr = WIDTHS[i]
    if i + 1 == len(WIDTHS):
        return _sums(ring, turn, zero_ptr, expert, row_tile, steps, N, BANDS, P)
    else:
        if tokens <= N:
            acc, turn = _sums(ring, turn, zero_ptr, expert, row_tile, steps, N, BANDS, P)
        else:
            acc, turn = _sums_of(
                ring, turn, zero_ptr, expert, row_tile, steps, tokens, i + 1, BANDS, P
            )
        return acc, turn


@gluon.jit
def _own_sums(
    ring, turn, zero_ptr, expert, row_tile, steps, tokens, own, i: gl.constexpr, P: gl.constexpr
):
    """`_sums_of` as many bands as this warpgroup has: the i-th of the fewer ones, or more."""
    if i == len(P.fewer):
        ALL: gl.constexpr = P.variant.bands
        return _sums_of(ring, turn, zero_ptr, expert, row_tile, steps, tokens, 0, ALL, P)
    else:
        BANDS: gl.constexpr = P.fewer[i]
        if own == BANDS:
            acc, turn = _sums_of(ring, turn, zero_ptr, expert, row_tile, steps, tokens, 0, BANDS, P)
        else:
            acc, turn = _own_sums(
                ring, turn, zero_ptr, expert, row_tile, steps, tokens, own, i + 1, P
            )
        return acc, turn


@gluon.jit
def _multiply_piece(
    ring, turn, zero_ptr, epilogue, expert, first, stop, row_tile, steps, P: gl.constexpr
):
    """A piece of work: sums, and what follows them."""
    TEAMS: gl.constexpr = P.variant.teams
    tokens = stop - first
    steps = _opaque(steps)
    LAYOUT: gl.constexpr = _layout(P)
    # Asked for before they are needed, where there are registers to hold them.
    EARLY: gl.constexpr = P.variant.few and P.variant.programs == 1
    rows = 0
    if EARLY:
        rows = row_factors(epilogue, expert.to(gl.int64), row_tile, LAYOUT, P)
    announce(epilogue, expert.to(gl.int64), row_tile, P)
    own = 0
    if len(P.fewer) > 0:
        # Bands of which this warpgroup has a row tile.
        left = P.row_tiles - row_tile - _team(row_tile)
        own = gl.minimum((left + TEAMS - 1) // TEAMS, P.variant.bands)
    acc, turn = _own_sums(ring, turn, zero_ptr, expert, row_tile, steps, tokens, own, 0, P)
    first, expert = _opaque(first), _opaque(expert).to(gl.int64)
    if not EARLY:
        rows = row_factors(epilogue, expert, row_tile, LAYOUT, P)
    finish_piece(acc, rows, epilogue, expert, first, stop, row_tile, P)
    return turn


@gluon.jit
def _consume(ring, work, zero_ptr, epilogue, steps, P: gl.constexpr):
    """All pieces of work."""
    turn = 0
    expert, first, stop, row_tile = take_work(ring, work, turn, P)
    while expert >= 0:
        turn = _multiply_piece(
            ring, turn, zero_ptr, epilogue, expert, first, stop, row_tile, steps, P
        )
        expert, first, stop, row_tile = take_work(ring, work, turn, P)
    if P.chained and P.ordered:
        leave(place_of(turn, P)[0], P)


@gluon.jit
def _by_band(boxes, desc, P: gl.constexpr):
    """Boxes of a descriptor, cut into those of a band's row tiles."""
    if desc is None:
        return 0
    else:
        COUNT: gl.constexpr = P.variant.slots * P.variant.bands
        SHAPE: gl.constexpr = [COUNT, P.variant.teams * desc.block_shape[2], desc.block_shape[3]]
        return reinterpret(boxes, desc.dtype, SHAPE, gl.NVMMASharedLayout(0, 32, 2))


@gluon.jit
def _words(boxes, desc, P: gl.constexpr):
    """`_by_band` of words, [row tiles, rows, 32]."""
    COUNT: gl.constexpr = P.variant.slots * P.variant.bands
    SHAPE: gl.constexpr = [COUNT, P.variant.teams, desc.block_shape[2], desc.block_shape[3]]
    L: gl.constexpr = gl.NVMMASharedLayout(128, 32, 3)
    return reinterpret(boxes, desc.dtype, SHAPE, L)


@gluon.constexpr_function
def _so_many(count, shape):
    return [count, *shape]


@gluon.jit
def _room(desc, COUNT: gl.constexpr):
    """Shared memory for so many boxes of a descriptor."""
    if desc is None:
        return 0
    else:
        SHAPE: gl.constexpr = _so_many(COUNT, desc.block_shape)
        return gl.allocate_shared_memory(desc.dtype, SHAPE, desc.layout)


@gluon.jit
def _scales(boxes, desc, P: gl.constexpr):
    """`_by_band` of scales; of blocks 32 words for each row tile, of which the first four count."""
    SHAPE: gl.constexpr = [P.variant.slots * P.variant.bands, P.variant.teams, 32]
    if P.weights.scale == "block":
        return reinterpret(boxes, gl.int32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    else:
        return _by_band(boxes, desc, P)


@gluon.jit
def _by_group(boxes, P: gl.constexpr):
    """The boxes of scales of activations, in memory's order, and behind them one of ones."""
    COUNT: gl.constexpr = P.variant.slots * P.variant.x_groups
    SHAPE: gl.constexpr = [COUNT + 1, P.variant.block, 4]
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [gl.num_warps(), 1], [1, 0])
    if P.variant.grouped:
        scales = reinterpret(boxes, gl.float32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        scales.index(COUNT).store(gl.full([P.variant.block, 4], 1.0, gl.float32, L))
        wait_for_all()  # here, lest Gluon puts one into the loop
        return scales
    else:
        return 0


_RUNTIME = ("max_tiles", "positions", "steps", "awaited", "alpha", "beta", "limit")


@gluon.jit(do_not_specialize=_RUNTIME)
def prefill_kernel(
    w_desc, s_desc, z_desc, x_desc, u_desc, x_ptr, sources_ptr, zero_ptr,
    row_scale_ptr, x_scale_ptr, tiles_ptr, count_ptr, max_tiles, positions, steps, awaited,
    bias_ptr, table_ptr, post_ptr, out_ptr, alpha, beta, limit, P: gl.constexpr,
):  # fmt: skip
    """All of one grouped GEMM.

    x_desc:    boxes of rows by position; None where rows are gathered: those of x_ptr, which
               sources_ptr says for each position
    positions: of the plan
    steps:     stages that the columns make
    awaited:   pieces of GEMM1 that make a tile's rows, if GEMM2 begins while GEMM1 is at others

    The count is known at run time only, lest loops be unrolled.
    """
    if P.ordered:
        gdc_launch_dependents()  # GEMM2; what follows that would only be in its way (H200)
    words = _room(w_desc, P.variant.slots)
    scales = _room(s_desc, P.variant.slots)
    zeros = _room(z_desc, P.variant.slots)
    ROOM: gl.constexpr = [P.variant.slots * P.variant.stage * P.most, P.variant.unit, 64]
    x = gl.allocate_shared_memory(P.operand, ROOM, TOKEN_BOXES)
    x_scales = _room(u_desc, P.variant.slots * P.variant.x_groups + 1)
    work = gl.allocate_shared_memory(
        gl.int32, [P.variant.slots, 4], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    kilobyte = gl.allocate_shared_memory(gl.bfloat16, [1, 8, 64], TOKEN_BOXES)
    number_memory()
    start = find(x) if P.gathers or not P.variant.by_warp else 0
    full_at = find(kilobyte)
    full = reinterpret(kilobyte, gl.int64, [128, 1], mbarrier.MBarrierLayout())
    SLOTS: gl.constexpr = P.variant.slots
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=P.arrivals)
        if P.gathers:
            mbarrier.init(full.index(BARRIERS + slot), count=1)
    fence_async_shared()
    filled = (words, scales, zeros, x, x_scales, full, full_at)
    taken = (
        _words(words, w_desc, P), _scales(scales, s_desc, P), _by_band(zeros, z_desc, P),
        x if P.variant.by_warp else start, _by_group(x_scales, P), full_at,
    )  # fmt: skip
    boxes = (w_desc, s_desc, z_desc, x_desc, u_desc)
    plan = (tiles_ptr, count_ptr, max_tiles)
    epilogue = (
        row_scale_ptr, x_scale_ptr, None if P.variant.grouped else sources_ptr, bias_ptr, table_ptr,
        post_ptr, out_ptr, alpha, beta, limit,
    )  # fmt: skip
    SPARE: gl.constexpr = P.variant.spare
    if P.gathers:
        gl.warp_specialize(
            [
                (_consume, (taken, work, zero_ptr, epilogue, steps, P)),
                (produce, (filled, work, boxes, plan, positions, steps, awaited, P)),
                (gather_rows, (filled, work, start, x_ptr, sources_ptr, steps, P)),
            ],
            [1, GATHERERS],
            [SPARE, SPARE],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (taken, work, zero_ptr, epilogue, steps, P)),
                (produce, (filled, work, boxes, plan, positions, steps, awaited, P)),
            ],
            [1],
            [SPARE],
        )
