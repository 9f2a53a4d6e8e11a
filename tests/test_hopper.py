"""The Hopper backend without a GPU: what it accepts and refuses, what it launches, and on what."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import ALL_SCHEMES, Case, make_input, make_weights

from moelten.formats import BF16, FP16, MXFP4, Float, Int4, Scheme, scheme
from moelten.kernels.hopper import HopperBackend
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_schedule import block_of, make_variant, split_rows
from moelten.packed import PackedExperts
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


def test_accepts_eight_bit_activations(hopper_gpu):
    """Whose codes bf16 holds, so that one packed layout serves both.

    With a scale per token; or for every 128 columns, where weights have as many scales.
    """
    rows = ("int4g128_fp8", "mxfp4_int8", "fp8_fp8", "int8_int8", "nvfp4_fp8")
    groups = ("fp8block_fp8", "int8block_int8", "fp8g128_fp8g128", "int4g128z_fp8g128")
    for name in rows + groups:
        assert HopperBackend().refusals(spec(scheme(name)), CUDA) == []
        assert "takes fp16" in HopperBackend("fp16").refusals(spec(scheme(name)), CUDA)[0]


@pytest.mark.parametrize(
    "which, hidden, reason",
    [
        (scheme("mxfp4_fp8g128"), 256, "takes bf16 activations, and 8-bit ones"),
        (scheme("int4g32_fp8tensor"), 256, "takes bf16 activations, and 8-bit ones"),
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


@pytest.mark.parametrize("experts, row_tiles", [(1, 1), (8, 2), (8, 64), (32, 45), (256, 112)])
def test_room_for_every_split(experts, row_tiles):
    """The rows that splits write fit in what is set aside, which never shrinks."""
    stored, before = storage(MXFP4(), "bf16"), 0
    for pairs in (*range(1, 400), 1000, 8192, 10**6):
        block = block_of(pairs, experts)
        variant = make_variant(
            stored, block, pairs, experts, row_tiles, columns=14336, may_split=True
        )
        room = split_rows(pairs, row_tiles)
        assert max(variant.splits * pairs, before) <= room
        before = room


@pytest.mark.parametrize("which", ["mxfp4_bf16", "int4g128z_fp16", "int4g32_fp8"])
def test_workspace_never_shrinks(which):
    ours = ExpertSpec(ALL_SCHEMES[which], 8, 256, 128)
    sizes = [HopperBackend().workspace_bytes(ours, t, 2) for t in (*range(200), 5000, 2**33)]
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[1] > 0 and sizes[-1] > 2**40


class Launches(list):
    """Stands in for a kernel: notes what it is launched on."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.append((grid, arguments, constants))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(
    "which, tokens, count",
    [
        ("mxfp4_bf16", 8, 4),
        ("mxfp4_bf16", 150, 5),
        ("mxfp4_bf16", 9000, 6),
        ("int4g32_bf16", 3, 4),
        ("int4g32_bf16", 150, 6),
        ("int4g32_bf16", 9000, 7),
        ("int4g32_fp8", 8, 6),
        ("mxfp4_int8", 150, 6),
        ("int4g32_fp8", 9000, 7),
        ("fp8block_fp8", 9000, 7),
    ],
)
def test_launches_inside_the_workspace(monkeypatch, which, tokens, count, on_input):
    """Four launches for few tokens, five or (with a plan in two) six for many, one more where
    hidden rows are quantized or become fp16, and where rows of the input differ by pair or, for few
    tokens, are quantized; in memory that is the workspace's."""
    pytest.importorskip("triton")
    from moelten.kernels import hopper_gemm, hopper_plan, hopper_rows, triton_ops, triton_plan

    launches = Launches()
    for module, names in (
        (hopper_gemm, ("decode_kernel", "prefill_kernel")),
        (hopper_plan, ("plan_kernel", "combine_kernel")),
        (hopper_rows, ("order_kernel", "quantize_kernel")),
        (triton_plan, ("count_kernel", "place_kernel")),
        (triton_ops, ("quantize_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, launches)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132),
    )
    case = Case(scheme(which), hidden_size=192, intermediate_size=96, tokens=tokens)
    weights, (x, routing) = make_weights(case), make_input(case)
    routing = replace(routing, on_input=on_input)
    backend = HopperBackend()
    experts = PackedExperts.pack(weights.spec, weights.experts(), backend.layout, x.device)
    size = backend.workspace_bytes(weights.spec, tokens, routing.top_k, on_input)
    workspace, out = torch.empty(size, dtype=torch.uint8), torch.empty_like(x)
    backend.run(x, experts, routing, out, workspace)
    quantized = "bf16" not in which
    assert len(launches) == count + (on_input and not quantized)

    def storage_of(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    known = {storage_of(t) for t in (x, out, routing.ids, routing.weights, workspace)}
    known |= {storage_of(t) for t in experts.tensors.values()}
    for _, arguments, _ in launches:
        parts = [getattr(a, "base", a) for a in arguments]
        assert {storage_of(a) for a in parts if isinstance(a, torch.Tensor)} <= known
    if tokens == 8:  # in two chunks
        launches.clear()
        less = backend.workspace_bytes(weights.spec, 5, routing.top_k, on_input)
        backend.run(x, experts, routing, out, workspace[:less])
        assert len(launches) == 2 * (count + (on_input and not quantized))
