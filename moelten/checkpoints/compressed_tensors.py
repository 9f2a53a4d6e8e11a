"""compressed-tensors (llm-compressor, Kimi-K2): config groups, and its integer layouts.

The group whose targets match an expert's module decides; `ignore` leaves a module plain. int4 is
stored offset by 8 in int32 words along K, zero points likewise but along N ("pack-quantized"), or
one code in an int8 ("int-quantized", which W4A8 presets write). NVFP4's global scale divides; the
other layouts are those of `blocks` and `microscaling`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from moelten import packing
from moelten.checkpoints.config import Recipe, Settings, module_names
from moelten.checkpoints.projection import FLOATS, SCALE_NAMES, Projection
from moelten.errors import CheckpointError, FormatError, UnsupportedError
from moelten.formats import (
    FP8_GROUP,
    FP8_ROW,
    FP8_TENSOR,
    INT8_GROUP,
    INT8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    Block,
    Format,
    Int4,
)
from moelten.qtensor import QTensor

_NAIVE = ("int-quantized", "float-quantized", "naive-quantized")
_STRATEGY_BLOCKS: dict[str, Block] = {
    "tensor": (None, None),
    "channel": (1, None),
    "block": (128, 128),
}


def find_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """The recipe of one expert's module, from the group of the configuration that targets it."""
    config = settings.quantization
    names = module_names(module)
    if any(_matches(names, pattern) for pattern in config.get("ignore") or ()):
        return Recipe("", "plain")
    group = _find_group(config, names)
    if group is None or not group.get("weights"):
        return Recipe("", "plain")
    _refuse_sparsity(config)
    layout = str(group.get("format") or config.get("format"))
    weights = group["weights"]
    if str(weights.get("actorder")).lower() in ("group", "dynamic", "true"):
        raise UnsupportedError(
            "compressed-tensors actorder=group is not supported: columns of every expert are "
            "permuted in their own order; requantize with actorder=weight"
        )
    recipe = _weights_recipe(layout, weights, str(group.get("targets")))
    activations = _activations(group.get("input_activations"))
    return replace(recipe, activations=activations)


def _matches(names: set[str], pattern: str) -> bool:
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    return pattern in names or pattern == "Linear"


def _find_group(config: dict[str, Any], names: set[str]) -> dict[str, Any] | None:
    """The most specific match: a module's name before a regex before the class."""
    found: dict[int, dict[str, Any]] = {}
    for group in (config.get("config_groups") or {}).values():
        for target in group.get("targets") or ():
            if _matches(names, target):
                rank = 2 if target == "Linear" else int(target.startswith("re:"))
                found.setdefault(rank, group)
    return found[min(found)] if found else None


def _refuse_sparsity(config: dict[str, Any]) -> None:
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UnsupportedError(f"compressed-tensors sparsity {sparsity!r} is not supported")


def _weights_recipe(layout: str, args: dict[str, Any], targets: str) -> Recipe:
    bits, kind = args.get("num_bits"), args.get("type")
    group, strategy = args.get("group_size"), args.get("strategy") or _strategy(args)
    zero = not args.get("symmetric", True)
    label = f"compressed-tensors {layout}"
    what = f"{label} {bits}-bit {kind}, {strategy} scales{', asymmetric' if zero else ''}"
    if strategy in ("group", "tensor_group") and not group:
        raise CheckpointError(f"{what}: the config group of {targets} has no group_size")
    along_k = group if strategy == "group" else None
    if (bits, kind) == (4, "int") and strategy in ("group", "channel"):
        if layout in ("pack-quantized", "int-quantized", "naive-quantized"):
            decoder = "packed int4" if layout == "pack-quantized" else "int4 in int8"
            name = f"{label} int4{' asymmetric' if zero else ''}"
            return Recipe(name, decoder, None, along_k, zero)
    elif not zero:
        if layout == "nvfp4-pack-quantized" and (strategy, group) == ("tensor_group", 16):
            return Recipe(f"{label} nvfp4", "nvfp4")
        if layout == "mxfp4-pack-quantized" and (strategy, group) == ("group", 32):
            return Recipe(f"{label} mxfp4", "mxfp4")
        if layout == "mxfp8-quantized" and (strategy, group) == ("group", 32):
            return Recipe(f"{label} mxfp8", "mxfp8")
        block = args.get("block_structure") or [128, 128]
        if layout in _NAIVE and bits == 8 and strategy in _STRATEGY_BLOCKS:
            if strategy != "block" or list(block) == [128, 128]:
                element = "int8" if kind == "int" else "fp8"
                name = f"{label} {element} {strategy}"
                return Recipe(name, element, blocks=_STRATEGY_BLOCKS[strategy])
    raise UnsupportedError(
        f"{what} (group_size {group}, block {args.get('block_structure')}) is not supported; "
        "supported: int4 group or channel (pack-quantized, int-quantized), int8 channel, fp8 "
        "tensor, channel or 128x128 block, nvfp4, mxfp4, mxfp8"
    )


