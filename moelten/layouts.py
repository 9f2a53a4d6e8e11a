"""Layouts of scale factors: linear, and the two swizzled orders that tensor cores read.

A layout maps a [..., M, S] array of scale bytes (M rows, S groups along K) to a flat one and back.
Rows are padded to the tile (128 or 8) and groups to 4, with zero bytes. Weight layouts of kernels
are not here: each lives beside the kernel that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moelten.errors import FormatError

# Rows that a layout's tiles span: rows are padded to a multiple. "linear" pads nothing.
ROW_TILES = {"linear": 1, "128x4": 128, "8x4": 8}


def swizzle(scale: Tensor, layout: str) -> Tensor:
    """[..., M, S] in one of `ROW_TILES`' layouts: as it is, or flat per matrix.

    >>> swizzle(torch.ones(9, 5), "8x4").shape
    torch.Size([128])
    """
    if layout == "linear":
        return scale
    return swizzle_128x4(scale) if layout == "128x4" else swizzle_8x4(scale)


def unswizzle(scale: Tensor, rows: int, groups: int, layout: str) -> Tensor:
    """Inverse of `swizzle`: [..., rows, groups]."""
    if layout == "linear":
        return scale
    inverse = unswizzle_128x4 if layout == "128x4" else unswizzle_8x4
    return inverse(scale, rows, groups)


def swizzled_size(rows: int, groups: int, layout: str) -> int:
    """Elements of one matrix's scales in a layout, padding included.

    >>> [swizzled_size(9, 5, layout) for layout in ROW_TILES]
    [45, 1024, 128]
    """
    tile = ROW_TILES[layout]
    return rows * groups if tile == 1 else -(-rows // tile) * tile * (-(-groups // 4) * 4)


def swizzle_128x4(scale: Tensor) -> Tensor:
    """[..., M, S] to tiles of 128 rows x 4 groups, 512 elements each, flattened per matrix.

    offset(m, s) = (m//128)*ceil(S/4)*512 + (s//4)*512 + (m%32)*16 + ((m%128)//32)*4 + s%4
    """
    tiles = _padded(scale, 128)
    *batch, rows, groups = tiles.shape
    tiles = tiles.view(*batch, rows // 128, 4, 32, groups // 4, 4)
    return _permute_tail(tiles, (0, 3, 2, 1, 4)).reshape(*batch, rows * groups)


def unswizzle_128x4(flat: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of `swizzle_128x4` for an M = rows, S = groups array."""
    tiles = _tiles(flat, rows, groups, 128)
    *batch, _ = flat.shape
    padded_rows, padded_groups = tiles
    out = flat.view(*batch, padded_rows // 128, padded_groups // 4, 32, 4, 4)
    out = _permute_tail(out, (0, 3, 2, 1, 4)).reshape(*batch, padded_rows, padded_groups)
    return out[..., :rows, :groups].contiguous()


def swizzle_8x4(scale: Tensor) -> Tensor:
    """[..., M, S] to tiles of 8 rows x 4 groups, 32 elements each, flattened per matrix.

    offset(m, s) = (m//8)*ceil(S/4)*32 + (s//4)*32 + (m%8)*4 + s%4
    """
    tiles = _padded(scale, 8)
    *batch, rows, groups = tiles.shape
    tiles = tiles.view(*batch, rows // 8, 8, groups // 4, 4)
    return _permute_tail(tiles, (0, 2, 1, 3)).reshape(*batch, rows * groups)


def unswizzle_8x4(flat: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of `swizzle_8x4` for an M = rows, S = groups array."""
    padded_rows, padded_groups = _tiles(flat, rows, groups, 8)
    *batch, _ = flat.shape
    out = flat.view(*batch, padded_rows // 8, padded_groups // 4, 8, 4)
    out = _permute_tail(out, (0, 2, 1, 3)).reshape(*batch, padded_rows, padded_groups)
    return out[..., :rows, :groups].contiguous()


def _padded(scale: Tensor, row_tile: int) -> Tensor:
    """Zero-padded copy as bytes-compatible elements (float8 has no pad of its own)."""
    if scale.dim() < 2:
        raise FormatError(f"scales: expected [..., M, S], got shape {tuple(scale.shape)}")
    raw = scale.contiguous().view(torch.uint8) if scale.element_size() == 1 else scale
    rows, groups = raw.shape[-2:]
    return pad(raw, (0, -groups % 4, 0, -rows % row_tile)).view(scale.dtype)


def _tiles(flat: Tensor, rows: int, groups: int, row_tile: int) -> tuple[int, int]:
    padded = rows + -rows % row_tile, groups + -groups % 4
    if flat.shape[-1] != padded[0] * padded[1]:
        raise FormatError(
            f"swizzled scales of M={rows}, S={groups} have {padded[0] * padded[1]} elements "
            f"(rows padded to {row_tile}, groups to 4), got {flat.shape[-1]}"
        )
    return padded


def _permute_tail(x: Tensor, order: tuple[int, ...]) -> Tensor:
    batch = x.dim() - len(order)
    return x.permute(*range(batch), *(batch + i for i in order))
