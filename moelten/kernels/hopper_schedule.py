"""Which GEMM runs, and which variant of it: a cost model over tokens, experts and the GPU's size.

Pure arithmetic on sizes that the host knows; nothing is timed and no model has a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from moelten.kernels.constants import Constants
from moelten.kernels.hopper_codes import Storage

# Programs that keep enough bytes in flight on the 132 multiprocessors of a full part.
_WANTED_PROGRAMS = 4 * 132
# Columns worth a split of K, in steps of 256.
_LEAST_STEPS = 4
_MAX_SPLITS = 8
_BLOCKS = (8, 16)
# Of a tile of two bands: 160 registers of sums, of the 232 that each of 8 warps' threads can have.
_MOST_TOKENS = 160
# Pairs per expert of which few experts have more than 64.
_MOST_NARROW = 53
# Of a multiprocessor, for all its programs; of each the epilogue takes 16 KiB, barriers and pieces
# of work 1 or 2, the driver 1.
_SHARED_BYTES, _OTHER_BYTES = 228 << 10, 20 << 10


def row_tiles(rows: int) -> int:
    """Tiles of 64 rows."""
    return -(-rows // 64)


@dataclass(frozen=True)
class Gemm(Constants):
    """What is compiled into the kernels for few and for many tokens per expert alike.

    rows, columns: N and K of one expert's matrix, of which GEMM1's with a gate has two halves
    scale_type:    of scales that are not of rows, "" for none
    """

    rows: int
    columns: int
    halves: int
    scale_type: str
    activation: str
    limited: bool

    @property
    def row_tiles(self) -> int:
        return row_tiles(self.rows * self.halves)

    @property
    def chunks(self) -> int:
        return -(-self.columns // 64)

    @property
    def super_blocks(self) -> int:
        return -(-self.chunks // 4)


@dataclass(frozen=True)
class Variant:
    """warps: of a program, which split K; registers: the most per thread; splits: over programs."""

    warps: int
    registers: int
    splits: int = 1


@dataclass(frozen=True)
class WideVariant:
    """weights: as the operands that they are multiplied as
    block: most tokens of a tile, beside `tiles` row tiles of 64 rows
    slots, stage: slots in shared memory, of so many chunks of 64 columns
    by_warp: whether warps multiply by themselves
    warps: that multiply, 8 or 16, whose threads have 232 or 112 registers
    grouped: whether activations have a scale for every 128 columns
    programs: of a multiprocessor
    gathers: whether GEMM1 gathers rows of activations; else they are before it
    """

    weights: Storage
    block: int
    stage: int
    tiles: int = 4
    by_warp: bool = False
    warps: int = 8
    grouped: bool = False
    programs: int = 1
    gathers: bool = True
    slots: int = 0

    @property
    def x_groups(self) -> int:
        """Groups of activations of a stage."""
        return self.stage // 2 if self.grouped else 0

    @property
    def bands(self) -> int:
        """Sets of row tiles, of which each warpgroup has one."""
        return self.tiles // self.teams

    @property
    def teams(self) -> int:
        """Warpgroups that multiply."""
        return self.warps // 4

    @property
    def registers(self) -> int:
        """The most of a thread when a program begins, with 4 warps more; they share them out."""
        return 65536 // ((self.warps + 4) * 32 * self.programs) // 8 * 8

    @property
    def spare(self) -> int:
        """Registers of a thread that brings or gathers, so that the others have as many as ever."""
        return 32 if self.few else 40

    @property
    def few(self) -> bool:
        """Whether tiles are of few tokens, so that memory is the limit sooner than products."""
        return self.by_warp or self.warps == 16

    @property
    def unit(self) -> int:
        """Tokens of a copy of activations."""
        return 8 if self.by_warp else 16

    def steps(self, columns: int) -> int:
        """Stages that so many columns make."""
        return -(-columns // (64 * self.stage))

    def row_blocks(self, row_tiles: int) -> int:
        """Pieces of work that so many row tiles make."""
        return -(-row_tiles // self.tiles)


def block_of(pairs: int, num_experts: int) -> int:
    """Pairs per tile: wide tiles cost every tile some speed, narrow ones large experts a pass more.

    Measured on H200: they break even near 5 pairs per expert.
    """
    narrow, wide = _BLOCKS
    return narrow if pairs <= 5 * num_experts else wide


def make_variant(
    stored: Storage, block: int, pairs: int, num_experts: int, row_tiles: int, columns: int,
    *, may_split: bool, grouped: bool = False,
) -> Variant:  # fmt: skip
    """The variant for a matrix of `row_tiles` tiles of 64 rows per expert, and its tokens.

    grouped: whether activations have a scale for every 128 columns
    """
    active = _active(pairs, num_experts)
    programs = max(min(active, pairs), pairs / block) * row_tiles
    steps = -(-columns // 256)
    splits = 1
    if may_split:
        wanted = math.ceil(_WANTED_PROGRAMS / programs)
        splits = max(1, min(wanted, steps // _LEAST_STEPS, _MAX_SPLITS))
    return Variant(4, _registers(stored, block, grouped), splits)


def _active(pairs: int, num_experts: int) -> float:
    """Experts that so many pairs go to, if they go anywhere."""
    return num_experts * -math.expm1(pairs * math.log1p(-1 / max(num_experts, 2)))


def choose_wide(
    stored: Storage, scale_type: str, pairs: int, num_experts: int, columns: tuple[int, int],
    *, x_scale: str = "none",
) -> WideVariant | None:  # fmt: skip
    """How many tokens per expert are multiplied; None where there are few.

    columns: of w13 and of w2
    x_scale: of activations: "none"; "row": of a token; "group": of every 128 columns of one

    A pass over the weights for every 8 or 16 tokens of an expert, by programs with a row tile each,
    keeps more programs busy, but what weights cost is decoded again and again. Others decode for 32
    tokens or more. Products of single warps take their time from decoding (H200: 6 cycles for 8
    tokens); those of whole warpgroups take half of theirs, but last as long for 8 tokens as for 24
    (`hopper_products`). Sixteen warps hide better what each waits for, eight have registers for
    more tokens. GEMM1 gathers rows, which takes up to 6 % less time, but not where about one large
    tile is all that an expert has: there it takes 1 to 3 % more (H200). Measured on H200, in pairs
    per expert.
    """
    mean = pairs / num_experts
    few = operands_of(stored, few=True, x_scale=x_scale)
    # Where rows of GEMM2 are what GEMM1 writes, the one follows the other without a pause.
    at_once = x_scale == "none" and few.code.operand == stored.code.operand
    if mean <= _few(stored, columns, at_once and _is_much(pairs, num_experts, columns)):
        return None
    if mean <= _some(few):
        variant = warp_variant(few, scale_type, columns)
    elif mean <= _narrow(few, x_scale):
        tile = _narrow_tile(few, mean, num_experts, columns)
        variant = narrow_variant(few, scale_type, *tile)
    else:
        variant = wide_variant(operands_of(stored, few=False, x_scale=x_scale), scale_type)
    if x_scale == "group":
        variant = with_groups(variant, scale_type)
    return replace(variant, gathers=not _MOST_NARROW < mean <= _MOST_TOKENS)


def operands_of(stored: Storage, *, few: bool, x_scale: str) -> Storage:
    """As what many tokens multiply weights: `Storage.many`, if there is that.

    few: whether tiles are of few tokens
    x_scale: as `choose_wide` has it

    But scales that join weights leave none that those of activations could join. Of few tokens
    groups of 128 are scaled sooner as sums, which are few (H200: 10 %); and codes of 8 bits cost
    less to decode than rows to bring to fp16 between the GEMMs (H200: 2 to 4 %).
    """
    if stored.many is None:
        return stored
    if stored.folds:
        own = x_scale == "group" or (few and stored.group == 128)
    else:
        own = few and x_scale == "none"
    return stored if own else stored.many


def _few(stored: Storage, columns: tuple[int, int], at_once: bool) -> float:
    """The most pairs per expert of the decode kernel.

    at_once: whether the other one's GEMMs follow each other at once, and make up for its plan: then
             it is ahead from the first tokens on, unless its stages are short
    """
    if stored.code.bits == 16:
        return 11
    if stored.code.bits == 8:
        return 11 if stored.scale != "block" else 8 if at_once else 9
    short = _ends_short(stored, columns)
    if at_once:
        return 3.5 if short else 0.5
    return 1.8 if stored.scale == "group" and not short else 5


def _is_much(pairs: int, num_experts: int, columns: tuple[int, int]) -> bool:
    """Whether pieces of four row tiles are enough for every multiprocessor, and weights for 0.1 ms.

    Below that planning and gathering costs more than single warps save (H200).
    """
    active, (hidden, inter) = _active(pairs, num_experts), columns
    pieces = active * _least_row_tiles(columns) / 4
    return pieces >= _WANTED_PROGRAMS and active * 3 * hidden * inter >= 1 << 30


def _least_row_tiles(columns: tuple[int, int]) -> int:
    """Whole ones of w2, or of w13 with a gate, whichever has fewer."""
    hidden, inter = columns
    return min(hidden // 64, inter // 32)


def _some(stored: Storage) -> float:
    """The most pairs per expert of single warps; none where nothing is decoded.

    Sums that are scaled group after group cost warpgroups more, which keep them in units.
    """
    if stored.code.bits == 16:
        return 0
    if stored.scales_twice:
        return 34
    return 22 if stored.scale == "group" else 15


def _narrow(stored: Storage, x_scale: str) -> float:
    """The most pairs per expert of sixteen warps; none where nothing is decoded.

    Tiles of 64 tokens do for nearly all experts up to `_MOST_NARROW`, those of 96 up to 80, but
    scales of activations are read for powers of two.
    """
    if stored.code.bits == 16:
        return 0
    return 80 if stored.code.bits == 4 and x_scale != "group" else _MOST_NARROW


def _narrow_tile(
    stored: Storage, mean: float, num_experts: int, columns: tuple[int, int]
) -> tuple[int, int]:
    """Tokens, and row tiles of sixteen warps: 8, so that fewer activations are read, of codes of 4
    bits if there are registers for their sums and pieces enough for every multiprocessor."""
    if mean > _MOST_NARROW:
        return 96, 4
    pieces = num_experts * _least_row_tiles(columns) // 8
    large = stored.code.bits == 4 and not stored.scales_sums and pieces >= _WANTED_PROGRAMS
    return 64, 8 if large else 4


def wide_variant(stored: Storage, scale_type: str) -> WideVariant:
    """As many tokens as there are registers for their sums, or a tenth or fifth less, until three
    slots fit: weights are decoded for so many at once. Two chunks to a stage where those are few
    bytes, or have the same scale."""
    little = stored.code.bits == 4 or stored.scale == "block"
    one_group = not stored.scales_sums or stored.group == 128
    stage = 2 if little and one_group else 1
    for block in (_MOST_TOKENS, 144, 128):
        variant = _fitted(WideVariant(stored, block, stage), scale_type)
        if variant.slots >= 3:
            break
    return variant


def narrow_variant(
    stored: Storage, scale_type: str, block: int = 64, tiles: int = 8
) -> WideVariant:
    """Sixteen warps. Stages are 32 KiB of codes, or 16 beside 96 tokens: fewer are waited for."""
    stage = 64 * 64 // (stored.code.bits * tiles * block)
    return _fitted(WideVariant(stored, block, stage, tiles=tiles, warps=16), scale_type)


def warp_variant(
    stored: Storage, scale_type: str, columns: tuple[int, int] = (256, 256)
) -> WideVariant:
    """Stages of 8 KiB of codes per row tile, or of half, if much of a last one would be nothing.

    Then warps wait twice as often, and two programs fill each other's gaps (H200: 9 %), if there
    are registers for their sums.
    """
    stage, programs = 16 // stored.code.bits, 1
    if _ends_short(stored, columns):
        stage, programs = stage // 2, 1 if stored.scales_sums else 2
    # A group's products are added up within a stage.
    stage = max(stage, stored.group // 64, 1)
    return _fitted(WideVariant(stored, 32, stage, by_warp=True, programs=programs), scale_type)


def _ends_short(stored: Storage, columns: tuple[int, int]) -> bool:
    """Whether much of a last stage of 8 KiB of codes per row tile would be nothing."""
    stage = 64 * 16 // stored.code.bits
    return any(-k % stage > k / 32 for k in columns)


def with_groups(variant: WideVariant, scale_type: str) -> WideVariant:
    """The same for activations with a scale for every 128 columns, in stages of whole groups.

    What is read from those scales at once is a power of two.
    """
    stage, block = max(variant.stage, 2), min(variant.block, 128)
    return _fitted(replace(variant, stage=stage, block=block, grouped=True, programs=1), scale_type)


def _fitted(variant: WideVariant, scale_type: str) -> WideVariant:
    """The variant with as many slots as fit in shared memory."""
    stage, block = variant.stage, variant.block
    rows = sum(box_rows(variant.weights, scale_type, stage))
    slot = 128 * (variant.tiles * rows + stage * block)
    room, scales = _SHARED_BYTES // variant.programs - _OTHER_BYTES, 16 * block
    if variant.grouped:  # scales of activations of a slot's groups, and ones behind all
        slot, room = slot + variant.x_groups * scales, room - scales
    return replace(variant, slots=min(room // slot, 8))


def type_name(dtype: torch.dtype | None) -> str:
    """A scale's type, as kernels are told; "" for none."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def box_rows(stored: Storage, scale_type: str, stage: int) -> tuple[int, int, int]:
    """Rows of 128 bytes of a row tile: codes of a stage of so many chunks, and the scales and zero
    points that lie together of these.

    0 where there are none, or one zero point per row; scales of blocks are the first of a row.
    """
    wide = 2 if scale_type == "float32" else 1
    chunks = max(stage, stored.scale_chunks)
    scale = zero = 0
    if stored.scale == "block":
        scale = 1
    elif stored.by_chunk:
        scale = chunks * (2 if stored.group == 16 else 1)
    elif stored.scale in ("fold", "group"):
        scale = chunks * 64 // stored.group * wide
    if stored.zeros is not None and stored.group:
        zero = 2 if stored.group == 32 else 1
    return stage * 4 * stored.code.bits, scale, zero


