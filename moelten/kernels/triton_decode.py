"""Stored codes to a matrix operand's values, in Triton: whole words of eight 4-bit codes, or bytes.

Every value is exact in the operand type. Columns come out in natural order, or in the order of a
matrix instruction's left fragment: there a thread's share of a row is whole words, so that codes go
from wide loads straight into the instruction. Both operands of a product must use one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moelten.kernels.triton_casts import (
    INTERPRET,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    round_to,
    widen,
)


@triton.jit
def columns_of(k, BLOCK_K: tl.constexpr):
    """The column of a block at position k of a fragment: a quad's lane t has its t-th quarter."""
    column = (k % 8) // 2 * (BLOCK_K // 4) + k // 32 * 8 + (k // 8) % 4 * 2 + k % 2
    return tl.max_contiguous(tl.multiple_of(column, 2), 2)


@triton.jit
def decode_words(
    words, zero, scale, CODES: tl.constexpr, TYPE: tl.constexpr, FRAGMENT: tl.constexpr
):
    """int32 [R, C] of eight codes each to TYPE (bf16 or fp16) [R, 8C], times scale [R, G] or [R].

    zero:  [R] zero points or None
    scale: one per 8C / G columns, exact in TYPE with every code; or None
    """
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    # Two codes, i and i + 4, at once: one in each half of a word.
    i0, i1 = _two(words, 0, CODES, TYPE), _two(words, 1, CODES, TYPE)
    i2, i3 = _two(words, 2, CODES, TYPE), _two(words, 3, CODES, TYPE)
    twos = tl.join(tl.join(i0, i2), tl.join(i1, i3))
    low, high = (twos & 0xFFFF).to(tl.int16), (twos >> 16).to(tl.int16)
    # [R, C, j, h, s]: column 4s + 2j + h of the word.
    values = tl.join(low, high).to(TYPE, bitcast=True)
    if INTERPRET:
        # NOTE: the interpreter has no bf16 arithmetic.
        values = widen(values)
    KIND: tl.constexpr = values.dtype
    if CODES == "int4":
        base = tl.full((1,), 136.0 if TYPE == tl.bfloat16 else 1032.0, tl.float32)
        if zero is not None:
            base = base + zero.to(tl.float32)
        values = values - base.to(KIND)[:, None, None, None, None]
    else:
        # Out of the subnormals that the bits were put into.
        factor: tl.constexpr = 2.0**126 if TYPE == tl.bfloat16 else 16384.0
        values = values * tl.full((1, 1, 1, 1, 1), factor, KIND)
    if scale is not None:
        scale = round_to(scale, TYPE).to(KIND)
        if len(scale.shape) == 1:
            values = values * scale[:, None, None, None, None]
        else:
            G: tl.constexpr = scale.shape[1]
            scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (R, G, C // G)), (R, C))
            values = values * scale[:, :, None, None, None]
    if FRAGMENT:
        values = tl.reshape(values, (R, 4, C // 4, 2, 2, 2))
        values = tl.permute(values, (0, 2, 5, 3, 1, 4))
    else:
        values = tl.permute(values, (0, 1, 4, 2, 3))
    values = tl.reshape(values, (R, 8 * C))
    if INTERPRET:
        return round_to(values, TYPE)
    else:
        return values


@triton.jit
def _two(words, FIRST: tl.constexpr, CODES: tl.constexpr, TYPE: tl.constexpr):
    """int32 whose halves are TYPE's bits of codes FIRST and FIRST + 4 of each word."""
    if CODES == "int4":
        # The low bits of 128 (bf16) or 1024 (fp16) count units; the xor adds 8.
        ONE: tl.constexpr = 0x43084308 if TYPE == tl.bfloat16 else 0x64086408
        return ((words >> (4 * FIRST)) & 0x000F000F) ^ ONE
    else:
        # A code's low bits are a number's last exponent bits and first mantissa bit.
        LEFT: tl.constexpr = (6 if TYPE == tl.bfloat16 else 9) - 4 * FIRST
        MASK: tl.constexpr = 0x01C001C0 if TYPE == tl.bfloat16 else 0x0E000E00
        sign = (words << (12 - 4 * FIRST)) & -0x7FFF8000
        if LEFT >= 0:
            return sign | ((words << LEFT) & MASK)
        else:
            return sign | ((words >> -LEFT) & MASK)


@triton.jit
def decode_bytes(
    codes, zero, scale, CODES: tl.constexpr, OPERAND: tl.constexpr, NATIVE: tl.constexpr
):
    """Bytes [R, C] to OPERAND [R, C], or [R, 2C] of 4-bit codes; the rest is as above."""
    if CODES == "int4" or CODES == "e2m1":
        codes = tl.interleave(codes & 0xF, codes >> 4)
    if CODES == "int8" and OPERAND == tl.int8:
        return codes
    elif CODES == "e4m3" and OPERAND == tl.float8e4nv:
        return codes.to(tl.float8e4nv, bitcast=True)
    elif CODES == "int4" and OPERAND == tl.int8:
        values = (codes.to(tl.int8) ^ 8) - 8
        return values if zero is None else values - zero[:, None]
    else:
        # Products stay exact in 16 bits; the interpreter has no bf16 arithmetic.
        narrow: tl.constexpr = OPERAND == tl.bfloat16 or OPERAND == tl.float16
        KIND: tl.constexpr = OPERAND if narrow and not INTERPRET else tl.float32
        if CODES == "int4":
            values = (codes.to(tl.int8) ^ 8) - 8
            if zero is not None:
                values = values - zero[:, None]
            values = values.to(tl.float32)
        elif CODES == "int8":
            values = codes.to(tl.float32)
        elif CODES == "e4m3":
            values = decode_e4m3(codes, NATIVE, KIND)
        else:
            values = decode_e2m1(codes)
        if scale is not None:
            if len(scale.shape) == 1:
                scale = scale[:, None]
            R: tl.constexpr = values.shape[0]
            K: tl.constexpr = values.shape[1]
            G: tl.constexpr = scale.shape[1]
            values = tl.reshape(values.to(KIND), (R, G, K // G))
            values = tl.reshape(values * round_to(scale, OPERAND).to(KIND)[:, :, None], (R, K))
        return round_to(values, OPERAND)


@triton.jit
def load_raw_scale(pointer, mask, KIND: tl.constexpr):
    """Scales as they are stored, to be decoded later; masked ones are 0."""
    if KIND == "float":
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer, mask=mask, other=0)


@triton.jit
def decode_scale(raw, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 of scales of storage KIND: "e8m0", "e4m3" (both bytes) or "float"."""
    if KIND == "e8m0":
        return decode_e8m0(raw)
    elif KIND == "e4m3":
        return decode_e4m3(raw, NATIVE)
    else:
        return widen(raw)
