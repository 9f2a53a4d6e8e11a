"""Which GEMM a scheme is on a target: operand type, where each scale goes, tile sizes.

Pure decisions from formats and a target's capabilities, without tensors, so that tests can list
every variant and compile it for GPUs that are not here. An operand type must hold every code
exactly; a scale is folded into the operand only where the product stays exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from moelten.formats import BF16, FP8, MXFP4, MXFP8, NVFP4, Float, Format, Int4, Int8

_MAX_BLOCK_K = 128
_MIN_8BIT_BLOCK_K = 32


@dataclass(frozen=True)
class Target:
    """backend "cuda", "hip" or "interpreter"; arch such as 90 or "gfx942"."""

    backend: str
    arch: int | str = 0

    @property
    def native_fp8(self) -> bool:
        """Whether conversions from e4m3 (the OCP kind) are instructions."""
        if self.backend == "cuda":
            return int(self.arch) >= 89
        return self.backend == "hip" and str(self.arch).startswith("gfx950")

    @property
    def exact_fp8_dot(self) -> bool:
        """Whether e4m3 matrix instructions accumulate in fp32.

        NOTE: Ada's and Hopper's keep about 14 bits even within one instruction. On an H200 that
        moved codes of the requantized intermediate, and rows missed the bound of 4e-3 fourfold.
        """
        if self.backend == "cuda":
            return int(self.arch) >= 100
        return self.native_fp8

    @property
    def measured(self) -> bool:
        """Whether tiles were chosen by measurement; the interpreter runs all that were."""
        return self.backend == "interpreter" or (self.backend == "cuda" and self.arch == 90)

    def multiplies_blocks(self, weights: Format, activations: Format) -> bool:
        """Whether instructions take the weights' codes and their blocks' scales as they are."""
        blackwell = self.backend == "cuda" and int(self.arch) // 10 == 10
        cdna4 = self.backend == "hip" and str(self.arch).startswith("gfx950")
        if isinstance(weights, NVFP4):
            # NOTE: Blackwell's e4m3 scales have no sign; no quantizer makes negative ones.
            # AMD's has e8m0 scales for 32 columns only.
            return blackwell and isinstance(activations, NVFP4)
        if not (blackwell or cdna4) or not isinstance(weights, MXFP4 | MXFP8):
            return False
        # A scale per token is constant along K: those activations enter the product unscaled.
        by_token = isinstance(activations, FP8) and activations.block[1] is None
        # CDNA4 converts by block to bf16: 231 instructions in the loop of 16 tokens, not 987.
        return isinstance(activations, MXFP8) or by_token or (cdna4 and activations == BF16)


@dataclass(frozen=True)
class Side:
    """How one operand is stored and scaled.

    codes:     "float", "int4", "e2m1", "int8" or "e4m3"; "bf16" beside operands in blocks
    scale:     "float", "e8m0" or "e4m3"
    mode:      "none"; "row": constant along K; "group": scales each group's product; "fold":
               multiplies the codes; "dot": the matrix instruction multiplies by it
    group:     columns per scale (all of them in mode "row")
    row_block: rows per scale, 0 for all
    """

    codes: str
    scale: str = "float"
    mode: str = "none"
    group: int = 1 << 30
    row_block: int = 1


@dataclass(frozen=True)
class Variant:
    """Everything about a GEMM that is fixed when it is compiled, but for its shape.

    operand:       type of what matrix instructions take, "blocks" for codes with blocks' scales
    block_n:       rows of the matrix in a tile, of each half
    tokens_left:   whether tokens are the matrix instruction's left operand, else weights
    max_registers: of a thread, if the compiler is not to choose
    """

    weights: Side
    activations: Side
    operand: str
    native_fp8: bool
    precision: str
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tokens_left: bool = False
    max_registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """Options of Triton's compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})

    @property
    def decodes_words(self) -> bool:
        """Whether 4-bit codes are decoded eight at a time, which gives 16-bit values."""
        return self.operand in ("bf16", "fp16")

    @property
    def block_scaled(self) -> bool:
        """Whether `triton_scaled` runs it; `triton_gemm` runs all others."""
        return self.operand == "blocks"


