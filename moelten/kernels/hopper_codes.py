"""Codes of the Hopper layout: where each bit of a code is stored, and the PTX that reads it.

The unit of placement is what a lane holds of two rows (b = 0, 1: rows g and g + 8) and 32 bits of
each row's run of contiguous columns (`hopper_layout` has the order): 64 bits in, in canonical order

    bit 32 * b + i      i: the bit of the canonical little-endian word, codes in order of column

and 64 bits out, in two words A and B. A 16-byte load is two units; the PTX of a code turns its four
words into `registers` 32-bit registers of operands. With c = 32-column chunk, s = k16 step within
it, j = register pair of the fragment (its "k + 8" half) and b = row half, register index is

    4-bit codes     c + 2 * (b + 2 * j + 4 * s)     16 registers    (the load: 64 columns, 2 rows)
    8-bit codes     s + 2 * (b + 2 * j)              8 registers    (32 columns)
    16-bit          j + 2 * b                        4 registers    (16 columns: one step)

so that with `pack=4` each tensor of 16-bit elements that the inline assembly returns has one (b, j,
s) and, along the axis of the four words, [c or s or j, h]: h is the half of a register, the parity
of the column. Halves of a "pair" are the two row halves b instead: multipliers and zero points.

    e2m1, and    the bits of a code, in the place of the number's own low exponent and high mantissa
    e4m3 that    bits, are that number times a power of two, subnormals included; one multiplication
    folds        undoes the power, and applies the scale where the product is exact ("fold")
    other e4m3   two codes at a time are converted by an instruction
    int4, int8   the bits of q + 8 or q + 128 in the low mantissa of 128.0 (bf16) or 1024.0 (fp16)
                 are that much plus q; one subtraction leaves q, or q - zero, and one more exact
                 multiplication, in the same instruction, q * scale

Every step is exact. What remains to be multiplied to the accumulator is `epilogue`, a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from moelten.errors import UnsupportedError
from moelten.formats import FP8, MXFP4, MXFP8, NVFP4, Float, Format, Int4, Int8
from moelten.kernels.hopper_bits import (
    Bits,
    Code,
    PairCode,
    Piece,
    Pieces,
    body,
    constants,
    gather,
    masked_or,
    multiply,
    place,
    spread,
    unit_index,
)

# e2m1 -------------------------------------------------------------------------------------------
# As bf16: sign at bit 15, exponent at 8 and 7, mantissa at 6; that is the value * 2**-126. Eight
# registers from two words in 16 integer instructions: three disjoint rotations of the mask in A,
# three in B, and the twice four bits per half that remain make one more word, with two.
_E2M1_BF16: Bits = (6, 7, 8, 15)
_E2M1_SHARED = 0xC180C180
_E2M1_BF16_PIECES: Pieces = tuple(
    (Piece(word, move, by, _E2M1_BF16),)
    for word, move, by in (
        (0, "rot", 4),
        (0, "shl", 6),
        (0, "shl", 2),
        (1, "rot", 2),
        (1, "rot", 8),
        (1, "shl", 4),
        (2, "", 0),
        (2, "rot", 6),
    )
)
E2M1_BF16 = Code(
    "e2m1",
    "bf16",
    4,
    place(_E2M1_BF16_PIECES, _E2M1_BF16, unit_index(4), _E2M1_SHARED),
    multiply(_E2M1_BF16_PIECES, "bf16", None, _E2M1_SHARED),
    pair="scale",
)

# As fp16: exponent at 11 and 10, mantissa at 9; the value * 2**-14. No rotations of that mask are
# disjoint, but three magnitudes shift into place, and the two last signs by themselves.
_E2M1_FP16: Bits = (9, 10, 11, 15)
_E2M1_FP16_PIECES: Pieces = tuple(
    pieces
    for word in (0, 1)
    for pieces in (
        (Piece(word, "", 0, _E2M1_FP16),),
        (Piece(word, "shl", 3, _E2M1_FP16),),
        (Piece(word, "shl", 6, (9, 10, 11)), Piece(word, "shl", 1, (15,))),
        (Piece(word, "shl", 9, (9, 10, 11)), Piece(word, "shl", 2, (15,))),
    )
)
_E2M1_FP16_PLACES = place(_E2M1_FP16_PIECES, _E2M1_FP16, unit_index(4))
E2M1_FP16 = Code(
    "e2m1", "fp16", 4, _E2M1_FP16_PLACES, multiply(_E2M1_FP16_PIECES, "fp16", 0x74007400)
)
# With e4m3 scales * 2**7 (an e4m3 * 2**14 would not fit in fp16).
E2M1_FP16_SCALED = Code(
    "e2m1",
    "fp16",
    4,
    _E2M1_FP16_PLACES,
    multiply(_E2M1_FP16_PIECES, "fp16", None),
    pair="scale",
    epilogue=128.0,
)
# With e4m3 scales * 2**119 for the 2**126 that e2m1 needs.
E2M1_BF16_SCALED = Code(
    "e2m1",
    "bf16",
    4,
    E2M1_BF16.placement,
    E2M1_BF16.ptx,
    pair="scale",
    epilogue=128.0,
)

# e4m3 -------------------------------------------------------------------------------------------
# As bf16, times a scale: sign at 15, exponent and mantissa at 10..4; the value * 2**-120. One code
# of a half in place, the other in the bits between, which two moves bring there.
_E4M3_BF16: Bits = (4, 5, 6, 7, 8, 9, 10, 15)
_E4M3_BF16_PIECES: Pieces = tuple(
    pieces
    for word in (0, 1)
    for pieces in (
        (Piece(word, "", 0, _E4M3_BF16),),
        (Piece(word, "rot", 4, (7, 8, 9, 10, 15)), Piece(word, "shl", 4, (4, 5, 6))),
    )
)
_E4M3_BF16_PLACES = place(_E4M3_BF16_PIECES, _E4M3_BF16, unit_index(8))
E4M3_BF16_SCALED = Code(
    "e4m3",
    "bf16",
    8,
    _E4M3_BF16_PLACES,
    multiply(_E4M3_BF16_PIECES, "bf16", None),
    pair="scale",
)


def _e4m3(operand: str) -> Code:
    """Hopper converts two codes to fp16 in one instruction; they lie in canonical order.

    From there to bf16 it is three more, together a little more than moving bits would take, and the
    kernel for few tokens has room for it; that for many, which multiplies in fp16, has next to
    nothing to decode.
    """
    lines = []
    for step in (0, 1):
        for b in (0, 1):
            lines.append(f"mov.b32 {{h0, h1}}, ${8 + 2 * step + b};")
            for j in (0, 1):
                out = f"${step + 2 * (b + 2 * j)}"
                if operand == "fp16":
                    lines.append(f"cvt.rn.f16x2.e4m3x2 {out}, h{j};")
                else:
                    lines += [f"cvt.rn.f16x2.e4m3x2 t0, h{j};", "mov.b32 {h2, h3}, t0;"]
                    lines += ["cvt.f32.f16 t1, h2;", "cvt.f32.f16 t2, h3;"]
                    lines.append(f"cvt.rn.bf16x2.f32 {out}, t2, t1;")
    return Code("e4m3", operand, 8, tuple(range(64)), body(lines))


E4M3_BF16, E4M3_FP16 = _e4m3("bf16"), _e4m3("fp16")


# Integers ---------------------------------------------------------------------------------------


def _int4(operand: str, zero: bool) -> Code:
    """q + 8 in the low mantissa of 128 (bf16) or 1024 (fp16); nibble b + 2 * j of each half."""
    kind, base = {"bf16": ("bf16x2", 0x43004300), "fp16": ("f16x2", 0x64006400)}[operand]
    lines = [] if zero else constants(base | 0x00080008)
    for block in (0, 1):
        if zero:
            lines += spread(f"${20 + 2 * block}")
        for step in (0, 1):
            for index in range(4):
                word = f"${16 + 2 * block + step}"
                if index:
                    lines.append(f"shr.u32 t0, {word}, {4 * index};")
                    word = "t0"
                lines.append(masked_or("t2", word, 0x000F000F, base))
                out = block + 2 * (index + 4 * step)
                lines.append(f"sub.{kind} ${out}, t2, t{4 + (index & 1)};")
    placement = tuple(
        32 * s + 4 * (b + 2 * j) + 16 * h + bit
        for b in (0, 1)
        for s in (0, 1)
        for j in (0, 1)
        for h in (0, 1)
        for bit in range(4)
    )
    pair = "zero" if zero else ""
    return Code("int4", operand, 4, placement, body(lines), pair, flip=0x88888888)


INT4_BF16, INT4_BF16_ZERO = _int4("bf16", False), _int4("bf16", True)
INT4_FP16, INT4_FP16_ZERO = _int4("fp16", False), _int4("fp16", True)


def _int4_scaled() -> Code:
    """(1.5 + q / 16) * scale - 1.5 * scale, whose terms are exact for scales of 8 bits.

    The nibble q + 8 is the high mantissa of 1.0; it lies where `_int4` wants it.
    """
    lines = []
    for block in (0, 1):
        pair = f"${20 + 2 * block}"
        lines += ["mov.b32 t3, 0xbe00be00;", f"mul.f16x2 t3, {pair}, t3;"]
        lines += [*spread("t3", "t6", "t7"), *spread(pair)]
        for step in (0, 1):
            for index in range(4):
                word, move = f"${16 + 2 * block + step}", 6 - 4 * index
                lines.append(f"{'shl.b32' if move > 0 else 'shr.u32'} t0, {word}, {abs(move)};")
                lines.append(masked_or("t2", "t0", 0x03C003C0, 0x3C003C00))
                row, out = index & 1, block + 2 * (index + 4 * step)
                lines.append(f"fma.rn.f16x2 ${out}, t2, t{4 + row}, t{6 + row};")
    return Code(
        "int4", "fp16", 4, INT4_FP16.placement, body(lines), "scale", INT4_FP16.flip, epilogue=16.0
    )


INT4_FP16_SCALED = _int4_scaled()


def _int8(operand: str) -> Code:
    """Byte b of the halves of word j.

    fp16: q + 128 below 1024. bf16 has 7 bits of mantissa: the low bits of q above 128, less 128 or,
    if q is negative, 256; that differs in the lowest bit of the exponent, where the sign lies.
    """
    lines = constants(0x64806480)
    for step in (0, 1):
        for j in (0, 1):
            for b in (0, 1):
                word, out = f"${8 + 2 * step + j}", f"${step + 2 * (b + 2 * j)}"
                if b:
                    lines.append(f"shr.u32 t0, {word}, 8;")
                    word = "t0"
                if operand == "fp16":
                    lines.append(masked_or("t2", word, 0x00FF00FF, 0x64006400))
                    lines.append(f"sub.f16x2 {out}, t2, t4;")
                else:
                    lines.append(masked_or("t2", word, 0x007F007F, 0x43004300))
                    lines.append(masked_or("t3", word, 0x00800080, 0x43004300))
                    lines.append(f"sub.bf16x2 {out}, t2, t3;")
    placement = tuple(
        32 * j + 8 * b + 16 * h + bit
        for b in (0, 1)
        for j in (0, 1)
        for h in (0, 1)
        for bit in range(8)
    )
    flip = 0x80808080 if operand == "fp16" else 0
    return Code("int8", operand, 8, placement, body(lines), flip=flip)


INT8_BF16, INT8_FP16 = _int8("bf16"), _int8("fp16")


# 16 bits ----------------------------------------------------------------------------------------


def _identity(operand: str) -> Code:
    lines = [f"mov.b32 ${j + 2 * b}, ${4 + 2 * j + b};" for j in (0, 1) for b in (0, 1)]
    return Code(operand, operand, 16, tuple(range(64)), body(lines))


BF16, FP16 = _identity("bf16"), _identity("fp16")


# Pairs of row parameters ------------------------------------------------------------------------


def _pairs(target: Bits, base: int = 0) -> PairCode:
    """Bytes of a word at eight bits of halves, in place and rotated by 8, over those of a base."""
    pieces: Pieces = ((Piece(0, "", 0, target),), (Piece(0, "rot", 8, target),))
    lines = [line for i, p in enumerate(pieces) for line in gather(p, ["$2"], f"${i}", base)]
    places = place(pieces, target, lambda register, half: 2 * register + half)
    return PairCode(body(lines), 2, places)


# Two e8m0 exponents per half: where a bf16 has its exponent.
E8M0_PAIRS = _pairs(tuple(range(7, 15)))
# Or two e5m3: what fp16 has, in the same place, of 128 times an e4m3 that is not negative. As bf16,
# under the highest exponents, that is 2**119 of the e4m3, and what e2m1 needs; but then zero is not
# zero.
E5M3_FP16_PAIRS = E8M0_PAIRS
E5M3_BF16_PAIRS = _pairs(tuple(range(4, 12)), 0x70007000)


def _zeros(base: int) -> PairCode:
    """Zero points z + 8 as nibbles, four pairs per word: base + 8 + z, for int4 to subtract."""
    lines = [masked_or("$0", "$4", 0x000F000F, base)]
    for index in range(1, 4):
        lines.append(f"shr.u32 t0, $4, {4 * index};")
        lines.append(masked_or(f"${index}", "t0", 0x000F000F, base))
    places = tuple(4 * i + 16 * b + bit for i in range(4) for b in (0, 1) for bit in range(4))
    return PairCode(body(lines), 4, places)


# The bf16 scales of a group's two rows, which fit in fp16: see `Storage.many`.
BF16_PAIR = PairCode(
    body(["shl.b32 t0, $1, 16;", "and.b32 t1, $1, 0xffff0000;", "cvt.rn.f16x2.f32 $0, t1, t0;"]),
    1,
    tuple(range(32)),
)
ZERO_BF16_PAIRS, ZERO_FP16_PAIRS = _zeros(0x43004300), _zeros(0x64006400)


# Formats ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """All that the layout and a kernel must know of a weight format as one type of operand.

    code:  of its elements
    scale: "none"; "row": constant along K, multiplies the accumulator at the end; "group" or
           "block": multiplies the product of each group of columns; "fold": multiplies the codes
    group: columns per scale, 0 for all
    pairs: how words of scales become pairs of 16-bit multipliers: in the operand type where scales
           fold, else bf16; None where scales are stored as numbers. A word has those of both
           32-column blocks of a chunk, or one group's
    zeros: how words of zero points become what `code` subtracts
    bias, least: exponents e are stored as e + bias - shift, and e - shift >= least keeps every
           product of a scale and a code exact
    many:  the same bits as operands of fp16, for many tokens per expert: codes of e4m3, which cost
           less to decode, or codes times their scales ("fold"), 11 bits, which bf16 has not. Then
           scales are stored times the power of two, whose inverse is the row_scale, that brings the
           largest of a row to 2**14 .. 2**15; those below 2**-27 of it lose bits
    """

    code: Code
    scale: str = "none"
    group: int = 0
    pairs: PairCode | None = None
    zeros: PairCode | None = None
    bias: int = 0
    least: int = 1
    many: Storage | None = None

    @property
    def scales_sums(self) -> bool:
        """Whether scales multiply sums, group after group."""
        return self.scale in ("group", "block")

    @property
    def scales_twice(self) -> bool:
        """Whether they do so twice in a chunk of 64 columns."""
        return self.scales_sums and self.group == 32

    @property
    def in_units(self) -> bool:
        """Whether sums may be kept in units of the scale at hand.

        Groups of 128 do not fold beside activations with scales for as many columns.
        """
        return self.scales_sums and (not self.folds or self.group == 128)

    @property
    def folds(self) -> bool:
        """Whether scales join codes for many tokens, though not here."""
        return self.many is not None and self.many.scale == "fold"

    @property
    def by_chunk(self) -> bool:
        """Whether a word has the scales of both blocks of a chunk, not those of one group."""
        return self.pairs is not None and self.pairs.registers == 2

    @property
    def scale_chunks(self) -> int:
        """Chunks whose scales lie together: half a super-block's, or all, of blocks."""
        return 4 if self.scale == "block" else 2


