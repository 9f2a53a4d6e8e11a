"""Every checkpoint format reads back exactly what an independent decoder reads."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    AWQ,
    CASES,
    E4M3,
    INT4,
    args,
    ct,
    deepseek,
    gptq_config,
    modelopt,
    write_case,
)
from checkpoint_writers import (
    Sizes,
    Stored,
    blocks,
    nvfp4_modelopt,
    other_tensors,
    plain,
    save,
    write_config,
    write_model,
)

from moelten import SwiGLU, UnsupportedError, dequantize
from moelten.activations import GPT_OSS, GeGLU, ReLU2
from moelten.checkpoints import Checkpoint
from moelten.checkpoints.reader import SafetensorsFiles
from moelten.formats import BF16, FP8_GROUP, FP8_ROW, FP8_TENSOR, NVFP4


@pytest.mark.parametrize("name", CASES)
def test_reads_exactly_what_an_independent_decoder_reads(name, tmp_path):
    case = CASES[name]
    stored = write_case(tmp_path, name)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.layers == case.sizes.moe_layers
    assert checkpoint.format_name == case.name
    for layer in checkpoint.layers:
        spec = checkpoint.spec(layer)
        assert spec.scheme.name == case.scheme
        sizes = (spec.num_experts, spec.hidden_size, spec.intermediate_size)
        assert sizes == (case.sizes.experts, case.sizes.hidden, case.sizes.inter)
        whole = checkpoint.weights(layer)
        assert whole.spec == spec
        for e, expert in enumerate(checkpoint.experts(layer)):
            assert expert.first_expert == e
            for half, role in enumerate(("gate", "up", "down")):
                want = stored[layer, e, role].values
                for weights, index in ((expert, 0), (whole, e)):
                    matrix = weights.w2[index] if role == "down" else weights.w13[index]
                    got = dequantize(matrix, want.dtype)
                    got = got if role == "down" else got[half]
                    assert torch.equal(got, want), (layer, e, role)
            check_extras(
                expert, stored[layer, e, "gate"], stored[layer, e, "up"], stored[layer, e, "down"]
            )


def check_extras(expert, gate: Stored, up: Stored, down: Stored) -> None:
    expected = {}
    if "input_scale" in gate.extras:
        larger = max(gate.extras["input_scale"], up.extras["input_scale"])
        expected["w13_input_scale"] = larger.reshape(1)
        expected["w2_input_scale"] = down.extras["input_scale"].reshape(1)
    if "pre_scale" in gate.extras:
        expected["w13_pre_scale"] = gate.extras["pre_scale"][None]
        expected["w2_pre_scale"] = down.extras["pre_scale"][None]
    got = expert.extras()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_activation_formats_are_those_of_the_configuration(tmp_path):
    for name, fmt in (
        ("deepseek fp8", "float32"),
        ("deepseek ue8m0", "e8m0"),
        ("deepseek fp4", "e8m0"),
    ):
        write_case(tmp_path / name.replace(" ", "_"), name)
        spec = Checkpoint(tmp_path / name.replace(" ", "_")).spec(1)
        assert (spec.scheme.activations.block, spec.scheme.activations.scale) == ((1, 128), fmt)


def test_nvfp4_of_compressed_tensors_agrees_with_its_own_decompress(tmp_path):
    stored = write_case(tmp_path, "nvfp4")
    for e, expert in enumerate(Checkpoint(tmp_path).experts(1)):
        for half, role in enumerate(("gate", "up")):
            one = stored[1, e, role]
            assert torch.equal(expert.w13.data[0, half], one.tensors["weight_packed"])
            assert torch.equal(expert.w13.scale[0, half], one.tensors["weight_scale"])
            assert torch.allclose(one.values, one.extras["theirs"], rtol=2e-7, atol=0)
        # One global scale per half: they differ, and neither is folded into the other.
        assert expert.w13.global_scale.shape == (1, 2)
        assert expert.w13.global_scale[0, 0] != expert.w13.global_scale[0, 1]


@pytest.mark.parametrize("name", ["deepseek fp8", "deepseek ue8m0", "deepseek fp4", "mxfp8"])
def test_agrees_with_transformers_fp8_dequantization(name, tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    case = CASES[name]
    sizes = Sizes(hidden=256, inter=128, moe_layers=(3,), experts=2)
    stored = write_model(tmp_path, case.encode, sizes, **case.write)
    write_config(tmp_path, sizes, case.quantization, **case.config)
    for e, expert in enumerate(Checkpoint(tmp_path).experts(3)):
        codes, scale = stored[3, e, "down"].tensors.values()
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)
        assert torch.equal(dequantize(expert.w2[0]), theirs)


def gpt_oss(path: Path, sizes: Sizes, quantized: bool, **config: object) -> dict[str, torch.Tensor]:
    """A gpt-oss layer with random bytes (or bf16 matrices), and its biases."""
    g = torch.Generator().manual_seed(1)
    e, h, i = sizes.experts, sizes.hidden, sizes.inter
    own = {}
    for layer in sizes.moe_layers:
        base = f"model.layers.{layer}.mlp.experts."
        for name, n, k in (("gate_up_proj", 2 * i, h), ("down_proj", h, i)):
            own[f"{base}{name}_bias"] = torch.randn(e, n, generator=g).bfloat16()
            if quantized:
                shape = (e, n, k // 32)
                codes = torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.uint8)
                own[f"{base}{name}_blocks"] = codes
                own[f"{base}{name}_scales"] = torch.randint(117, 128, shape, generator=g).byte()
            else:
                own[f"{base}{name}"] = torch.randn(e, k, n, generator=g).bfloat16()
    save(path, own | other_tensors(sizes), shards=2)
    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    experts = {"num_experts": None, "num_local_experts": e, "model_type": "gpt_oss"}
    write_config(path, sizes, quantization if quantized else None, **experts, **config)
    return own


@pytest.mark.parametrize("quantized", [True, False])
def test_gpt_oss(quantized, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = Sizes(hidden=96, inter=64)
    own = gpt_oss(tmp_path, sizes, quantized)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.format_name == ("gpt-oss mxfp4" if quantized else "bf16")
    assert checkpoint.expert_tensor_names() == set(own)
    for layer in (1, 2):
        base = f"model.layers.{layer}.mlp.experts."
        assert checkpoint.spec(layer).activation == GPT_OSS
        assert checkpoint.spec(layer).extras == ("w13_bias", "w2_bias")
        assert checkpoint.spec(layer).scheme.name == ("mxfp4_bf16" if quantized else "bf16_bf16")
        if quantized:
            theirs = [
                convert_moe_packed_tensors(own[f"{base}{n}_blocks"], own[f"{base}{n}_scales"])
                for n in ("gate_up_proj", "down_proj")
            ]
        else:
            theirs = [own[f"{base}{n}"] for n in ("gate_up_proj", "down_proj")]
        gate_up, down = theirs  # [E, K, N], as the model multiplies
        weights = checkpoint.weights(layer)
        for e in range(3):
            w13 = dequantize(weights.w13[e], torch.bfloat16)
            assert torch.equal(w13[0], gate_up[e, :, 0::2].T)
            assert torch.equal(w13[1], gate_up[e, :, 1::2].T)
            assert torch.equal(dequantize(weights.w2[e], torch.bfloat16), down[e].T)
        bias = own[f"{base}gate_up_proj_bias"].float()
        assert torch.equal(weights.w13_bias, torch.stack((bias[:, 0::2], bias[:, 1::2]), 1))
        assert torch.equal(weights.w2_bias, own[f"{base}down_proj_bias"].float())


TINY = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 48},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
    },
}


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", TINY)
def test_what_transformers_saves(family, original, tmp_path):
    """One tensor per expert, as on the hub, or fused, as transformers 5 holds them."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shared = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](**shared, **heads, **TINY[family]), dtype=torch.float32
    )
    model.save_pretrained(tmp_path, save_original_format=original)
    checkpoint = Checkpoint(tmp_path)
    modules = dict(model.named_modules())
    assert checkpoint.layers == ((1,) if family == "deepseek_v3" else (0, 1))
    for layer in checkpoint.layers:
        experts = modules[f"model.layers.{layer}.mlp.experts"]
        gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        weights = checkpoint.weights(layer)
        if family == "gpt_oss":
            gate_up, down = gate_up.mT.unflatten(1, (48, 2)).movedim(2, 1), down.mT
        assert torch.equal(weights.w13.data.flatten(), gate_up.flatten())
        assert torch.equal(weights.w2.data, down)


