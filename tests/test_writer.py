"""What the writer writes is what transformers, compressed-tensors and moelten itself read back.

Outside readers are the judges: transformers loads whole models, compressed-tensors decompresses,
safetensors opens the files. vLLM is not among them; `test_layout` has its conventions as names,
dtypes and shapes.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from compressed_tensors.utils.match import match_name  # noqa: E402

from moelten import CheckpointError, FormatError, UnsupportedError, dequantize, quantize  # noqa: E402
from moelten.checkpoints import Checkpoint  # noqa: E402
from moelten.checkpoints.writer import quantize_checkpoint  # noqa: E402
from moelten.formats import (  # noqa: E402
    FP8_BLOCK,
    FP8_ROW,
    FP8_TENSOR,
    INT8_ROW,
    MXFP4,
    NVFP4,
    Format,
    Int4,
)
from moelten.qtensor import QTensor  # noqa: E402
from tests.checkpoint_cases import CASES, write_case  # noqa: E402
from tests.compressed_reader import EXACT, decompress  # noqa: E402
from tests.tiny_models import logits, tiny_model  # noqa: E402

# The tiny models have H = 64 and I = 32.
FITTING = {k: v for k, v in EXACT.items() if k not in ("int4 g64", "int4 g128")}
FITTING["nvfp4"] = NVFP4()
# Sources that take no long to write; the larger ones are FP8 blocks and W4AFP8, which have tests.
SMALL = [name for name, case in CASES.items() if case.sizes.hidden * case.sizes.inter < 2**14]
ROUTED = re.compile(r"\.experts\.\d+\.")
PROJECTIONS = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "deepseek_v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Saved bf16 models by family; tests only read them."""
    root = tmp_path_factory.mktemp("sources")
    for family in (*PROJECTIONS, "gpt_oss"):
        tiny_model(family, torch.bfloat16).save_pretrained(root / family)
        (root / family / "tokenizer.json").write_text('{"version": "1.0"}')
    return {path.name: path for path in root.iterdir()}


