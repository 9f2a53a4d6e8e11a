"""NVIDIA ModelOpt: one algorithm for the model, or a table of them by layer (MIXED_PRECISION).

Its int4 packs pairs of output rows. AWQ's pre_quant_scale multiplies activations and stays beside
the weights. W4A8_AWQ's weight_scale_2 is no factor of the weights: weight_scale is amax/7 of the
real ones, and kernels that divide it by weight_scale_2 to fit fp8 multiply it back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moelten import packing
from moelten.checkpoints.blocks import PLAIN, w4afp8_recipe
from moelten.checkpoints.config import Recipe, Settings, matches_wildcard, module_names
from moelten.checkpoints.projection import BYTES, FLOATS, SCALE_NAMES, Projection
from moelten.errors import CheckpointError, UnsupportedError
from moelten.formats import FP8_ROW, FP8_TENSOR, MXFP8, NVFP4, Int4
from moelten.qtensor import QTensor

_TABLE: dict[str, Callable[[int], Recipe]] = {
    "NVFP4": lambda group: Recipe("modelopt nvfp4", "nvfp4", NVFP4()),
    "NVFP4_AWQ": lambda group: Recipe("modelopt nvfp4 awq", "nvfp4", NVFP4()),
    "W4A16_NVFP4": lambda group: Recipe("modelopt nvfp4 weight-only", "nvfp4"),
    "W4A8_MXFP4_FP8": lambda group: Recipe("modelopt mxfp4 fp8", "mxfp4", FP8_TENSOR),
    "MXFP4": lambda group: Recipe("modelopt mxfp4", "mxfp4"),
    "MXFP8": lambda group: Recipe("modelopt mxfp8", "mxfp8", MXFP8()),
    "FP8": lambda group: Recipe("modelopt fp8 tensor", "fp8", FP8_TENSOR, blocks=(None, None)),
    "FP8_PER_CHANNEL_PER_TOKEN": lambda group: Recipe("modelopt fp8 channel", "fp8", FP8_ROW),
    "FP8_PB_WO": lambda group: Recipe("modelopt fp8 block", "fp8", blocks=(128, 128)),
    "W4A16_AWQ": lambda group: Recipe("modelopt int4 awq", "row-pair int4", None, group),
    "INT4_AWQ": lambda group: Recipe("modelopt int4 awq", "row-pair int4", None, group),
    "W4A8_AWQ": lambda group: Recipe("modelopt w4a8 awq", "row-pair int4", FP8_TENSOR, group),
}
# Formats whose group size is part of their definition, and those that must be told.
_GROUPS = {"NVFP4": 16, "NVFP4_AWQ": 16, "W4A16_NVFP4": 16}
_GROUPS |= {"MXFP4": 32, "W4A8_MXFP4_FP8": 32, "MXFP8": 32, "FP8_PB_WO": 128}
_INT4 = ("W4A16_AWQ", "INT4_AWQ", "W4A8_AWQ")


def find_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """The recipe of one expert's module: excluded, by its layer's algorithm, or by the model's."""
    config = settings.quantization
    excluded = [*(config.get("exclude_modules") or ()), *(config.get("ignore") or ())]
    if matches_wildcard(module, excluded):
        return PLAIN
    algorithm = str(settings.require("quant_algo")).upper()
    if algorithm == "MIXED_PRECISION":
        # TensorRT-LLM's W4AFP8 script marks its checkpoints so; nothing else names int4 scales so.
        if {"weight_scale_inv", "input_scale"} <= suffixes:
            return w4afp8_recipe(settings, module, suffixes)
        own = _find_layer(settings, module)
        if own is None:
            return PLAIN
        config, algorithm = own, str(own.get("quant_algo")).upper()
    if algorithm not in _TABLE:
        raise UnsupportedError(
            f"ModelOpt {algorithm} is not supported; supported: {', '.join(_TABLE)}"
        )
    return _TABLE[algorithm](_group_size(settings, config, algorithm))


def _find_layer(settings: Settings, module: str) -> dict[str, Any] | None:
    """A module's own entry, or that of a module around it (a whole layer's experts) or inside."""
    table = settings.quantization.get("quantized_layers")
    if not isinstance(table, dict):
        raise CheckpointError(
            "ModelOpt MIXED_PRECISION has no quantized_layers, neither in the configuration nor "
            "in quant_cfg.json"
        )
    names = module_names(module)
    for key, entry in table.items():
        if key in names or any(name.startswith(f"{key}.") for name in names):
            return dict(entry)
    return None


def _group_size(settings: Settings, config: dict[str, Any], algorithm: str) -> int:
    """The group size that the configuration declares; a fixed one may be left out, not changed."""
    groups = [g.get("weights") or {} for g in (config.get("config_groups") or {}).values()]
    if algorithm in _INT4:
        return int(settings.require("group_size", config, *groups))
    fixed = _GROUPS.get(algorithm, 0)
    for source in (config, *groups):
        declared = source.get("group_size")
        if declared and int(declared) != fixed:
            raise UnsupportedError(f"ModelOpt {algorithm} has groups of {fixed}, got {declared}")
    return fixed


def row_pair_int4(p: Projection, recipe: Recipe) -> QTensor:
    """weight uint8 [N/2, K] (low nibble: even row, two's complement), weight_scale [N, K/g]."""
    pairs = p.read("weight", BYTES, None, None).view(torch.uint8)
    rows, columns = 2 * pairs.shape[0], pairs.shape[1]
    plain = Int4(recipe.group_size)
    plain.check_columns(columns, p.describe("weight"))
    scale = p.read_scale("weight_scale", FLOATS, plain.scale_shape(rows, columns))
    p.skip("weight_scale_2")
    fmt = Int4(recipe.group_size, scale=SCALE_NAMES[scale.dtype])
    return QTensor(packing.from_row_pairs(pairs), fmt, scale)
