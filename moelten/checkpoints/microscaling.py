"""MXFP4, MXFP8 and NVFP4 weights: every exporter's names for the same few layouts.

Codes are e2m1 nibbles, even k low, or e4m3 bytes; MX scales are e8m0 bytes per 32, NVFP4 scales
e4m3 per 16 under one global scale per matrix, which ModelOpt stores to multiply and
compressed-tensors to divide. gpt-oss fuses experts and splits K into blocks. Quark's configuration
is read here, because MXFP4 is all of Quark that is supported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moelten.checkpoints.blocks import PLAIN, SCALES, is_ignored
from moelten.checkpoints.config import Recipe, Settings, matches_wildcard
from moelten.checkpoints.projection import BYTES, E8M0, Projection
from moelten.errors import UnsupportedError
from moelten.formats import FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, NVFP4, Format
from moelten.qtensor import QTensor

_PACKED = ("weight_packed", "weight")


def gpt_oss_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """quant_method "mxfp4" of OpenAI's gpt-oss and of transformers."""
    if is_ignored(settings, module):
        return PLAIN
    return Recipe("gpt-oss mxfp4", "gpt-oss mxfp4")


def quark_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """AMD Quark; a layer's own configuration comes before the global one."""
    config = settings.quantization
    if matches_wildcard(module, config.get("exclude") or ()):
        return PLAIN
    layers = config.get("layer_quant_config") or {}
    own = next((c for pattern, c in layers.items() if matches_wildcard(module, [pattern])), None)
    chosen = own or config.get("global_quant_config") or {}
    weight: Any = chosen.get("weight")
    if not isinstance(weight, dict) or not _is_mxfp4(weight):
        raise UnsupportedError(
            f"quark weights {weight} are not supported; supported: fp4, per_group of 32, e8m0"
        )
    return Recipe("quark mxfp4", "mxfp4", _quark_activations(chosen.get("input_tensors")))


def _is_mxfp4(spec: dict[str, Any]) -> bool:
    return (
        spec.get("dtype") == "fp4"
        and spec.get("qscheme") == "per_group"
        and spec.get("group_size") == 32
        and spec.get("scale_format") == "e8m0"
    )


def _quark_activations(spec: dict[str, Any] | None) -> Format | None:
    if spec is None:
        return None
    if _is_mxfp4(spec):
        return MXFP4()
    if spec.get("dtype") == "fp8_e4m3" and spec.get("qscheme") == "per_tensor":
        return FP8_ROW if spec.get("is_dynamic") else FP8_TENSOR
    raise UnsupportedError(f"quark activations {spec} are not supported")


def gpt_oss_mxfp4(p: Projection, recipe: Recipe) -> QTensor:
    """blocks uint8 [N, K/32, 16] and scales uint8 [N, K/32] of one expert."""
    blocks = p.read("blocks", (torch.uint8,), None, None, 16)
    scale = p.read("scales", (torch.uint8,), *blocks.shape[:2])
    return QTensor(blocks.flatten(-2), MXFP4(), scale)


def mxfp4(p: Projection, recipe: Recipe) -> QTensor:
    """weight_packed or weight, uint8 or int8 [N, K/2], and e8m0 scales [N, K/32]."""
    data = _bytes(p)
    MXFP4().check_columns(2 * data.shape[1], p.module)
    shape = MXFP4().scale_shape(data.shape[0], 2 * data.shape[1])
    return QTensor(data, MXFP4(), p.read_scale(p.first(*SCALES), E8M0, shape))


def mxfp8(p: Projection, recipe: Recipe) -> QTensor:
    """weight e4m3 [N, K] and e8m0 scales [N, K/32]."""
    weight = p.read("weight", (torch.float8_e4m3fn,), None, None)
    shape = MXFP8().scale_shape(*weight.shape)
    return QTensor(weight, MXFP8(), p.read_scale(p.first(*SCALES), E8M0, shape))


def nvfp4(p: Projection, recipe: Recipe) -> QTensor:
    """weight or weight_packed uint8 [N, K/2], weight_scale e4m3 [N, K/16], and a global scale."""
    data = _bytes(p)
    NVFP4().check_columns(2 * data.shape[1], p.module)
    shape = NVFP4().scale_shape(data.shape[0], 2 * data.shape[1])
    scale = p.read_scale("weight_scale", (torch.float8_e4m3fn,), shape)
    if p.first("weight_global_scale", "weight_scale_2") == "weight_scale_2":
        decode = p.read_scalar("weight_scale_2")
    else:
        decode = 1.0 / p.read_scalar("weight_global_scale")
    return QTensor(data, NVFP4(), scale, None, decode)


def _bytes(p: Projection) -> Tensor:
    return p.read(p.first(*_PACKED), BYTES, None, None).view(torch.uint8)
