"""What is compiled into Triton's grouped GEMMs: one value, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from moelten.kernels.constants import Constants
from moelten.kernels.triton_variants import Side, Variant

_OPERANDS = {
    "bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32,
    "e4m3": tl.float8e4nv, "int8": tl.int8,
}  # fmt: skip


@dataclass(frozen=True)
class Problem(Constants):
    """What is compiled into a kernel.

    rows, columns: N and K of one expert's matrix, of which GEMM1's with a gate has two halves
    limited:       whether the activation may have limits
    block:         most pairs of a tile
    """

    rows: int
    columns: int
    halves: int
    activation: str
    limited: bool
    block: int
    variant: Variant

    @property
    def weights(self) -> Side:
        return self.variant.weights

    @property
    def activations(self) -> Side:
        return self.variant.activations

    @property
    def operand(self) -> Any:
        return _OPERANDS[self.variant.operand]

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // self.variant.block_n)

    @property
    def tile_rows(self) -> int:
        """Rows of a tile, of all halves."""
        return self.variant.block_n * self.halves

    @property
    def rest(self) -> int:
        """Most pairs of the tile for what is left of an expert: half a tile costs half."""
        halved = self.variant.tokens_left and self.block == 128
        return self.block // 2 if halved else self.block

    @property
    def run(self) -> int:
        """Rows by which the halves take turns, so that one thread's accumulators hold both of an
        output: one by one along a fragment's columns, by eights along its rows."""
        return 1 if self.variant.tokens_left else 8

    @property
    def scale_rows(self) -> int:
        """Rows of a half's scales: one per row, per block of rows, or one for the whole matrix."""
        return 1 if self.weights.row_block == 0 else -(-self.rows // self.weights.row_block)

    @property
    def scale_columns(self) -> int:
        return -(-self.columns // self.weights.group)

    @property
    def half_scales(self) -> int:
        """Scales of a half."""
        return self.scale_rows * self.scale_columns

    @property
    def token_scales(self) -> int:
        """Scales of a row of activations."""
        return -(-self.columns // self.activations.group)

    @property
    def blocked(self) -> bool:
        """Whether one scale serves the whole tile, of each half, for a step."""
        block = self.weights.row_block
        return self.weights.mode == "group" and block > 1 and block % self.variant.block_n == 0

    @property
    def scales_sums(self) -> bool:
        """Whether scales multiply sums, group after group."""
        return "group" in (self.weights.mode, self.activations.mode)

    @property
    def integer(self) -> bool:
        """Whether sums are integers."""
        return self.variant.operand == "int8" and not self.scales_sums

    @property
    def in_units(self) -> bool:
        """Whether a power of two of each row's own brings its scales into fp16."""
        return self.weights.mode == "fold" and self.weights.codes == "int4"

    @property
    def unit_step(self) -> int:
        """Columns of scales that are read at once to find those powers of two.

        NOTE: Triton 3.6 lays out what follows after this load. With 2048 columns of scales at once
        the weights come as their fragment; with 512 no register spills on the right.
        """
        padded: int = triton.next_power_of_2(self.scale_columns)
        columns = 512 if self.variant.tokens_left else 2048
        return min(padded, max(columns // self.weights.group, 16, padded // 16))
