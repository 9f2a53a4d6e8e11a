"""Byte order of 4-bit codes: ours, and the others that checkpoints use.

Canonical: uint8 [..., N, K/2], low nibble = even k, int4 in two's complement. Each foreign order is
one `from_*` into canonical codes or bytes and its inverse. These functions move bits; they never
round, and scales are not their business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelten.errors import FormatError

# Nibble i of an AWQ word holds this output column of its eight.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes [..., K] (low 4 bits used) into uint8 [..., K/2], low nibble = even k.

    >>> pack_nibbles(torch.tensor([-8, -7, 6, 7])).tolist()
    [152, 118]
    """
    if codes.shape[-1] % 2:
        raise FormatError(f"4-bit codes are packed in pairs, got an odd length {codes.shape[-1]}")
    nibbles = (codes & 0xF).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unsigned codes 0..15 (uint8 [..., K]) of packed bytes [..., K/2]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def sign_extend(nibbles: Tensor) -> Tensor:
    """Two's complement value (int8, -8..7) of codes 0..15."""
    return ((nibbles ^ 8).to(torch.int8)) - 8


def flip_offset(packed: Tensor) -> Tensor:
    """Swap offset-8 and two's complement in packed bytes; its own inverse."""
    return packed ^ 0x88


def words_to_bytes(words: Tensor) -> Tensor:
    """int32 words [..., K/8] (nibble i = element 8w + i) to bytes [..., K/2]."""
    # Flat first: a size-1 axis may carry a stride that passes for contiguous and forbids the view.
    return words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])


def bytes_to_words(packed: Tensor) -> Tensor:
    """Inverse of `words_to_bytes`; K must be a multiple of 8."""
    if packed.shape[-1] % 4:
        raise FormatError(f"int32 words hold 8 codes, got K={2 * packed.shape[-1]}")
    return packed.reshape(-1).view(torch.int32).view(*packed.shape[:-1], packed.shape[-1] // 4)


def from_offset_words(words: Tensor) -> Tensor:
    """compressed-tensors int4 (offset-8 int32 words along K) to canonical bytes.

    >>> words = torch.tensor([0x76543210], dtype=torch.int32)
    >>> from_offset_words(words).tolist()
    [152, 186, 220, 254]
    """
    return flip_offset(words_to_bytes(words))


def to_offset_words(packed: Tensor) -> Tensor:
    """Inverse of `from_offset_words`."""
    return bytes_to_words(flip_offset(packed))


def unpack_words(words: Tensor, dim: int) -> Tensor:
    """Codes 0..15 (uint8) of int32 words packed along `dim`, nibble i = element 8w + i of it."""
    moved = words.movedim(dim, -1)
    return unpack_nibbles(words_to_bytes(moved)).movedim(-1, dim)


def pack_words(codes: Tensor, dim: int) -> Tensor:
    """Inverse of `unpack_words`."""
    return bytes_to_words(pack_nibbles(codes.movedim(dim, -1))).movedim(-1, dim)


def from_gptq(qweight: Tensor) -> Tensor:
    """GPTQ qweight int32 [K/8, N] (unsigned) to canonical two's complement bytes [N, K/2].

    Zero points must move by the same 8; `unpack_words(qzeros, 1)` holds them minus one in v1.
    """
    return flip_offset(pack_nibbles(unpack_words(qweight, 0).T))


def to_gptq(packed: Tensor) -> Tensor:
    """Inverse of `from_gptq`."""
    return pack_words(unpack_nibbles(flip_offset(packed)).T, 0)


def unpack_awq(words: Tensor) -> Tensor:
    """Codes 0..15 (uint8 [R, N]) of AWQ int32 words [R, N/8] packed along the output columns."""
    nibbles = unpack_nibbles(words_to_bytes(words))
    groups = nibbles.view(*nibbles.shape[:-1], -1, 8)
    order = torch.tensor(AWQ_COLUMNS, device=words.device).argsort()
    return groups[..., order].flatten(-2)


def pack_awq(codes: Tensor) -> Tensor:
    """Inverse of `unpack_awq`."""
    groups = codes.view(*codes.shape[:-1], -1, 8)
    order = torch.tensor(AWQ_COLUMNS, device=codes.device)
    return bytes_to_words(pack_nibbles(groups[..., order].flatten(-2)))


def from_awq(qweight: Tensor) -> Tensor:
    """AWQ qweight int32 [K, N/8] (unsigned) to canonical two's complement bytes [N, K/2]."""
    return flip_offset(pack_nibbles(unpack_awq(qweight).T))


def to_awq(packed: Tensor) -> Tensor:
    """Inverse of `from_awq`."""
    return pack_awq(unpack_nibbles(flip_offset(packed)).T.contiguous())


def from_row_pairs(packed: Tensor) -> Tensor:
    """ModelOpt int4 uint8 [N/2, K] (pairs of output rows, low nibble = even row) to canonical."""
    return pack_nibbles(unpack_nibbles(packed.mT).mT)


def to_row_pairs(packed: Tensor) -> Tensor:
    """Inverse of `from_row_pairs`."""
    return pack_nibbles(unpack_nibbles(packed).mT).mT.contiguous()
