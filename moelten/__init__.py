"""Fused Mixture-of-Experts layers on quantized weights: exact, light, portable.

Names load on first use, so that `import moelten` and `moelten --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelten.activations import GPT_OSS, GeGLU, ReLU2, SwiGLU
    from moelten.checkpoints import Checkpoint
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
    from moelten.moe import MoELayer, explain, fused_moe, pack, workspace_bytes
    from moelten.packed import PackedExperts
    from moelten.qtensor import QTensor, dequantize, quantize
    from moelten.quantized import QuantizedRows, quantize_activations
    from moelten.router import topk_softmax
    from moelten.routing import Routing
    from moelten.weights import ExpertSpec, ExpertWeights

__version__ = "0.1.0"

_HOMES = {
    "activations": "GPT_OSS GeGLU ReLU2 SwiGLU",
    "checkpoints": "Checkpoint",
    "errors": "CheckpointError FormatError LayoutError UnsupportedError",
    "formats": "BF16 FP8 FP16 FP32 MXFP4 MXFP8 NVFP4 SCHEMES Float Int4 Int8 Scheme scheme",
    "moe": "MoELayer explain fused_moe pack workspace_bytes",
    "packed": "PackedExperts",
    "qtensor": "QTensor dequantize quantize",
    "quantized": "QuantizedRows quantize_activations",
    "router": "topk_softmax",
    "routing": "Routing",
    "weights": "ExpertSpec ExpertWeights",
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moelten' has no attribute {name!r}")
    value = getattr(import_module(f"moelten.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