@lru_cache(maxsize=1)
def current_target() -> Target:
    """The GPU that Triton compiles for, or its interpreter."""
    import triton

    if triton.knobs.runtime.interpret:
        return Target("interpreter")
    found = triton.runtime.driver.active.get_current_target()
    return Target(found.backend, found.arch)


def block_m(pairs: int, num_experts: int, target: Target, activations: Format) -> int:
    """Pairs per tile: a power of two, 16..128, that the pairs of most experts fit.

    Where nothing was measured, as of fp32, 16 or 64: every size is one more compilation of every
    GEMM.
    """
    mean = pairs / num_experts
    most = math.ceil(mean + 1.5 * math.sqrt(mean))
    size = min(max(1 << (most - 1).bit_length(), 16), 128)
    measured = target.measured and activations != Float("float32")
    return size if measured else 16 if size == 16 else 64


def row_dtype(weights: Format, activations: Format, target: Target) -> torch.dtype | None:
    """What activations are stored as for the GEMM, None for codes as the format has them.

    e4m3 codes are widened once, not in every tile. bf16 rows that meet int4 codes times bf16
    scales, which are exact in fp16 alone, become fp16 times a power of two: exact but for elements
    below 2**-31 of their row's largest.
    """
    if target.multiplies_blocks(weights, activations):
        return None
    if activations == BF16 and _folds_in_fp16(weights):
        return torch.float16
    if isinstance(activations, FP8):
        operand = _operand(weights, activations, target, None)
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(operand)
    return None


@lru_cache(maxsize=1024)
def make_variant(
    weights: Format,
    activations: Format,
    target: Target,
    tokens: int,
    halves: int,
    rows: torch.dtype | None = None,
) -> Variant:
    """The variant for a scheme, for tiles of `tokens` pairs and a matrix of `halves`.

    rows: dtype of the activations' storage, by default that of `row_dtype`
    """
    rows = row_dtype(weights, activations, target) if rows is None else rows
    operand = _operand(weights, activations, target, rows)
    # Activations have a scale for every row, if it is one for all of them too.
    sides = _side(weights, operand), replace(_side(activations, operand), row_block=1)
    if operand == "blocks":
        return _block_scaled(sides, target, tokens, halves)
    if isinstance(activations, Float) and operand != activations.name:
        sides = sides[0], Side("float", mode="row")
    elif rows in (torch.float16, torch.bfloat16):
        sides = sides[0], replace(sides[1], codes="float")
    if tokens < 64 and sides[0].codes == "int4" and sides[0].mode == "fold":
        # A few accumulators are cheaper to scale than long groups of weights.
        if sides[0].group >= _MAX_BLOCK_K:
            sides = replace(sides[0], mode="group"), sides[1]
    block_k = _block_k(sides, operand)
    if operand in ("e4m3", "int8") and block_k < _MIN_8BIT_BLOCK_K:
        # 8-bit matrix instructions take 32 columns; bf16 holds the same codes and takes 16.
        operand = "bf16"
    tile = _tile(sides, operand, target, tokens, halves)
    precision = "tf32x3" if target.backend == "cuda" else "ieee"
    return Variant(
        *sides,
        operand,
        target.native_fp8,
        precision,
        **tile | {"block_k": min(block_k, tile["block_k"])},
    )


