"""Which GEMM runs, and which variant of it: a cost model over tokens, experts and the GPU's size.

Pure arithmetic on sizes that the host knows; nothing is timed and no model has a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moelten.kernels.hopper_codes import Storage

# Programs that keep enough bytes in flight on the 132 multiprocessors of a full part.
_WANTED_PROGRAMS = 4 * 132
# Columns worth a split of K, in steps of 256.
_LEAST_STEPS = 4
_MAX_SPLITS = 8
_BLOCKS = (8, 16)
# Of 227 KiB a program can have; the epilogue takes two times 8 KiB.
_SHARED_BYTES = 210 << 10


@dataclass(frozen=True)
class Variant:
    """warps: of a program, which split K; registers: the most per thread; splits: over programs."""

    warps: int
    registers: int
    splits: int = 1


@dataclass(frozen=True)
class WideVariant:
    """block: most tokens of a tile, beside `tiles` row tiles of 64 rows

    slots, stage: slots in shared memory, of so many chunks of 64 columns
    """

    block: int
    slots: int
    stage: int
    tiles: int = 4
    consumers: int = 2

    @property
    def by_warp(self) -> bool:
        """Whether warps multiply by themselves, which costs what the tokens cost."""
        return self.block <= 32


def block_of(pairs: int, num_experts: int) -> int:
    """Pairs per tile: wide tiles cost every tile some speed, narrow ones large experts a pass more.

    Measured on H200: they break even near 5 pairs per expert.
    """
    narrow, wide = _BLOCKS
    return narrow if pairs <= 5 * num_experts else wide


def make_variant(
    stored: Storage, block: int, pairs: int, num_experts: int, row_tiles: int, columns: int,
    *, may_split: bool,
) -> Variant:  # fmt: skip
    """The variant for a matrix of `row_tiles` tiles of 64 rows per expert, and its tokens."""
    active = num_experts * -math.expm1(pairs * math.log1p(-1 / max(num_experts, 2)))
    programs = max(min(active, pairs), pairs / block) * row_tiles
    steps = -(-columns // 256)
    splits = 1
    if may_split:
        wanted = math.ceil(_WANTED_PROGRAMS / programs)
        splits = max(1, min(wanted, steps // _LEAST_STEPS, _MAX_SPLITS))
    return Variant(4, _registers(stored, block), splits)


def choose_wide(
    stored: Storage, scale_type: str, pairs: int, num_experts: int, columns: tuple[int, ...]
) -> WideVariant | None:
    """How many tokens per expert are multiplied; None where there are few.

    columns: of the layer's matrices

    Few tokens cost a pass over the weights for every 16 of an expert, many cost one and a half for
    up to 64, or little more than one in narrow tiles. Measured on H200, they break even at 11 to 40
    pairs per expert: the sooner the more a pass reads, the later the more each product of the other
    kernel costs beside; narrow tiles and wide ones near 48.
    """
    mean, operands = pairs / num_experts, stored.folded or stored
    narrow = _suits_narrow(operands, columns)
    if stored.code.bits == 16:
        enough = 11
    elif operands.scale == "group" and operands.group == 32:
        enough = 40
    else:
        enough = 12 if narrow else 16
    if mean <= enough:
        return None
    return (narrow_variant if narrow and mean <= 48 else wide_variant)(operands, scale_type)


def wide_variant(stored: Storage, scale_type: str) -> WideVariant:
    """Two chunks to a stage where those are few bytes, or one group's; else sums would be brought
    to other units (`hopper_prefill`) between chunks of the same row tile."""
    little = stored.code.bits == 4 or stored.scale == "block"
    one_group = stored.scale not in ("group", "block") or stored.group == 128
    return _fitted(stored, scale_type, 128, 2 if little and one_group else 1)


def warp_variant(
    stored: Storage, scale_type: str, columns: tuple[int, ...] = (256,)
) -> WideVariant:
    """Stages of 8 KiB of codes per row tile, or of half, if much of a last one would be nothing."""
    stage = 16 // stored.code.bits
    if any(-k % (64 * stage) > k / 32 for k in columns):
        stage //= 2
    # A group's products are added up within a stage.
    return _fitted(stored, scale_type, 32, max(stage, stored.group // 64, 1))


def narrow_variant(stored: Storage, scale_type: str) -> WideVariant:
    """Half as many sums leave registers for four chunks at a time: half as many waits."""
    return _fitted(stored, scale_type, 64, 4)


def _suits_narrow(stored: Storage, columns: tuple[int, ...]) -> bool:
    """Whether stages of four chunks fit: in shared memory, in units of one scale, in columns."""
    one_scale = stored.scale not in ("group", "block")
    return stored.code.bits == 4 and one_scale and all(-k % 256 <= k / 32 for k in columns)


def _fitted(
    stored: Storage, scale_type: str, block: int, stage: int, tiles: int = 4
) -> WideVariant:
    """As many slots as fit in shared memory."""
    chunk, scale, zero = box_rows(stored, scale_type)
    slot = 128 * (tiles * (stage * chunk + scale + zero) + stage * block)
    return WideVariant(block, min(_SHARED_BYTES // slot, 8), stage, tiles)


def type_name(dtype: torch.dtype | None) -> str:
    """A scale's type, as kernels are told; "" for none."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def box_rows(stored: Storage, scale_type: str) -> tuple[int, int, int]:
    """Rows of 128 bytes of a row tile: codes of a chunk, scales and zero points of a super-block.

    0 where there are none, or too few for a row.
    """
    wide = 2 if scale_type == "float32" else 1
    scale = zero = 0
    if stored.by_chunk:
        scale = 8 if stored.group == 16 else 4
    elif stored.scale in ("fold", "group"):
        scale = 256 // stored.group * wide
    if stored.zeros is not None and stored.group:
        zero = 2 if stored.group == 32 else 1
    return 4 * stored.code.bits, scale, zero


def split_rows(pairs: int, row_tiles: int) -> int:
    """Rows that hold what all splits of `pairs` pairs bring; never fewer for more pairs.

    (splits - 1) * pairs < wanted / programs * pairs, and programs >= pairs / block * row_tiles.
    """
    return pairs + min((_MAX_SPLITS - 1) * pairs, _WANTED_PROGRAMS * max(_BLOCKS) // row_tiles)


def _registers(stored: Storage, block: int) -> int:
    """The most registers per thread: few enough for many warps, enough not to spill."""
    # Groups of 32 have two products per chunk, each with sums of its own.
    two_products = stored.scale == "group" and stored.group == 32
    if block == 8:
        if stored.code.bits == 16 or (two_products and stored.zeros is not None):
            return 128
        if two_products or stored.zeros:
            return 96
        return 72 if stored.scale == "fold" and stored.code.bits == 4 else 80
    if two_products:
        return 168
    return 96 if stored.code.bits == 4 and stored.scale not in ("group", "block") else 128