def _strategy(args: dict[str, Any]) -> str:
    """The strategy that compressed-tensors itself derives where none is named."""
    group = args.get("group_size")
    return "tensor" if group is None else "channel" if group == -1 else "group"


def _activations(args: dict[str, Any] | None) -> Format | None:
    """Activation format of `input_activations`; dynamic per-tensor scales become per-token."""
    if args is None:
        return None
    bits, kind, dynamic = args.get("num_bits"), args.get("type"), args.get("dynamic")
    strategy, group = args.get("strategy") or _strategy(args), args.get("group_size")
    key = bits, kind, strategy, group if strategy in ("group", "tensor_group") else None
    microscaling = "uint8" in str(args.get("scale_dtype"))
    table: dict[tuple[Any, ...], Format] = {}
    if dynamic is True:
        table = {
            (8, "int", "token", None): INT8_ROW,
            (8, "int", "tensor", None): INT8_ROW,
            (8, "int", "group", 128): INT8_GROUP,
            (8, "float", "token", None): FP8_ROW,
            (8, "float", "tensor", None): FP8_ROW,
            (8, "float", "group", 128): FP8_GROUP,
            (4, "float", "tensor_group", 16): NVFP4(per_token=True),
            (4, "float", "group", 32): MXFP4(),
        }
        if microscaling:
            table[8, "float", "group", 32] = MXFP8()
    else:
        table = {(8, "float", "tensor", None): FP8_TENSOR}
        table[4, "float", "tensor_group", 16] = NVFP4()
    if key not in table or not args.get("symmetric", True):
        raise UnsupportedError(
            f"compressed-tensors activations {bits}-bit {kind}, {strategy} scales, group_size "
            f"{group}, dynamic={dynamic} are not supported"
        )
    return table[key]


def packed_int4(p: Projection, recipe: Recipe) -> QTensor:
    """weight_packed int32 [N, K/8], weight_scale [N, K/g], weight_zero_point int32 [N/8, K/g]."""
    words = p.read("weight_packed", (torch.int32,), None, None)
    rows, columns = words.shape[0], 8 * words.shape[1]
    _check_shape(p, rows, columns)
    plain = Int4(recipe.group_size)
    plain.check_columns(columns, p.describe("weight_packed"))
    scale = p.read_scale("weight_scale", FLOATS, plain.scale_shape(rows, columns))
    zero = None
    if recipe.zero_point:
        stored = p.read("weight_zero_point", (torch.int32,), -(-rows // 8), scale.shape[1])
        zero = packing.unpack_words(stored, 0)[:rows].to(torch.int8) - 8
    fmt = Int4(recipe.group_size, recipe.zero_point, SCALE_NAMES[scale.dtype])
    return QTensor(packing.from_offset_words(words), fmt, scale, zero)


def _check_shape(p: Projection, rows: int, columns: int) -> None:
    if "weight_shape" not in p:
        return
    stored = p.read("weight_shape", (torch.int64, torch.int32), 2)
    if not stored.is_meta and stored.tolist() != [rows, columns]:
        raise FormatError(
            f"{p.describe('weight_shape')}: says {stored.tolist()}, but "
            f"{p.describe('weight_packed')} holds [{rows}, {columns}]"
        )


def int4_in_int8(p: Projection, recipe: Recipe) -> QTensor:
    """weight int8 [N, K] of values -8..7, weight_scale [N, K/g], weight_zero_point likewise."""
    weight = p.read("weight", (torch.int8,), None, None)
    if not weight.is_meta and (int(weight.min()) < -8 or int(weight.max()) > 7):
        raise FormatError(
            f"{p.describe('weight')}: expected int4 values -8..7 in int8, got "
            f"{int(weight.min())}..{int(weight.max())}"
        )
    rows, columns = weight.shape
    plain = Int4(recipe.group_size)
    plain.check_columns(columns, p.describe("weight"))
    shape = plain.scale_shape(rows, columns)
    scale = p.read_scale("weight_scale", FLOATS, shape)
    zero = p.read("weight_zero_point", (torch.int8,), *shape) if recipe.zero_point else None
    fmt = Int4(recipe.group_size, recipe.zero_point, SCALE_NAMES[scale.dtype])
    return QTensor(packing.pack_nibbles(weight), fmt, scale, zero)
