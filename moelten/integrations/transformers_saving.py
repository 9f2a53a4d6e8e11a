"""What `save_pretrained` writes for packed experts: tensors that other engines read too.

gpt-oss experts in MXFP4 are written as gpt-oss stores them; all others one linear per expert, as
compressed-tensors, under the family's own names for them. Codes and scales are stored, never
rounded, so loading the directory again gives the same bits. A format that neither can hold is
refused. Where a family's own checkpoints fuse the experts (Qwen3-VL-MoE), linears per expert are
what vLLM reads; transformers without moelten then reports every expert as missing.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from moelten.checkpoints.layout import quantization_config, write_projection
from moelten.checkpoints.writer import OUTSIDE_EXPERTS
from moelten.errors import UnsupportedError
from moelten.formats import MXFP4, Float
from moelten.packed import PackedExperts
from moelten.qtensor import QTensor

GPT_OSS = "gpt_oss"
GPT_OSS_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def stored_config(packed: dict[str, PackedExperts], model_type: str) -> dict[str, Any]:
    """The `quantization_config` of config.json for the experts modules of a model, by name.

    Raises UnsupportedError if one configuration cannot describe all of them.
    """
    plain = [n for n, p in packed.items() if isinstance(p.spec.scheme.weights, Float)]
    schemes = {p.spec.scheme for n, p in packed.items() if n not in plain}
    if len(schemes) != 1:
        names = ", ".join(scheme.name for scheme in schemes) or "no quantized experts"
        raise UnsupportedError(f"a checkpoint is saved in one format, this model has {names}")
    (scheme,) = schemes
    if model_type == GPT_OSS and scheme.weights == MXFP4() and not plain:
        return dict(GPT_OSS_CONFIG)
    extras = sorted({name for p in packed.values() for name in p.spec.extras})
    if extras or model_type == GPT_OSS:
        raise UnsupportedError(
            f"{model_type} experts in {scheme.name} with {', '.join(extras) or 'no extras'} cannot "
            "be saved: no reader of compressed-tensors loads such experts; copy the directory that "
            "they were loaded from"
        )
    # By layer, because readers know the block around the experts by other names.
    layers = [re.findall(r"layers\.\d+\.", name)[-1] for name in plain]
    ignore = ["lm_head", OUTSIDE_EXPERTS, *(f"re:.*{re.escape(layer)}" for layer in layers)]
    return quantization_config(scheme.weights, scheme.activations, ignore)


def stored_tensors(
    name: str, packed: PackedExperts, config: dict[str, Any], projections: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors of one experts module under transformers' name of it, in the format of `config`.

    projections: names of the linears of one expert: gate, up and down, or up and down.
    """
    if config["quant_method"] == "mxfp4":
        return _gpt_oss(name, packed)
    tensors: dict[str, Tensor] = {}
    for expert in range(packed.spec.num_experts):
        weights = packed.unpack_expert(expert)
        matrices = [weights.w13[0][half] for half in range(weights.w13.shape[1])]
        for projection, matrix in zip(projections, [*matrices, weights.w2[0]], strict=True):
            tensors |= _linear(f"{name}.{expert}.{projection}", matrix)
    return tensors


def _linear(name: str, matrix: QTensor) -> dict[str, Tensor]:
    if isinstance(matrix.format, Float):
        return {f"{name}.weight": matrix.data}
    return write_projection(name, matrix)


def _gpt_oss(name: str, packed: PackedExperts) -> dict[str, Tensor]:
    """Fused [E, 2I, ...] with gate and up rows alternating, and blocks of 32 along K."""
    weights = packed.unpack()
    w13 = {part: _interleave(tensor) for part, tensor in weights.w13.tensors().items()}
    w13_bias = None if weights.w13_bias is None else _interleave(weights.w13_bias)
    tensors = {}
    for kind, parts, bias in (
        ("gate_up_proj", w13, w13_bias),
        ("down_proj", weights.w2.tensors(), weights.w2_bias),
    ):
        experts, rows, _ = parts["data"].shape
        tensors[f"{name}.{kind}_blocks"] = parts["data"].reshape(experts, rows, -1, 16)
        tensors[f"{name}.{kind}_scales"] = parts["scale"]
        if bias is not None:
            tensors[f"{name}.{kind}_bias"] = _narrowest(bias)
    return {key: part.contiguous() for key, part in tensors.items()}


def _interleave(halves: Tensor) -> Tensor:
    """[E, 2, I, ...] as [E, 2I, ...], gate and up rows alternating."""
    return halves.transpose(1, 2).flatten(1, 2)


def _narrowest(bias: Tensor) -> Tensor:
    """bf16 if that holds every value, as it does for all that came from bf16."""
    narrow = bias.to(torch.bfloat16)
    return narrow if torch.equal(narrow.float(), bias) else bias
