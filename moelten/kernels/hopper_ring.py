"""What passes through shared memory in the Hopper GEMM for many tokens per expert, in Gluon.

A ring of slots, each with a stage: some chunks of 64 columns of several row tiles, their row
parameters of the whole super-block, and the activations of up to a tile's tokens. One warp fills
it with bulk copies, maybe beside two that gather activations (`hopper_gather`); eight or sixteen
others take bands of row tiles from there (`hopper_bands`). A slot is full when all its bytes have
come, and empty when all of them say so.

A ring is a tuple of buffers, for every slot: words of codes, scales and zero points of each row
tile, activations x and their scales; then the barriers that are passed when a slot is full, or, for
those who take, where these are in shared memory. What a problem has not is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from moelten.kernels.gluon_names import bring
from moelten.kernels.hopper_codes import Storage
from moelten.kernels.hopper_products import TOKENS
from moelten.kernels.hopper_schedule import Gemm, WideVariant, box_rows, padded, slot_bytes

WORDS, SCALES, ZEROS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
X, X_SCALES = gl.constexpr(3), gl.constexpr(4)
FULL, FULL_AT = gl.constexpr(5), gl.constexpr(6)
# Slots' barriers, of which there are 8 at most; behind them, so many bytes on, those that are
# passed when a slot is open for those who gather.
BARRIERS, OPEN = gl.constexpr(8), gl.constexpr(64)
# Warps that gather activations.
GATHERERS = gl.constexpr(2)
# Barriers of the multiprocessor that say that slots are empty: the last of 16. All warps that
# multiply arrive, one waits, but not for slots that were never full.
_BARRIER = 8
# Pieces of each program, about, that do not come by turns.
_LAST = gl.constexpr(2)
_WAIT = gl.constexpr(
    """{.reg .pred p, wanted; setp.ne.s32 wanted, $3, 0; @!wanted bra done_${:uid};
    again_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra again_${:uid};
    done_${:uid}: mov.b32 $0, $2;}"""
)
# Counted up by one lane, for all that the program's warps wrote before. Who waits then reads it by
# bulk copies, to which a fence must say so.
_COUNT_UP = gl.constexpr(
    """{.reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0;
    setp.ne.and.b32 p, $2, 0, p; @p red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, $2;}"""
)
_UNTIL = gl.constexpr(
    """{.reg .pred p; .reg .b32 n; again_${:uid}: ld.acquire.gpu.global.b32 n, [$1];
    setp.lt.s32 p, n, $2; @p bra again_${:uid}; fence.proxy.async.global; mov.b32 $0, $2;}"""
)
_EXPECT = gl.constexpr(
    """{.reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0;
    @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2; mov.b32 $0, $2;}"""
)
OPERANDS = {"bf16": gl.bfloat16, "fp16": gl.float16}


@dataclass(frozen=True)
class Problem(Gemm):
    """What is compiled into a kernel.

    ordered: whether columns of the result stand in the order of operands, for the next GEMM; else
             in the order of sums, for their sum over slots
    chained: whether GEMM2 begins with tiles that GEMM1 has finished, while that is at others: their
             pieces are counted. Its programs start as those of GEMM1 end, which all have begun
    variant: operands, tiles of tokens, pieces of work and slots of the ring
    """

    ordered: bool
    chained: bool
    variant: WideVariant

    @property
    def weights(self) -> Storage:
        return self.variant.weights

    @property
    def operand(self) -> Any:
        return OPERANDS[self.weights.code.operand]

    @property
    def row_blocks(self) -> int:
        return self.variant.row_blocks(self.row_tiles)

    @property
    def width(self) -> int:
        """Columns of the result's rows in memory, or bytes, if they are in the order of sums."""
        return -(-self.rows // 32) * 32 if self.ordered else slot_bytes(self.rows)

    @property
    def gathers(self) -> bool:
        """Whether rows of activations are gathered; else they are by position."""
        return self.ordered and self.variant.gathers

    @property
    def x_width(self) -> int:
        """Columns of rows of activations that are gathered: whole stages."""
        return padded(self.columns)

    @property
    def arrivals(self) -> int:
        """At a slot's barrier before it is full: for all bulk copies, and of each lane's."""
        return 1 + 32 * int(GATHERERS) if self.gathers else 1

    @property
    def scaled(self) -> bool:
        """Whether scales multiply sums, group after group."""
        return self.weights.scales_sums

    @property
    def scale_rows(self) -> int:
        """Rows of 128 bytes of a row tile's scales that a stage needs (`box_rows`)."""
        return box_rows(self.weights, self.scale_type, self.variant.stage)[1]

    @property
    def groups(self) -> int:
        """Groups of columns, with scales that multiply sums, of a stage."""
        return 2 if self.weights.scales_twice else 1

    @property
    def served(self) -> int:
        """Chunks of a stage that a scale of sums serves: all, if there is none."""
        stage = self.variant.stage
        return min(max(self.weights.group // 64, 1), stage) if self.scaled else stage

    @property
    def most(self) -> int:
        """Units of tokens of a block."""
        return self.variant.block // self.variant.unit

    @property
    def held(self) -> int:
        """Tensors of sums of a row tile: whole parts of 32 tokens."""
        return -(-self.variant.block // 32) * (32 // int(TOKENS))

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of tokens that are multiplied: for each there is a loop to compile.

        Larger tiles have few tokens only where a whole expert has; and an instruction of a
        warpgroup takes no less for 8 or 16 than for 24.
        """
        if self.variant.by_warp:
            return tuple(range(8, self.variant.block + 1, 8))
        if self.variant.few:
            return tuple(range(24 if self.variant.block == 64 else 48, self.variant.block + 1, 8))
        return tuple(range(64, self.variant.block + 1, 16))

    @property
    def fewer(self) -> tuple[int, ...]:
        """Bands of warpgroups that have not all of them in a matrix's last piece.

        Empty where all have row tiles in all bands; and for groups of 32 that are scaled, as ptxas
        then lets all products wait for each other.
        """
        rest, teams = self.row_tiles % self.variant.tiles, self.variant.teams
        if rest == 0 or (self.groups == 2 and not self.variant.by_warp):
            return ()
        counts = {-(-max(rest - team, 0) // teams) for team in range(teams)}
        return tuple(sorted(counts - {self.variant.bands}))

    @property
    def spread(self) -> bool:
        """Whether the halves of a quad of lanes have words of their own, as nvfp4's."""
        return self.weights.group == 16

    @property
    def parts(self) -> int:
        """Halves of a super-block whose scales a stage has apart."""
        return max(self.variant.stage // self.weights.scale_chunks, 1)

    @property
    def choices(self) -> int:
        """Bits of a chunk's number by which it chooses among a lane's words of scales."""
        own = self.weights.by_chunk or self.weights.group <= 64
        return 2 * (self.parts == 2) + own


# Work ---------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _work_layout(warps):
    """A piece of work, four words, in every lane."""
    return gl.BlockedLayout([4], [32], [warps], [0])


@gluon.jit
def _hand_over(work, expert, first, stop, row_tile):
    """Write down a piece of work: expert, first and stop position, first row tile."""
    i = gl.arange(0, 4, _work_layout(gl.num_warps()))
    low = gl.where(i == 0, expert, first)
    work.store(gl.where(i < 2, low, gl.where(i == 2, stop, row_tile)))


@gluon.jit
def place_of(turn, P: gl.constexpr):
    """The slot of a turn, and the phase of its barriers.

    Where whole warpgroups multiply of a number without a sign, as their loops, which divide once
    for all lanes, then have less to do; those of single warps would have more (Triton 3.9).
    """
    SLOTS: gl.constexpr = P.variant.slots
    turn = gl.to_tensor(turn)
    if not P.variant.by_warp:
        turn = turn.to(gl.uint32)
    return (turn % SLOTS).to(gl.int32), (turn // SLOTS & 1).to(gl.int32)


@gluon.jit
def wait_at(barriers, place, pred=True):
    """The slot of a place, when its one of some barriers is passed.

    In PTX, since between waits at the same barriers Gluon has all warps wait for each other.
    """
    slot, phase = place
    gl.inline_asm_elementwise(
        _WAIT, "=r,r,r,r", [barriers + slot * 8, phase, pred + phase * 0], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
    return slot


@gluon.jit
def wait_until_full(ring, place, pred=True):
    """The slot of a place, when what belongs there has come."""
    return wait_at(ring[FULL], place, pred)


@gluon.constexpr_function
def _arrive(warps):
    return (
        f"{{.reg .b32 at; add.u32 at, $1, {_BARRIER};"
        f"barrier.cta.arrive.aligned at, {32 * (warps + 1)}; mov.b32 $0, $1;}}"
    )


@gluon.constexpr_function
def _sync(warps):
    return (
        f"{{.reg .b32 at; .reg .pred p; add.u32 at, $1, {_BARRIER}; setp.ge.s32 p, $2, 0;"
        f"@p barrier.cta.sync.aligned at, {32 * (warps + 1)}; mov.b32 $0, $1;}}"
    )


@gluon.jit
def leave(slot, P: gl.constexpr):
    """This warp does not need what is in a slot any more.

    An arrival at one of the multiprocessor's barriers, for which warps do not wait for each other.
    """
    PTX: gl.constexpr = _arrive(P.variant.warps)
    gl.inline_asm_elementwise(PTX, "=r,r", [slot], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read_work(work, slot):
    """The piece of work that begins in a slot; no expert if there is no more."""
    L: gl.constexpr = _work_layout(gl.num_warps())
    words = work.index(slot).load(L)
    i = gl.arange(0, 4, L)
    expert = gl.sum(gl.where(i == 0, words, 0), 0)
    first = gl.sum(gl.where(i == 1, words, 0), 0)
    stop = gl.sum(gl.where(i == 2, words, 0), 0)
    row_tile = gl.sum(gl.where(i == 3, words, 0), 0)
    return expert, first, stop, row_tile


@gluon.jit
def take_work(ring, work, turn, P: gl.constexpr):
    """The piece of work that begins with the stage of a turn."""
    return read_work(work, wait_until_full(ring, place_of(turn, P)))


# Filling ------------------------------------------------------------------------------------------


@gluon.jit
def _wait_until_empty(turn, P: gl.constexpr):
    """Wait, once, until no warp needs what is in the slot of a turn."""
    PTX: gl.constexpr = _sync(P.variant.warps)
    gl.inline_asm_elementwise(
        PTX, "=r,r,r", [turn % P.variant.slots, turn - P.variant.slots], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _lanes():
    """The lanes of the warp that fills the ring.

    What it asks of memory ahead of time stays by lane until it is needed: numbers that all lanes
    have become the warp's as soon as they are asked for, and so are waited for.
    """
    return gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def _of_lane(numbers, lane: gl.constexpr):
    return gl.sum(gl.where(_lanes() == lane, numbers, 0), 0)


@gluon.jit
def _count(counter_ptr):
    """How often a counter was counted up before; by one lane, so that nothing is shared out."""
    lane = _lanes()
    before = gl.atomic_add(counter_ptr + lane * 0, lane * 0 + 1, mask=lane == 0, sem="relaxed")
    return _of_lane(before, 0)


@gluon.jit
def _look_up(tiles_ptr, max_tiles, index, P: gl.constexpr):
    """Ask for the expert, first and stop position of a piece of work, one each for lanes 0 .. 2.

    They are anything past the last piece.
    """
    part = gl.minimum(_lanes(), 2)
    tile = gl.minimum(index // P.row_blocks, max_tiles - 1)
    return gl.load(tiles_ptr + part * max_tiles + tile)


@gluon.jit
def _count_up(counter, pred):
    """Count a finished piece: what all warps wrote before they left a slot that is empty now."""
    gl.inline_asm_elementwise(
        _COUNT_UP, "=r,l,r", [counter.to(gl.uint64, bitcast=True), pred.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _wait_for_rows(turn, counter, awaited, P: gl.constexpr):
    """Wait until a piece's rows of activations are there, or, where none are counted, all rows."""
    if P.chained and not P.ordered:
        gl.inline_asm_elementwise(
            _UNTIL, "=r,l,r", [counter.to(gl.uint64, bitcast=True), awaited], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    elif turn == 0:
        gdc_wait()


@gluon.jit
def _expect(bar, count):
    """Arrive at a barrier, by one lane, for so many bytes: Gluon would have to know how many when
    it compiles, and so compile a loop for each number of units."""
    gl.inline_asm_elementwise(
        _EXPECT, "=r,r,r", [bar, count], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _bring_rows(ring, x_desc, slot, step, first, units, P: gl.constexpr):
    """A stage's activations: units of tokens that follow each other."""
    UNIT: gl.constexpr = P.variant.unit
    STAGE: gl.constexpr = P.variant.stage
    for c in gl.static_range(STAGE):
        for unit in range(units):
            room = ring[X].index((slot * STAGE + c) * P.most + unit)
            column = (step * STAGE + c) * 64
            bring(x_desc, [first + unit * UNIT, column], ring[FULL].index(slot), room)


@gluon.jit
def _open(ring, slot):
    """Let those who gather begin with a slot."""
    mbarrier.arrive(ring[FULL].index(BARRIERS + slot))


@gluon.jit
def _fill(
    ring, boxes, turn, expert, first, units, row_tile, positions, steps, counter, awaited,
    P: gl.constexpr,
):  # fmt: skip
    """Bring one piece of work of so many units of tokens, stage after stage.

    The slot of `turn` is empty, before as after.

    counter: of finished pieces of the tile in GEMM1, which GEMM2 waits for
    """
    w_desc, s_desc, z_desc, x_desc, u_desc = boxes
    W_ROWS: gl.constexpr = w_desc.block_shape[2]
    S_ROWS: gl.constexpr = 0 if s_desc is None else P.scale_rows
    Z_ROWS: gl.constexpr = 0 if z_desc is None else z_desc.block_shape[2]
    TILES: gl.constexpr = P.variant.tiles
    STAGE: gl.constexpr = P.variant.stage
    X_GROUPS: gl.constexpr = P.variant.x_groups
    U_BYTES: gl.constexpr = X_GROUPS * P.variant.block * 16
    BYTES: gl.constexpr = U_BYTES + 128 * TILES * (W_ROWS + S_ROWS + Z_ROWS)
    X_BYTES: gl.constexpr = 0 if P.gathers else 128 * STAGE * P.variant.unit
    for step in range(steps):
        slot = turn % P.variant.slots
        bar = ring[FULL].index(slot)
        if P.gathers and step > 0:
            _open(ring, slot)  # rows take longer than boxes
        _expect(ring[FULL_AT] + slot * 8, BYTES + units * X_BYTES)
        # All row tiles at once: each copy takes the warp its time. Past the last one are zeros.
        bring(w_desc, [expert, row_tile, step * W_ROWS, 0], bar, ring[WORDS].index(slot))
        if s_desc is not None:
            row = step * STAGE // max(STAGE, P.weights.scale_chunks) * S_ROWS
            bring(s_desc, [expert, row_tile, row, 0], bar, ring[SCALES].index(slot))
        if z_desc is not None:
            row = step * STAGE // 4 * Z_ROWS
            bring(z_desc, [expert, row_tile, row, 0], bar, ring[ZEROS].index(slot))
        if step == 0:
            _wait_for_rows(turn, counter, awaited, P)
            if P.gathers:
                _open(ring, slot)
        if not P.gathers:
            _bring_rows(ring, x_desc, slot, step, first, units, P)
        for g in gl.static_range(X_GROUPS):
            # Of all the block's tokens; what others there are adds to sums that are not stored.
            row = (step * X_GROUPS + g) * positions + first
            bring(u_desc, [row, 0], bar, ring[X_SCALES].index(slot * X_GROUPS + g))
        turn += 1
        _wait_until_empty(turn, P)
    return turn


@gluon.jit
def produce(ring, work, boxes, plan, positions, steps, awaited, P: gl.constexpr):
    """Fill the ring while there are pieces of work.

    boxes: descriptors of words, scales, zero points, activations and their scales; None for what
           there is not, or what is gathered
    plan:  tiles and count of a `TilePlan`, and max_tiles

    Where products are the limit, pieces take as long as their tokens: each program takes the next
    one, by a counter, when it has room for it. Where memory is, pieces take turns, as on H200 all
    are read 5 % sooner than by the counter; and what is next is looked up a piece ahead. But of the
    last ones programs take as many as they get done (H200: 4 %).
    """
    TURNS: gl.constexpr = P.variant.few
    COUNTER: gl.constexpr = 1 if P.ordered else 2
    UNIT: gl.constexpr = P.variant.unit
    SLOTS: gl.constexpr = P.variant.slots
    tiles_ptr, count_ptr, max_tiles = plan
    finished = tiles_ptr + 3 * max_tiles
    turn = 0
    index = gl.program_id(0)
    before = index
    piece = _look_up(tiles_ptr, max_tiles, index, P)
    count = gl.load(count_ptr) * P.row_blocks
    dealt = gl.maximum(count // gl.num_programs(0) - _LAST, 1) * gl.num_programs(0)
    while index < count:
        expert, first, stop = _of_lane(piece, 0), _of_lane(piece, 1), _of_lane(piece, 2)
        row_tile = index % P.row_blocks * P.variant.tiles
        tile = index // P.row_blocks
        if TURNS:
            index += gl.num_programs(0)
            if index >= dealt:
                index = dealt + _count(count_ptr + COUNTER)
            piece = _look_up(tiles_ptr, max_tiles, index, P)
        _hand_over(work.index(turn % P.variant.slots), expert, first, stop, row_tile)
        units = (stop - first + UNIT - 1) // UNIT
        turn = _fill(
            ring, boxes, turn, expert, first, units, row_tile, positions, steps, finished + tile,
            awaited, P,
        )  # fmt: skip
        if P.chained and P.ordered:
            # The piece before is finished, since stages of this one, which are enough, are.
            _count_up(finished + before, turn > steps)
        before = tile
        if not TURNS:
            # Programs begin with a piece each, which nobody counted.
            index = gl.num_programs(0) + _count(count_ptr + COUNTER)
            piece = _look_up(tiles_ptr, max_tiles, index, P)
    slot = turn % P.variant.slots
    _hand_over(work.index(slot), -1, 0, 0, 0)
    if P.gathers:
        _open(ring, slot)
    mbarrier.arrive(ring[FULL].index(slot))
    for _ in gl.static_range(1, SLOTS):
        turn += 1
        _wait_until_empty(turn, P)
    if P.chained and P.ordered:
        _wait_until_empty(turn + 1, P)
        _count_up(finished + before, turn >= SLOTS)
