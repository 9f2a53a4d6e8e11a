"""Small checkpoints in the formats that model makers publish, written by their own libraries.

transformers builds and saves each model (random weights, real tensor names); then the experts'
tensors are replaced by what compressed-tensors' compressors or transformers' fp8 quantizer make of
them. transformers writes gpt-oss MXFP4 only on a GPU: there compressed-tensors makes the codes and
scales, and this file arranges them as gpt-oss stores them. Every format also has a decoder that is
not moelten's, so a demo cannot agree with itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelten.commands.definition import Decoder, Parts
from moelten.commands.doctor import require_extra

Encoder = Callable[[Tensor], Parts]


@dataclass(frozen=True)
class Demo:
    """One checkpoint to make.

    model: which of `_CONFIGS` it is; gain: how much larger than 1/sqrt(K) its weights are
    """

    name: str
    model: str
    writer: str
    decoder: str
    codec: Callable[[], tuple[Encoder, Decoder, dict[str, Any]]]
    gain: float = 1.0


@dataclass(frozen=True)
class Made:
    """A checkpoint on disk, and the foreign decoder that reads its experts."""

    demo: Demo
    path: Path
    decode: Decoder


def make(demo: Demo, folder: Path, seed: int = 0) -> Made:
    """Write `demo` under `folder`. Raises ImportError if the transformers extra is missing."""
    require_extra("transformers", "making example checkpoints")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from safetensors.torch import load_file, save_file

    path = folder / demo.name
    with quiet_transformers():
        _save_model(demo, path, seed)
    encode, decode, quantization = demo.codec()
    file = path / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        tensors |= _encoded(name, tensor, encode)
    save_file(tensors, file, metadata={"format": "pt"})
    if quantization:
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = quantization
        (path / "config.json").write_text(json.dumps(config, indent=2))
    return Made(demo, path, decode)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings about random weights and no progress bars of its own, for a while."""
    from transformers.utils import logging

    untyped: Any = logging
    level, bars = untyped.get_verbosity(), untyped.is_progress_bar_enabled()
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    try:
        yield
    finally:
        untyped.set_verbosity(level)
        if bars:
            untyped.enable_progress_bar()


def _save_model(demo: Demo, path: Path, seed: int) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, sizes = _CONFIGS[demo.model]
    config = CONFIG_MAPPING[kind](**_COMMON, **sizes)
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." not in name:
                continue
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
                continue
            transposed = demo.model == "gpt-oss"
            reduction = parameter.shape[-2 if transposed else -1]
            parameter.normal_(std=demo.gain * reduction**-0.5)
    model.save_pretrained(path)


def _encoded(name: str, tensor: Tensor, encode: Encoder) -> Parts:
    """The tensors that replace one: an expert's projection becomes what `encode` makes of it."""
    stem, _, last = name.rpartition(".")
    if ".mlp.experts." not in name and ".block_sparse_moe.experts." not in name:
        return {name: tensor}
    if last in ("gate_up_proj", "down_proj"):  # gpt-oss: fused, [E, K, N]
        parts = [encode(expert.T.contiguous()) for expert in tensor]
        fused = {part: torch.stack([p[part] for p in parts]) for part in parts[0]}
        return {f"{name}_{part}": value for part, value in fused.items()}
    if last != "weight":
        return {name: tensor}
    return {f"{stem}.{part}": value.contiguous() for part, value in encode(tensor).items()}


_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": (
        "gpt_oss",
        {
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_local_experts": 8,
            "num_key_value_heads": 2,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "hidden_size": 256,
            "intermediate_size": 128,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "qwen3": (
        "qwen3_moe",
        {
            "hidden_size": 128,
            "intermediate_size": 128,
            "moe_intermediate_size": 96,
            "num_experts": 8,
            "num_key_value_heads": 2,
        },
    ),
    "mixtral": (
        "mixtral",
        {
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_local_experts": 8,
            "num_key_value_heads": 2,
        },
    ),
}
_IGNORE = [
    "lm_head",
    r"re:.*self_attn.*",
    r"re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*mlp\.gate$",
    r"re:.*block_sparse_moe\.gate$",
]


def _plain() -> tuple[Encoder, Decoder, dict[str, Any]]:
    return (
        lambda matrix: {"weight": matrix},
        lambda parts, quantization: parts["weight"],
        {},
    )


