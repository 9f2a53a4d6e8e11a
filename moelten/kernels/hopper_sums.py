"""GEMM2's sums for many tokens per expert, on their way to the sum over slots: order and bits.

The order of sums is that of registers in a product of 256 rows, of which a lane's four stand
together (of sixteen warps two, beside another lane's): column 32 w + 4 g + 2 b + h of 256 is
128 b + 16 w + 8 h + g of the result, for 8 w, 8 g, 2 b and 2 h. So nothing is exchanged, and no
warp waits for another one (an exchange among lanes takes back what the bytes below save).

Two together are 32 bits: multiples of a power of two that brings the larger below 2**11, rounded to
integers. They are subnormals of fp16, of which the upper 4 bits of the exponent are 0; those hold
the power, low bits first. What rounding leaves out is at most 1/2047 of the larger, an eighth of
what bf16 leaves out of it; the two are rows 8 apart, of the same block of scales, if there are any.
Where one has 2**113 or more, or is not finite, both are NaN. With 24 bits of each, layers of 8192
tokens take 2 to 3 % longer (H200).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_fragments import cut
from moelten.kernels.triton_casts import only_if

# The larger, and a little more, lest it is rounded up to 2**11; its exponent e, of 8 bits; and
# 2**(113 - e), which is fp32 with exponent 240 - e. Half of e's bits lie in each half of the word.
_SHORTEN = gl.constexpr(
    f"""{{.reg .f32 most, other; .reg .b32 e, bits;
    abs.f32 most, $1; abs.f32 other, $2; max.NaN.f32 most, most, other;
    mul.f32 most, most, 0f3F801000;
    mov.b32 e, most; shr.u32 e, e, 23;
    mad.lo.s32 bits, e, {-1 << 23}, {240 << 23};
    mov.b32 other, bits;
    mul.f32 most, $1, other; mul.f32 other, $2, other; cvt.rn.f16x2.f32 $0, other, most;
    mul.lo.u32 bits, e, {1 << 11 | 1 << 23}; lop3.b32 $0, bits, 0x78007800, $0, 0xEA;}}"""
)


@gluon.constexpr_function
def _in_order(bands):
    """Every second of 8 tokens, [4, 256], in the order of sums: two bands of half as many rows each
    are a lane's, one of all rows is of twice as many warps."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]][:bands],
        lane_bases=[[1, 0], [2, 0], [0, 4], [0, 8], [0, 16]],
        warp_bases=[[0, 32], [0, 64], [0, 128], [0, 2]][: 5 - bands],
        block_bases=[],
        shape=[4, 256],
    )


@gluon.jit
def _store_short(y, at, left, token: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):
    """Every second of 8 tokens' sums, from the one on that is so far behind."""
    y = gl.convert_layout(y, L, assert_trivial=True)
    y = gl.inline_asm_elementwise(_SHORTEN, "=r,f,f", [y], dtype=gl.uint16, is_pure=True, pack=2)
    gl.store(at + token * (WIDTH // 2), y, mask=left > token)


@gluon.jit
def store_sums(bands, out_ptr, first, stop, n0, WIDTH: gl.constexpr):
    """Sums of 256 outputs, two bands or one, [rows, positions first ..], to memory: 8 bytes per
    lane and token, or 4.

    WIDTH: bytes of a row (`hopper_schedule.slot_bytes`)

    A lane has one address, from where its other tokens are at constant distances.
    """
    L: gl.constexpr = _in_order(len(bands))
    # Axes w h g, tokens 16 8 2 1, b; or b first.
    if len(bands) == 2:
        y = gl.join(bands[0], bands[1]).reshape([8, 2, 8, 2, 2, 4, 2, 2])
        y = y.permute((5, 0, 2, 7, 1, 6, 4, 3))
    else:
        y = bands[0].reshape([2, 8, 2, 8, 2, 2, 4, 2]).permute((6, 1, 3, 0, 2, 7, 5, 4))
    tokens = cut(y.reshape([4, 256, 2, 2, 2]))
    position = first + 2 * gl.arange(0, 4, gl.SliceLayout(1, L))[:, None]
    n = n0 + gl.arange(0, 256, gl.SliceLayout(0, L))[None, :]
    at = out_ptr.to(gl.pointer_type(gl.uint16)) + position.to(gl.int64) * (WIDTH // 2) + n
    left = stop - position
    for i in gl.static_range(8):
        _store_short(tokens[i], at, left, i // 2 * 8 + i % 2, WIDTH, L)


@triton.jit
def _half(words, shift: tl.constexpr):
    """One of the two numbers, times 2**(113 - e)."""
    half = ((words >> shift) & 0x87FF).to(tl.uint16)
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_sums(y_ptr, row, first, there, columns, COUNT: tl.constexpr):
    """Columns first .. of a row of so many, in the order of sums: fp32 [COUNT].

    0 past the last one, and where there is no such row.
    """
    two = first // 2 + tl.arange(0, COUNT // 2)
    at = y_ptr.to(tl.pointer_type(tl.uint32)) + row * (columns // 2) + two
    words = tl.load(at, mask=only_if(there, two < columns // 2), other=0)
    e = (words >> 11 & 0xF) | (words >> 23 & 0xF0)
    power = tl.where(e > 239, 0x7FC00000, (e + 14) << 23).to(tl.float32, bitcast=True)
    return tl.join(_half(words, 0) * power, _half(words, 16) * power).reshape([COUNT])


@triton.jit
def in_columns(y, COUNT: tl.constexpr):
    """Columns in the order of sums, whole blocks of 256, in that of the result."""
    return y.reshape([COUNT // 256, 8, 8, 2, 2]).permute(0, 3, 1, 4, 2).reshape([COUNT])
