"""What passes through shared memory in the Hopper GEMM for many tokens per expert, in Gluon.

A ring of slots, each with a stage: some chunks of 64 columns of several row tiles, their row
parameters of the whole super-block, and the activations of up to a tile's tokens. One warp fills
it with bulk copies; each warpgroup takes its row tiles from there, as operands of the matrix
instruction, and the scales that multiply sums. A slot is full when all its bytes have come, and
empty when both warpgroups say so.

A ring is a tuple of buffers, for every slot: words of codes, scales and zero points of each row
tile, activations x and their scales; then the barriers that are passed when a slot is full, and
when it is empty. What a problem has not is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from moelten.kernels.hopper_codes import Storage
from moelten.kernels.hopper_fragments import (
    chunk_zero,
    floats,
    load_layout,
    operands,
    pair_layout,
    scale_layout,
    zero_words,
)
from moelten.kernels.hopper_schedule import WideVariant, box_rows

_WORDS, _SCALES, _ZEROS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
X, _X_SCALES = gl.constexpr(3), gl.constexpr(4)
_FULL, _EMPTY = gl.constexpr(5), gl.constexpr(6)
OPERANDS = {"bf16": gl.bfloat16, "fp16": gl.float16}
# Its name in later Tritons, and in 3.6.
_bring = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@dataclass(frozen=True)
class Problem:
    """What is compiled into a kernel.

    rows, columns: N and K of one expert's matrix, of which GEMM1's with a gate has two halves
    ordered:       whether columns of the result stand in the order of operands, for the next GEMM
    variant:       operands, tiles of tokens, pieces of work and slots of the ring
    """

    rows: int
    columns: int
    halves: int
    scale_type: str
    activation: str
    limited: bool
    ordered: bool
    variant: WideVariant

    @property
    def weights(self) -> Storage:
        return self.variant.weights

    @property
    def operand(self) -> Any:
        return OPERANDS[self.weights.code.operand]

    @property
    def row_tiles(self) -> int:
        return -(-self.rows * self.halves // 64)

    @property
    def row_blocks(self) -> int:
        return -(-self.row_tiles // self.variant.tiles)

    @property
    def chunks(self) -> int:
        return -(-self.columns // 64)

    @property
    def super_blocks(self) -> int:
        return -(-self.chunks // 4)

    @property
    def scaled(self) -> bool:
        """Whether scales multiply sums, group after group."""
        return self.weights.scales_sums

    @property
    def scale_rows(self) -> int:
        """Rows of 128 bytes of a row tile's scales of a super-block (`box_rows`)."""
        return box_rows(self.weights, self.scale_type)[1]

    @property
    def groups(self) -> int:
        """Groups of columns, with scales that multiply sums, of a stage."""
        return 2 if self.scaled and self.weights.group == 32 else 1

    @property
    def most(self) -> int:
        """Units of tokens of a block: tensors of sums of a row tile."""
        return self.variant.block // self.variant.unit

    @property
    def least(self) -> int:
        """Units that are always multiplied.

        Instructions of whole warpgroups take as long for fewer tokens as for 64.
        """
        return 1 if self.variant.by_warp else 64 // self.variant.unit

    @property
    def uneven(self) -> bool:
        """Whether a matrix's last piece has nothing for the second warpgroup."""
        return 0 < self.row_tiles % self.variant.tiles <= self.variant.each

    @property
    def spread(self) -> bool:
        """Whether the halves of a quad of lanes have words of their own, as nvfp4's."""
        return self.weights.group == 16

    @property
    def words(self) -> int:
        """Choices of a chunk among a lane's words of scales of a super-block."""
        return 4 if self.weights.by_chunk else min(256 // self.weights.group, 4)


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
    """The slot of a turn, and the phase of its barriers."""
    return turn % P.variant.slots, turn // P.variant.slots & 1


@gluon.jit
def wait_until_full(ring, place, pred=True):
    """The slot of a place, when what belongs there has come."""
    slot, phase = place
    mbarrier.wait(ring[_FULL].index(slot), phase, pred=pred)
    return slot


@gluon.jit
def leave(ring, slot):
    """A warpgroup does not need what is in a slot any more."""
    mbarrier.arrive(ring[_EMPTY].index(slot))


@gluon.jit
def take_work(ring, work, turn, P: gl.constexpr):
    """The piece of work that begins with the stage of a turn; no expert if there is no more."""
    slot = wait_until_full(ring, place_of(turn, P))
    L: gl.constexpr = _work_layout(gl.num_warps())
    words = work.index(slot).load(L)
    i = gl.arange(0, 4, L)
    expert = gl.sum(gl.where(i == 0, words, 0), 0)
    first = gl.sum(gl.where(i == 1, words, 0), 0)
    stop = gl.sum(gl.where(i == 2, words, 0), 0)
    row_tile = gl.sum(gl.where(i == 3, words, 0), 0)
    return expert, first, stop, row_tile


@gluon.jit
def find_zeros(zero_ptr, expert, row_tile, P: gl.constexpr):
    """Whole rows' zero points of all row tiles that a warpgroup has, if there are such."""
    EACH: gl.constexpr = P.variant.each
    W: gl.constexpr = P.weights
    zeros = ()
    for t in gl.static_range(EACH):
        zero = 0
        if zero_ptr is not None:
            matrix = expert * P.row_tiles + gl.minimum(row_tile + t, P.row_tiles - 1)
            warp, lane = zero_words(W, 4)
            zero = gl.load(zero_ptr + matrix * 32 + (warp * 8 + lane))
        zeros = zeros + (zero,)
    return zeros


# Filling ------------------------------------------------------------------------------------------


@gluon.jit
def _wait_until_empty(ring, turn, P: gl.constexpr):
    """Wait until nobody needs what is in the slot of a turn."""
    slot = turn % P.variant.slots
    mbarrier.wait(ring[_EMPTY].index(slot), turn // P.variant.slots & 1 ^ 1)


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
def _fill(
    ring, boxes, turn, expert, first, row_tile, positions, steps,
    UNITS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Bring one piece of work of so many units of tokens, stage after stage.

    The slot of `turn` is empty, before as after.
    """
    w_desc, s_desc, z_desc, x_desc, u_desc = boxes
    UNIT: gl.constexpr = P.variant.unit
    W_ROWS: gl.constexpr = w_desc.block_shape[0]
    S_ROWS: gl.constexpr = 0 if s_desc is None else P.scale_rows
    Z_ROWS: gl.constexpr = 0 if z_desc is None else z_desc.block_shape[0]
    TILES: gl.constexpr = P.variant.tiles
    STAGE: gl.constexpr = P.variant.stage
    X_GROUPS: gl.constexpr = P.variant.x_groups
    U_BYTES: gl.constexpr = X_GROUPS * P.variant.block * 16
    BYTES: gl.constexpr = U_BYTES + 128 * (
        TILES * (W_ROWS + S_ROWS + Z_ROWS) + STAGE * UNITS * UNIT
    )
    for step in range(steps):
        slot = turn % P.variant.slots
        bar = ring[_FULL].index(slot)
        mbarrier.expect(bar, BYTES)
        for tile in gl.static_range(TILES):
            # Past the last row tile, that again; its results are not stored.
            matrix = expert * P.row_tiles + gl.minimum(row_tile + tile, P.row_tiles - 1)
            row = matrix * (P.chunks * W_ROWS // STAGE) + step * W_ROWS
            _bring(w_desc, [row, 0], bar, ring[_WORDS].index(slot * TILES + tile))
            block = matrix * P.super_blocks + step * STAGE // 4
            if s_desc is not None:
                to = ring[_SCALES].index(slot * TILES + tile)
                _bring(s_desc, [block * S_ROWS, 0], bar, to)
            if z_desc is not None:
                to = ring[_ZEROS].index(slot * TILES + tile)
                _bring(z_desc, [block * Z_ROWS, 0], bar, to)
        for c in gl.static_range(STAGE):
            for unit in gl.static_range(UNITS):
                tokens = ring[X].index(slot * STAGE + c).slice(unit * UNIT, UNIT, 0)
                at = [first + unit * UNIT, (step * STAGE + c) * 64]
                _bring(x_desc, at, bar, tokens)
        for g in gl.static_range(X_GROUPS):
            # Of all the block's tokens; what others there are adds to sums that are not stored.
            row = (step * X_GROUPS + g) * positions + first
            _bring(u_desc, [row, 0], bar, ring[_X_SCALES].index(slot * X_GROUPS + g))
        turn += 1
        _wait_until_empty(ring, turn, P)
    return turn


@gluon.jit
def produce(ring, work, boxes, tiles_ptr, count_ptr, max_tiles, positions, steps, P: gl.constexpr):
    """Fill the ring while there are pieces of work.

    boxes: descriptors of words, scales, zero points, activations and their scales; or None

    Where products are the limit, pieces take as long as their tokens: each program takes the next
    one, by a counter, when it has room for it. Where memory is, pieces take turns, as on H200 all
    are read 5 % sooner than by the counter; and what is next is looked up a piece ahead.
    """
    TURNS: gl.constexpr = P.variant.by_warp
    COUNTER: gl.constexpr = 1 if P.ordered else 2
    UNIT: gl.constexpr = P.variant.unit
    MOST: gl.constexpr = P.most
    turn = 0
    index = gl.program_id(0)
    piece = _look_up(tiles_ptr, max_tiles, index, P)
    count = gl.load(count_ptr) * P.row_blocks
    while index < count:
        expert, first, stop = _of_lane(piece, 0), _of_lane(piece, 1), _of_lane(piece, 2)
        row_tile = index % P.row_blocks * P.variant.tiles
        if TURNS:
            index += gl.num_programs(0)
            piece = _look_up(tiles_ptr, max_tiles, index, P)
        _hand_over(work.index(turn % P.variant.slots), expert, first, stop, row_tile)
        units = (stop - first + UNIT - 1) // UNIT
        for n in gl.static_range(1, MOST + 1):
            if units == n:
                turn = _fill(ring, boxes, turn, expert, first, row_tile, positions, steps, n, P)
        if not TURNS:
            # Programs begin with a piece each, which nobody counted.
            index = gl.num_programs(0) + _count(count_ptr + COUNTER)
            piece = _look_up(tiles_ptr, max_tiles, index, P)
    slot = turn % P.variant.slots
    _hand_over(work.index(slot), -1, 0, 0, 0)
    mbarrier.arrive(ring[_FULL].index(slot))


# Taking -------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _code_layout(loads):
    """A chunk of a row tile, [16 * loads, 32]: 16 bytes per lane and load."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]] + [[16 << i, 0] for i in range((loads - 1).bit_length())],
        lane_bases=[[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]],
        warp_bases=[[4, 0], [8, 0]],
        block_bases=[],
        shape=[16 * loads, 32],
    )


@gluon.constexpr_function
def _quad_layout():
    """Words [4 w, 8 g, 2 halves of a quad, 2 lanes]."""
    return gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        warp_bases=[[1, 0, 0, 0], [2, 0, 0, 0]],
        block_bases=[],
        shape=[4, 8, 2, 2],
    )


@gluon.constexpr_function
def _parameter_layout(rows, spread):
    """A super-block's row parameters, [rows, 32]: w, g, half of a quad if `spread`, own words."""
    words = rows // 2 if spread else rows
    half = [words] if spread else [0]
    bits = [0, *half, *(rows << i for i in range(5))]  # of 4 t, 8 g, 4 w
    registers = [1 << i for i in range((words - 1).bit_length())]
    places = [[[at // 32, at % 32] for at in group] for group in (registers, bits[:5], bits[5:])]
    return gl.DistributedLinearLayout(*places, [], [rows, 32])


@gluon.jit
def _pick(words, bit):
    """The half of the last axis that a bit says."""
    HALF: gl.constexpr = words.shape[2] // 2
    low, high = gl.split(words.reshape([4, words.shape[1], 2, HALF]).permute((0, 1, 3, 2)))
    return gl.where(bit != 0, high, low)


@gluon.jit
def _take(buffer, chunk, WORDS: gl.constexpr, SPREAD: gl.constexpr):
    """A lane's words of a chunk, [4 w, 8 g (times 2 halves of a quad), n]."""
    ROWS: gl.constexpr = buffer.shape[0]
    words = buffer.load(_parameter_layout(ROWS, SPREAD)).to(gl.uint32, bitcast=True)
    if SPREAD:
        words = words.reshape([4, 16, ROWS // 2])
    else:
        words = words.reshape([4, 8, ROWS])
    if WORDS > 1:
        words = _pick(words, chunk & 2)
    if WORDS > 2:
        words = _pick(words, chunk & 1)
    return words


@gluon.jit
def _for_quads(words, SPREAD: gl.constexpr):
    """[4 w, 8 g (times 2), 1] as [4 w, 8 g, 4 t], or two of them as [4 w, 8 g, 4 t, 2]."""
    QUAD: gl.constexpr = _quad_layout()
    if words.shape[2] == 2:
        low, high = gl.split(words)
        low, high = low.expand_dims(2), high.expand_dims(2)
        return gl.join(_for_quads(low, SPREAD), _for_quads(high, SPREAD))
    else:
        if SPREAD:
            HALVES: gl.constexpr = gl.SliceLayout(3, QUAD)
            words = gl.convert_layout(words.reshape([4, 8, 2]), HALVES, assert_trivial=True)
        else:
            WHOLE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, QUAD))
            words = gl.convert_layout(words.reshape([4, 8]), WHOLE, assert_trivial=True)
            words = words.expand_dims(2)
        words, _ = gl.broadcast(words.expand_dims(3), gl.zeros([4, 8, 2, 2], gl.uint32, QUAD))
        return gl.convert_layout(words.reshape([4, 8, 4]), pair_layout(4), assert_trivial=True)


@gluon.jit
def take_weights(
    ring, zero, slot, tile: gl.constexpr, chunk, c: gl.constexpr, P: gl.constexpr,
    OPERAND: gl.constexpr,
):  # fmt: skip
    """Operands [4 warps, 16, 64] of a row tile's chunk, the c-th of its stage.

    zero:    words [4 w, 8 g, 4 t], where one zero point serves the whole row
    OPERAND: their type; uint32 for their registers, [64, 32]
    """
    W: gl.constexpr = P.weights
    LOADS: gl.constexpr = W.code.bits // 4
    w = ring[_WORDS].index(slot * P.variant.tiles + tile).slice(c * (16 * LOADS), 16 * LOADS, 0)
    w = w.load(_code_layout(LOADS)).reshape([LOADS, 4, 128]).permute((1, 0, 2))
    w = gl.convert_layout(w, load_layout(4, LOADS), assert_trivial=True)
    s = 0
    if W.scale == "fold":
        s = _for_quads(
            _take(ring[_SCALES].index(slot * P.variant.tiles + tile), chunk, P.words, P.spread),
            P.spread,
        )
    if W.zeros is not None and W.group != 0:
        WORDS: gl.constexpr = 2 if W.group == 32 else 1
        zero = _for_quads(
            _take(ring[_ZEROS].index(slot * P.variant.tiles + tile), chunk, WORDS, False), False
        )
        zero = zero >> chunk_zero(chunk, W)[1]
    return operands(w, s, zero, W, OPERAND)


@gluon.jit
def take_stage(ring, zero, slot, tile: gl.constexpr, chunk, P: gl.constexpr):
    """`take_weights` of a stage's chunks, of which `chunk` is the first: their registers."""
    STAGE: gl.constexpr = P.variant.stage
    a = ()
    for c in gl.static_range(STAGE):
        own = take_weights(ring, zero, slot, tile, chunk + c, c, P, gl.uint32)
        a = a + (own,)
    return a


@gluon.jit
def take_token_scales(
    ring, slot, group: gl.constexpr, at: gl.constexpr, L: gl.constexpr, P: gl.constexpr
):
    """fp32 [1, tokens] of a unit, from the at-th of the block on, for a group of a stage.

    L: the layout of the sums [64, tokens]
    """
    words = ring[_X_SCALES].index(slot * P.variant.x_groups + group).slice(at, P.variant.unit, 0)
    return words.slice(0, 1, 1).permute((1, 0)).load(L)


@gluon.jit
def take_scale(ring, slot, tile: gl.constexpr, chunk, group: gl.constexpr, P: gl.constexpr):
    """fp32 [64], in the order of a row tile's rows: the scales of a group of a chunk."""
    W: gl.constexpr = P.weights
    TYPE: gl.constexpr = P.scale_type
    own = ring[_SCALES].index(slot * P.variant.tiles + tile)
    if W.scale == "block":
        # Two groups of a super-block, two numbers each, which all lanes have.
        L: gl.constexpr = scale_layout(4, 2)
        ALL: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))
        words = gl.where(chunk & 2 != 0, own.slice(2, 2).load(ALL), own.slice(0, 2).load(ALL))
        words = words[None, None, :] + gl.zeros([4, 8, 2], gl.int32, L)
        rows = floats(words.to(gl.uint32, bitcast=True), W, TYPE)
    else:
        words = _take(own, chunk, P.words, False)
        words = gl.convert_layout(words, scale_layout(4, words.shape[2]), assert_trivial=True)
        rows = floats(words, W, TYPE)  # warps g b c
        if rows.shape[3] == 2:
            low, high = gl.split(rows)
            rows = high if group == 1 else low
    return rows.reshape([4, 8, 2]).permute((0, 2, 1)).reshape([64])
