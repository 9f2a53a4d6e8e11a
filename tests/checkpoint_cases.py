"""Every checkpoint format: who writes it, what its configuration says, what it must be read as."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_writers import (
    MIXTRAL,
    Encoder,
    Sizes,
    Stored,
    awq,
    blocks,
    compressed,
    ct_asymmetric,
    ct_block,
    ct_mx,
    ct_nvfp4_encoder,
    ct_rows,
    ct_symmetric,
    fp8_tensor,
    gptq,
    mxfp4,
    mxfp8,
    nvfp4_modelopt,
    plain,
    row_pairs,
    rows,
    w4afp8,
    write_config,
    write_model,
)

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
PRE_SCALE = 0.5 + torch.rand(256, generator=torch.Generator().manual_seed(7))
KIMI_IGNORE = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]
USUAL = Sizes()
LARGE = Sizes(hidden=256, inter=192)  # 192 is not a multiple of a block of 128
FP4_SIZES = Sizes(inter=48)
W4AFP8_SIZES = Sizes(hidden=128, inter=256)
DEEPSEEK_V4 = {
    "names": "layers.{layer}.ffn.experts.{expert}.{projection}.{suffix}",
    "projections": MIXTRAL,
}
MIXTRAL_NAMES = {
    "names": "model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.{suffix}",
    "projections": MIXTRAL,
    "shards": 1,
}
NESTED_NAMES = {
    "names": "language_model.model.layers.{layer}.mlp.experts.{expert}.{projection}.{suffix}"
}


def args(bits: int, kind: str, strategy: str, **more: Any) -> dict:
    """QuantizationArgs of compressed-tensors."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