def _tile(
    sides: tuple[Side, Side], operand: str, target: Target, tokens: int, halves: int
) -> dict[str, Any]:
    """Sizes of a tile and what runs it, as measured on H200."""
    if target.backend == "interpreter":
        # Its cost is the number of operations, whatever their size.
        tile = {"block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 1}
        return tile | {"tokens_left": tokens >= 64}
    if not target.measured:
        # Few registers to a thread: none may spill.
        tile = {"block_n": 64 // halves, "block_k": 64, "num_warps": 4 if tokens < 64 else 8}
        if operand == "fp32" and tokens >= 64:
            tile["block_k"] = 16
        if target.backend == "hip":
            return tile | {"num_stages": 2}
        # NOTE: without a limit ptxas spills a register or two to fit another block.
        return tile | {"num_stages": 3, "max_registers": 255}
    modes = sides[0].mode, sides[1].mode
    grouped = "group" in modes
    both = modes == ("group", "group")
    # Scales of rows are cheap beside the left operand, of which a thread has few rows.
    by_row = (sides[0].mode, sides[0].row_block) == ("group", 1)
    if tokens < 64 or (by_row and not (both and tokens == 128)):
        tile = {"block_n": 64 // halves, "num_warps": 4, "block_k": 128, "num_stages": 4}
        if tokens >= 64:
            tile |= {"block_k": 64, "num_stages": 3}
        # Four warps would spill.
        if tokens == 128 or (tokens == 64 and both):
            tile["num_warps"] = 8
    else:
        # Two of these fit a multiprocessor: one multiplies while the other decodes.
        tile = {"block_n": 128 // halves, "block_k": 64, "num_warps": 4, "num_stages": 3}
        tile["tokens_left"] = True
        # These take registers beside the sums, which four warps have not at 128 tokens.
        by_channel = sides[0].codes == "int4" and modes == ("row", "none")
        decoded = operand == "bf16" and sides[1].codes == "int8"
        if tokens == 128 and (grouped or by_channel or decoded or operand == "fp32"):
            tile["num_warps"] = 8
            if both and by_row:
                tile["block_n"] = 64 // halves
            if grouped and operand == "fp16":
                tile["block_k"] = 128
    return tile


def _block_scaled(sides: tuple[Side, Side], target: Target, tokens: int, halves: int) -> Variant:
    # Blackwell's instruction demands 128 rows: of both halves, where there are two.
    block_n, num_stages = (128 // halves, 3) if target.backend == "cuda" else (64, 2)
    num_warps = 8 if tokens >= 64 else 4
    # Each operand's rows in 128 bytes, where there are registers for it.
    block_k = 256 if sides[0].codes == sides[1].codes == "e2m1" else 128
    if sides[1].codes == "bf16" and tokens >= 64:
        block_k = 64
    return Variant(*sides, "blocks", True, "ieee", block_n, block_k, num_warps, num_stages)


def _operand(weights: Format, activations: Format, target: Target, rows: torch.dtype | None) -> str:
    if target.multiplies_blocks(weights, activations):
        return "blocks"
    if isinstance(activations, Float):
        return "fp16" if rows == torch.float16 else activations.name
    # e2m1 times its block scale is exact in bf16, and so is every 8-bit code: one product for all.
    if isinstance(weights, MXFP4 | MXFP8 | NVFP4):
        return "bf16"
    if isinstance(activations, Int8):
        return "int8"
    # e4m3 and int4 codes are exact in fp16, which e4m3 converts to in one instruction.
    return "e4m3" if target.exact_fp8_dot else "fp16"


def _folds_in_fp16(fmt: Format) -> bool:
    """Whether code times scale takes 11 bits, which fp16 has and bf16 has not."""
    if not isinstance(fmt, Int4) or fmt.zero_point or fmt.scale != "bfloat16":
        return False
    group = fmt.group_size
    return group is not None and group & (group - 1) == 0


def _side(fmt: Format, operand: str) -> Side:
    if isinstance(fmt, Float):
        return Side(fmt.name if operand == "blocks" else "float")
    scale = {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}.get(fmt.scale_dtype, "float")  # type: ignore[arg-type]
    rows, group = fmt.block
    if isinstance(fmt, MXFP4 | MXFP8 | NVFP4):
        # NOTE: fp16 has not the exponents for e8m0 scales, but for e4m3 ones it has.
        fold = operand in ("bf16", "fp32") or (operand == "fp16" and isinstance(fmt, NVFP4))
        codes = "e4m3" if isinstance(fmt, MXFP8) else "e2m1"
        mode = "dot" if operand == "blocks" else "fold" if fold else "group"
        return Side(codes, scale, mode, group or 0)
    assert isinstance(fmt, Int4 | Int8 | FP8)
    codes = {Int4: "int4", Int8: "int8", FP8: "e4m3"}[type(fmt)]
    if group is None:
        return Side(codes, scale, "row", row_block=rows or 0)
    if operand == "fp16" and _folds_in_fp16(fmt):
        return Side(codes, scale, "fold", group)
    return Side(codes, scale, "group", group, rows or 0)


def _block_k(sides: tuple[Side, Side], operand: str) -> int:
    """The largest tile along K in which no per-group scale changes."""
    size = 32 if operand == "fp32" else _MAX_BLOCK_K
    for side in sides:
        if side.mode == "group":
            size = min(size, side.group & -side.group)
    return size
