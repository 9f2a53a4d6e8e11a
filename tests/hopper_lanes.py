"""What the lanes of a Hopper kernel read: packed tensors to operand values, by the book.

Written from the PTX ISA's picture of m16n8k16 and from how a lane loads its activations, not from
the packer: offsets are those of a kernel's pointers, bit moves are the kernel's own PTX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests import ptx

LANE = torch.arange(32)
G, T = LANE // 4, LANE % 4


def words(part: Tensor) -> Tensor:
    """32-bit patterns of a packed tensor, as int64."""
    return part.reshape(-1).view(torch.int32).long() & ptx.MASK


def fragment_row(warp: int, b: int) -> Tensor:
    """Row within its 64 of a lane's registers a0, a2 (b = 0) or a1, a3 (b = 1)."""
    return 16 * warp + G + 8 * b


def activation_column(step: int, j: int, h: int) -> Tensor:
    """Column within 32 that a lane's activation register for B fragment (step, j) holds in half h.

    A lane loads 16 bytes, columns 8 t .. 8 t + 7, as four registers; step s takes two of them.
    """
    register = 2 * step + j
    return 8 * T + 2 * register + h


def load(part: Tensor, tile: int, chunk: int, nth: int, warp: int) -> list[Tensor]:
    """The four words of every lane's 16-byte load: part int32 [tiles, chunks, loads, 4, 32, 4]."""
    _, chunks, loads = part.shape[:3]
    base = (((tile * chunks + chunk) * loads + nth) * 4 + warp) * 128
    flat = words(part)
    return [flat[base + 4 * LANE + i] for i in range(4)]