def _gpt_oss_mxfp4() -> tuple[Encoder, Decoder, dict[str, Any]]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from moelten.integrations.transformers_saving import GPT_OSS_CONFIG

    compress, _, _ = _compressed_tensors("MXFP4A16")

    def encode(matrix: Tensor) -> Parts:
        made = compress(matrix)
        scales = made["weight_scale"]
        return {"blocks": made["weight_packed"].view(*scales.shape, 16), "scales": scales}

    def decode(parts: Parts, quantization: dict[str, Any]) -> Tensor:
        one = parts["blocks"][None], parts["scales"][None]
        return convert_moe_packed_tensors(*one, dtype=torch.float32)[0].T

    return encode, decode, dict(GPT_OSS_CONFIG)


def _deepseek_fp8() -> tuple[Encoder, Decoder, dict[str, Any]]:
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = FineGrainedFP8Config(
        weight_block_size=(128, 128),
        modules_to_not_convert=["lm_head", "self_attn", "shared_experts", "model.layers.0.mlp"],
    )
    untyped: Any = (Fp8Quantize, Fp8Dequantize)
    quantizer, dequantizer = (op(SimpleNamespace(quantization_config=config)) for op in untyped)

    def encode(matrix: Tensor) -> Parts:
        made: Parts = quantizer.convert({"proj.weight": matrix})
        return {name.removeprefix("proj."): part for name, part in made.items()}

    def decode(parts: Parts, quantization: dict[str, Any]) -> Tensor:
        made: Parts = dequantizer.convert(dict(parts))
        return made["weight"]

    record = config.to_dict() | {"fmt": "e4m3", "weight_block_size": [128, 128]}
    return encode, decode, record


def _compressed_tensors(
    preset: str, group_size: int | None = None
) -> tuple[Encoder, Decoder, dict[str, Any]]:
    """Encoder, decoder and config of one of compressed-tensors' preset schemes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    if group_size is not None:
        args.group_size = group_size
    name = str(getattr(infer_module_format(torch.nn.Linear, scheme), "value", None))
    compressor = BaseCompressor.get_value_from_registry(name)

    def encode(matrix: Tensor) -> Parts:
        groups = matrix.float().view(len(matrix), -1, args.group_size or matrix.shape[-1])
        parts = {"weight": matrix}
        top = None
        if name == "nvfp4-pack-quantized":
            top = parts["weight_global_scale"] = generate_gparam(groups.min(), groups.max())
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=top)
        # Float formats say how their scales are stored; integer ones follow the weights' dtype.
        parts["weight_scale"] = scale if args.scale_dtype else scale.to(matrix.dtype)
        made: Parts = compressor.compress(parts, scheme)
        return made

    def decode(parts: Parts, quantization: dict[str, Any]) -> Tensor:
        if name == "nvfp4-pack-quantized":
            return _decoded_nvfp4(parts, args)
        # fp32 scales make its result fp32; in bf16 it would round products of code and scale.
        wide = parts | {"weight_scale": parts["weight_scale"].float()}
        made: Parts = compressor.decompress(wide, scheme)
        return made["weight"]

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=name,
        ignore=_IGNORE,
        quantization_status="compressed",
    )
    return encode, decode, json.loads(json.dumps(config.to_dict(), default=str))


def _decoded_nvfp4(parts: Parts, args: Any) -> Tensor:
    """What its decompressor does, in fp32: that one works in bf16 and rounds."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = parts["weight_packed"]
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
    values: Tensor = dequantize(
        codes,
        parts["weight_scale"].float(),
        args=args,
        global_scale=parts["weight_global_scale"],
        dtype=torch.float32,
    )
    return values


def _preset(name: str, group_size: int | None = None) -> Callable[[], Any]:
    return lambda: _compressed_tensors(name, group_size)


_CT = "compressed-tensors"
DEMOS = {
    demo.name: demo
    for demo in (
        Demo(
            "gpt-oss-mxfp4",
            "gpt-oss",
            "compressed-tensors codes in gpt-oss blocks",
            "transformers",
            _gpt_oss_mxfp4,
            gain=4.0,
        ),
        Demo("kimi-int4", "deepseek-v3", _CT, _CT, _preset("W4A16", 32)),
        Demo("deepseek-fp8", "deepseek-v3", "transformers", "transformers", _deepseek_fp8),
        Demo("deepseek-w4afp8", "deepseek-v3", _CT, _CT, _preset("W4AFP8")),
        Demo("qwen3-nvfp4", "qwen3", _CT, _CT, _preset("NVFP4A16")),
        Demo("qwen3-int8", "qwen3", _CT, _CT, _preset("W8A8")),
        Demo("mixtral-fp8", "mixtral", _CT, _CT, _preset("FP8_DYNAMIC")),
        Demo("qwen3-bf16", "qwen3", "transformers", "safetensors", _plain),
    )
}
