"""Checkpoints that cannot be read: the format or the damage is named, with tensor and file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    AWQ,
    CASES,
    FP4_SIZES,
    FP8_BLOCKS,
    INT4,
    MX4,
    MX8,
    QUARK_FP4,
    USUAL,
    args,
    ct,
    deepseek,
    gptq_config,
    modelopt,
    quark,
    write_case,
)
from checkpoint_writers import plain, save, write_config, write_model
from torch import Tensor

from moelten import CheckpointError, FormatError, UnsupportedError
from moelten.checkpoints import Checkpoint
from moelten.checkpoints.reader import SafetensorsFiles
from moelten.formats import FP16, MXFP8

INT4_TOKEN = args(4, "int", "token", dynamic=True)
SPARSE = {"format": "sparse-24-bitmask"}
REFUSALS = [
    ({"quant_method": "bitsandbytes"}, r"'bitsandbytes' is not supported; supported: compressed-"),
    ({"quant_method": "hqq"}, "'hqq' is not supported"),
    ({"quant_method": "torchao"}, "'torchao' is not supported"),
    ({"quant_method": "auto-round"}, "'auto-round' is not supported"),
    ({"quant_method": "qoq"}, "'qoq' is not supported"),
    ({"some": "thing"}, "'unnamed' is not supported"),
    (ct("pack-quantized", {**INT4, "actorder": "group"}), "actorder=group"),
    (ct("marlin-24", INT4), "compressed-tensors marlin-24 4-bit int"),
    (ct("pack-quantized", INT4, sparsity_config=SPARSE), "sparse-24-bitmask"),
    (ct("mxfp6-pack-quantized", {**MX8, "num_bits": 6}), "mxfp6-pack-quantized 6-bit float"),
    (ct("pack-quantized", {**INT4, "num_bits": 8}), "pack-quantized 8-bit int"),
    (ct("pack-quantized", INT4, INT4_TOKEN), "activations 4-bit int"),
    (ct("int-quantized", INT4, args(8, "int", "tensor")), "dynamic=None are not supported"),
    (ct("float-quantized", {**FP8_BLOCKS, "block_structure": [64, 64]}), "64, 64"),
    (deepseek(weight_block_size=[64, 64]), r"weight_block_size \[64, 64\]"),
    (deepseek(activation_scheme="static"), "activation_scheme 'static'"),
    ({"quant_method": "blockwise_int8", "weight_block_size": [64, 64]}, "64, 64"),
    (modelopt("INT8_SQ"), "ModelOpt INT8_SQ is not supported; supported: NVFP4"),
    (modelopt("NVFP4", group_size=32), "groups of 16, got 32"),
    (quark({"dtype": "int4"}), "quark weights"),
    (quark(QUARK_FP4, {"dtype": "fp6"}), "quark activations"),
    (gptq_config(bits=8), "of 8 bits"),
    (gptq_config(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    ({**AWQ, "version": "gemv"}, "AWQ version 'gemv'"),
    ({**AWQ, "zero_point": False}, "zero_point=False"),
]


@pytest.mark.parametrize("quantization, message", REFUSALS)
def test_unsupported_formats_are_refused_by_name(quantization, message, tmp_path):
    write_model(tmp_path, plain(torch.bfloat16), FP4_SIZES)
    write_config(tmp_path, FP4_SIZES, quantization)
    with pytest.raises(UnsupportedError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "quantization, message",
    [
        (ct("pack-quantized", {**INT4, "group_size": None}), "no group_size"),
        (modelopt("W4A16_AWQ"), "no group_size; it is not guessed"),
        (modelopt("MIXED_PRECISION"), "no quantized_layers"),
        (gptq_config(group_size=None), "no group_size"),
        ({"quant_method": "blockwise_int8"}, "no weight_block_size"),
    ],
)
def test_a_configuration_without_its_parameters(quantization, message, tmp_path):
    sizes = FP4_SIZES
    write_model(tmp_path, plain(torch.bfloat16), sizes)
    write_config(tmp_path, sizes, quantization)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config, error, message",
    [
        ({"hidden_act": "situ"}, UnsupportedError, "activation 'situ' is not supported; .*silu"),
        ({"hidden_act": None}, CheckpointError, "names no activation"),
        ({"model_type": "step3p7"}, UnsupportedError, "clamps the gate after silu"),
        ({"model_type": "new", "swiglu_limit": 3}, UnsupportedError, "swiglu_limit=3"),
        ({"dtype": "float8"}, UnsupportedError, "model dtype 'float8'"),
    ],
)
def test_models_that_are_not_understood(config, error, message, tmp_path):
    write_model(tmp_path, CASES["kimi int4"].encode, USUAL)
    write_config(tmp_path, USUAL, CASES["kimi int4"].quantization, **config)
    with pytest.raises(error, match=message):
        Checkpoint(tmp_path).spec(1)


def test_mxfp4_activations_are_refused_with_the_way_out(tmp_path):
    inputs = {**MX4, "dynamic": True}
    write_model(tmp_path, CASES["mxfp4"].encode, USUAL)
    write_config(tmp_path, USUAL, ct("mxfp4-pack-quantized", MX4, inputs))
    with pytest.raises(UnsupportedError, match=r"mxfp4_mxfp4 is not supported.*activation_format="):
        Checkpoint(tmp_path).spec(1)
    spec = Checkpoint(tmp_path, activation_format=MXFP8()).spec(1)
    assert spec.scheme.name == "mxfp4_mxfp8"
    assert Checkpoint(tmp_path, activation_format=FP16).spec(1).scheme.name == "mxfp4_fp16"


def test_fused_order_is_never_assumed(tmp_path):
    base = "model.layers.0.mlp.experts."
    shapes = {"gate_up_proj": (3, 96, 64), "down_proj": (3, 64, 48)}
    save(tmp_path, {base + n: torch.ones(s).bfloat16() for n, s in shapes.items()})
    write_config(tmp_path, USUAL, model_type="unknown")
    with pytest.raises(UnsupportedError, match="order is not known for model type 'unknown'"):
        Checkpoint(tmp_path).spec(0)
    write_config(tmp_path, USUAL, num_experts=2)
    with pytest.raises(CheckpointError, match="num_experts=2, the files hold 3"):
        Checkpoint(tmp_path).spec(0)
    rewrite(tmp_path, "down_proj", lambda t: t[:, :32])
    write_config(tmp_path, USUAL)
    with pytest.raises(FormatError, match=r"fused experts BF16 \[3, 96, 64\] in model.*expected"):
        Checkpoint(tmp_path).spec(0)
    rewrite(tmp_path, "down_proj", lambda t: t[:2])
    with pytest.raises(CheckpointError, match="fused tensors disagree on the number of experts"):
        Checkpoint(tmp_path).spec(0)


def read_all(path: Path) -> dict[str, Tensor]:
    files = SafetensorsFiles(path)
    return {name: files.read(name) for name in files.tensors}


def rewrite(path: Path, end: str, change: Callable[[Tensor], Tensor] | None) -> None:
    """Change (or drop, for None) every tensor whose name ends in `end`."""
    tensors = read_all(path)
    hits = [name for name in tensors if name.endswith(end)]
    assert hits, end
    for name in hits:
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor)
    for file in (*path.glob("*.safetensors"), *path.glob("*.index.json")):
        file.unlink()
    save(path, tensors)


@dataclass(frozen=True)
class Damage:
    """A case's checkpoint, which tensors are changed and how (None: dropped), and what is said."""

    case: str
    end: str
    change: Callable[[Tensor], Tensor] | None
    error: type[Exception]
    message: str


