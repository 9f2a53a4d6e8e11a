"""Bit placements of the Hopper layout against an emulation of the lanes that read them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moelten import UnsupportedError, dequantize
from moelten.formats import (
    BF16,
    FP8,
    FP8_BLOCK,
    FP8_GROUP,
    FP8_ROW,
    FP8_TENSOR,
    FP16,
    INT8_BLOCK,
    INT8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    Int4,
)
from moelten.kernels import hopper_codes
from moelten.kernels.hopper_bits import Code, PairCode
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_layout import K_ORDER, HopperLayout
from moelten.qtensor import QTensor
from tests import hopper_lanes, ptx

INT4 = [Int4(group, zero) for group in (32, 64, 128, None) for zero in (False, True)]
SIXTEEN = [
    *INT4,
    Int4(32, scale="float16"),
    Int4(64, scale="float32"),
    MXFP4(),
    MXFP8(),
    NVFP4(),
    NVFP4(per_token=True),
    FP8_BLOCK,
    FP8_GROUP,
    FP8_ROW,
    FP8_TENSOR,
    FP8((128, 128), "e8m0"),
    FP8((1, 128), "bfloat16"),
    INT8_ROW,
    INT8_BLOCK,
]
PAIRS = [
    *((fmt, operand) for fmt in SIXTEEN for operand in ("bf16", "fp16")),
    (BF16, "bf16"),
    (FP16, "fp16"),
]
IDS = [f"{fmt.name}-{getattr(fmt, 'scale', '')}-{operand}" for fmt, operand in PAIRS]
SHAPES = [(2, 40, 384), (1, 70, 128), (136, 640), (24, 96), (2, 8, 80)]
CASES = [
    pytest.param(fmt, operand, shape, id=f"{name}-{'x'.join(map(str, shape))}")
    for (fmt, operand), name in zip(PAIRS, IDS, strict=True)
    for shape in SHAPES
    if not fmt.packed or shape[-1] % (fmt.block[1] or 1) == 0
]
CODES = {name: c for name, c in vars(hopper_codes).items() if isinstance(c, Code)}
PAIR_CODES = {name: c for name, c in vars(hopper_codes).items() if isinstance(c, PairCode)}


def emulate(q: QTensor, operand: str, many: bool = False) -> torch.Tensor:
    stored = storage(q.format, operand)
    parts = HopperLayout(operand).pack(q)
    return hopper_lanes.weights(parts, stored.many if many else stored, q.shape)


@pytest.mark.parametrize("fmt, operand, shape", CASES)
def test_lanes_decode_what_dequantize_does(fmt, operand, shape):
    q = hopper_lanes.matrix(fmt, shape)
    assert torch.equal(emulate(q, operand), dequantize(q, torch.float64))


@pytest.mark.parametrize("operand", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [32, 64])
def test_scales_that_fold_in_fp16_are_exact(group, operand):
    """Over 27 powers of two in a row, of both signs, from any power on; below they round."""
    for shape in ((2, 40, 384), (136, 640)):
        q = hopper_lanes.matrix(Int4(group), shape)
        g = torch.Generator().manual_seed(shape[-1])
        exponent = torch.randint(-26, 1, q.scale.shape, generator=g)
        exponent += torch.randint(-60, 60, (*q.scale.shape[:-1], 1), generator=g)
        q = replace(q, scale=torch.ldexp(q.scale.sign() * 1.9921875, exponent).bfloat16())
        assert torch.equal(emulate(q, operand, many=True), dequantize(q, torch.float64))
    scale = q.scale.clone()
    scale[:, 0] *= 2.0**-40
    small = replace(q, scale=scale)
    error = (emulate(small, operand, many=True) - dequantize(small, torch.float64)).abs()
    assert (error <= 2.0**-33 * small.scale.abs().amax(-1, keepdim=True).double()).all()


def test_which_groups_fold():
    """Whole rows have no use for it, and fp16 scales already fit."""
    for fmt in (*INT4, Int4(32, scale="float16")):
        folds = storage(fmt, "bf16").folds
        grouped = fmt.group_size in (32, 64, 128)
        assert folds == (grouped and fmt.scale == "bfloat16" and not fmt.zero_point)


@pytest.mark.parametrize("fmt, operand", PAIRS, ids=IDS)
def test_placements_lose_no_bit(fmt, operand):
    stored = storage(fmt, operand)
    assert sorted(stored.code.placement) == list(range(64))
    for pairs in (stored.pairs, stored.zeros):
        assert pairs is None or sorted(pairs.placement) == list(range(32))


# Instructions per 16-byte load: integer, then 16-bit arithmetic. A move between registers is free.
BUDGET = {
    "E2M1_BF16": (32, 16),  # 32 codes: 8 and 4 per 8
    "E2M1_BF16_SCALED": (32, 16),
    "E2M1_FP16": (44, 16),
    "E2M1_FP16_SCALED": (44, 16),
    "INT4_BF16": (28, 16),  # 7 and 4
    "INT4_BF16_ZERO": (28, 16),
    "INT4_FP16": (28, 16),
    "INT4_FP16_ZERO": (28, 16),
    "INT4_FP16_SCALED": (32, 18),  # 8 and 4, and one of a pair for each block
    "E4M3_BF16": (0, 32),  # 16 codes
    "E4M3_BF16_SCALED": (20, 8),
    "E4M3_FP16": (0, 8),
    "INT8_BF16": (20, 8),
    "INT8_FP16": (12, 8),
    "BF16": (0, 0),
    "FP16": (0, 0),
    # Words of row parameters.
    "E8M0_PAIRS": (3, 0),
    "BF16_PAIR": (2, 1),
    "E5M3_BF16_PAIRS": (3, 0),
    "E5M3_FP16_PAIRS": (3, 0),
    "ZERO_BF16_PAIRS": (7, 0),
    "ZERO_FP16_PAIRS": (7, 0),
}


def test_every_code_has_a_budget():
    assert set(BUDGET) == set(CODES) | set(PAIR_CODES)


@pytest.mark.parametrize("name", BUDGET)
def test_instructions_stay_in_the_budget(name):
    ptx_text = (CODES | PAIR_CODES)[name].ptx
    ops = [line.split(".")[0] for line in ptx_text.splitlines()]
    arithmetic = sum(ops.count(op) for op in ("mul", "sub", "fma", "cvt"))
    integer = sum(ops.count(op) for op in ("and", "lop3", "shf", "shl", "shr", "mad"))
    assert (integer, arithmetic) == BUDGET[name]


def mutants():
    """Faults that a wrong kernel or packer would have, and a matrix that must expose each."""
    yield "rows g and g + 8 swapped", MXFP4(), {"b": True}
    yield "rows g and g + 8 swapped", BF16, {"b": True}
    yield "steps swapped", Int4(32), {"s": True}
    yield "register pairs swapped", FP8_BLOCK, {"j": True}
    yield "scales one chunk late", MXFP4(), {"roll": "scale"}
    yield "scales one group late", Int4(32), {"roll": "scale"}
    yield "zero points one group late", Int4(32, True), {"roll": "zero"}
    yield "blocks one super-block late", FP8_BLOCK, {"roll": "scale"}
    yield "rows of scales one late", INT8_ROW, {"roll": "row_scale"}
    yield "gate for up", NVFP4(), {"gate": True}


@pytest.mark.parametrize(
    "fault, fmt, how", list(mutants()), ids=lambda v: v if type(v) is str else ""
)
def test_faults_are_seen(fault, fmt, how, monkeypatch):
    shape = (2, 40, 640)
    q = hopper_lanes.matrix(fmt, shape)
    want = dequantize(q, torch.float64)
    parts = HopperLayout().pack(q.map(lambda part: part.flip(0)) if "gate" in how else q)
    if name := how.get("roll"):
        parts[name] = parts[name].roll(1, 1 if parts[name].dim() == 3 else -1)
    axis = next((i for i, key in enumerate("bjs") if key in how), None)
    if axis is not None:
        honest = hopper_lanes.Lanes.registers

        def swapped(lanes, c):
            out = honest(lanes, c)
            return {k: out[tuple(x ^ (i == axis) for i, x in enumerate(k))] for k in out}

        monkeypatch.setattr(hopper_lanes.Lanes, "registers", swapped)
    assert not torch.equal(hopper_lanes.weights(parts, storage(fmt, "bf16"), shape), want), fault


def test_the_matrix_instruction_agrees_on_the_order_of_columns():
    """m16n8k16 by its definition, on what lanes load: the same sums as over plain columns."""
    q = hopper_lanes.matrix(BF16, (64, 64))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    lanes = hopper_lanes.Lanes(HopperLayout().pack(q), storage(BF16, "bf16"))
    out = torch.zeros(64, 8).double()
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    for c in (0, 1):
        # Lane (g, t) loads 16 bytes of token g: columns 32 c + 8 t and on, as four registers.
        loaded = torch.stack([x[32 * c + 8 * t + i, g] for i in range(8)], -1).view(32, 4, 2)
        registers = lanes.registers(c)
        for s in (0, 1):
            a, b = torch.zeros(4, 16, 16).double(), torch.zeros(16, 8).double()
            for j in (0, 1):
                for h in (0, 1):
                    k = 2 * t + h + 8 * j
                    b[k, g] = loaded[:, 2 * s + j, h].double()
                    for row in (0, 1):
                        word = registers[row, j, s][0, 0]
                        a[:, g + 8 * row, k] = ptx.decode_float(word >> 16 * h & 0xFFFF, "bf16")
            out += (a @ b).view(64, 8)
    want = q.data.double() @ x.double()
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_the_order_of_columns_is_the_documented_one():
    q = QTensor(torch.arange(64).repeat(64, 1).bfloat16(), BF16)
    lanes = hopper_lanes.Lanes(HopperLayout().pack(q), storage(BF16, "bf16"))
    for c in (0, 1):
        for (_, j, s), register in lanes.registers(c).items():
            for h in (0, 1):
                index = {"c": c, "t": lanes.t, "s": s, "j": j, "h": h}
                column = sum(step * index[name] for name, step in K_ORDER.items())
                got = ptx.decode_float(register >> 16 * h & 0xFFFF, "bf16")
                assert torch.equal(got, column.expand_as(got).double())


@pytest.mark.parametrize("fmt", [MXFP4(), MXFP8()], ids=lambda f: f.name)
@pytest.mark.parametrize("operand", ["bf16", "fp16"])
def test_every_e8m0_exponent_is_exact(fmt, operand):
    """One exponent per row, 0..254; then rows that span as many as one factor can serve."""
    data = hopper_lanes.matrix(fmt, (256, 64)).data
    exponents = torch.arange(256).clamp(max=254)
    scale = exponents[:, None].expand(-1, 2).clone()
    stored = storage(fmt, operand)
    span = 59 if stored.scale == "group" else 254 - stored.bias - stored.least
    scale[:, 1] = torch.minimum(scale[:, 0] + span, torch.tensor(254))
    q = QTensor(data, fmt, scale.to(torch.uint8))
    assert torch.equal(emulate(q, operand), dequantize(q, torch.float64))


@pytest.mark.parametrize("fmt", [MXFP4(), MXFP8()], ids=lambda f: f.name)
@pytest.mark.parametrize("live", [3, 100, 254])
def test_exponents_of_zeros_bind_nothing_and_come_back(fmt, live):
    q = hopper_lanes.matrix(fmt, (256, 64))
    minus_zero = 0x88 if fmt.packed else 0x80
    q.data.view(torch.uint8)[:, : q.data.shape[1] // 2] = minus_zero
    q.scale[:, 0], q.scale[:, 1] = torch.arange(256).clamp(max=254), live
    layout = HopperLayout()
    parts = layout.pack(q)
    assert torch.equal(layout.unpack(parts, fmt, q.shape).scale, q.scale)
    assert torch.equal(emulate(q, "bf16"), dequantize(q, torch.float64))


def test_pairs_without_a_storage_are_refused():
    for fmt, operand in ((FP16, "bf16"), (BF16, "fp16"), (Int4(48), "bf16")):
        with pytest.raises(UnsupportedError, match=f"no {fmt.name} weights as {operand} operands"):
            storage(fmt, operand)
