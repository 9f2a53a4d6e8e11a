"""Every linear that is written decodes, in compressed-tensors' own hands, to what it was."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("compressed_tensors")

from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

from moelten import FormatError, UnsupportedError, dequantize, quantize
from moelten.checkpoints.layout import (
    _reciprocal,
    quantization_config,
    write_projection,
)
from moelten.formats import (
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
    Int4,
)
from moelten.qtensor import NVFP4_RANGE, QTensor
from tests.compressed_reader import EXACT, decompress


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
