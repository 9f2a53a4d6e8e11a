"""An interpreter for straight-line PTX of the Hopper kernels, on int64 tensors of 32-bit words.

It knows the instructions that codes and sums use and refuses all others. Arithmetic follows the PTX
ISA: operands and results in their own type, one rounding to nearest even, subnormals kept.
"""

from __future__ import annotations

import operator
import re

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# (mantissa bits, exponent bias) of the types that arithmetic runs in.
FLOATS = {"bf16": (7, 127), "f16": (10, 15)}
ARITHMETIC = {
    f"{name}.{kind}x2": (operation, kind)
    for name, operation in (("mul", operator.mul), ("sub", operator.sub))
    for kind in FLOATS
}
# Exact in fp64 before the one rounding: 11-bit factors, and a sum within 53 bits.
ARITHMETIC["fma.rn.f16x2"] = (lambda x, y, z: x * y + z, "f16")


def run(text: str, inputs: dict[str, Tensor], outputs: int) -> list[Tensor]:
    """Execute a block; inputs by name ("$16"), results $0 .. $(outputs - 1)."""
    state = dict(inputs)
    body = text.strip()
    assert body[0] == "{" and body[-1] == "}"
    for statement in re.sub(r"//[^\n]*", "", body[1:-1]).split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            _step(statement.strip(), state)
    return [state[f"${i}"] for i in range(outputs)]


def decode_float(bits: Tensor, kind: str) -> Tensor:
    """Values (fp64) of 16-bit patterns."""
    mantissa, bias = FLOATS[kind]
    exponent = bits >> mantissa & (2 * bias + 1)
    fraction = (bits & ((1 << mantissa) - 1)).double() / (1 << mantissa)
    normal = torch.ldexp(1 + fraction, (exponent - bias).double())
    small = torch.ldexp(fraction, torch.tensor(1.0 - bias).double())
    value = torch.where(exponent == 0, small, normal)
    special = torch.where(fraction == 0, torch.inf, torch.nan)
    value = torch.where(exponent == 2 * bias + 1, special, value)
    return torch.where(bits >> 15 & 1 == 1, -value, value)


def encode_float(value: Tensor, kind: str) -> Tensor:
    """Bit patterns of fp64 values, rounded once to nearest even."""
    mantissa, bias = FLOATS[kind]
    magnitude = value.abs()
    _, exponent = torch.frexp(magnitude)
    exponent = torch.where(magnitude == 0, 1 - bias, exponent.long() - 1).clamp(min=1 - bias)
    units = torch.ldexp(magnitude, (mantissa - exponent).double()).round().nan_to_num(0, 0).long()
    # A carry out of the mantissa moves into the exponent by itself.
    bits = (exponent + bias - 1 << mantissa) + units
    infinite = (2 * bias + 1) << mantissa
    bits = torch.where(magnitude.isinf(), infinite, bits).clamp(max=infinite)
    bits = torch.where(value.isnan(), infinite | 1, bits)
    return bits | torch.signbit(value).long() << 15


def decode_e4m3(byte: Tensor) -> Tensor:
    """Values (fp64) of e4m3 bytes; 0x7f and 0xff are NaN."""
    exponent, fraction = byte >> 3 & 15, (byte & 7).double() / 8
    normal = torch.ldexp(1 + fraction, (exponent - 7).double())
    value = torch.where(exponent == 0, fraction / 64, normal)
    value = torch.where(byte & 0x7F == 0x7F, torch.nan, value)
    return torch.where(byte >> 7 & 1 == 1, -value, value)


def _step(statement: str, state: dict[str, Tensor]) -> None:
    op, rest = statement.split(None, 1)
    pair = re.fullmatch(r"\{(\w+), *(\w+)\}, *(\S+)", rest)
    if op == "mov.b32" and pair:
        word = _value(pair[3], state)
        state[pair[1]], state[pair[2]] = word & 0xFFFF, word >> 16
        return
    join = re.fullmatch(r"(\S+), *\{(\w+), *(\w+)\}", rest)
    if op == "mov.b32" and join:
        state[join[1]] = state[join[2]] | state[join[3]] << 16
        return
    target, *names = (part.strip() for part in rest.split(","))
    state[target] = _evaluate(op, [_value(name, state) for name in names])


def _value(name: str, state: dict[str, Tensor]) -> Tensor:
    if name in state:
        return state[name]
    return torch.tensor(int(name[2:], 16) if name.startswith("0f") else int(name, 0))


def _evaluate(op: str, a: list[Tensor]) -> Tensor:
    if op == "mov.b32":
        return a[0]
    if op == "and.b32":
        return a[0] & a[1]
    if op == "or.b32":
        return a[0] | a[1]
    if op == "shl.b32":
        return a[0] << a[1] & MASK
    if op in ("shr.u32", "shr.b32"):
        return a[0] >> a[1]
    if op == "shf.r.wrap.b32":
        return (a[1] << 32 | a[0]) >> (a[2] & 31) & MASK if int(a[2]) else a[0]
    if op == "lop3.b32":
        return _lop3(*a[:3], int(a[3]))
    if op in ("mul.lo.u32", "mad.lo.s32"):
        return (a[0] * a[1] + (a[2] if len(a) > 2 else 0)) & MASK
    if op in ("abs.f32", "mul.f32", "max.NaN.f32"):
        return _fp32(op, [x.int().view(torch.float32) for x in a])
    if op == "cvt.rn.f16x2.e4m3x2":
        halves = (encode_float(decode_e4m3(a[0] >> 8 * i & 0xFF), "f16") for i in (0, 1))
        return sum(half << 16 * i for i, half in enumerate(halves))
    if op == "cvt.f32.f16":
        return decode_float(a[0], "f16").float().view(torch.int32).long() & MASK
    if op in ("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"):
        kind = op.split(".")[2].removesuffix("x2")
        high, low = (x.int().view(torch.float32).double() for x in a)
        return encode_float(high, kind) << 16 | encode_float(low, kind)
    if op not in ARITHMETIC:
        raise NotImplementedError(op)
    operation, kind = ARITHMETIC[op]
    word = torch.tensor(0)
    for shift in (0, 16):
        halves = [decode_float(x >> shift & 0xFFFF, kind) for x in a]
        word = word | encode_float(operation(*halves), kind) << shift
    return word


def _fp32(op: str, a: list[Tensor]) -> Tensor:
    operation = {"abs.f32": torch.abs, "mul.f32": torch.mul, "max.NaN.f32": torch.maximum}[op]
    return operation(*a).view(torch.int32).long() & MASK


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    out = torch.tensor(0)
    for row in range(8):
        if table >> row & 1:
            terms = (x if row >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0)))
            x, y, z = terms
            out = out | x & y & z
    return out & MASK
