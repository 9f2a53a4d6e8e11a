"""Packed models in transformers: loaded without dequantizing, saved, and loaded again bit for bit.

The reference of a quantized checkpoint is an fp32 model holding the values that an independent
decoder reads from it, or transformers' own dequantized model: every weight must be equal, and
logits up to summation order (fp32) or a few roundings (bf16).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from checkpoint_cases import CASES, PRE_SCALE  # noqa: E402
from checkpoint_writers import Stored, blocks, row_pairs  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_models import (  # noqa: E402
    FAMILIES,
    greedy,
    llama4_config,
    logits,
    one_thread,  # noqa: F401
    prompt,
    save_quantized,
    save_tensors,
    tiny_model,
)
from transformers import AutoModelForCausalLM  # noqa: E402

from moelten import (  # noqa: E402
    BF16,
    FP8,
    FP16,
    FP32,
    MXFP4,
    NVFP4,
    CheckpointError,
    FormatError,
    Int4,
    UnsupportedError,
    dequantize,
)
from moelten.integrations.transformers import MoeltenConfig, load, use_moelten  # noqa: E402
from moelten.integrations.transformers_quantizer import packed_modules  # noqa: E402

FP8_ROW, FP8_TENSOR = FP8((1, None)), FP8((None, None))
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Every packed tensor of a model, as bytes."""
    return {
        f"{name}.{part}": tensor.contiguous().view(torch.uint8)
        for name, module in packed_modules(model).items()
        for part, tensor in module.packed.tensors.items()
    }


def assert_packed(model, ratio: float = 0.3) -> None:
    """The experts are packed, are small, and nothing of them is left elsewhere."""
    modules = packed_modules(model)
    stored = sum(
        tensor.nbytes
        for module in modules.values()
        for part, tensor in module.packed.tensors.items()
        if part.startswith(("w13.", "w2."))
    )
    assert stored <= ratio * sum(m.spec.logical_bytes for m in modules.values())
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]


def assert_decodes(model, reference, dtype: torch.dtype) -> None:
    """Every weight of the model has the reference's value, in the dtype that its decoder has."""
    values = dict(model.named_parameters())
    for name, module in packed_modules(model).items():
        weights = module.packed.unpack()
        values[f"{name}.gate_up_proj"] = dequantize(weights.w13).flatten(1, 2)
        values[f"{name}.down_proj"] = dequantize(weights.w2)
    expected = dict(reference.named_parameters())
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert torch.equal(value.to(dtype), expected[name].to(dtype)), name


def assert_same(model, other) -> None:
    """Bit for bit: packed tensors, parameters, logits and tokens."""
    mine, theirs = tensors_of(model), tensors_of(other)
    assert mine and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    parameters = dict(other.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), logits(other))
    assert torch.equal(greedy(model), greedy(other))


def unmarked(path: Path) -> Path:
    """Take moelten's mark off a saved directory: what an engine without moelten sees."""
    record = json.loads((path / "config.json").read_text())
    del record["quantization_config"]["moelten"]
    (path / "config.json").write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])
def test_families_quantize_save_and_reload(family, tmp_path):
    source, target = tmp_path / "bf16", tmp_path / "int4"
    tiny_model(family, torch.bfloat16).save_pretrained(source)
    model = load(source, weight_format=Int4(32))
    assert_packed(model)
    model.save_pretrained(target)
    assert_same(model, AutoModelForCausalLM.from_pretrained(target))
    plain = AutoModelForCausalLM.from_pretrained(unmarked(target))
    assert not packed_modules(plain)
    assert_decodes(model, plain, BFLOAT16)