def read_all(path: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def expected_linears(source: Path, family: str, fmt: Format) -> dict[str, QTensor]:
    """Every linear of the experts by name: gate and up share what spans a matrix, not a block."""
    block, (gate, up, down) = PROJECTIONS[family]
    tensors = read_all(source)
    linears = {}
    for name, w in tensors.items():
        if ROUTED.search(name) and name.endswith(f".{down}.weight"):
            linears[name.removesuffix(".weight")] = quantize(w, fmt)
            stem = name.removesuffix(f"{down}.weight")
            w13 = torch.cat([tensors[f"{stem}{p}.weight"] for p in (gate, up)])
            both = quantize(w13, fmt)
            if fmt == FP8_BLOCK:
                both = quantize(w13.unflatten(0, (2, -1)), fmt)
                linears[f"{stem}{gate}"], linears[f"{stem}{up}"] = both[0], both[1]
            else:
                linears[f"{stem}{gate}"] = both.rows(0, len(w13) // 2)
                linears[f"{stem}{up}"] = both.rows(len(w13) // 2, len(w13))
    assert linears and all(f".{block}." in name for name in linears)
    return linears


def assert_same(got: QTensor, want: QTensor) -> None:
    assert got.format == want.format
    for part, tensor in want.tensors().items():
        assert torch.equal(got.tensors()[part].float(), tensor.float()), part


@pytest.mark.parametrize("fmt", FITTING.values(), ids=FITTING)
def test_moelten_reads_back_every_bit(sources, tmp_path, fmt):
    source = sources["mixtral"]
    result = quantize_checkpoint(source, tmp_path / "q", fmt)
    target, tensors = Checkpoint(tmp_path / "q"), read_all(source)
    wanted = expected_linears(source, "mixtral", fmt)
    assert target.layers == (0, 1)
    for layer in target.layers:
        error = norm = 0.0
        for e, expert in enumerate(target.experts(layer)):
            linears = {"w1": expert.w13[0][0], "w3": expert.w13[0][1], "w2": expert.w2[0]}
            for projection, got in linears.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{e}.{projection}"
                assert_same(got, wanted[name])
                w = tensors[f"{name}.weight"].double()
                error += (dequantize(got).double() - w).square().sum().item()
                norm += w.square().sum().item()
        assert result.layer_errors[layer] == pytest.approx((error / norm) ** 0.5, rel=1e-6)
        assert 0.002 < result.layer_errors[layer] < 0.15


@pytest.mark.parametrize(
    "family, fmt",
    [
        ("qwen3_moe", Int4(32)),
        ("qwen3_moe", MXFP4()),
        ("qwen3_moe", FP8_ROW),
        ("mixtral", Int4(32)),
        ("mixtral", MXFP4()),
        ("deepseek_v3", Int4()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_transformers_loads_exactly_the_quantized_weights(sources, tmp_path, family, fmt):
    source, (_, (gate, up, down)) = sources[family], PROJECTIONS[family]
    quantize_checkpoint(source, tmp_path / "q", fmt)
    model = load(tmp_path / "q")
    original = load(source).state_dict()
    wanted = {
        name: dequantize(matrix).bfloat16()
        for name, matrix in expected_linears(source, family, fmt).items()
    }
    experts = 0
    for name, value in model.state_dict().items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            prefix = name.rpartition(".")[0].replace(".mlp.", f".{PROJECTIONS[family][0]}.", 1)
            prefix = prefix.replace(".experts.experts", ".experts")
            roles = (gate, up) if "gate_up" in name else (down,)
            for e, got in enumerate(value):
                want = torch.cat([wanted[f"{prefix}.{e}.{role}"] for role in roles])
                assert torch.equal(got, want), f"{name} of expert {e}"
                experts += len(roles)
        else:
            assert torch.equal(value, original[name]), name
    assert experts == len(wanted)
    assert logits(model).isfinite().all()
    with torch.no_grad():
        tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 6)


def load(path: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def test_nvfp4_with_the_decompressor_as_transformers_drops_its_global_scale(sources, tmp_path):
    source = sources["qwen3_moe"]
    quantize_checkpoint(source, tmp_path / "q", NVFP4())
    tensors = read_all(tmp_path / "q")
    for name, matrix in expected_linears(source, "qwen3_moe", NVFP4()).items():
        got = decompress(NVFP4(), tensors, name).float()
        want = dequantize(matrix)
        assert ((got - want).abs() <= want.abs() * 2**-8).all()
        if name.endswith(".gate_proj"):
            other = name.replace("gate_proj", "up_proj")
            both = [tensors[f"{n}.weight_global_scale"] for n in (name, other)]
            assert torch.equal(*both)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_ignore_excludes_all_but_the_routed_experts(sources, tmp_path, family):
    quantize_checkpoint(sources[family], tmp_path / "q", Int4(32))
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]

    def ignored(module: str) -> bool:
        return any(match_name(module, pattern) for pattern in config["ignore"])

    names = {name.rpartition(".")[0] for name in read_all(sources[family])}
    # What engines make of them: fused linears, other prefixes, the layer of experts as one module.
    names |= {f"model.layers.1.{m}" for m in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.gate")}
    names |= {f"language_model.{name}" for name in names} | {"lm_head", "visual.blocks.0.mlp.fc1"}
    assert {n for n in names if not ignored(n)} == {n for n in names if ".experts." in n}
    assert any("shared_experts" in name for name in names) == (family == "deepseek_v3")
    assert not ignored("model.layers.1.mlp.experts")


def test_everything_else_is_copied(sources, tmp_path):
    source, target = sources["deepseek_v3"], tmp_path / "q"
    result = quantize_checkpoint(source, target, MXFP4(), activation_format=FP8_ROW)
    before, after = read_all(source), read_all(target)
    others = {name for name in before if not ROUTED.search(name)}
    assert others == {name for name in after if not ROUTED.search(name)} and len(others) > 20
    for name in others:
        assert torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
    assert result.bytes_before == sum(t.nbytes for t in before.values())
    assert result.bytes_after == sum(t.nbytes for t in after.values()) < result.bytes_before
    for file in ("generation_config.json", "tokenizer.json"):
        assert (target / file).read_bytes() == (source / file).read_bytes()
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, target))
    inputs = new.pop("quantization_config")["config_groups"]["group_0"]["input_activations"]
    assert old == new
    assert inputs["strategy"] == "token" and inputs["dynamic"] and inputs["type"] == "float"
    assert Checkpoint(target).spec(1).scheme.name == "mxfp4_fp8"


def test_shards_are_indexed_and_no_larger_than_asked(sources, tmp_path):
    target = tmp_path / "q"
    result = quantize_checkpoint(sources["qwen3_moe"], target, Int4(32), max_shard_bytes=20_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000
        assert {k for k, v in index["weight_map"].items() if v == file.name} == tensors.keys()
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == result.bytes_after
    assert_equal_folders(
        quantize_checkpoint(sources["qwen3_moe"], tmp_path / "r", Int4(32)), target
    )


def assert_equal_folders(result, other: Path) -> None:
    one, two = read_all(result.path), read_all(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_progress_counts_to_the_end(sources, tmp_path):
    seen: list[tuple[int, int, str]] = []
    quantize_checkpoint(
        sources["mixtral"], tmp_path / "q", Int4(32), progress=lambda *step: seen.append(step)
    )
    others = [name for name in read_all(sources["mixtral"]) if not ROUTED.search(name)]
    assert [done for done, _, _ in seen] == list(range(len(others) + 2 * 4))
    assert {total for _, total, _ in seen} == {len(seen)}
    assert seen[-1][2] == "layer 1, expert 3"


def test_one_expert_is_read_at_a_time(sources, tmp_path, monkeypatch):
    from moelten.checkpoints.reader import SafetensorsFiles

    sizes = []
    read = SafetensorsFiles.read
    monkeypatch.setattr(
        SafetensorsFiles, "read", lambda *a: sizes.append(read(*a).nbytes) or read(*a)
    )
    quantize_checkpoint(sources["qwen3_moe"], tmp_path / "q", Int4(32))
    assert len(sizes) == 2 * 8 * 3 and set(sizes) == {2 * 64 * 32}


def test_a_folder_in_use_is_not_touched(sources, tmp_path):
    target = tmp_path / "q"
    target.mkdir()
    quantize_checkpoint(sources["mixtral"], target, Int4(32))  # an empty folder is free to take
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(CheckpointError, match="not empty"):
        quantize_checkpoint(sources["mixtral"], target, MXFP4())
    with pytest.raises(CheckpointError, match="not empty"):
        quantize_checkpoint(sources["mixtral"], sources["mixtral"], MXFP4())
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        quantize_checkpoint(sources["mixtral"], file, MXFP4())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "q"]


def test_failing_half_way_leaves_nothing(sources, tmp_path):
    def stop(done: int, total: int, text: str) -> None:
        if text == "layer 1, expert 2":
            assert any(tmp_path.iterdir()), "writing has begun"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(sources["mixtral"], tmp_path / "q", Int4(32), progress=stop)
    assert not any(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(sources, tmp_path):
    source = copy_model(sources["mixtral"], tmp_path / "source")
    tensors = read_all(source)
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 1: .*NaN"):
        quantize_checkpoint(source, tmp_path / "q", Int4(32))
    assert not (tmp_path / "q").exists()


def test_a_group_that_does_not_divide_names_those_that_do(sources, tmp_path):
    with pytest.raises(FormatError, match=r"'intermediate_size': 32.*divide both: 32, or one"):
        quantize_checkpoint(sources["qwen3_moe"], tmp_path / "deep" / "q", Int4(64))
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_noticed_first(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="1000 free"):
        quantize_checkpoint(sources["mixtral"], tmp_path / "q", Int4(32))
    assert not any(tmp_path.iterdir())


def test_fused_experts_without_a_reader_of_linears_are_refused(sources, tmp_path):
    with pytest.raises(UnsupportedError, match="w13_bias"):
        quantize_checkpoint(sources["gpt_oss"], tmp_path / "q", MXFP4())
    source = fuse(sources["qwen3_moe"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl_moe"}))
    with pytest.raises(UnsupportedError, match="'qwen3_vl_moe' are stored fused"):
        quantize_checkpoint(source, tmp_path / "q", MXFP4())
    assert not (tmp_path / "q").exists()


def test_fused_experts_are_split_where_transformers_loads_linears(sources, tmp_path):
    source = fuse(sources["qwen3_moe"], tmp_path / "source")
    assert not any(ROUTED.search(name) for name in read_all(source))
    split = quantize_checkpoint(source, tmp_path / "split", Int4(32))
    quantize_checkpoint(sources["qwen3_moe"], tmp_path / "whole", Int4(32))
    assert_equal_folders(split, tmp_path / "whole")


def fuse(source: Path, target: Path) -> Path:
    """The same model with its experts stored as transformers holds them."""
    load(source).save_pretrained(target, save_original_format=False)
    return target


def copy_model(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.mark.parametrize("fmt", [Int4(32), NVFP4(), FP8_TENSOR], ids=lambda fmt: fmt.name)
def test_codes_already_in_the_format_are_kept(sources, tmp_path, fmt):
    first = quantize_checkpoint(sources["qwen3_moe"], tmp_path / "first", fmt)
    again = quantize_checkpoint(first.path, tmp_path / "again", fmt, activation_format=FP8_ROW)
    assert_equal_folders(again, first.path)
    assert set(again.layer_errors.values()) == {0.0}
    other = quantize_checkpoint(first.path, tmp_path / "mxfp4", MXFP4())
    assert all(error > 0.01 for error in other.layer_errors.values())


def test_global_scales_that_differ_between_gate_and_up_become_one(tmp_path):
    write_case(tmp_path / "source", "nvfp4")
    old = read_all(tmp_path / "source")
    result = quantize_checkpoint(tmp_path / "source", tmp_path / "q", NVFP4())
    new = read_all(tmp_path / "q")
    gates = [name for name in new if name.endswith(".gate_proj.weight_global_scale")]
    assert len(gates) > 3
    for gate in gates:
        up = gate.replace("gate_proj", "up_proj")
        assert not torch.equal(old[gate], old[up]) and torch.equal(new[gate], new[up])
    assert all(0 < error < 0.1 for error in result.layer_errors.values())


def test_a_nested_description_of_the_source_is_replaced(sources, tmp_path):
    source = quantize_checkpoint(sources["qwen3_moe"], tmp_path / "source", Int4(32)).path
    config = json.loads((source / "config.json").read_text())
    nested = {"model_type": "some_vl_moe", "text_config": config}
    (source / "config.json").write_text(json.dumps(nested))
    (source / "hf_quant_config.json").write_text("{}")
    quantize_checkpoint(source, tmp_path / "q", MXFP4())
    new = json.loads((tmp_path / "q" / "config.json").read_text())
    assert new["quantization_config"]["format"] == "mxfp4-pack-quantized"
    assert new["text_config"] == {k: v for k, v in config.items() if k != "quantization_config"}
    assert not (tmp_path / "q" / "hf_quant_config.json").exists()


def test_quantized_linears_outside_the_experts_are_decoded(sources, tmp_path):
    """DeepSeek stores attention and shared experts in FP8 blocks as well."""
    source = copy_model(sources["deepseek_v3"], tmp_path / "source")
    tensors = {}
    decoded = {}
    for name, w in read_all(source).items():
        if re.search(r"layers.*(_proj|_a|_b|_mqa)\.weight$", name):
            matrix = quantize(w, FP8_BLOCK)
            tensors |= {name: matrix.data, f"{name}_scale_inv": matrix.scale}
            decoded[name] = dequantize(matrix, torch.bfloat16)
        else:
            tensors[name] = decoded[name] = w
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": fp8}))
    quantize_checkpoint(source, tmp_path / "q", Int4(32))
    others = {k: v for k, v in read_all(tmp_path / "q").items() if not ROUTED.search(k)}
    assert others.keys() == {name for name in decoded if not ROUTED.search(name)}
    assert all(torch.equal(value, decoded[name]) for name, value in others.items())
    assert tensors["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    model = load(tmp_path / "q")
    assert torch.equal(
        model.model.layers[1].self_attn.o_proj.weight,
        decoded["model.layers.1.self_attn.o_proj.weight"],
    )
    # Experts are quantized from their exact values, before any rounding to bf16.
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    w = dequantize(QTensor(tensors[name], FP8_BLOCK, tensors[f"{name}_scale_inv"]))
    got = model.model.layers[1].mlp.experts.down_proj[2]
    assert torch.equal(got, dequantize(quantize(w, Int4(32)), torch.bfloat16))


@pytest.mark.parametrize("name", SMALL)
def test_every_format_that_can_be_read_can_be_requantized(name, tmp_path):
    write_case(tmp_path / "source", name)
    quantize_checkpoint(tmp_path / "source", tmp_path / "q", INT8_ROW)
    source, target = Checkpoint(tmp_path / "source"), Checkpoint(tmp_path / "q")
    assert source.layers == target.layers
    layer = source.layers[-1]
    for old, new in zip(source.experts(layer), target.experts(layer), strict=True):
        for side in ("w13", "w2"):
            exact, pre_scale = dequantize(getattr(old, side)), getattr(old, f"{side}_pre_scale")
            if pre_scale is not None:
                exact = exact * pre_scale.unflatten(0, (-1, *[1] * (exact.dim() - 2)))
            if old.w2.format == INT8_ROW:
                assert_same(getattr(new, side), getattr(old, side))
            else:
                assert_same(getattr(new, side), quantize(exact, INT8_ROW))


def test_w4afp8_keeps_fp8_blocks_outside_the_experts(tmp_path):
    source = tmp_path / "source"
    write_case(source, "deepseek w4afp8")
    attention = quantize(torch.randn(192, 256), FP8_BLOCK)
    name = "model.layers.0.self_attn.o_proj.weight"
    extra = {name: attention.data, f"{name}_scale_inv": attention.scale}
    save_file(read_all(source) | extra, tmp_path / "model.safetensors")
    for file in (*source.glob("*.safetensors"), *source.glob("*.index.json")):
        file.unlink()
    (tmp_path / "model.safetensors").rename(source / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "q", Int4(128), activation_format=FP8_ROW)
    after = read_all(tmp_path / "q")
    assert torch.equal(after[name], dequantize(attention, torch.bfloat16))
    assert f"{name}_scale_inv" not in after
    assert (
        Checkpoint(tmp_path / "q").spec(Checkpoint(source).layers[0]).scheme.name == "int4g128_fp8"
    )


def test_scales_that_no_configuration_explains_are_refused(sources, tmp_path):
    source = copy_model(sources["mixtral"], tmp_path / "source")
    tensors = read_all(source)
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.ones(1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"self_attn.q_proj has .*does not say how"):
        quantize_checkpoint(source, tmp_path / "q", Int4(32))


def test_experts_that_are_not_quantized_are_ignored_by_name(sources, tmp_path):
    source = copy_model(sources["mixtral"], tmp_path / "source")
    block = "model.layers.0.block_sparse_moe.experts"
    extra = {
        f"{block}.e_score_correction_bias": torch.ones(4),
        f"{block}.norm.weight": torch.ones(4, 4),
        "model.mtp.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(4, 4),
        "mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 4),
    }
    tensors = read_all(source) | extra
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(source, tmp_path / "q", Int4(32))
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    ignored = {
        module: any(match_name(module, pattern) for pattern in config["ignore"])
        for module in (block, f"{block}.0.w1", *(name.rpartition(".")[0] for name in extra))
    }
    assert ignored == {
        block: False,
        f"{block}.0.w1": False,
        f"{block}.norm": True,
        "model.mtp.layers.0.mlp.experts.0.gate_proj": True,
        "mtp.layers.0.mlp.experts": True,
    }
    after = read_all(tmp_path / "q")
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())
    assert Checkpoint(tmp_path / "q").spec(0).scheme.name == "int4g32_bf16"
