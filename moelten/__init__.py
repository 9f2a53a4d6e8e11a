"""moelten runs the expert layer of Mixture-of-Experts models on its quantized weights, in one call.

The public names are imported when one of them is first used, so that the command line answers
`--help` without loading torch. Until then no torch operator is registered.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelten.activations import GPT_OSS, Activation, GeGLU, ReLU2, SwiGLU
    from moelten.errors import CheckpointError, FormatError, LayoutError, UnsupportedError
    from moelten.formats import (
        BF16,
        FP8,
        FP16,
        FP32,
        MXFP4,
        MXFP8,
        NVFP4,
        SCHEMES,
        Float,
        Int4,
        Int8,
        Scheme,
        scheme,
    )
    from moelten.moe import MoELayer, explain, fused_moe, pack
    from moelten.packed import PackedExperts
    from moelten.quantize import QTensor, dequantize, quantize
    from moelten.routing import Routing, topk_softmax
    from moelten.weights import ExpertSpec, ExpertWeights

__version__ = "0.1.0"

__all__ = [
    "BF16",
    "FP8",
    "FP16",
    "FP32",
    "GPT_OSS",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "SCHEMES",
    "Activation",
    "CheckpointError",
    "ExpertSpec",
    "ExpertWeights",
    "Float",
    "FormatError",
    "GeGLU",
    "Int4",
    "Int8",
    "LayoutError",
    "MoELayer",
    "PackedExperts",
    "QTensor",
    "ReLU2",
    "Routing",
    "Scheme",
    "SwiGLU",
    "UnsupportedError",
    "dequantize",
    "explain",
    "fused_moe",
    "pack",
    "quantize",
    "scheme",
    "topk_softmax",
]
_MODULES = (
    "activations",
    "errors",
    "formats",
    "moe",
    "packed",
    "quantize",
    "routing",
    "weights",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in [import_module(f"{__name__}.{part}") for part in _MODULES]:
        globals().update({n: vars(module)[n] for n in __all__ if n in vars(module)})
    return globals()[name]


class _Package(ModuleType):
    """A package in which importing the submodule `quantize` does not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "quantize" and isinstance(value, ModuleType):
            value = value.quantize
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