@pytest.mark.parametrize(
    "weights, activations",
    [
        (Int4(zero_point=True), None),
        (Int4(32), FP8_ROW),
        (NVFP4(), None),
        (MXFP4(), None),
        (FP8_ROW, FP8_ROW),
    ],
    ids=str,
)
def test_formats_quantize_save_and_reload(weights, activations, tmp_path):
    tiny_model("qwen3_moe", torch.bfloat16).save_pretrained(tmp_path / "bf16")
    model = load(tmp_path / "bf16", weight_format=weights, activation_format=activations)
    scheme = packed_modules(model)["model.layers.1.mlp.experts"].spec.scheme
    assert (scheme.weights, scheme.activations) == (weights, activations or BF16)
    model.save_pretrained(tmp_path / "saved")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert_same(model, load(tmp_path / "saved"))


def kimi(path: Path):
    """A tiny Kimi-K2 (DeepSeek-V3), its int4 experts written by compressed-tensors itself."""
    case = CASES["kimi int4"]
    model = tiny_model("deepseek_v3", torch.bfloat16)
    return save_quantized(model, path, case.quantization, case.encode, model_type="kimi_k2")


def test_kimi_k2_int4(tmp_path):
    kimi(tmp_path / "kimi")
    model = load(tmp_path / "kimi")
    assert_packed(model)
    (module,) = packed_modules(model).values()
    assert module.spec.scheme.name == "int4g32_bf16"
    model.save_pretrained(tmp_path / "saved")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    source = load_file(tmp_path / "kimi" / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert source.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in source.items())
    theirs = AutoModelForCausalLM.from_pretrained(unmarked(tmp_path / "saved"))
    assert_decodes(model, theirs, BFLOAT16)
    assert relative(logits(model), logits(theirs)) < 2e-2
    assert torch.equal(greedy(model), greedy(theirs))


def gpt_oss(path: Path) -> dict[str, torch.Tensor]:
    """A tiny gpt-oss with random MXFP4 experts; returns the tensors of its file."""
    model = tiny_model("gpt_oss", torch.bfloat16)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        draw = {"generator": generator, "dtype": torch.uint8}
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), **draw)
        tensors[f"{name}_scales"] = torch.randint(121, 124, shape, **draw)
    save_tensors(tensors, path)
    record = json.loads((path / "config.json").read_text())
    record["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (path / "config.json").write_text(json.dumps(record))
    return tensors


def test_gpt_oss_mxfp4(tmp_path):
    source = gpt_oss(tmp_path / "gpt-oss")
    model = load(tmp_path / "gpt-oss")
    assert_packed(model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt-oss")
    assert theirs.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert relative(logits(model), logits(theirs)) < 2e-2
    model.save_pretrained(tmp_path / "saved")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert source.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in source.items())
    again = AutoModelForCausalLM.from_pretrained(unmarked(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(theirs))


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("kimi int4", BFLOAT16),
        ("int4 asymmetric", BFLOAT16),
        ("w8a8", BFLOAT16),
        ("fp8 dynamic", BFLOAT16),
        ("fp8 block", BFLOAT16),
        ("nvfp4", FLOAT32),
        ("mxfp4", FLOAT32),
        ("mxfp8 ct", FLOAT32),
        ("deepseek fp8", FLOAT32),
        ("deepseek ue8m0", FLOAT32),
        ("autofp8 static", FLOAT32),
        ("modelopt nvfp4", FLOAT32),
        ("quark mxfp4", FLOAT32),
        ("gptq", FLOAT32),
        ("gptq v2 asymmetric", FLOAT32),
        ("awq", FLOAT32),
    ],
)
def test_third_party_formats_with_every_linear_quantized(name, dtype, tmp_path):
    case = CASES[name]
    quantization = {k: v for k, v in case.quantization.items() if k != "ignore"}
    model = tiny_model("deepseek_v3", torch.bfloat16)
    reference = save_quantized(model, tmp_path, quantization, case.encode, case.encode)
    model = load(tmp_path, dtype=torch.float32, activation_format=FP32)
    assert_packed(model, ratio=0.6)
    assert_decodes(model, reference, dtype)
    if dtype == FLOAT32:
        assert relative(logits(model), logits(reference)) < 1e-6
    native = packed_modules(load(tmp_path))["model.layers.1.mlp.experts"]
    assert native.spec.scheme.name == case.scheme