E0, E1 = "layers.1.mlp.experts.0.", "layers.1.mlp.experts.1."
DAMAGE = {
    "one expert's scale": Damage(
        "kimi int4",
        E1 + "up_proj.weight_scale",
        None,
        CheckpointError,
        r"missing tensor .*1\.up_proj\.weight_scale; other .*\.0\.up.* in model\.safetensors",
    ),
    "the first expert's scale": Damage(
        "kimi int4",
        E0 + "up_proj.weight_scale",
        None,
        CheckpointError,
        r"missing tensor .*experts\.0\.up_proj\.weight_scale; other experts .*\.1\.up",
    ),
    "all scales": Damage(
        "kimi int4",
        "gate_proj.weight_scale",
        None,
        CheckpointError,
        r"missing tensor .*gate_proj\.weight_scale; the files hold weight_packed, weight_shape",
    ),
    "one projection": Damage(
        "bf16",
        E1 + "up_proj.weight",
        None,
        CheckpointError,
        r"missing tensor .*1\.up_proj\.weight;",
    ),
    "scale shape": Damage(
        "kimi int4",
        "weight_scale",
        lambda t: t[:, :1].repeat(1, 4),
        FormatError,
        r"gate_proj\.weight_scale \(BF16 \[96, 4\] in model\.safetensors\): expected .*\[96, 2\], "
        r"got bfloat16 \[96, 4\]",
    ),
    "block scale shape": Damage(
        "deepseek fp8",
        "weight_scale_inv",
        lambda t: t.repeat(2, 1),
        FormatError,
        r"expected .*\[2, 2\], got float32 \[4, 2\]",
    ),
    "codes' dtype": Damage(
        "kimi int4",
        "weight_packed",
        lambda t: t.to(torch.int16),
        FormatError,
        r"weight_packed \(I16 .*expected int32 \[any, any\], got int16 \[96, 8\]",
    ),
    "scales' dtype": Damage(
        "nvfp4a16", "weight_scale", lambda t: t.float(), FormatError, "expected float8_e4m3fn"
    ),
    "one expert's dtype": Damage(
        "kimi int4",
        "layers.1.mlp.experts.2.up_proj.weight_scale",
        lambda t: t.float(),
        FormatError,
        r"experts\.2\.up_proj\.weight_scale \(F32 .*expected BF16 \[96, 2\] as .*experts\.0\.up",
    ),
    "K and group": Damage(
        "modelopt int4 awq",
        "weight",
        lambda t: t[:, :48],
        FormatError,
        r"gate_proj\.weight \(U8 .*multiple of its group of 32, got K=48",
    ),
    "negative scale": Damage(
        "modelopt nvfp4",
        "weight_scale_2",
        lambda t: -t,
        CheckpointError,
        r"weight_scale_2 \(F32 .*expected a positive finite scale, got -",
    ),
    "zero input scale": Damage(
        "modelopt fp8",
        "input_scale",
        lambda t: t * 0,
        CheckpointError,
        r"input_scale \(F32 .*expected a positive finite scale, got 0",
    ),
    "no input scale": Damage(
        "modelopt fp8",
        "input_scale",
        None,
        CheckpointError,
        r"input_scale.*static activations need it, a dynamic activation_format does not",
    ),
    "half of the input scales": Damage(
        "modelopt fp8", "up_proj.input_scale", None, CheckpointError, r"up_proj\.input_scale"
    ),
    "weight_shape": Damage(
        "kimi int4",
        "weight_shape",
        lambda t: t + 1,
        FormatError,
        r"weight_shape .*: says \[97, 65\], but .*weight_packed .*holds \[96, 64\]",
    ),
    "int4 range": Damage(
        "w4a8", "weight", lambda t: t * 3, FormatError, r"expected int4 values -8\.\.7 in int8, got"
    ),
    "pre-scales": Damage(
        "modelopt w4a8 awq",
        "up_proj.pre_quant_scale",
        lambda t: t * 2,
        CheckpointError,
        "layer 1, expert 0: gate and up have different pre_quant_scale",
    ),
    "zero points": Damage(
        "gptq",
        "qzeros",
        lambda t: t + 1,
        CheckpointError,
        r"qzeros .*sym=True, which is zero point 8, got 8\.\.9",
    ),
    "zero point overflow": Damage(
        "gptq asymmetric",
        "qzeros",
        lambda t: t | 15,
        CheckpointError,
        r"qzeros .*zero point 16 does not fit 4 bits",
    ),
    "desc_act": Damage(
        "gptq", "g_idx", lambda t: t.flip(0), UnsupportedError, r"g_idx \(I32 .*desc_act=True"
    ),
    "gate unlike up": Damage(
        "bf16", "gate_proj.weight", lambda t: t[:40], CheckpointError, r"gate is .*40, 64.*up is"
    ),
    "gate_up unlike down": Damage(
        "bf16", "down_proj.weight", lambda t: t[:56], FormatError, r"need w13"
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, tmp_path):
    damage = DAMAGE[name]
    write_case(tmp_path, damage.case)
    rewrite(tmp_path, damage.end, damage.change)
    with pytest.raises(damage.error, match=damage.message):
        Checkpoint(tmp_path).expert(1, 0)


def test_tensors_that_no_decoder_asks_for_are_refused(tmp_path):
    write_case(tmp_path, "bf16")
    tensors = read_all(tmp_path)
    own = {name for name in tensors if "1.mlp.experts" in name}
    save(tmp_path, tensors | {n.replace("weight", "lora_a"): tensors[n] for n in own})
    (tmp_path / "model.safetensors.index.json").unlink()
    for file in tmp_path.glob("model-*"):
        file.unlink()
    with pytest.raises(UnsupportedError, match=r"gate_proj\.lora_a \(BF16 .*has no such tensor"):
        Checkpoint(tmp_path).spec(1)


def test_missing_experts_and_projections(tmp_path):
    write_case(tmp_path, "bf16")
    for projection in ("gate", "up", "down"):
        rewrite(tmp_path, f"2.mlp.experts.1.{projection}_proj.weight", None)
    assert Checkpoint(tmp_path).spec(1).num_experts == 3
    with pytest.raises(CheckpointError, match=r"layer 2: missing tensors of experts \[1\]"):
        Checkpoint(tmp_path).spec(2)
    rewrite(tmp_path, "gate_proj.weight", None)
    with pytest.raises(
        CheckpointError, match=r"SwiGLU experts have down, gate, up .*hold down, up"
    ):
        Checkpoint(tmp_path)


def test_configuration_and_files_must_agree(tmp_path):
    case = CASES["bf16"]
    write_model(tmp_path, case.encode, case.sizes)
    write_config(tmp_path, case.sizes, num_experts=4)
    with pytest.raises(CheckpointError, match="num_experts=4, the files hold 3"):
        Checkpoint(tmp_path).spec(1)
    write_config(tmp_path, case.sizes, hidden_size=32)
    with pytest.raises(CheckpointError, match="hidden_size=32, expert matrices have 64"):
        Checkpoint(tmp_path).spec(1)
    write_config(tmp_path, case.sizes)
    with pytest.raises(
        CheckpointError, match=r"layer 0 has no routed experts; MoE layers: \(1, 2\)"
    ):
        Checkpoint(tmp_path).spec(0)
    with pytest.raises(CheckpointError, match=r"expert 3 is not in 0\.\.2 of layer 1"):
        Checkpoint(tmp_path).expert(1, 3)


def test_files_that_are_cut_or_gone(tmp_path):
    write_case(tmp_path, "bf16")
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for size, message in (
        (len(whole) - 10, "is truncated: tensor"),
        (40, "header has"),
        (4, "tru"),
    ):
        shard.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{shard.name} .*{message}|{shard.name} is tru"):
            Checkpoint(tmp_path)
    shard.write_bytes(whole.replace(b'"dtype"', b'"dtipe"'))
    with pytest.raises(CheckpointError, match=f"{shard.name} has a damaged header"):
        Checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names 1 files that .* lacks: {shard.name}"):
        Checkpoint(tmp_path)
    shard.write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=f"missing tensor .* places it in {shard.name}"):
        Checkpoint(tmp_path)


