"""Device functions every Triton kernel shares: the dots, the one rounding cast, and the codes.

Casts follow `moelten.casts` bit for bit, by integer arithmetic, on any GPU and in Triton's
interpreter. The interpreter (3.6) truncates casts to bf16, multiplies raw bit patterns in a bf16
dot and has no block-scaled one, so nothing outside this file may round to bf16 or call `tl.dot` or
`tl.dot_scaled`. Decoding is branch-free, exact in every operand type that `triton_gemm` chooses.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def only_if(condition, mask):
    """A mask, or nothing of it, as one number says.

    Not `&`, of which the interpreter of Triton 3.9 makes integers, and then takes no such mask.
    """
    return tl.where(condition, mask, False)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b for equal operand types; fp32 accumulation, int32 for int8."""
    if INTERPRET and acc.dtype == tl.float32:
        return acc + tl.dot(widen(a), widen(b), input_precision="ieee")
    elif a.dtype == tl.float8e4nv:
        # NOTE: Hopper accumulates fp8 in about 14 bits; Triton promotes only when it is told to.
        STEP: tl.constexpr = min(a.shape[1], 128)
        return tl.dot(a, b, acc, max_num_imprecise_acc=STEP)
    elif a.dtype == tl.int8:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def scaled_dot(
    a, a_scale, b, b_scale, acc,
    A_CODES: tl.constexpr, B_CODES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """acc + (a * a_scale) @ (b * b_scale).T, by the instructions that multiply blocks' scales in.

    a, b:    bytes [rows, K] of e4m3 codes, or [rows, K / 2] of e2m1 pairs; b may be bf16
    scales:  bytes [rows, K / 32] of e8m0, or [rows, K / 16] of e4m3, as SCALE says; None for bf16
    """
    if INTERPRET:
        wide = _decode_blocks(a, a_scale, A_CODES, SCALE)
        other = widen(b) if B_CODES == "bf16" else _decode_blocks(b, b_scale, B_CODES, SCALE)
        return acc + tl.dot(wide, tl.trans(other), input_precision="ieee")
    else:
        if SCALE == "e4m3":
            # The type tells the kinds of scales apart.
            a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
            b_scale = b_scale.to(tl.float8e4nv, bitcast=True)
        return tl.dot_scaled(a, a_scale, A_CODES, tl.trans(b), b_scale, B_CODES, acc)


@triton.jit
def _decode_blocks(codes, scale, CODES: tl.constexpr, SCALE: tl.constexpr):
    """What the instruction sees, in fp32: codes times their blocks' scales."""
    if CODES == "e2m1":
        values = decode_e2m1(tl.interleave(codes & 0xF, codes >> 4))
    else:
        values = decode_e4m3(codes, False)
    wide = decode_e8m0(scale) if SCALE == "e8m0" else decode_e4m3(scale, False)
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    GROUPS: tl.constexpr = scale.shape[1]
    values = tl.reshape(values, (ROWS, GROUPS, COLUMNS // GROUPS))
    return tl.reshape(values * wide[:, :, None], (ROWS, COLUMNS))


@triton.jit
def widen(x):
    """Exactly fp32, from bf16, fp16 or fp32."""
    if INTERPRET and x.dtype == tl.bfloat16:
        # NOTE: the interpreter's own conversion loses subnormals.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round fp32 to DTYPE (bf16, fp16 or fp32): to nearest, ties to even."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def nan_like(x):
    return tl.full(x.shape, float("nan"), tl.float32)


@triton.jit
def abs_bits(x):
    """|x| as int32, ordered as magnitudes with NaN above everything: an amax that keeps NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode_e4m3(x, NATIVE: tl.constexpr = False):
    """fp32 to e4m3 codes (uint8), clamped to +-448; NaN stays NaN and keeps its sign."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True) | sign.to(tl.uint8)
    else:
        magnitude = abs_bits(x)
        clamped = tl.minimum(magnitude, 0x43E00000)
        normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - 960
        # Adding 2**14 leaves the sum a step of 2**-9, the step of e4m3 below 2**-6.
        shifted = clamped.to(tl.float32, bitcast=True) + 16384.0
        small = shifted.to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(clamped < 0x3C800000, small, normal)
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        return (code | sign).to(tl.uint8)


@triton.jit
def decode_e4m3(codes, NATIVE: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """e4m3 codes (uint8) to fp32, bf16 or fp16, all exact."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        wide = codes.to(tl.int16)
        # An fp16 number with the same exponent bits, off by 2**8.
        bits = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
        half = bits.to(tl.float16, bitcast=True)
        if DTYPE == tl.float16:
            value = half * tl.full((1, 1), 256.0, tl.float16)
        else:
            value = half.to(tl.float32) * 256.0
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(DTYPE)


@triton.jit
def encode_e2m1(x):
    """fp32 to e2m1 codes (int32, 0..15); NaN becomes +6."""
    a = tl.abs(x)
    code = (a >= 0.75).to(tl.int32) + (a >= 1.75).to(tl.int32) + (a >= 3.5).to(tl.int32)
    code += (a > 0.25).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(x != x, 7, code | sign)


@triton.jit
def decode_e2m1(codes):
    """e2m1 codes (0..15, any integer type) to fp32."""
    wide = codes.to(tl.int16)
    # The three low bits are an fp16 number's last exponent bits and first mantissa bit.
    bits = ((wide & 7) << 9) | ((wide & 8) << 12)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def encode_int8(x):
    """fp32 to int8: half to even, clamped to -127..127, NaN to 0."""
    x = tl.where(x != x, 0.0, x)
    x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    # Adding 1.5 * 2**23 leaves a step of one.
    return ((x + 12582912.0) - 12582912.0).to(tl.int32).to(tl.int8)


@triton.jit
def encode_e8m0(x):
    """Smallest power of two not below x >= 0, as a biased byte (int32); NaN and inf give 255."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.minimum((bits + 0x7FFFFF) >> 23, 255).to(tl.int32)


@triton.jit
def decode_e8m0(byte):
    """2**(byte - 127) in fp32."""
    exponent = byte.to(tl.int32)
    value = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, nan_like(value), value)


@triton.jit
def load_scale(pointer, mask, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 scales of storage KIND: "e8m0", "e4m3" (both bytes) or "float"; masked ones are 0."""
    if KIND == "e8m0":
        return tl.where(mask, decode_e8m0(tl.load(pointer, mask=mask, other=0)), 0.0)
    elif KIND == "e4m3":
        return decode_e4m3(tl.load(pointer, mask=mask, other=0), NATIVE)
    else:
        return widen(tl.load(pointer, mask=mask, other=0.0))
