"""The Hopper layout as a layout: what goes in comes back, for every format, size and expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moelten import FormatError, dequantize
from moelten.formats import (
    BF16,
    FP8,
    FP8_BLOCK,
    FP8_GROUP,
    FP8_ROW,
    FP8_TENSOR,
    FP16,
    INT8_BLOCK,
    INT8_GROUP,
    INT8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    Float,
    Int4,
    Scheme,
)
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_layout import HopperLayout
from moelten.packed import PackedExperts
from moelten.qtensor import QTensor, expand_blocks
from tests.cases import Case, make_weights
from tests.hopper_lanes import matrix, weights

FORMATS = [
    *(
        Int4(group, zero, scale)
        for group in (32, 64, 128, None)
        for zero in (False, True)
        for scale in ("bfloat16", "float16", "float32")
    ),
    *(FP8(fmt.blocks, scale) for fmt in (FP8_TENSOR, FP8_ROW, FP8_GROUP, FP8_BLOCK)
      for scale in ("float32", "bfloat16", "e8m0")),
    INT8_ROW, INT8_GROUP, INT8_BLOCK, MXFP4(), MXFP8(), NVFP4(), NVFP4(per_token=True), BF16, FP16,
]  # fmt: skip
RAGGED = [
    (2, 80, 2880), (2, 232, 192), (2, 1, 128), (1, 192, 320), (1856, 64), (40, 704),
    (2, 40, 640), (72, 1920),
]  # fmt: skip
OPERANDS = ("bf16", "fp16")


def raw(part: torch.Tensor) -> torch.Tensor:
    return part.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_same(got: QTensor, want: QTensor) -> None:
    assert got.format == want.format and got.tensors().keys() == want.tensors().keys()
    for name, part in want.tensors().items():
        other = got.tensors()[name]
        assert (other.dtype, other.shape) == (part.dtype, part.shape), name
        assert torch.equal(raw(other), raw(part)), name


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{getattr(f, 'scale', '')}")
@pytest.mark.parametrize("operand", OPERANDS)
def test_unpack_inverts_pack(fmt, operand):
    if isinstance(fmt, Float) and fmt.name != operand:
        operand = fmt.name
    layout, group = HopperLayout(operand), fmt.block[1] or 1
    shapes = [s for s in RAGGED if not fmt.packed or s[-1] % group == 0]
    assert len(shapes) >= 2
    for seed, shape in enumerate(shapes):
        q = matrix(fmt, shape, seed)
        parts = layout.pack(q)
        before = {name: part.clone() for name, part in parts.items()}
        assert_same(layout.unpack(parts, fmt, shape), q)
        assert all(torch.equal(raw(parts[name]), raw(before[name])) for name in parts)


# (data, then the other parts) of a matrix [2, 80, 320]: 3 tiles of 32 gate and 32 up rows, 5 chunks
# of 64 columns, 2 super-blocks of 256.
SHAPES = {
    MXFP4(): {"data": (3, 5, 1, 4, 32, 4), "scale": (3, 4, 4, 8, 2), "row_scale": (3, 64)},
    NVFP4(): {"data": (3, 5, 1, 4, 32, 4), "scale": (3, 4, 4, 8, 2, 2), "row_scale": (3, 64)},
    MXFP8(): {"data": (3, 5, 2, 4, 32, 4), "scale": (3, 4, 4, 8, 2), "row_scale": (3, 64)},
    Int4(32): {
        "data": (3, 5, 1, 4, 32, 4), "scale": (3, 4, 4, 8, 4, 2), "row_scale": (3, 64)
    },
    Int4(64, True): {
        "data": (3, 5, 1, 4, 32, 4), "scale": (3, 4, 4, 8, 2, 2), "zero": (3, 2, 4, 8, 1)
    },
    Int4(32, True): {
        "data": (3, 5, 1, 4, 32, 4), "scale": (3, 4, 4, 8, 4, 2), "zero": (3, 2, 4, 8, 2)
    },
    Int4(None, True): {
        "data": (3, 5, 1, 4, 32, 4), "row_scale": (3, 64), "zero": (3, 1, 4, 8, 1)
    },
    FP8_BLOCK: {"data": (3, 5, 2, 4, 32, 4), "scale": (3, 4, 2)},
    FP8_GROUP: {"data": (3, 5, 2, 4, 32, 4), "scale": (3, 4, 4, 8, 1, 2)},
    FP8_TENSOR: {"data": (3, 5, 2, 4, 32, 4), "row_scale": (3, 64)},
    INT8_ROW: {"data": (3, 5, 2, 4, 32, 4), "row_scale": (3, 64)},
    BF16: {"data": (3, 5, 4, 4, 32, 4)},
}  # fmt: skip


@pytest.mark.parametrize("fmt", SHAPES, ids=lambda f: f.name)
def test_parts_have_the_documented_shapes_and_are_contiguous(fmt):
    parts = HopperLayout().pack(matrix(fmt, (2, 80, 320)))
    assert {name: tuple(part.shape) for name, part in parts.items()} == SHAPES[fmt]
    for name, part in parts.items():
        assert part.is_contiguous(), name
        numbers = fmt.scale_dtype if isinstance(fmt, Int4) else torch.float32
        words = name in ("data", "zero") or storage(fmt, "bf16").pairs is not None
        wanted = torch.float32 if name == "row_scale" else torch.int32 if words else numbers
        assert part.dtype == wanted, name


@pytest.mark.parametrize("fmt", [MXFP4(), NVFP4(), Int4(32, True), FP8_BLOCK, INT8_ROW, BF16])
def test_packing_costs_few_bytes(fmt):
    q = matrix(fmt, (2, 2048, 1024))
    packed = sum(part.nbytes for part in HopperLayout().pack(q).values())
    assert packed <= 1.01 * q.nbytes


def test_float_scales_of_any_sign_and_size_survive():
    info = torch.finfo(torch.float32)
    values = torch.tensor([-0.0, 0.0, info.max, -info.max, info.tiny, 2.0**-149, -1.5, 1.0])
    for fmt, shape in ((INT8_ROW, (8, 64)), (FP8_GROUP, (8, 128)), (FP8_BLOCK, (1024, 128))):
        q = replace(matrix(fmt, shape), scale=values[:, None])
        unpacked = HopperLayout().unpack(HopperLayout().pack(q), fmt, shape)
        if fmt.block[1] is not None:
            # Codes under a scale of zero come back as zeros.
            rows = shape[0] // len(values)
            assert not raw(unpacked.data[: 2 * rows]).any()
            q, unpacked = q.rows(2 * rows, shape[0]), unpacked.rows(2 * rows, shape[0])
        assert_same(unpacked, q)


GROUPED = [Int4(32, False, "float32"), Int4(64, True), FP8_BLOCK, FP8_GROUP, INT8_BLOCK]


@pytest.mark.parametrize("fmt", [*GROUPED, NVFP4()], ids=str)
@pytest.mark.parametrize("operand", OPERANDS)
def test_codes_under_a_scale_of_zero_are_zeros(fmt, operand):
    q, layout = matrix(fmt, (256, 512)), HopperLayout(operand)
    g = torch.Generator().manual_seed(1)
    alive = torch.rand(q.scale.shape, generator=g) > 0.4
    q = replace(q, scale=torch.where(alive, q.scale.float(), 0).to(q.scale.dtype))
    parts = layout.pack(q)
    unpacked = layout.unpack(parts, fmt, q.shape)
    assert torch.equal(dequantize(unpacked), dequantize(q))
    assert torch.equal(weights(parts, storage(fmt, operand), q.shape), dequantize(q, torch.float64))
    ones = torch.ones(q.scale.shape).to(q.scale.dtype)
    values, wanted = (dequantize(replace(each, scale=ones)) for each in (unpacked, q))
    dead = expand_blocks(~alive, fmt.block, q.shape)
    assert torch.equal(values, torch.where(dead, 0, wanted))


@pytest.mark.parametrize("fmt", GROUPED, ids=str)
def test_scales_too_far_apart_are_refused(fmt):
    q = matrix(fmt, (256, 512))
    q.scale[:] = 1
    q.scale[1, 2] = 2.0**-60
    with pytest.raises(FormatError, match=r"1 .* scales, the first at \[1, 2\], are not over"):
        HopperLayout().pack(q)
    q.scale[1, 2] = 2.0**-59
    assert_same_after_packing(q)
    # Nothing but zeros may lie under any scale that is small.
    q.scale[1, 2] = 2.0**-70
    data = torch.zeros_like(q.data.view(torch.uint8)).view(q.data.dtype)
    zero = None if q.zero is None else torch.zeros_like(q.zero)
    assert_same_after_packing(replace(q, data=data, zero=zero))


def assert_same_after_packing(q: QTensor) -> None:
    assert_same(HopperLayout().unpack(HopperLayout().pack(q), q.format, q.shape), q)


CASES = [
    Case(Scheme(MXFP4(), BF16), 3, hidden_size=288, intermediate_size=192),
    Case(Scheme(Int4(32, True), BF16), 3, hidden_size=320, intermediate_size=96, biases=True),
    Case(Scheme(NVFP4(), BF16), 3, hidden_size=80, intermediate_size=192),
    Case(Scheme(FP8_BLOCK, BF16), 3, hidden_size=192, intermediate_size=320),
    Case(Scheme(INT8_ROW, BF16), 3, hidden_size=80, intermediate_size=232),
    Case(Scheme(BF16, BF16), 3, hidden_size=72, intermediate_size=40),
]


def same_weights(got, want) -> bool:
    return got.spec == want.spec and all(
        torch.equal(raw(a), raw(b))
        for name in ("w13", "w2")
        for a, b in zip(
            getattr(got, name).tensors().values(),
            getattr(want, name).tensors().values(),
            strict=True,
        )
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.scheme.name)
def test_experts_pack_unpack_update_and_shard(case):
    weights = make_weights(case)
    packed = PackedExperts.pack(weights.spec, weights.experts(), HopperLayout(), "cpu")
    assert same_weights(packed.unpack(), weights)
    other = make_weights(replace(case, seed=7)).expert_range(1, 2)
    pointers = {name: part.data_ptr() for name, part in packed.tensors.items()}
    packed.update_expert(1, other)
    assert pointers == {name: part.data_ptr() for name, part in packed.tensors.items()}
    assert same_weights(packed.unpack_expert(1), packed.unpack().expert_range(1, 2))
    assert torch.equal(packed.unpack_expert(1).w2.data, other.w2.data)
    assert same_weights(packed.unpack_expert(2), weights.expert_range(2, 3))
    unpacked = packed.unpack()
    for rank in (0, 1):
        assert same_weights(packed.shard(rank, 2).unpack(), unpacked.shard(rank, 2))


def test_nan_codes_are_refused():
    q = matrix(FP8_BLOCK, (128, 128))
    q.data.view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(FormatError, match=r"1 e4m3 codes are NaN, the first at \[3, 5\]"):
        HopperLayout().pack(q)


def test_negative_nvfp4_scales_are_refused():
    q = matrix(NVFP4(), (64, 64))
    scale = q.scale.float()
    scale[5, 2] = -0.0
    HopperLayout().pack(replace(q, scale=scale.to(q.scale.dtype)))
    scale[3, 1] = -1.0
    with pytest.raises(FormatError, match=r"1 nvfp4 scales are negative, the first at \[3, 1\]"):
        HopperLayout().pack(replace(q, scale=scale.to(q.scale.dtype)))


def test_zero_points_outside_the_format_are_refused():
    q = matrix(Int4(32, True), (64, 64))
    q.zero[0, 1] = 8
    with pytest.raises(FormatError, match=r"zero points are -8..7, got -8..8"):
        HopperLayout().pack(q)


@pytest.mark.parametrize("fmt, span", [(MXFP4(), 134), (MXFP8(), 132)], ids=str)
def test_rows_whose_scales_span_too_much_are_refused(fmt, span):
    q = matrix(fmt, (64, 64))
    q.scale[:], q.scale[9, 0] = 200, 200 - span
    with pytest.raises(FormatError, match=r"1 rows, the first \[9\], have mxfp. scales that span"):
        HopperLayout().pack(q)
    q.scale[9, 0] += 1
    unpacked = HopperLayout().unpack(HopperLayout().pack(q), fmt, q.shape)
    assert torch.equal(dequantize(unpacked), dequantize(q))


def test_the_layout_of_each_operand_has_a_name():
    names = [HopperLayout(operand).name for operand in ("bf16", "fp16")]
    assert names == ["hopper", "hopper-fp16"]


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [MXFP4(), Int4(32, True), NVFP4(), FP8_BLOCK, BF16], ids=str)
def test_packing_on_a_gpu_is_the_same_and_needs_little(fmt):
    q = matrix(fmt, (2, 2048, 7168))
    layout, there = HopperLayout(), q.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    parts = layout.pack(there)
    assert torch.cuda.max_memory_allocated() - held <= 1.5 * q.nbytes + (256 << 20)
    for name, part in layout.pack(q).items():
        assert torch.equal(raw(parts[name].cpu()), raw(part)), name
    assert_same(layout.unpack(parts, fmt, q.shape).to("cpu"), q)
