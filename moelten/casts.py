"""Casts between fp32 and the element types, with one rounding rule.

Every cast rounds to nearest, ties to even, after an explicit clamp; none relies on what a framework
does out of range. e8m0 scales are the exception by design: they round *up* to a power of two
(RCEIL), by integer bits, so that the largest element never clips. Scales and blocks belong to
`quantize`; byte order belongs to `packing`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))
# Midpoints between neighbours; a tie belongs to the neighbour whose code is even.
_TIES_UP = (0.75, 1.75, 3.5)
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
E4M3_MAX = 448.0


def encode_e2m1(x: Tensor) -> Tensor:
    """Round fp32 to e2m1 codes (uint8, 0..15); bit 3 is the sign, -0 keeps it, NaN becomes +6.

    >>> encode_e2m1(torch.tensor([0.25, 0.75, 2.5, 5.0, -9.0])).tolist()
    [0, 2, 4, 6, 15]
    """
    a = x.abs()
    code = torch.signbit(x).to(torch.uint8) << 3
    for boundary in _TIES_UP:
        code += a >= boundary
    for boundary in _TIES_DOWN:
        code += a > boundary
    return torch.where(torch.isnan(x), 7, code)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Values (fp32) of e2m1 codes 0..15."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    return table[codes.long()]


def encode_e4m3(x: Tensor) -> Tensor:
    """Round fp32 to float8_e4m3fn, clamped to +-448; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_int(x: Tensor, low: int, high: int) -> Tensor:
    """Round half to even and clamp to low..high, as int8; NaN becomes 0."""
    return torch.nan_to_num(x.round().clamp(low, high)).to(torch.int8)


def encode_e8m0(x: Tensor) -> Tensor:
    """Smallest power of two not below x >= 0, as a biased byte (RCEIL); 0 gives byte 0.

    byte = (bits(x) + 0x7FFFFF) >> 23; inf and NaN give 255, the e8m0 NaN.

    >>> encode_e8m0(torch.tensor([1.0, 1.1, 2.0, 0.0])).tolist()
    [127, 128, 128, 0]
    """
    bits = x.to(torch.float32).contiguous().view(torch.int32)
    return ((bits.long() + 0x7FFFFF) >> 23).clamp(0, 255).to(torch.uint8)


def decode_e8m0(byte: Tensor) -> Tensor:
    """2**(byte - 127) in fp32, exact for every byte; 255 is NaN and 0 the subnormal 2**-127."""
    exponent = byte.to(torch.int32)
    bits = torch.where(exponent == 0, 1 << 22, exponent << 23)
    return torch.where(exponent == 255, torch.nan, bits.view(torch.float32))