_INT4 = {
    ("bf16", False): INT4_BF16,
    ("bf16", True): INT4_BF16_ZERO,
    ("fp16", False): INT4_FP16,
    ("fp16", True): INT4_FP16_ZERO,
}
_INT4_GROUPS = (32, 64, 128, None)
_ZEROS = {"bf16": ZERO_BF16_PAIRS, "fp16": ZERO_FP16_PAIRS}
_OTHERS = {
    (MXFP4, "bf16"): Storage(E2M1_BF16, "fold", 32, E8M0_PAIRS, bias=126, least=-5),
    (MXFP4, "fp16"): Storage(E2M1_FP16, "group", 32, E8M0_PAIRS),
    (NVFP4, "bf16"): Storage(E2M1_BF16_SCALED, "fold", 16, E5M3_BF16_PAIRS),
    (NVFP4, "fp16"): Storage(E2M1_FP16_SCALED, "fold", 16, E5M3_FP16_PAIRS),
    (MXFP8, "bf16"): Storage(E4M3_BF16_SCALED, "fold", 32, E8M0_PAIRS, bias=120, least=3),
    (MXFP8, "fp16"): Storage(E4M3_FP16, "group", 32, E8M0_PAIRS),
}
_BYTES = {
    (FP8, "bf16"): E4M3_BF16,
    (FP8, "fp16"): E4M3_FP16,
    (Int8, "bf16"): INT8_BF16,
    (Int8, "fp16"): INT8_FP16,
}


