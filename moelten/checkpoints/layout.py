"""How compressed-tensors stores a linear: its tensors, and the configuration that describes them.

Names, shapes, dtypes and keys are those that transformers, vLLM and SGLang read. Codes and scales
are stored exactly; decoding is the reader's, and `write_projection` says where it rounds
differently. Formats without such a layout are refused, not approximated. `compressed_tensors` is
the reading side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moelten.errors import FormatError, UnsupportedError
from moelten.formats import (
    FP8,
    FP8_GROUP,
    FP8_ROW,
    INT8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    Float,
    Format,
    Int4,
    Int8,
    Scheme,
)
from moelten.packing import pack_words, to_offset_words
from moelten.qtensor import QTensor

_STRATEGIES = {(None, None): "tensor", (1, None): "channel", (128, 128): "block"}


def write_projection(name: str, matrix: QTensor) -> dict[str, Tensor]:
    """The compressed-tensors tensors of one linear, by full name, for a QTensor [N, K].

        Int4         weight_packed int32 [N, K/8], weight_scale [N, K/g], weight_shape int64 [2],
                     with zero points also weight_zero_point int32 [N/8, K/g]
        NVFP4        weight_packed uint8 [N, K/2], weight_scale e4m3 [N, K/16],
                     weight_global_scale fp32 [1], the *reciprocal* of the decode scale
        MXFP4        weight_packed uint8 [N, K/2], weight_scale uint8 [N, K/32]
        FP8, Int8    weight [N, K], weight_scale [N, 1], [1] per tensor, or one per 128x128 block
        MXFP8        weight e4m3 [N, K], weight_scale uint8 [N, K/32]

    Readers decode exactly what `dequantize` does, with one exception: for NVFP4 they compute
    code * (scale / g) where `dequantize` computes code * scale * (1/g), the same up to fp32
    rounding and identical when g is a power of two. 1/g itself reloads bit for bit for every
    global scale that `quantize` makes; one from elsewhere may be no fp32 number's reciprocal and
    then reloads to the nearest that is.

    >>> from moelten.qtensor import quantize
    >>> matrix = quantize(torch.ones(8, 32), Int4(32))
    >>> {k: list(v.shape) for k, v in write_projection("experts.0.up_proj", matrix).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'experts.0.up_proj.weight_packed': [8, 4], 'experts.0.up_proj.weight_scale': [8, 1],
     'experts.0.up_proj.weight_shape': [2]}
    """
    fmt = matrix.format
    _weight_arguments(fmt)
    if len(matrix.shape) != 2:
        raise FormatError(f"{name}: expected one matrix [N, K], got {list(matrix.shape)}")
    assert matrix.scale is not None
    parts = {"weight_scale": matrix.scale}
    if isinstance(fmt, Int4):
        parts["weight_packed"] = to_offset_words(matrix.data)
        parts["weight_shape"] = torch.tensor(matrix.shape, dtype=torch.int64)
        if matrix.zero is not None:
            parts["weight_zero_point"] = pack_words((matrix.zero + 8).to(torch.uint8), 0)
    elif isinstance(fmt, MXFP4 | NVFP4):
        parts["weight_packed"] = matrix.data
        if matrix.global_scale is not None:
            parts["weight_global_scale"] = _reciprocal(matrix.global_scale).reshape(1)
    else:
        parts["weight"] = matrix.data
        if fmt.block == (None, None):
            parts["weight_scale"] = matrix.scale.reshape(1)
    return {f"{name}.{part}": parts[part].contiguous() for part in sorted(parts)}


def _reciprocal(decode: Tensor) -> Tensor:
    """The fp32 g for which 1/g is `decode` again, or the nearest reciprocal if there is none."""
    best = 1.0 / decode
    nearest = best
    for limit in (0.0, torch.inf):
        neighbour = torch.nextafter(nearest, torch.full_like(nearest, limit))
        best = torch.where((1.0 / best != decode) & (1.0 / neighbour == decode), neighbour, best)
    return best


def quantization_config(
    fmt: Format, activation_format: Format, ignore: list[str]
) -> dict[str, Any]:
    """The `quantization_config` of a config.json whose linears outside `ignore` are in `fmt`.

    `ignore` has module names, and regular expressions marked "re:". Activations may be unquantized,
    fp8 or int8 per token, fp8 per 128 or MXFP8, all dynamic; static ones are refused, because
    their scales need calibration data.

    >>> from moelten.formats import BF16
    >>> config = quantization_config(Int4(32), BF16, ["lm_head"])
    >>> config["format"], config["config_groups"]["group_0"]["weights"]["group_size"]
    ('pack-quantized', 32)
    """
    Scheme(fmt, activation_format).check()
    layout, weights = _weight_arguments(fmt)
    group = {
        "targets": ["Linear"],
        "input_activations": _activation_arguments(activation_format),
        "output_activations": None,
        "weights": weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def _weight_arguments(fmt: Format) -> tuple[str, dict[str, Any]]:
    """Name of the compressed-tensors layout and the description of the weights in it."""
    if isinstance(fmt, Int4):
        strategy = "channel" if fmt.group_size is None else "group"
        extra = {"symmetric": not fmt.zero_point}
        return "pack-quantized", _arguments("int", 4, strategy, fmt.group_size, **extra)
    if fmt == MXFP4():
        return "mxfp4-pack-quantized", _arguments(
            "float", 4, "group", 32, scale_dtype="torch.uint8"
        )
    if fmt == MXFP8():
        return "mxfp8-quantized", _arguments("float", 8, "group", 32, scale_dtype="torch.uint8")
    if fmt == NVFP4():
        scale = {"scale_dtype": "torch.float8_e4m3fn"}
        return "nvfp4-pack-quantized", _arguments("float", 4, "tensor_group", 16, **scale)
    if isinstance(fmt, FP8) and fmt.block in _STRATEGIES and fmt.scale != "e8m0":
        block = [128, 128] if fmt.block == (128, 128) else None
        strategy = _STRATEGIES[fmt.block]
        return "float-quantized", _arguments("float", 8, strategy, block_structure=block)
    if isinstance(fmt, Int8) and fmt.block == (1, None):
        return "int-quantized", _arguments("int", 8, "channel")
    raise UnsupportedError(
        f"compressed-tensors has no layout for {fmt} weights; write int4 (grouped or per channel), "
        "mxfp4, mxfp8, nvfp4, int8 per channel, or fp8 with 16- or 32-bit scales per tensor, "
        "channel or 128x128 block"
    )


def _activation_arguments(fmt: Format) -> dict[str, Any] | None:
    dynamic = {"dynamic": True, "observer": None}
    if isinstance(fmt, Float):
        return None
    if fmt in (FP8_ROW, INT8_ROW):
        return _arguments("float" if fmt == FP8_ROW else "int", 8, "token", **dynamic)
    if fmt == FP8_GROUP:
        return _arguments("float", 8, "group", 128, **dynamic)
    if fmt == MXFP8():
        return _arguments("float", 8, "group", 32, scale_dtype="torch.uint8", **dynamic)
    raise UnsupportedError(
        f"{fmt.name} activations have no dynamic form in compressed-tensors (static ones need "
        "calibrated scales); write bf16, fp8, fp8g128, int8 or mxfp8 activations"
    )


def _arguments(
    kind: str, bits: int, strategy: str, group_size: int | None = None, **changes: Any
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
        **changes,
    }