def test_gpt_oss_parameters_come_from_the_configuration(tmp_path):
    gpt_oss(tmp_path, Sizes(hidden=64, inter=32), True, swiglu_limit=5.0, swiglu_alpha=1.5)
    assert Checkpoint(tmp_path).spec(1).activation == SwiGLU(1.5, 1.0, 5.0)


def fused(path: Path, hidden: int, inter: int, transposed: bool, **config: object) -> torch.Tensor:
    w13 = torch.randn(3, 2 * inter, hidden).bfloat16()
    w2 = torch.randn(3, hidden, inter).bfloat16()
    base = "model.language_model.layers.0.mlp.experts."
    tensors = {f"{base}gate_up_proj": w13, f"{base}down_proj": w2}
    save(path, {name: w.mT if transposed else w for name, w in tensors.items()})
    nested = {"hidden_size": hidden, "num_experts": 3, "hidden_act": "silu", "dtype": "bfloat16"}
    text = {"model_type": "qwen3_vl_moe_text", **nested, **config}
    record = {"model_type": "qwen3_vl_moe", "text_config": text}
    (path / "config.json").write_text(json.dumps(record))
    return torch.cat((w13.flatten(), w2.flatten()))


# H = 2I and H = I make one matrix square: the other still tells which way both lie.
@pytest.mark.parametrize("hidden, inter", [(64, 48), (96, 48), (48, 48)])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_in_both_orientations(hidden, inter, transposed, tmp_path):
    flat = fused(tmp_path, hidden, inter, transposed)
    weights = Checkpoint(tmp_path).weights(0)
    assert weights.w13.shape == (3, 2, inter, hidden)
    got = torch.cat((weights.w13.data.flatten(), weights.w2.data.flatten()))
    assert torch.equal(got, flat)