@lru_cache(maxsize=256)
def storage(fmt: Format, operand: str) -> Storage:
    """How weights in `fmt` are stored for operands "bf16" or "fp16"."""
    kind, (rows, group) = type(fmt), fmt.block
    if isinstance(fmt, Float) and fmt.name == operand:
        return Storage({"bf16": BF16, "fp16": FP16}[operand])
    if (kind, operand) in _OTHERS:
        return _OTHERS[kind, operand]  # type: ignore[index]
    where = "row" if group is None else "group" if rows == 1 else "block"
    if isinstance(fmt, Int4) and (operand, fmt.zero_point) in _INT4 and group in _INT4_GROUPS:
        zeros = _ZEROS[operand] if fmt.zero_point else None
        many = None
        if group in (32, 64, 128) and not fmt.zero_point and fmt.scale == "bfloat16":
            many = Storage(INT4_FP16_SCALED, "fold", group, BF16_PAIR)
        code = _INT4[operand, fmt.zero_point]
        return Storage(code, where, group or 0, zeros=zeros, many=many)
    if (kind, operand) in _BYTES:
        code = _BYTES[kind, operand]  # type: ignore[index]
        many = Storage(E4M3_FP16, where, group or 0) if code == E4M3_BF16 else None
        return Storage(code, where, group or 0, many=many)
    raise UnsupportedError(f"the Hopper layout has no {fmt.name} weights as {operand} operands")