def test_w4afp8_beside_fp8_linears(tmp_path):
    case, fp8 = CASES["deepseek w4afp8"], blocks(torch.float8_e4m3fn, "weight_scale_inv")
    model = tiny_model("deepseek_v3", torch.bfloat16, hidden_size=128, moe_intermediate_size=128)
    reference = save_quantized(model, tmp_path, None, case.encode, fp8)
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION"}})
    )
    model = load(tmp_path, dtype=torch.float32, activation_format=FP32)
    assert relative(logits(model), logits(reference)) < 1e-6
    static = load(tmp_path)
    assert static.model.layers[1].mlp.experts.spec.scheme.name == "int4g128_fp8tensor"
    with pytest.raises(UnsupportedError, match=r"w13_input_scale.*copy the directory"):
        static.save_pretrained(tmp_path / "saved")


def test_pre_scales_of_awq_are_applied_everywhere(tmp_path):
    encode = row_pairs(32, PRE_SCALE, None, None)

    def scaled(w: torch.Tensor) -> Stored:
        stored = encode(w)
        scale = stored.tensors["pre_quant_scale"].float()
        return Stored(stored.tensors, stored.values * scale)

    quantization = {
        k: v for k, v in CASES["modelopt int4 awq"].quantization.items() if k != "ignore"
    }
    model = tiny_model("qwen3_moe", torch.bfloat16)
    reference = save_quantized(model, tmp_path, quantization, scaled, scaled)
    model = load(tmp_path, dtype=torch.float32)
    assert relative(logits(model), logits(reference)) < 1e-5


