"""GPTQ and AWQ: 4-bit codes 0..15 in int32 words, transposed to [K, N].

GPTQ packs eight k of one output column, AWQ eight output columns of one k in an order of its own;
both pack zero points along N. GPTQ v1 stores zero points minus one. `desc_act` shuffles which group
a column of K belongs to, in its own way for every expert: only the natural order is loaded.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from moelten import packing
from moelten.checkpoints.blocks import PLAIN, is_ignored
from moelten.checkpoints.config import Recipe, Settings
from moelten.checkpoints.projection import SCALE_NAMES, Projection
from moelten.errors import CheckpointError, UnsupportedError
from moelten.formats import Int4
from moelten.qtensor import QTensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def gptq_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """quant_method "gptq", with GPTQModel's `dynamic` overrides by module."""
    config = settings.quantization
    if is_ignored(settings, module):
        return PLAIN
    for pattern, override in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            if pattern.startswith("-:"):
                return PLAIN
            config = {**config, **override}
            break
    form = str(config.get("checkpoint_format") or "gptq")
    if form not in ("gptq", "gptq_v2") or config.get("bits") != 4:
        raise UnsupportedError(
            f"GPTQ checkpoint_format {form!r} of {config.get('bits')} bits is not supported; "
            "supported: gptq and gptq_v2, 4 bits"
        )
    group = int(settings.require("group_size", config))
    return Recipe(
        form,
        "gptq",
        None,
        None if group == -1 else group,
        not settings.require("sym", config),
        stored_zero=1 if form == "gptq" else 0,
    )


def awq_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """quant_method "awq" in AutoAWQ's gemm layout."""
    config = settings.quantization
    if is_ignored(settings, module):
        return PLAIN
    version = str(config.get("version", "gemm")).lower()
    bits = config.get("bits", config.get("w_bit"))
    if version != "gemm" or bits != 4 or not config.get("zero_point", True):
        raise UnsupportedError(
            f"AWQ version {version!r} of {bits} bits with zero_point={config.get('zero_point')} is "
            "not supported; supported: gemm, 4 bits, with zero points"
        )
    sources: tuple[dict[str, Any], ...] = (config, {"group_size": config.get("q_group_size")})
    group = int(settings.require("group_size", *sources))
    return Recipe("awq gemm", "awq", None, None if group == -1 else group, True)


def gptq(p: Projection, recipe: Recipe) -> QTensor:
    """qweight int32 [K/8, N], qzeros int32 [K/g, N/8], scales [K/g, N], g_idx int32 [K]."""
    words = p.read("qweight", (torch.int32,), None, None)
    columns, rows = 8 * words.shape[0], words.shape[1]
    scale, stored = _groups(p, recipe, rows, columns)
    _check_order(p, recipe, columns)
    zeros = packing.unpack_words(stored, 1).T.to(torch.int8) + recipe.stored_zero
    if not zeros.is_meta:
        _check_zeros(p, recipe, zeros)
    fmt = Int4(recipe.group_size, recipe.zero_point, SCALE_NAMES[scale.dtype])
    zero = (zeros - 8).contiguous() if recipe.zero_point else None
    return QTensor(packing.from_gptq(words), fmt, scale, zero)


def awq(p: Projection, recipe: Recipe) -> QTensor:
    """qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales [K/g, N]."""
    words = p.read("qweight", (torch.int32,), None, None)
    columns, rows = words.shape[0], 8 * words.shape[1]
    scale, stored = _groups(p, recipe, rows, columns)
    zero = (packing.unpack_awq(stored).T.to(torch.int8) - 8).contiguous()
    fmt = Int4(recipe.group_size, True, SCALE_NAMES[scale.dtype])
    return QTensor(packing.from_awq(words), fmt, scale, zero)


def _groups(p: Projection, recipe: Recipe, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Scales as [N, K/g], and the packed zero points [K/g, N/8]."""
    plain = Int4(recipe.group_size)
    plain.check_columns(columns, p.describe("qweight"))
    groups = plain.scale_shape(rows, columns)[1]
    scale = p.read("scales", _FLOATS, groups, rows).T.contiguous()
    if rows % 8:
        raise CheckpointError(f"{p.describe('qweight')}: zero points pack 8 rows, got N={rows}")
    return scale, p.read("qzeros", (torch.int32,), groups, rows // 8)


def _check_order(p: Projection, recipe: Recipe, columns: int) -> None:
    if "g_idx" not in p:
        return
    order = p.read("g_idx", (torch.int32, torch.int64), columns)
    natural = torch.arange(columns) // (recipe.group_size or columns)
    if not order.is_meta and not torch.equal(order.long(), natural):
        raise UnsupportedError(
            f"{p.describe('g_idx')}: groups are not in the order of K (desc_act=True); every "
            "expert would need its own permutation; requantize with desc_act=False"
        )


def _check_zeros(p: Projection, recipe: Recipe, zeros: Tensor) -> None:
    low, high = int(zeros.min()), int(zeros.max())
    if not recipe.zero_point and (low, high) != (8, 8):
        raise CheckpointError(
            f"{p.describe('qzeros')}: the configuration says sym=True, which is zero point 8, got "
            f"{low}..{high}; is checkpoint_format right?"
        )
    if high > 15:
        raise CheckpointError(
            f"{p.describe('qzeros')}: zero point 16 does not fit 4 bits, its writer overflowed; "
            "export as gptq_v2"
        )
