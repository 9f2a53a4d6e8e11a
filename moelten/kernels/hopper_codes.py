"""Codes of the Hopper layout: where each bit of a code is stored, and the PTX that reads it.

A `Code` says how weights of one kind become operands of one type in a lane's registers. The bits
are stored where the fewest instructions find them, so placement and PTX are two views of one thing
and are built here side by side, from the same lists of pieces.

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

    e2m1, e4m3   the bits of a code, in the place of the number's own low exponent and high mantissa
                 bits, are that number times a power of two, subnormals included; one multiplication
                 undoes the power, and applies the scale where the product is exact ("fold")
    int4, int8   the bits of q + 8 or q + 128 in the low mantissa of 128.0 (bf16) or 1024.0 (fp16)
                 are that much plus q; one subtraction leaves q, or q - zero

Every step is exact. What remains to be multiplied to the accumulator is `epilogue`, a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

Bits = tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """One kind of code as one type of operand.

    name, operand: such as "e2m1" and "bf16"
    bits:      of a stored code
    placement: bit of the two words (A: 0..31, B: 32..63) for each bit of a unit in canonical order
    ptx:       outputs $0.. (`registers`), then the load's four words, then if `pair` four copies of
               its argument (4-bit codes: two for each of the two 32-column chunks)
    pair:      "": none; "scale": 16-bit multipliers of rows (b = 0, b = 1); "zero": what to
               subtract from each row, in the same form
    flip:      32-bit pattern that is XORed to a canonical word before its bits are placed
    epilogue:  what remains of the powers of two; multiplies the accumulator
    """

    name: str
    operand: str
    bits: int
    placement: Bits
    ptx: str
    pair: str = ""
    flip: int = 0
    epilogue: float = 1.0

    @property
    def registers(self) -> int:
        return 64 // self.bits

    @property
    def constraints(self) -> str:
        """The constraint string of the inline assembly."""
        inputs = 8 if self.pair else 4
        return ",".join(["=r"] * self.registers + ["r"] * inputs)


@dataclass(frozen=True)
class PairCode:
    """How a word of row parameters becomes registers of pairs (halves: b = 0, 1).

    ptx:       outputs $0.. (`registers`), then one word
    registers: pairs per word, ascending along K
    """

    ptx: str
    registers: int

    @property
    def constraints(self) -> str:
        return ",".join(["=r"] * self.registers + ["r"])


@dataclass(frozen=True)
class Piece:
    """Some bits of a register: `bits` of each half, found in `word` after a move.

    word: 0 (A), 1 (B) or 2: the parts of A and B that no other register uses, merged
    move: "", "rot" (rotate the 32-bit word right) or "shl", by `by`
    """

    word: int
    move: str
    by: int
    bits: Bits

    def source(self, bit: int) -> int:
        """Bit of the stored word that the move brings to `bit`."""
        return bit - self.by if self.move == "shl" else (bit + self.by) % 32

    @property
    def mask(self) -> int:
        return sum(0x10001 << bit for bit in self.bits)


Pieces = tuple[tuple[Piece, ...], ...]

_LANE = "lop3.b32 {}, {}, {:#010x}, {}, 0xEA;"  # (x & mask) | y
_MERGE = "lop3.b32 {}, {}, {}, {:#010x}, 0xE4;"  # (x & mask) | (y & ~mask)


def _gather(pieces: tuple[Piece, ...], words: list[str], out: str) -> list[str]:
    """PTX that gathers the pieces of one register into `out`; t0 is scratch."""
    lines = []
    for index, piece in enumerate(pieces):
        word = words[piece.word]
        if piece.move == "rot":
            lines.append(f"shf.r.wrap.b32 t0, {word}, {word}, {piece.by};")
        elif piece.move:
            lines.append(f"{piece.move}.b32 t0, {word}, {piece.by};")
        moved = "t0" if piece.move else word
        if index:
            lines.append(_LANE.format(out, moved, piece.mask, out))
        else:
            lines.append(f"and.b32 {out}, {moved}, {piece.mask:#010x};")
    return lines


def _place(registers: Pieces, target: Bits, order: Bits, shared: int = 0) -> Bits:
    """Placement of 4- or 8-bit codes whose bit p belongs at target[p] of a half.

    registers: their pieces; register i holds (b, j, s) = the bits of i from the lowest (8-bit
               codes have no s: their unit is one step)
    order:     register index of each entry of `registers`
    shared:    bits of A that belong to word 2; those of B are the others
    """
    width = len(target)
    table = [-1] * 64
    for entry, pieces in zip(order, registers, strict=True):
        b, column = entry & 1, entry >> 1
        for half in (0, 1):
            for bit, to in enumerate(target):
                piece = next(p for p in pieces if to in p.bits)
                at = piece.source(to + 16 * half)
                word = piece.word if piece.word < 2 else 1 - (shared >> at & 1)
                table[32 * b + width * (2 * column + half) + bit] = 32 * word + at
    assert sorted(table) == list(range(64)), "every bit has a place of its own"
    return tuple(table)


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join([".reg .b32 t<8>;", ".reg .b16 h<2>;", *lines]) + "\n}"


def _spread(pair: str) -> list[str]:
    """t4 and t5: both halves of a pair, each in both halves of a register (free in SASS)."""
    return [f"mov.b32 {{h0, h1}}, {pair};", "mov.b32 t4, {h0, h0};", "mov.b32 t5, {h1, h1};"]


# e2m1 as bf16: sign at bit 15, exponent at 8 and 7, mantissa at 6; that is the value * 2**-126.
# Eight registers from two words in 16 integer instructions: three disjoint rotations of the mask in
# A, three in B, and the twice four bits per half that remain make one more word, with two.
_E2M1_BF16: Bits = (6, 7, 8, 15)
_E2M1_SHARED = 0xC180C180
_E2M1_PIECES: Pieces = tuple(
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


def _e2m1_bf16() -> Code:
    lines = []
    for chunk in (0, 1):
        words = [f"${16 + 2 * chunk}", f"${17 + 2 * chunk}", "t1"]
        lines += [_MERGE.format("t1", words[0], words[1], _E2M1_SHARED)]
        lines += _spread(f"${20 + 2 * chunk}")
        for index, pieces in enumerate(_E2M1_PIECES):
            lines += _gather(pieces, words, "t2")
            lines.append(f"mul.bf16x2 ${chunk + 2 * index}, t2, t{4 + (index & 1)};")
    placement = _place(_E2M1_PIECES, _E2M1_BF16, tuple(range(8)), _E2M1_SHARED)
    return Code("e2m1", "bf16", 4, placement, _block(lines), "scale")


E2M1_BF16 = _e2m1_bf16()

# Two e8m0 exponents per half: where a bf16 has its exponent, and rotated by 8.
E8M0_PAIRS = PairCode(
    _block(
        [
            "and.b32 $0, $2, 0x7f807f80;",
            "shf.r.wrap.b32 t0, $2, $2, 8;",
            "and.b32 $1, t0, 0x7f807f80;",
        ]
    ),
    2,
)