INT4 = args(4, "int", "group", group_size=32)
INT4_ASYM = {**INT4, "symmetric": False}
INT4_ROW = args(4, "int", "channel")
INT4_ROW_ASYM = {**INT4_ROW, "symmetric": False}
INT8_ROW = args(8, "int", "channel")
INT8_TOKEN = args(8, "int", "token", dynamic=True)
FP8_ROW = args(8, "float", "channel")
FP8_TOKEN = args(8, "float", "token", dynamic=True)
FP8_G128 = args(8, "float", "group", group_size=128, dynamic=True)
FP8_BLOCKS = args(8, "float", "block", block_structure=[128, 128])
FP8_STATIC = args(8, "float", "tensor")
NVFP4_ARGS = args(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
NVFP4_LOCAL = {**NVFP4_ARGS, "dynamic": "local"}
NVFP4_DYNAMIC = {**NVFP4_ARGS, "dynamic": True}
MX4 = args(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
MX8 = args(8, "float", "group", group_size=32, scale_dtype="torch.uint8")
MX8_DYNAMIC = {**MX8, "dynamic": True}
QUARK_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def ct(layout: str, weights: dict, inputs: dict | None = None, **config: Any) -> dict:
    """A compressed-tensors configuration with one group, as Kimi-K2 has it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    base = {"quant_method": "compressed-tensors", "format": layout, "ignore": KIMI_IGNORE}
    return {**base, "config_groups": {"group_0": group}, **config}


def modelopt(algorithm: str, **more: Any) -> dict:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


def deepseek(**more: Any) -> dict:
    base = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    return {**base, "weight_block_size": [128, 128], **more}


def autofp8(scheme: str) -> dict:
    return {"quant_method": "fp8", "activation_scheme": scheme}


def gptq_config(**more: Any) -> dict:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    return {**base, "checkpoint_format": "gptq", **more}


def quark(weight: dict, inputs: dict | None = None, **more: Any) -> dict:
    both = {"weight": weight, "input_tensors": inputs}
    return {"quant_method": "quark", "global_quant_config": both, "exclude": ["lm_head"], **more}


@dataclass(frozen=True)
class Case:
    """One format; `scheme` and `name` are what a loaded checkpoint must say of itself."""

    scheme: str
    name: str
    encode: Encoder
    quantization: dict | None
    sizes: Sizes = USUAL
    config: dict = field(default_factory=dict)
    write: dict = field(default_factory=dict)


def ct_case(
    scheme: str,
    label: str,
    layout: str,
    weights: dict,
    scales: Callable,
    inputs: dict | None = None,
    sizes: Sizes = USUAL,
    **config: Any,
) -> Case:
    """Written by compressed-tensors itself. Its compressors do not look at activations."""
    encode = compressed(layout, {"weights": weights}, scales=scales)
    name = f"compressed-tensors {layout} {label}"
    return Case(scheme, name, encode, ct(layout, weights, inputs), sizes, config)


def ct_nvfp4(scheme: str, inputs: dict | None, input_amax: float | None) -> Case:
    layout = "nvfp4-pack-quantized"
    encode = ct_nvfp4_encoder({"weights": NVFP4_ARGS}, input_amax)
    name = f"compressed-tensors {layout} nvfp4"
    return Case(scheme, name, encode, ct(layout, NVFP4_ARGS, inputs), FP4_SIZES)


PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
HALF = {"dtype": None, "torch_dtype": "float16"}
V4 = {"model_type": "deepseek_v4"}
FP8_CT_TENSOR = "compressed-tensors float-quantized fp8 tensor"
SYM, SYM_ROW = ct_symmetric(32, 7.5), ct_symmetric(None, 7.5, torch.float16)
UE8M0 = deepseek(scale_fmt="ue8m0")
FP4_EXPERTS = deepseek(scale_fmt="ue8m0", expert_dtype="fp4")
GROUP_16 = {"group_0": {"weights": {"group_size": 16}}}
INT8_BLOCKS = {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}
MX_BLOCKS = {"quant_method": "fp8", "weight_block_size": [1, 32]}
GPTQ_V2 = {"checkpoint_format": "gptq_v2"}
INV = "weight_scale_inv"

CASES = {
    # compressed-tensors, integers
    "kimi int4": ct_case("int4g32_bf16", "int4", PACK, INT4, SYM),
    "int4 channel fp16": ct_case("int4_fp16", "int4", PACK, INT4_ROW, SYM_ROW, **HALF),
    "int4 asymmetric": ct_case(
        "int4g32z_bf16", "int4 asymmetric", PACK, INT4_ASYM, ct_asymmetric(32)
    ),
    "int4 asymmetric, N % 8": ct_case(
        "int4z_bf16",
        "int4 asymmetric",
        PACK,
        INT4_ROW_ASYM,
        ct_asymmetric(None),
        sizes=Sizes(experts=2, hidden=72, inter=40),
    ),
    "w4a8 packed": ct_case("int4g32_int8", "int4", PACK, INT4, SYM, INT8_TOKEN),
    "w4afp8 packed": ct_case("int4g32_fp8", "int4", PACK, INT4, SYM, FP8_TOKEN),
    "w4a8": ct_case("int4g32_int8", "int4", INT, INT4, SYM, INT8_TOKEN),
    "w4afp8": ct_case("int4g32_fp8", "int4", INT, INT4, SYM, FP8_TOKEN),
    "w4afp8 g128": ct_case("int4g32_fp8g128", "int4", INT, INT4, SYM, FP8_G128),
    "w4a8 asymmetric": ct_case(
        "int4g32z_int8", "int4 asymmetric", INT, INT4_ASYM, ct_asymmetric(32), INT8_TOKEN
    ),
    "w8a8": ct_case("int8_int8", "int8 channel", INT, INT8_ROW, ct_rows(127), INT8_TOKEN),
    # compressed-tensors, floats
    "fp8 dynamic": ct_case("fp8_fp8", "fp8 channel", FLOAT, FP8_ROW, ct_rows(448), FP8_TOKEN),
    "fp8 block": ct_case("fp8block_fp8", "fp8 block", FLOAT, FP8_BLOCKS, ct_block, FP8_G128, LARGE),
    "fp8 static": Case(
        "fp8tensor_fp8tensor",
        FP8_CT_TENSOR,
        fp8_tensor(0.01, (1,)),
        ct(FLOAT, FP8_STATIC, FP8_STATIC),
    ),
    "nvfp4": ct_nvfp4("nvfp4_nvfp4", NVFP4_LOCAL, 5.0),
    "nvfp4a16": ct_nvfp4("nvfp4_bf16", None, None),
    "nvfp4 per token": ct_nvfp4("nvfp4_nvfp4t", NVFP4_DYNAMIC, None),
    "mxfp4": ct_case("mxfp4_bf16", "mxfp4", "mxfp4-pack-quantized", MX4, ct_mx(6.0)),
    "mxfp4 fp8": ct_case(
        "mxfp4_fp8g128", "mxfp4", "mxfp4-pack-quantized", MX4, ct_mx(6.0), FP8_G128
    ),
    "mxfp8 ct": ct_case("mxfp8_mxfp8", "mxfp8", "mxfp8-quantized", MX8, ct_mx(448.0), MX8_DYNAMIC),
    # DeepSeek and what grew around it
    "deepseek fp8": Case("fp8block_fp8", "fp8 block", blocks(E4M3, INV), deepseek(), LARGE),
    "deepseek ue8m0": Case(
        "fp8block_fp8", "fp8 block", blocks(E4M3, INV, torch.uint8, E8M0), UE8M0, LARGE
    ),
    "deepseek v4 fp8": Case(
        "fp8block_fp8",
        "fp8 block",
        blocks(E4M3, "scale", torch.uint8),
        UE8M0,
        LARGE,
        V4,
        DEEPSEEK_V4,
    ),
    "deepseek fp4": Case(
        "mxfp4_fp8g128",
        "deepseek fp4",
        mxfp4("weight", "scale", torch.int8, True),
        FP4_EXPERTS,
        config=V4,
        write=DEEPSEEK_V4,
    ),
    "deepseek fp4, dtype F4": Case(
        "mxfp4_fp8g128",
        "deepseek fp4",
        mxfp4("weight", "scale", torch.float4_e2m1fn_x2, True),
        FP4_EXPERTS,
        config=V4,
        write=DEEPSEEK_V4,
    ),
    "deepseek w4afp8": Case(
        "int4g128_fp8tensor",
        "w4afp8",
        w4afp8(torch.float32),
        None,
        W4AFP8_SIZES,
        write={"renamed": {"input_scale"}},
    ),
    "sglang w4afp8": Case(
        "int4g128_fp8tensor",
        "w4afp8",
        w4afp8(torch.bfloat16),
        {"quant_method": "w4afp8"},
        W4AFP8_SIZES,
    ),
    "mxfp8": Case("mxfp8_mxfp8", "mxfp8", mxfp8(INV, False), {"quant_method": "mxfp8"}),
    "mxfp8 blocks": Case("mxfp8_mxfp8", "mxfp8", mxfp8(INV, True), MX_BLOCKS),
    "autofp8 static": Case(
        "fp8tensor_fp8tensor", "fp8 tensor", fp8_tensor(0.02), autofp8("static")
    ),
    "autofp8 dynamic": Case("fp8tensor_fp8", "fp8 tensor", fp8_tensor(None), autofp8("dynamic")),
    "sglang w8a8": Case(
        "int8_int8",
        "int8 channel",
        rows(torch.int8, "weight_scale", torch.float32, 2),
        {"quant_method": "w8a8_int8"},
    ),
    "blockwise int8": Case(
        "int8block_int8", "int8 block", blocks(torch.int8, INV), INT8_BLOCKS, LARGE
    ),
    # ModelOpt
    "modelopt nvfp4": Case(
        "nvfp4_nvfp4",
        "modelopt nvfp4",
        nvfp4_modelopt(),
        modelopt("NVFP4", config_groups=GROUP_16),
        FP4_SIZES,
    ),
    "modelopt nvfp4 awq": Case(
        "nvfp4_nvfp4",
        "modelopt nvfp4 awq",
        nvfp4_modelopt(4.0, PRE_SCALE),
        modelopt("NVFP4_AWQ", group_size=16),
        FP4_SIZES,
    ),
    "modelopt nvfp4a16": Case(
        "nvfp4_bf16",
        "modelopt nvfp4 weight-only",
        nvfp4_modelopt(None),
        modelopt("W4A16_NVFP4"),
        FP4_SIZES,
    ),
    "modelopt mxfp4": Case(
        "mxfp4_bf16", "modelopt mxfp4", mxfp4("weight", "weight_scale"), modelopt("MXFP4")
    ),
    "modelopt mxfp4 fp8": Case(
        "mxfp4_fp8tensor",
        "modelopt mxfp4 fp8",
        mxfp4("weight", "weight_scale", input_scale=0.02),
        modelopt("W4A8_MXFP4_FP8"),
    ),
    "modelopt mxfp8": Case(
        "mxfp8_mxfp8", "modelopt mxfp8", mxfp8("weight_scale", False), modelopt("MXFP8")
    ),
    "modelopt fp8": Case(
        "fp8tensor_fp8tensor", "modelopt fp8 tensor", fp8_tensor(0.02), modelopt("FP8")
    ),
    "modelopt fp8 channel": Case(
        "fp8_fp8",
        "modelopt fp8 channel",
        rows(E4M3, "weight_scale", torch.float32, 1),
        modelopt("FP8_PER_CHANNEL_PER_TOKEN"),
    ),
    "modelopt fp8 block": Case(
        "fp8block_bf16",
        "modelopt fp8 block",
        blocks(E4M3, "weight_scale", axes=4),
        modelopt("FP8_PB_WO"),
        LARGE,
    ),
    "modelopt int4 awq": Case(
        "int4g32_bf16",
        "modelopt int4 awq",
        row_pairs(32, PRE_SCALE, None, None),
        modelopt("W4A16_AWQ", group_size=32, pre_quant_scale=True),
    ),
    "modelopt w4a8 awq": Case(
        "int4g32_fp8tensor",
        "modelopt w4a8 awq",
        row_pairs(32, PRE_SCALE, 0.003, 0.02),
        modelopt("W4A8_AWQ", group_size=32),
    ),
    # Quark, GPTQ, AWQ
    "quark mxfp4": Case(
        "mxfp4_bf16", "quark mxfp4", mxfp4("weight", "weight_scale"), quark(QUARK_FP4)
    ),
    "gptq": Case("int4g32_bf16", "gptq", gptq(32, 1, True), gptq_config()),
    "gptq channel": Case("int4_bf16", "gptq", gptq(-1, 1, True), gptq_config(group_size=-1)),
    "gptq asymmetric": Case("int4g32z_bf16", "gptq", gptq(32, 1, False), gptq_config(sym=False)),
    "gptq v2": Case("int4g32_bf16", "gptq_v2", gptq(32, 2, True), gptq_config(**GPTQ_V2)),
    "gptq v2 asymmetric": Case(
        "int4g32z_bf16", "gptq_v2", gptq(32, 2, False), gptq_config(sym=False, **GPTQ_V2)
    ),
    "awq": Case("int4g32z_bf16", "awq gemm", awq(32), AWQ),
    # no quantization
    "bf16": Case("bf16_bf16", "bf16", plain(torch.bfloat16), None, FP4_SIZES),
    "fp16": Case("fp16_fp16", "fp16", plain(torch.float16), None, FP4_SIZES),
    "mixtral": Case(
        "bf16_bf16",
        "bf16",
        plain(torch.bfloat16),
        None,
        config={"model_type": "mixtral"},
        write=MIXTRAL_NAMES,
    ),
    "multimodal": Case("bf16_bf16", "bf16", plain(torch.bfloat16), None, write=NESTED_NAMES),
}


def write_case(path: Path, name: str) -> dict[tuple[int, int, str], Stored]:
    """Write a case's checkpoint; returns what each projection must be read as."""
    case = CASES[name]
    stored = write_model(path, case.encode, case.sizes, **case.write)
    write_config(path, case.sizes, case.quantization, **case.config)
    if name == "deepseek w4afp8":  # says nothing in config.json
        record = {"quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}}
        (path / "hf_quant_config.json").write_text(json.dumps(record))
    return stored