def test_directories_that_are_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="no directory; checkpoints are local"):
        Checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    write_config(tmp_path, USUAL)
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match="GGUF checkpoints are not supported"):
        Checkpoint(tmp_path)
    save(tmp_path, {"model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="no routed experts"):
        Checkpoint(tmp_path)
    save(tmp_path, {"model.layers.0.mlp.experts.0.fc1.weight": torch.ones(2, 2)})
    with pytest.raises(UnsupportedError, match=r"gate_proj, w1, .*not 'fc1'"):
        Checkpoint(tmp_path)
    save(tmp_path, {f"{n}.layers.0.mlp.experts.0.w1.weight": torch.ones(2, 2) for n in "ab"})
    with pytest.raises(UnsupportedError, match=r"experts of several models: layers under 'a\.', "):
        Checkpoint(tmp_path)
    both = ("0.gate_proj.weight", "gate_up_proj")
    save(tmp_path, {f"model.layers.0.mlp.experts.{name}": torch.ones(2, 2) for name in both})
    with pytest.raises(CheckpointError, match="layer 0: experts are stored one by one and fused"):
        Checkpoint(tmp_path)
    both = ("0.w1.weight", "0.gate_proj.weight")
    save(tmp_path, {f"model.layers.0.mlp.experts.{name}": torch.ones(2, 2) for name in both})
    with pytest.raises(CheckpointError, match="are the same part of one expert"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        Checkpoint(tmp_path)
