"""Which GEMM a scheme is on a target: operand type, where each scale goes, tile sizes.

Pure decisions from formats and a target's capabilities, without tensors, so that tests can list
every variant and compile it for GPUs that are not here. An operand type must hold every code
exactly; a scale is folded into the operand only where the product stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moelten.formats import FP8, MXFP4, MXFP8, NVFP4, Float, Format, Int4, Int8

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

    def multiplies_blocks(self, weights: Format, activations: Format) -> bool:
        """Whether a matrix instruction takes both codes and their blocks' scales."""
        blackwell = self.backend == "cuda" and int(self.arch) // 10 == 10
        if isinstance(weights, NVFP4):
            # NOTE: Blackwell's e4m3 scales have no sign; no quantizer makes negative ones.
            # AMD's has e8m0 scales for 32 columns only.
            return blackwell and isinstance(activations, NVFP4)
        if not (blackwell or (self.backend == "hip" and str(self.arch).startswith("gfx950"))):
            return False
        # A scale per token is constant along K: those activations enter the product unscaled.
        by_token = isinstance(activations, FP8) and activations.block[1] is None
        return isinstance(weights, MXFP4 | MXFP8) and (isinstance(activations, MXFP8) or by_token)


@dataclass(frozen=True)
class Side:
    """How one operand is stored and scaled.

    codes:     "float", "int4", "e2m1", "int8" or "e4m3"
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

    operand:  type of what the matrix instructions take, "blocks" for codes with blocks' scales
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


def block_m(pairs: int, num_experts: int) -> int:
    """Pairs per tile: a power of two near the mean of an expert, 16..128."""
    mean = -(-pairs // num_experts)
    return min(max(1 << (mean - 1).bit_length(), 16), 128)


@lru_cache(maxsize=1024)
def make_variant(
    weights: Format, activations: Format, target: Target, tokens: int, halves: int
) -> Variant:
    """The variant for a scheme, for tiles of `tokens` pairs and a matrix of `halves`."""
    operand = _operand(weights, activations, target)
    sides = _side(weights, operand), _side(activations, operand)
    if operand == "blocks":
        return _block_scaled(sides, target, tokens, halves)
    block_k = _block_k(sides, operand)
    if operand in ("e4m3", "int8") and block_k < _MIN_8BIT_BLOCK_K:
        # 8-bit matrix instructions take 32 columns; bf16 holds the same codes and takes 16.
        operand = "bf16"
    precision = "tf32x3" if target.backend == "cuda" else "ieee"
    # Measured on H200: 64 rows and 4 warps beat 128 rows and 8 warps, at 16 and at 128 tokens.
    block_n, num_warps, num_stages = 64, 4, 4
    if tokens >= 64:
        block_k, num_stages = min(block_k, 64), 3
    if target.backend == "hip":
        num_stages = 2
    if target.exact_fp8_dot and target.backend == "cuda" and halves > 1:
        decoded = sides[1].codes != "float" and "group" not in (sides[0].mode, sides[1].mode)
        if decoded:
            # NOTE: Triton 3.6 fails to pipeline two tcgen05 dots that share a decoded operand.
            num_stages = 1
    if target.backend == "interpreter":
        # Its cost is the number of operations, whatever their size.
        block_n = 128
    return Variant(
        *sides, operand, target.native_fp8, precision, block_n, block_k, num_warps, num_stages
    )


def _block_scaled(sides: tuple[Side, Side], target: Target, tokens: int, halves: int) -> Variant:
    # Blackwell's instruction demands 128 rows: of both halves, where there are two.
    block_n, num_stages = (128 // halves, 3) if target.backend == "cuda" else (64, 2)
    num_warps = 8 if tokens >= 64 else 4
    # 128 bytes of a row where both operands hold e2m1.
    block_k = 256 if sides[0].codes == sides[1].codes == "e2m1" else 128
    return Variant(*sides, "blocks", True, "ieee", block_n, block_k, num_warps, num_stages)


def _operand(weights: Format, activations: Format, target: Target) -> str:
    if target.multiplies_blocks(weights, activations):
        return "blocks"
    if isinstance(activations, Float):
        return activations.name
    # e2m1 times its block scale is exact in bf16, and so is every 8-bit code: one product for all.
    if isinstance(weights, MXFP4 | MXFP8 | NVFP4):
        return "bf16"
    if isinstance(activations, Int8):
        return "int8"
    # e4m3 and int4 codes are exact in fp16, which e4m3 converts to in one instruction.
    return "e4m3" if target.exact_fp8_dot else "fp16"


def _side(fmt: Format, operand: str) -> Side:
    if isinstance(fmt, Float):
        return Side("float")
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
    return Side(codes, scale, "group", group, rows or 0)


def _block_k(sides: tuple[Side, Side], operand: str) -> int:
    """The largest tile along K in which no per-group scale changes."""
    size = 32 if operand == "fp32" else _MAX_BLOCK_K
    for side in sides:
        if side.mode == "group":
            size = min(size, side.group & -side.group)
    return size
