"""8-bit weights with scales per tensor, row or 128x128 block, and DeepSeek's formats around them.

All scales multiply, whatever their name (`weight_scale_inv`, `weight_scale`, V4's `scale`), and are
fp32, bf16, fp16 or e8m0. The last blocks may be partial. W4AFP8 keeps int4 codes beside fp32 scales
in an otherwise FP8 checkpoint; its activations have static per-tensor scales, one per expert as
calibrated (engines that use one for all experts take their maximum).
"""

from __future__ import annotations

from typing import Any

import torch

from moelten.checkpoints.config import Recipe, Settings, matches_regex
from moelten.checkpoints.projection import BYTES, E8M0, FLOATS, SCALE_NAMES, Projection
from moelten.errors import UnsupportedError
from moelten.formats import (
    FP8,
    FP8_ROW,
    FP8_TENSOR,
    INT8_GROUP,
    INT8_ROW,
    MXFP8,
    Int4,
    Int8,
)
from moelten.qtensor import QTensor

SCALES = ("weight_scale_inv", "weight_scale", "scale")
PLAIN = Recipe("", "plain")


def is_ignored(settings: Settings, module: str) -> bool:
    config = settings.quantization
    patterns = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
    return matches_regex(module, patterns)


def fp8_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """quant_method "fp8" and "mxfp8": DeepSeek's, transformers' and vLLM's own."""
    if is_ignored(settings, module):
        return PLAIN
    config = settings.quantization
    block = config.get("weight_block_size")
    block = tuple(block) if block else None
    ue8m0 = str(config.get("scale_fmt", "")).lower() == "ue8m0"
    static = str(config.get("activation_scheme", "dynamic")).lower() == "static"
    # DeepSeek rounds the scales of activations as it rounds those of weights.
    groups = FP8((1, 128), "e8m0" if ue8m0 else "float32")
    if "fp4" in (config.get("expert_dtype"), settings.text.get("expert_dtype")):
        return Recipe("deepseek fp4", "mxfp4", groups)
    if settings.method == "mxfp8" or block == (1, 32):
        return Recipe("mxfp8", "mxfp8", MXFP8())
    if block == (128, 128) and not static:
        return Recipe("fp8 block", "fp8", groups, blocks=(128, 128))
    if block is None:
        return Recipe("fp8 tensor", "fp8", FP8_TENSOR if static else FP8_ROW, blocks=(None, None))
    raise UnsupportedError(
        f"fp8 with weight_block_size {list(block)} and activation_scheme "
        f"{config.get('activation_scheme')!r} is not supported; supported: [128, 128] dynamic, "
        "[1, 32] (mxfp8), and one scale per tensor"
    )


def w4afp8_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """DeepSeek W4AFP8 (TensorRT-LLM, SGLang): groups of 128 unless the configuration says."""
    group = int(settings.quantization.get("group_size") or 128)
    return Recipe("w4afp8", "w4afp8", FP8_TENSOR, group)


def int8_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """SGLang's "w8a8_int8" and "blockwise_int8"."""
    if is_ignored(settings, module):
        return PLAIN
    if settings.method == "w8a8_int8":
        return Recipe("int8 channel", "int8", INT8_ROW)
    block: Any = settings.require("weight_block_size")
    if list(block) != [128, 128]:
        raise UnsupportedError(f"blockwise int8 has blocks of [128, 128], got {block}")
    return Recipe("int8 block", "int8", INT8_GROUP, blocks=(128, 128))


def fp8(p: Projection, recipe: Recipe) -> QTensor:
    """weight e4m3 [N, K] and its scales, one per block of `recipe.blocks`."""
    weight = p.read("weight", (torch.float8_e4m3fn,), None, None)
    shape = FP8(recipe.blocks).scale_shape(*weight.shape)
    scale = p.read_scale(p.first(*SCALES), (*FLOATS, *E8M0), shape)
    return QTensor(weight, FP8(recipe.blocks, SCALE_NAMES[scale.dtype]), scale)


def int8(p: Projection, recipe: Recipe) -> QTensor:
    """weight int8 [N, K] and its scales, one per row or 128x128 block."""
    weight = p.read("weight", (torch.int8,), None, None)
    shape = Int8(recipe.blocks).scale_shape(*weight.shape)
    scale = p.read_scale(p.first(*SCALES), FLOATS, shape)
    return QTensor(weight, Int8(recipe.blocks, SCALE_NAMES[scale.dtype]), scale)


def w4afp8(p: Projection, recipe: Recipe) -> QTensor:
    """weight int8 [N, K/2] of two's complement nibbles, weight_scale_inv [N, K/128]."""
    data = p.read("weight", BYTES, None, None).view(torch.uint8)
    rows, columns = data.shape[0], 2 * data.shape[1]
    plain = Int4(recipe.group_size)
    plain.check_columns(columns, p.describe("weight"))
    scale = p.read_scale("weight_scale_inv", FLOATS, plain.scale_shape(rows, columns))
    return QTensor(data, Int4(recipe.group_size, scale=SCALE_NAMES[scale.dtype]), scale)
