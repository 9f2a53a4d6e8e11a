"""The formats that compressed-tensors stores, and its own decoder as a judge of what we write."""

from __future__ import annotations

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from moelten.checkpoints.layout import quantization_config
from moelten.formats import (
    BF16,
    FP8,
    FP8_BLOCK,
    FP8_ROW,
    FP8_TENSOR,
    INT8_ROW,
    MXFP4,
    MXFP8,
    Format,
    Int4,
)

# All but NVFP4, whose readers round in another place.
EXACT = {
    "int4 g32": Int4(32),
    "int4 g64": Int4(64),
    "int4 g128": Int4(128),
    "int4 channel": Int4(),
    "int4 fp16 scales": Int4(32, scale="float16"),
    "int4 zero points": Int4(32, True),
    "int4 zero points channel": Int4(None, True),
    "mxfp4": MXFP4(),
    "mxfp8": MXFP8(),
    "fp8 tensor": FP8_TENSOR,
    "fp8 channel": FP8_ROW,
    "fp8 channel bf16 scales": FP8((1, None), "bfloat16"),
    "fp8 block": FP8_BLOCK,
    "int8": INT8_ROW,
}


def decompress(fmt: Format, tensors: dict[str, Tensor], name: str) -> Tensor:
    """One linear, decompressed by compressed-tensors as its configuration says."""
    config = QuantizationConfig.model_validate(quantization_config(fmt, BF16, []))
    own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    compressor = BaseCompressor.get_value_from_registry(config.format)
    return compressor.decompress(own, config.config_groups["group_0"])["weight"]
