"""Weights without quantization: bf16, fp16 or fp32, taken as they are."""

from __future__ import annotations

from moelten.checkpoints.config import Recipe
from moelten.checkpoints.projection import FLOATS, SCALE_NAMES, Projection
from moelten.formats import Float
from moelten.qtensor import QTensor


def plain(p: Projection, recipe: Recipe) -> QTensor:
    """weight [N, K]."""
    weight = p.read("weight", FLOATS, None, None)
    return QTensor(weight, Float(SCALE_NAMES[weight.dtype]))
