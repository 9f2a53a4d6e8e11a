"""How the bits of packed codes are described, placed and gathered: the machinery of `hopper_codes`.

A `Code` says how weights of one kind become operands of one type in a lane's registers. The bits
are stored where the fewest instructions find them, so placement and PTX are two views of one thing
and are built side by side, from the same pieces: `place` says where a piece's bits are stored,
`gather` writes the instructions that bring them where they belong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Bits = tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """One kind of code as one type of operand.

    name, operand: such as "e2m1" and "bf16"
    bits:      of a stored code
    placement: bit of the two words (A: 0..31, B: 32..63) for each bit of a unit in canonical order
    ptx:       outputs $0.. (`registers`), then the load's four words, then if `pair` four copies of
               its argument (4-bit codes: two for each of the two 32-column blocks)
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
    placement: bit of the word for each bit of its parameters in canonical order: pair, b
    """

    ptx: str
    registers: int
    placement: Bits

    @property
    def constraints(self) -> str:
        return ",".join(["=r"] * self.registers + ["r"])


@dataclass(frozen=True)
class Piece:
    """Some bits of a register: `bits` of each of its elements, found in `word` after a move.

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
        return sum(1 << bit + at for bit in self.bits for at in (0, 16))


Pieces = tuple[tuple[Piece, ...], ...]


def gather(pieces: tuple[Piece, ...], words: list[str], out: str, base: int = 0) -> list[str]:
    """PTX that gathers the pieces of one register, over a base, into `out`; t0 is scratch."""
    lines = []
    for index, piece in enumerate(pieces):
        word = words[piece.word]
        if piece.move == "rot":
            lines.append(f"shf.r.wrap.b32 t0, {word}, {word}, {piece.by};")
        elif piece.move:
            lines.append(f"{piece.move}.b32 t0, {word}, {piece.by};")
        moved = "t0" if piece.move else word
        if index or base:
            lines.append(masked_or(out, moved, piece.mask, out if index else base))
        else:
            lines.append(f"and.b32 {out}, {moved}, {piece.mask:#010x};")
    return lines


def masked_or(out: str, x: str, mask: int, y: int | str) -> str:
    """(x & mask) | y"""
    return f"lop3.b32 {out}, {x}, {mask:#010x}, {y if isinstance(y, str) else hex(y)}, 0xEA;"


def merge(out: str, x: str, y: str, mask: int) -> str:
    """(x & mask) | (y & ~mask)"""
    return f"lop3.b32 {out}, {x}, {y}, {mask:#010x}, 0xE4;"


def place(
    registers: Pieces, target: Bits, index: Callable[[int, int], int], shared: int = 0
) -> Bits:
    """Placement of codes whose bit p belongs at target[p] of an element.

    index:  (register, element within it) to the number of the code in canonical order
    shared: bits of A that belong to word 2; those of B are the others
    """
    width = len(target)
    places = {}
    for register, pieces in enumerate(registers):
        for element in (0, 1):
            for bit, to in enumerate(target):
                piece = next(p for p in pieces if to in p.bits)
                at = piece.source(to + 16 * element)
                word = piece.word if piece.word < 2 else 1 - (shared >> at & 1)
                places[width * index(register, element) + bit] = 32 * word + at
    assert sorted(places) == sorted(places.values()), "every bit has a place of its own"
    return tuple(places[bit] for bit in range(len(places)))


def unit_index(bits: int) -> Callable[[int, int], int]:
    """Code number in a unit for registers counted b + 2 * (j + 2 * s): `hopper_layout.K_ORDER`."""
    return lambda register, element: 32 // bits * (register & 1) + 2 * (register >> 1) + element


def body(lines: list[str]) -> str:
    return "{\n" + "\n".join([".reg .b32 t<8>;", ".reg .b16 h<4>;", *lines]) + "\n}"


def spread(pair: str, low: str = "t4", high: str = "t5") -> list[str]:
    """Both halves of a pair, each in both halves of a register (free in SASS)."""
    first = f"mov.b32 {{h0, h1}}, {pair};"
    return [first, f"mov.b32 {low}, {{h0, h0}};", f"mov.b32 {high}, {{h1, h1}};"]


def constants(word: int) -> list[str]:
    """t4 and t5: one constant for both rows."""
    return [f"mov.b32 t4, {word:#010x};", f"mov.b32 t5, {word:#010x};"]


def multiply(pieces: Pieces, operand: str, factor: int | None, shared: int = 0) -> str:
    """PTX of a code that is gathered and multiplied by `factor`, or by its row's scale if None.

    One unit has len(pieces) registers, a load two; a pair serves a unit (4-bit) or the load.
    """
    kind, total = {"bf16": "bf16x2", "fp16": "f16x2"}[operand], 2 * len(pieces)
    lines = [] if factor is None else constants(factor)
    for unit in (0, 1):
        words = [f"${total + 2 * unit}", f"${total + 2 * unit + 1}", "t1"]
        if shared:
            lines.append(merge("t1", words[0], words[1], shared))
        if factor is None:
            lines += spread(f"${total + 4 + (2 * unit if total == 16 else 0)}")
        for index, parts in enumerate(pieces):
            lines += gather(parts, words, "t2")
            lines.append(f"mul.{kind} ${unit + 2 * index}, t2, t{4 + (index & 1)};")
    return body(lines)