def test_fused_fp8_blocks(tmp_path):
    sizes = Sizes(hidden=256, inter=128, moe_layers=(0,))
    encode = blocks(E4M3, "weight_scale_inv")
    stored = {
        (e, r): encode(sizes.matrix(0, e, r)) for e in range(3) for r in ("gate", "up", "down")
    }
    own = {}
    for suffix, end in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
        part = {key: one.tensors[suffix] for key, one in stored.items()}
        halves = [torch.cat((part[e, "gate"], part[e, "up"])) for e in range(3)]
        own[f"model.layers.0.mlp.experts.gate_up_proj{end}"] = torch.stack(halves)
        downs = torch.stack([part[e, "down"] for e in range(3)])
        own[f"model.layers.0.mlp.experts.down_proj{end}"] = downs
    save(tmp_path, own)
    write_config(tmp_path, sizes, deepseek())
    for e, expert in enumerate(Checkpoint(tmp_path).experts(0)):
        for half, role in enumerate(("gate", "up")):
            assert torch.equal(dequantize(expert.w13[0])[half], stored[e, role].values)
        assert torch.equal(dequantize(expert.w2[0]), stored[e, "down"].values)


def test_ungated_experts(tmp_path):
    sizes = Sizes(hidden=32, inter=48)
    names = "backbone.layers.{layer}.mixer.experts.{expert}.{projection}.{suffix}"
    stored = write_model(tmp_path, plain(torch.bfloat16), sizes, names=names, roles=("up", "down"))
    config = {"model_type": "nemotron_h", "mlp_hidden_act": "relu2", "hidden_act": None}
    write_config(tmp_path, sizes, moe_latent_size=32, **{**config, "hidden_size": 999})
    weights = Checkpoint(tmp_path).weights(2)
    assert weights.activation == ReLU2()
    assert weights.w13.shape == (3, 1, 48, 32)
    assert torch.equal(weights.w13.data[1, 0], stored[2, 1, "up"].values)


