"""Which variant of the decode GEMM runs: a cost model over tokens, experts and the GPU's size.

Pure arithmetic on sizes that the host knows; nothing is timed and no model has a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moelten.kernels.hopper_codes import Storage

# Programs per multiprocessor that keep enough bytes in flight, and columns worth a split of K.
_WANTED_PROGRAMS = 4
_LEAST_STEPS = 4
_MAX_SPLITS = 8


@dataclass(frozen=True)
class Variant:
    """warps: of a program, which split K; splits: of K over programs; registers: the most."""

    warps: int
    splits: int
    registers: int | None


def block_of(pairs: int, num_experts: int) -> int:
    """Pairs per tile, for experts of about Poisson size."""
    return 8 if pairs <= 2 * num_experts else 16


def make_variant(
    stored: Storage, block: int, pairs: int, num_experts: int, row_tiles: int, columns: int,
    processors: int, *, may_split: bool,
) -> Variant:  # fmt: skip
    """The variant for a matrix of `row_tiles` tiles of 64 rows per expert, and its tokens."""
    active = num_experts * -math.expm1(pairs * math.log1p(-1 / max(num_experts, 2)))
    programs = min(active, pairs) * row_tiles
    steps = -(-columns // 256)
    splits = 1
    if may_split:
        wanted = math.ceil(_WANTED_PROGRAMS * processors / programs)
        splits = max(1, min(wanted, steps // _LEAST_STEPS, _MAX_SPLITS))
    return Variant(4, splits, _registers(stored, block))


def _registers(stored: Storage, block: int) -> int | None:
    """The most registers per thread: few enough for many warps, enough not to spill."""
    if block == 8 or stored.code.bits == 16:
        return None
    return 128 if stored.scale in ("group", "block") or stored.code.bits == 8 else 96
