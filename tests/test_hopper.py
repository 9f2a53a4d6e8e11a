"""What the Hopper backend accepts and refuses, without a GPU."""

from __future__ import annotations

import pytest
import torch

from moelten.formats import BF16, FP16, MXFP4, Float, Int4, Scheme, scheme
from moelten.kernels.hopper import HopperBackend
from moelten.kernels.hopper_schedule import block_of
from moelten.weights import ExpertSpec

CUDA = torch.device("cuda")


@pytest.fixture
def hopper_gpu(monkeypatch):
    """A machine whose GPU reports compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def spec(which: Scheme, hidden: int = 256) -> ExpertSpec:
    return ExpertSpec(which, 8, hidden, 128)


def test_accepts_sixteen_bit_activations(hopper_gpu):
    for weights in (MXFP4(), Int4(32), Int4(128, zero_point=True), scheme("fp8block_fp8").weights):
        for act, operand in ((BF16, "bf16"), (FP16, "fp16")):
            assert HopperBackend(operand).refusals(spec(Scheme(weights, act)), CUDA) == []
    assert HopperBackend("fp16").refusals(spec(Scheme(FP16, FP16)), CUDA) == []


@pytest.mark.parametrize(
    "which, hidden, reason",
    [
        (scheme("mxfp4_fp8"), 256, "takes bf16 activations"),
        (Scheme(MXFP4(), FP16), 256, "takes bf16 activations"),
        (Scheme(Int4(16), BF16), 256, "int4g16"),
        (Scheme(Float("float32"), Float("float32")), 256, "takes bf16 activations"),
        (scheme("bf16_bf16"), 260, "multiple of 8"),
    ],
)
def test_refuses_with_a_reason(hopper_gpu, which, hidden, reason):
    assert any(reason in r for r in HopperBackend().refusals(spec(which, hidden), CUDA))


def test_refuses_other_machines(monkeypatch):
    ours = spec(scheme("mxfp4_bf16"))
    assert "experts are for cpu" in HopperBackend().refusals(ours, torch.device("cpu"))[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "needs compute capability 9.x" in HopperBackend().refusals(ours, CUDA)[0]


def test_tiles_grow_with_experts():
    assert [block_of(6 * t, 256) for t in (1, 64, 213, 214, 1024)] == [8, 8, 8, 16, 16]
