"""The two tables: quantization method -> recipe, and recipe -> decoder.

A format is one decoder and one row of DECODERS; a way of announcing it is one row of METHODS. All
that is not in the tables is refused by name, with the list of what is.
"""

from __future__ import annotations

from collections.abc import Callable

from moelten.checkpoints import blocks, compressed_tensors, gptq_awq, microscaling, modelopt
from moelten.checkpoints.config import Recipe, Settings
from moelten.checkpoints.plain import plain
from moelten.checkpoints.projection import Projection
from moelten.errors import UnsupportedError
from moelten.qtensor import QTensor

Decoder = Callable[[Projection, Recipe], QTensor]
Method = Callable[[Settings, str, frozenset[str]], Recipe]

DECODERS: dict[str, Decoder] = {
    "plain": plain,
    "packed int4": compressed_tensors.packed_int4,
    "int4 in int8": compressed_tensors.int4_in_int8,
    "row-pair int4": modelopt.row_pair_int4,
    "w4afp8": blocks.w4afp8,
    "gptq": gptq_awq.gptq,
    "awq": gptq_awq.awq,
    "int8": blocks.int8,
    "fp8": blocks.fp8,
    "mxfp8": microscaling.mxfp8,
    "mxfp4": microscaling.mxfp4,
    "gpt-oss mxfp4": microscaling.gpt_oss_mxfp4,
    "nvfp4": microscaling.nvfp4,
}
METHODS: dict[str, Method] = {
    "compressed-tensors": compressed_tensors.find_recipe,
    "mxfp4": microscaling.gpt_oss_recipe,
    "fp8": blocks.fp8_recipe,
    "mxfp8": blocks.fp8_recipe,
    "w4afp8": blocks.w4afp8_recipe,
    "w8a8_int8": blocks.int8_recipe,
    "blockwise_int8": blocks.int8_recipe,
    "modelopt": modelopt.find_recipe,
    "gptq": gptq_awq.gptq_recipe,
    "awq": gptq_awq.awq_recipe,
    "quark": microscaling.quark_recipe,
}
_ALIASES = {
    "compressed_tensors": "compressed-tensors",
    "modelopt_fp4": "modelopt",
    "modelopt_fp8": "modelopt",
    "modelopt_mixed": "modelopt",
    "modelopt_mxfp8": "modelopt",
}


def find_recipe(settings: Settings, module: str, suffixes: frozenset[str]) -> Recipe:
    """The recipe of one module of a routed expert, whose tensors have these suffixes.

    Raises UnsupportedError for a method, or a variant of one, that is not in the tables.
    """
    if not settings.method:
        return Recipe("", "plain")
    method = _ALIASES.get(settings.method, settings.method)
    if method not in METHODS:
        raise UnsupportedError(
            f"quantization method {settings.method!r} is not supported; supported: "
            + ", ".join(METHODS)
            + ", and none (bf16, fp16, fp32)"
        )
    return METHODS[method](settings, module, suffixes)
