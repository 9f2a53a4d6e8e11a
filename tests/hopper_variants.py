"""Variants of the Hopper GEMM for many tokens that sizes choose, by what they are good for."""

from __future__ import annotations

from moelten.kernels.hopper_codes import Storage
from moelten.kernels.hopper_schedule import WideVariant, narrow_variant


def slim_variant(stored: Storage, scale_type: str) -> WideVariant:
    """For few tokens of few rows."""
    return narrow_variant(stored, scale_type, tiles=4)


def tall_variant(stored: Storage, scale_type: str) -> WideVariant:
    """For more tokens of few rows."""
    return narrow_variant(stored, scale_type, 96, 4)