def padded(columns: int) -> int:
    """Of rows of activations: whole super-blocks, and so whole stages."""
    return -(-columns // 256) * 256


def slot_bytes(rows: int) -> int:
    """Of a pair's sums for many tokens: blocks of 256, 16 bits each (`hopper_sums`)."""
    return -(-rows // 256) * 512


def split_rows(pairs: int, row_tiles: int) -> int:
    """Rows that hold what all splits of `pairs` pairs bring; never fewer for more pairs.

    (splits - 1) * pairs < wanted / programs * pairs, and programs >= pairs / block * row_tiles.
    """
    return pairs + min((_MAX_SPLITS - 1) * pairs, _WANTED_PROGRAMS * max(_BLOCKS) // row_tiles)


def _registers(stored: Storage, block: int, grouped: bool) -> int:
    """The most registers per thread: few enough for many warps, enough not to spill."""
    if grouped:
        much = block > 8 or (stored.scale == "group" and stored.code.bits == 8)
        return _registers(stored, block, False) + (24 if much else 16)
    # Groups of 32 have two products per chunk, each with sums of its own.
    if block == 8:
        if stored.code.bits == 16 or (stored.scales_twice and stored.zeros is not None):
            return 128
        if stored.scales_twice and stored.by_chunk:
            return 104
        if stored.scales_twice or stored.zeros:
            return 96
        return 72 if stored.scale == "fold" and stored.code.bits == 4 else 80
    # More tokens only meet codes of 8 bits and more (`_few`).
    return 168 if stored.scales_twice else 128