def test_activations_of_families(tmp_path):
    sizes = Sizes(inter=48)
    write_model(tmp_path, plain(torch.bfloat16), sizes)
    for config, want in (
        ({"hidden_act": "gelu_pytorch_tanh"}, GeGLU("tanh")),
        ({"hidden_act": "gelu"}, GeGLU()),
        ({"model_type": "deepseek_v4", "swiglu_limit": 9.0}, SwiGLU(limit=9.0)),
        ({"model_type": "minimax_m3_vl", "hidden_act": "swigluoai"}, GPT_OSS),
        ({"model_type": "an_unknown_model"}, SwiGLU()),
    ):
        write_config(tmp_path, sizes, **config)
        assert Checkpoint(tmp_path).spec(1).activation == want


def test_ignored_layers_are_plain(tmp_path):
    """Layer 2 is bf16 in an int4 checkpoint: the configuration says so in four dialects."""
    sizes = Sizes(hidden=64, inter=64)
    first = write_model(tmp_path / "a", CASES["kimi int4"].encode, sizes)
    second = write_model(tmp_path / "b", plain(torch.bfloat16), sizes)
    shared = {}
    for part, layer in (("a", 1), ("b", 2)):
        files = SafetensorsFiles(tmp_path / part)
        shared |= {n: files.read(n) for n in files.tensors if f"layers.{layer}.mlp.experts" in n}
    save(tmp_path, shared)
    every = [
        f"model.layers.2.mlp.experts.{e}.{p}_proj" for e in range(3) for p in ("gate", "up", "down")
    ]
    for ignore in (["re:.*layers.2.*"], every, ["re:model.layers.2.mlp.experts.*"]):
        write_config(tmp_path, sizes, ct("pack-quantized", INT4, ignore=ignore))
        checkpoint = Checkpoint(tmp_path)
        assert checkpoint.format_name == "compressed-tensors pack-quantized int4 + bf16"
        assert [checkpoint.spec(n).scheme.name for n in (1, 2)] == ["int4g32_bf16", "bf16_bf16"]
        got = dequantize(checkpoint.expert(1, 2).w2[0], torch.bfloat16)
        assert torch.equal(got, first[1, 2, "down"].values)
        assert torch.equal(checkpoint.expert(2, 2).w2.data[0], second[2, 2, "down"].values)
    write_config(tmp_path, sizes, ct("pack-quantized", INT4, ignore=every[:-1]))
    with pytest.raises(UnsupportedError, match=r"layer 2 mixes formats: .*experts.2.down_proj"):
        Checkpoint(tmp_path).spec(2)