def test_a_layer_left_plain_stays_plain(tmp_path):
    tiny_model("mixtral", torch.bfloat16).save_pretrained(tmp_path / "bf16")
    model = load(tmp_path / "bf16", weight_format=Int4(32))
    plain = load(tmp_path / "bf16").model.layers[0].mlp.experts
    model.save_pretrained(tmp_path / "int4")
    tensors = load_file(tmp_path / "int4" / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe.experts."
    source = load_file(tmp_path / "bf16" / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    save_tensors(
        kept | {k: v for k, v in source.items() if k.startswith(prefix)}, tmp_path / "int4"
    )
    record = json.loads((tmp_path / "int4" / "config.json").read_text())
    record["quantization_config"]["ignore"].append(r"re:.*layers\.0\.")
    (tmp_path / "int4" / "config.json").write_text(json.dumps(record))
    mixed = load(tmp_path / "int4")
    names = [module.spec.scheme.name for module in packed_modules(mixed).values()]
    assert names == ["bf16_bf16", "int4g32_bf16"]
    assert torch.equal(mixed.model.layers[0].mlp.experts.packed.tensors["w2.data"], plain.down_proj)
    mixed.save_pretrained(tmp_path / "saved")
    assert_same(mixed, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


def test_multimodal_models_nest_their_language_model(tmp_path):
    text = {**tiny_model("qwen3_moe").config.to_dict(), "model_type": "qwen3_vl_moe_text"}
    text["rope_parameters"] |= {"mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    kind(config).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    auto = transformers.AutoModelForImageTextToText
    model = load(tmp_path / "bf16", weight_format=Int4(32), auto_class=auto)
    assert list(packed_modules(model)) == [
        f"model.language_model.layers.{layer}.mlp.experts" for layer in (0, 1)
    ]
    model.save_pretrained(tmp_path / "int4")
    assert_same(model, auto.from_pretrained(tmp_path / "int4"))


def test_from_pretrained_takes_the_config(tmp_path):
    tiny_model("olmoe", torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=MoeltenConfig(weight_format=MXFP4())
    )
    assert_same(model, load(tmp_path, weight_format=MXFP4()))
    assert use_moelten(model) == 2


def test_a_checkpoint_that_is_not_quantized_keeps_its_parameters(tmp_path):
    tiny_model("olmoe", torch.bfloat16).save_pretrained(tmp_path)
    model, expected = load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not packed_modules(model)
    assert model.get_experts_implementation() == {"": "moelten"}
    use_moelten(expected)
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(UnsupportedError, match="is not quantized; name a weight_format"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MoeltenConfig())


def test_packed_models_follow_dtype_copies_and_state_dicts(tmp_path):
    reference = kimi(tmp_path)
    model = load(tmp_path)
    before = logits(model)
    wide = copy.deepcopy(model).to(torch.float32)
    assert wide.model.layers[1].mlp.experts.spec.scheme.activations == FP32
    assert_decodes(wide, reference, BFLOAT16)
    assert relative(logits(wide), logits(reference)) < 5e-3
    assert wide.to(torch.float16).model.layers[1].mlp.experts.spec.scheme.activations == FP16
    again, bits = tensors_of(wide.to(torch.bfloat16)), tensors_of(model)
    assert again.keys() == bits.keys()
    assert all(torch.equal(part, bits[name]) for name, part in again.items())
    with pytest.raises(UnsupportedError, match="float64"):
        wide.to(torch.float64)
    other = copy.deepcopy(model)
    for module in packed_modules(other).values():
        module.packed.tensors["w2.data"].zero_()
    assert not torch.equal(logits(other), before)
    for assign in (False, True):
        twin = copy.deepcopy(other)
        twin.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(logits(twin), before)
    assert torch.equal(logits(model), before)


def test_packed_models_compile_to_one_graph(tmp_path):
    kimi(tmp_path)
    model = load(tmp_path)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(prompt()).logits, model(prompt()).logits)
    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match="inference only"):
        model(prompt()).logits.sum().backward()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"device_map": {"": "disk"}}, UnsupportedError, "offloaded to disk"),
        ({"dtype": torch.float64}, UnsupportedError, "float64"),
        ({"weight_format": "int4"}, TypeError, "weight_format: expected a moelten format"),
        ({"activation_format": MXFP4()}, UnsupportedError, "int4g32 weights run with"),
    ],
    ids=str,
)
def test_options_that_cannot_be_honoured_are_refused(options, error, message, tmp_path):
    kimi(tmp_path)
    with pytest.raises(error, match=message):
        load(tmp_path, **options)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"hidden_act": "gelu"}, UnsupportedError, "computes GeGLU"),
        ({"moe_intermediate_size": 64}, FormatError, "I=64, the files 8 with H=64, I=32"),
        ({"num_hidden_layers": 3}, CheckpointError, r"layers\.2\.mlp.* experts of layers \(1,\)"),
        ({"distributed_config": {"tp_size": 2}}, UnsupportedError, "not sharded by transformers"),
    ],
    ids=str,
)
def test_a_model_that_contradicts_its_files_is_refused(changes, error, message, tmp_path):
    kimi(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**record, "model_type": "deepseek_v3"}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(error, match=message):
        load(tmp_path, config=config)


def test_gpt_oss_in_other_formats_loads_and_is_not_saved(tmp_path):
    tiny_model("gpt_oss", torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path, weight_format=Int4(32))
    assert_packed(model)
    with pytest.raises(UnsupportedError, match="gpt_oss experts in int4g32_bf16 with w13_bias"):
        model.save_pretrained(tmp_path / "saved")
    load(tmp_path, weight_format=MXFP4()).save_pretrained(tmp_path / "saved")
    assert_packed(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


def test_llama4_is_refused(tmp_path):
    config = llama4_config()
    transformers.Llama4ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"Llama4ForCausalLM has no experts .*MoELayer"):
        load(tmp_path, weight_format=Int4(32))
