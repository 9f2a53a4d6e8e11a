"""What the writer writes is what compressed-tensors, transformers and moelten itself read back.

Outside readers are the judges: compressed-tensors decompresses every layout, transformers loads
whole models, safetensors opens the files. vLLM is not among them; its conventions are checked as
names, dtypes and shapes.
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

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme  # noqa: E402
from compressed_tensors.utils.match import match_name  # noqa: E402

from moelten import CheckpointError, FormatError, UnsupportedError, dequantize, quantize  # noqa: E402
from moelten.checkpoints import Checkpoint  # noqa: E402
from moelten.checkpoints.layout import _reciprocal  # noqa: E402
from moelten.checkpoints.writer import (  # noqa: E402
    quantization_config,
    quantize_checkpoint,
    write_projection,
)
from moelten.formats import (  # noqa: E402
    BF16,
    FP8,
    FP8_BLOCK,
    FP8_GROUP,
    FP8_ROW,
    FP8_TENSOR,
    INT8_BLOCK,
    INT8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    Int4,
)
from moelten.quantize import NVFP4_RANGE, QTensor  # noqa: E402
from tests.checkpoint_cases import CASES, write_case  # noqa: E402
from tests.tiny_models import logits, tiny_model  # noqa: E402

EXACT = {
    "int4 g32": Int4(32),
    "int4 g64": Int4(64),
    "int4 g128": Int4(128),
    "int4 channel": Int4(),
    "int4 fp16 scales": Int4(32, scale="float16"),
    "int4 zero points": Int4(32, True),
    "int4 zero points channel": Int4(None, True),
    "mxfp4": MXFP4(),
    "mxfp8": MXFP8(),
    "fp8 tensor": FP8_TENSOR,
    "fp8 channel": FP8_ROW,
    "fp8 channel bf16 scales": FP8((1, None), "bfloat16"),
    "fp8 block": FP8_BLOCK,
    "int8": INT8_ROW,
}
# The tiny models have H = 64 and I = 32.
FITTING = {k: v for k, v in EXACT.items() if k not in ("int4 g64", "int4 g128")}
FITTING["nvfp4"] = NVFP4()
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


def decompress(fmt: Format, tensors: dict[str, Tensor], name: str) -> Tensor:
    """One linear, decompressed by compressed-tensors as its configuration says."""
    config = QuantizationConfig.model_validate(quantization_config(fmt, BF16, []))
    own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    compressor = BaseCompressor.get_value_from_registry(config.format)
    return compressor.decompress(own, config.config_groups["group_0"])["weight"]


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


@pytest.mark.parametrize("fmt", EXACT.values(), ids=EXACT)
def test_compressed_tensors_decodes_what_dequantize_does(fmt):
    w = torch.randn(136, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    w[3] = 0
    w[:, 5] *= 50
    matrix = quantize(w, fmt)
    weight = decompress(fmt, write_projection("a.experts.0.w1", matrix), "a.experts.0.w1")
    assert torch.equal(weight, dequantize(matrix).to(weight.dtype))


def test_nvfp4_differs_from_readers_by_the_place_of_one_rounding():
    w = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix = quantize(w, NVFP4())
    tensors = write_projection("x", matrix)
    weight = decompress(NVFP4(), tensors, "x")
    # The reader's own order, code * (scale / g), exactly; ours to a bf16 rounding.
    scale = (matrix.scale.float() / tensors["x.weight_global_scale"]).repeat_interleave(16, 1)
    codes = dequantize(QTensor(matrix.data, MXFP4(), torch.full((128, 16), 127, dtype=torch.uint8)))
    assert torch.equal(weight, (codes * scale).bfloat16())
    ours = dequantize(matrix)
    assert ((weight.float() - ours).abs() <= ours.abs() * 2**-8).all()
    # A power of two leaves nothing to round.
    power = quantize(w, NVFP4(), global_scale=torch.tensor(2.0**-13))
    again = decompress(NVFP4(), write_projection("x", power), "x")
    assert torch.equal(again, dequantize(power).bfloat16())


def test_nvfp4_global_scales_reload_bit_for_bit():
    amax = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) + 0.5
    amax = torch.cat([amax, torch.tensor([1e-38, 1e-30, 1e30, 3e38])])
    decode = 1.0 / (NVFP4_RANGE / amax).clamp(max=torch.finfo(torch.float32).max)
    data = torch.zeros(1, 8, dtype=torch.uint8)
    scale = torch.ones(1, 1).to(torch.float8_e4m3fn)
    stored = _reciprocal(decode)
    assert torch.equal(1.0 / stored, decode)
    assert not torch.equal(1.0 / (1.0 / decode), decode), "the naive reciprocal would do"
    one = write_projection("x", QTensor(data, NVFP4(), scale, None, decode[7]))
    assert one["x.weight_global_scale"].tolist() == [stored[7].item()]
    # Not every fp32 number is a reciprocal; the others move by one ulp at most.
    anything = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) + 0.5
    back = 1.0 / _reciprocal(anything)
    assert ((back - anything).abs() <= anything * 2**-23).all()
    assert not torch.equal(back, anything)


def test_tensor_names_dtypes_and_shapes():
    w = torch.randn(64, 128)
    shapes = {
        name: {k: (str(v.dtype)[6:], list(v.shape)) for k, v in write_projection("p", q).items()}
        for name, q in {
            "int4": quantize(w, Int4(32)),
            "zero": quantize(w, Int4(32, True)),
            "nvfp4": quantize(w, NVFP4()),
            "mxfp4": quantize(w, MXFP4()),
            "fp8": quantize(w, FP8_TENSOR),
            "int8": quantize(w, INT8_ROW),
        }.items()
    }
    int4 = {
        "p.weight_packed": ("int32", [64, 16]),
        "p.weight_scale": ("bfloat16", [64, 4]),
        "p.weight_shape": ("int64", [2]),
    }
    assert shapes == {
        "int4": int4,
        "zero": {**int4, "p.weight_zero_point": ("int32", [8, 4])},
        "nvfp4": {
            "p.weight_global_scale": ("float32", [1]),
            "p.weight_packed": ("uint8", [64, 64]),
            "p.weight_scale": ("float8_e4m3fn", [64, 8]),
        },
        "mxfp4": {"p.weight_packed": ("uint8", [64, 64]), "p.weight_scale": ("uint8", [64, 4])},
        "fp8": {"p.weight": ("float8_e4m3fn", [64, 128]), "p.weight_scale": ("float32", [1])},
        "int8": {"p.weight": ("int8", [64, 128]), "p.weight_scale": ("float32", [64, 1])},
    }
    assert write_projection("p", quantize(w, Int4(32)))["p.weight_shape"].tolist() == [64, 128]


@pytest.mark.parametrize("fmt", [BF16, INT8_BLOCK, FP8_GROUP, FP8((128, 128), "e8m0")], ids=str)
def test_formats_without_a_layout_are_refused(fmt):
    with pytest.raises(UnsupportedError, match=r"no layout|not supported"):
        quantization_config(fmt, BF16, [])
    with pytest.raises(UnsupportedError, match="no layout"):
        write_projection("x", quantize(torch.zeros(128, 128), fmt))


def test_write_projection_wants_one_matrix():
    with pytest.raises(FormatError, match=r"one matrix \[N, K\], got \[2, 32, 32\]"):
        write_projection("x", quantize(torch.zeros(2, 32, 32), Int4(32)))


def test_configuration_has_the_keys_of_published_checkpoints():
    config = quantization_config(Int4(32), BF16, ["lm_head"])
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(
    "fmt, activations, preset",
    [
        (Int4(128), FP8_ROW, "W4AFP8"),
        (Int4(128), INT8_ROW, "W4A8"),
        (Int4(128, True), BF16, "W4A16_ASYM"),
        (INT8_ROW, INT8_ROW, "W8A8"),
        (FP8_ROW, FP8_ROW, "FP8_DYNAMIC"),
        (FP8_BLOCK, FP8_GROUP, "FP8_BLOCK"),
        (NVFP4(), BF16, "NVFP4A16"),
        (MXFP4(), BF16, "MXFP4A16"),
        (MXFP4(), FP8_GROUP, "MXFP4XFP8"),
        (MXFP8(), MXFP8(), "MXFP8"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_configuration_means_the_preset_of_that_name(fmt, activations, preset):
    config = QuantizationConfig.model_validate(quantization_config(fmt, activations, []))
    ours, theirs = config.config_groups["group_0"], preset_name_to_scheme(preset, ["Linear"])
    keys = "num_bits type symmetric strategy group_size block_structure dynamic scale_dtype".split()
    for part in ("weights", "input_activations"):
        got, want = getattr(ours, part), getattr(theirs, part)
        assert (got is None) == (want is None)
        assert want is None or [getattr(got, k) for k in keys] == [getattr(want, k) for k in keys]


@pytest.mark.parametrize("activations", [FP8_TENSOR, NVFP4(), NVFP4(True)], ids=lambda f: f.name)
def test_static_activations_are_refused(activations):
    weights = NVFP4() if isinstance(activations, NVFP4) else Int4(32)
    with pytest.raises(UnsupportedError, match="calibrated"):
        quantization_config(weights, activations, [])


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


def test_codes_already_in_the_format_are_kept(sources, tmp_path):
    first = quantize_checkpoint(sources["qwen3_moe"], tmp_path / "int4", Int4(32))
    again = quantize_checkpoint(first.path, tmp_path / "again", Int4(32), activation_format=FP8_ROW)
    assert_equal_folders(again, first.path)
    assert set(again.layer_errors.values()) == {0.0}
    other = quantize_checkpoint(first.path, tmp_path / "mxfp4", MXFP4())
    assert all(error > 0.01 for error in other.layer_errors.values())
    config = json.loads((other.path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mxfp4-pack-quantized"


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


@pytest.mark.parametrize("name", CASES)
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