@pytest.mark.parametrize(
    "name, quantization",
    [
        ("deepseek fp8", deepseek(modules_to_not_convert=["model.layers.1.mlp.experts"])),
        ("gptq", gptq_config(dynamic={r"-:.*layers\.1\..*": {}})),
        ("awq", {**AWQ, "modules_to_not_convert": ["layers.1"]}),
        ("modelopt nvfp4", modelopt("NVFP4", exclude_modules=["model.layers.1*"])),
        ("modelopt nvfp4", modelopt("MIXED_PRECISION", quantized_layers={"lm_head": {}})),
        ("quark mxfp4", {"quant_method": "quark", "exclude": ["re:.*layers.1.*"]}),
    ],
)
def test_ignored_modules_in_every_dialect(name, quantization, tmp_path):
    sizes = Sizes(hidden=128, inter=128, moe_layers=(1,))
    stored = write_model(tmp_path, plain(torch.bfloat16), sizes)
    write_config(tmp_path, sizes, {**(CASES[name].quantization or {}), **quantization})
    if "modules_to_not_convert" in quantization and quantization["quant_method"] == "awq":
        write_config(tmp_path, sizes, {**AWQ, "modules_to_not_convert": ["model.layers.1"]})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.format_name == "bf16"
    assert torch.equal(checkpoint.expert(1, 1).w2.data[0], stored[1, 1, "down"].values)


def test_patterns_reach_modules_under_their_other_prefixes(tmp_path):
    """Files say language_model.model.layers, the configuration model.language_model.layers."""
    sizes = Sizes(hidden=128, inter=128, moe_layers=(1,))
    write_model(tmp_path, plain(torch.bfloat16), sizes, **CASES["multimodal"].write)
    for prefix in ("model.language_model.", "model.", "language_model.model.", ""):
        name = f"{prefix}layers.1.mlp.experts"
        for quantization in (
            deepseek(modules_to_not_convert=[name]),
            modelopt("NVFP4", exclude_modules=[f"{name}*"]),
            ct("pack-quantized", INT4, ignore=[f"re:^{name}.*"]),
        ):
            write_config(tmp_path, sizes, quantization)
            assert Checkpoint(tmp_path).format_name == "bf16"


def test_group_that_targets_the_experts_is_chosen(tmp_path):
    sizes = Sizes(hidden=64, inter=64, moe_layers=(1,))
    write_model(tmp_path, CASES["kimi int4"].encode, sizes)
    config = ct("mixed-precision", INT4)
    group = config["config_groups"]["group_0"]
    experts = {**group, "targets": ["re:.*experts.*"], "format": "pack-quantized"}
    fp8 = {
        "targets": ["Linear"],
        "weights": args(8, "float", "channel"),
        "format": "float-quantized",
    }
    config["config_groups"] = {"group_0": fp8, "group_1": experts}
    write_config(tmp_path, sizes, config)
    assert Checkpoint(tmp_path).spec(1).scheme.name == "int4g32_bf16"


@pytest.mark.parametrize("key", ["compression_config", "text", "quantize_config.json", "hf"])
def test_configurations_are_found_where_tools_leave_them(key, tmp_path):
    sizes = Sizes(hidden=64, inter=64, moe_layers=(1,))
    case = CASES[
        "gptq"
        if key == "quantize_config.json"
        else "modelopt w4a8 awq"
        if key == "hf"
        else "kimi int4"
    ]
    write_model(tmp_path, case.encode, sizes)
    text = {"hidden_act": "silu", "model_type": "kimi_k2", "quantization_config": case.quantization}
    if key == "compression_config":
        write_config(tmp_path, sizes, compression_config=case.quantization)
    elif key == "text":
        write_config(tmp_path, sizes, text_config=text)
    elif key == "hf":
        inner = {"quant_algo": "W4A8_AWQ", "group_size": 32, "exclude_modules": ["lm_head"]}
        write_config(tmp_path, sizes)
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": inner}))
    else:
        record = {k: v for k, v in case.quantization.items() if k != "quant_method"}
        write_config(tmp_path, sizes)
        (tmp_path / key).write_text(json.dumps(record))
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.format_name, checkpoint.spec(1).scheme.name) == (case.name, case.scheme)


