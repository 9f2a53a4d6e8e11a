"""moelten runs the expert layer of Mixture-of-Experts models on its quantized weights, in one call."""

from moelten.activations import GPT_OSS, Activation, GeGLU, ReLU2, SwiGLU
from moelten.errors import CheckpointError, FormatError, LayoutError, UnsupportedError
from moelten.formats import BF16, FP8, FP16, FP32, MXFP4, MXFP8, NVFP4, SCHEMES, Float, Int4, Int8, Scheme, scheme  # fmt: skip
from moelten.moe import MoELayer, explain, fused_moe, pack
from moelten.packed import PackedExperts
from moelten.quantize import QTensor, dequantize, quantize
from moelten.routing import Routing, topk_softmax
from moelten.weights import ExpertSpec, ExpertWeights

__version__ = "0.1.0"