@pytest.mark.parametrize("inside", [True, False])
def test_mixed_precision_by_layer(inside, tmp_path):
    sizes = Sizes(hidden=64, inter=48, moe_layers=(1,))
    write_model(tmp_path, nvfp4_modelopt(), sizes)
    table = {"model.layers.1.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}}
    table["model.layers.1.self_attn.q_proj"] = {"quant_algo": "FP8"}
    config = modelopt("MIXED_PRECISION")
    if inside:
        config["quantized_layers"] = table
    else:
        (tmp_path / "quant_cfg.json").write_text(json.dumps({"quantized_layers": table}))
    write_config(tmp_path, sizes, config)
    assert Checkpoint(tmp_path).format_name == "modelopt nvfp4"


def test_activation_format_is_the_users_choice(tmp_path):
    write_case(tmp_path, "modelopt nvfp4")
    for fmt in (BF16, NVFP4(per_token=True), FP8_ROW):
        spec = Checkpoint(tmp_path, activation_format=fmt).spec(1)
        assert (spec.scheme.activations, spec.extras) == (fmt, ())
    static = Checkpoint(tmp_path, activation_format=NVFP4()).spec(1)
    assert static.extras == ("w13_input_scale", "w2_input_scale")
    with pytest.raises(UnsupportedError, match=r"fp8tensor is static.*are for nvfp4"):
        Checkpoint(tmp_path, activation_format=FP8_TENSOR).spec(1)
    with pytest.raises(
        UnsupportedError, match=r"nvfp4_fp8g128 is not supported.*activation_format="
    ):
        Checkpoint(tmp_path, activation_format=FP8_GROUP).spec(1)
    write_case(tmp_path, "modelopt nvfp4 awq")
    spec = Checkpoint(tmp_path, activation_format=BF16).spec(1)
    assert spec.extras == ("w13_pre_scale", "w2_pre_scale")


@pytest.mark.parametrize("name", ["kimi int4", "deepseek w4afp8", "modelopt w4a8 awq", "bf16"])
def test_load_packs_what_expert_reads(name, tmp_path):
    write_case(tmp_path, name)
    checkpoint = Checkpoint(str(tmp_path))
    experts = checkpoint.load(2, backend="cpu")
    assert experts.spec == checkpoint.spec(2)
    unpacked, direct = experts.unpack(), checkpoint.weights(2)
    for part in ("w13", "w2"):
        ours, theirs = getattr(unpacked, part).tensors(), getattr(direct, part).tensors()
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert all(torch.equal(unpacked.extras()[n], t) for n, t in direct.extras().items())


def test_experts_stream_one_at_a_time(tmp_path, monkeypatch):
    """Every tensor is read once, for its own expert, and is gone before the next one's come."""
    read, alive = [], []
    original = SafetensorsFiles.read

    def watched(self, name, index=None):
        tensor = original(self, name, index)
        read.append(name)
        alive.append((name, weakref.ref(tensor)))
        return tensor

    write_case(tmp_path, "kimi int4")
    checkpoint = Checkpoint(tmp_path)
    monkeypatch.setattr(SafetensorsFiles, "read", watched)
    checkpoint.spec(1)
    assert not read, "a spec reads no values"
    for e, expert in enumerate(checkpoint.experts(1)):
        assert expert.spec.num_experts == 1
        assert all(f"layers.1.mlp.experts.{e}." in n for n, ref in alive if ref() is not None)
        del expert
        assert not [n for n, ref in alive if ref() is not None]
    own = {n for n in checkpoint.expert_tensor_names() if "layers.1." in n}
    assert sorted(read) == sorted(own)
    read.clear()
    checkpoint.expert(2, 1)
    assert {n.split(".")[2] + n.split(".")[5] for n in read} == {"21"}


def test_expert_tensor_names_are_the_routed_experts(tmp_path):
    write_case(tmp_path, "kimi int4")
    names = Checkpoint(tmp_path).expert_tensor_names()
    assert len(names) == 2 * 3 * 3 * 3
    assert all(".mlp.experts." in name and "mtp" not in name for name in names)
