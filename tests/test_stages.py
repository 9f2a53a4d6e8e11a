"""Stage by stage: the bits of the whole, on every backend here (in the interpreter: Triton too)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ACTIVATIONS, Case, make_input, make_weights
from metrics import assert_matches

import moelten
from moelten import kernels, reference, stages
from moelten.formats import scheme
from moelten.qtensor import round_activations
from moelten.routing import Routing

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SCHEMES = (
    *("mxfp4_bf16", "fp32_fp32", "int4g64z_fp8", "fp8block_fp8"),
    *("nvfp4_nvfp4", "nvfp4_nvfp4t", "int8_int8"),
)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN or the largest integer: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def runners(spec) -> list[tuple[str, str]]:
    """Devices and backends that run the spec, less those that run layers only whole."""
    whole = {b.name for b in kernels.BACKENDS if not isinstance(b, kernels.StagedBackend)}
    assert whole == {"hopper", "hopper-fp16"}
    runs = ((d, v.backend) for d in DEVICES for v in moelten.explain(spec, d) if v.runs)
    return [(device, backend) for device, backend in runs if backend not in whole]


def make(name: str, **changes):
    sizes = {"num_experts": 5, "hidden_size": 128, "intermediate_size": 64, "tokens": 3}
    case = Case(scheme(name), top_k=2, **(sizes | changes))
    return make_weights(case), *make_input(case)


def check(weights, x, routing):
    """Every backend: the three stages give what the whole gives."""
    for device, backend in runners(weights.spec):
        experts = moelten.pack(weights, device=device, backend=backend)
        rows, there = x.to(device), moved(routing, device)
        hidden = stages.gemm1(rows, experts, there, backend=backend)
        slots = stages.gemm2(hidden, experts, there, backend=backend)
        out = stages.combine(slots, experts, there, x.dtype, backend=backend)
        tokens, top_k = routing.ids.shape
        assert hidden.dtype == slots.dtype == torch.float32
        assert hidden.shape == (tokens, top_k, weights.spec.intermediate_size)
        assert slots.shape == (tokens, top_k, weights.spec.hidden_size)
        whole = moelten.fused_moe(rows, experts, there, backend=backend)
        assert torch.equal(out, whole), backend


def moved(routing: Routing, device) -> Routing:
    return Routing(routing.ids.to(device), routing.weights.to(device), routing.on_input)


@pytest.mark.parametrize("name", SCHEMES)
def test_stages_are_the_whole(name):
    check(*make(name, biases=True))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g64z_fp8"])
def test_activations_and_pre_scales(name):
    g = torch.Generator().manual_seed(3)
    for activation in ("per_expert", "relu2"):
        weights, x, routing = make(name, activation=ACTIVATIONS[activation], biases=True)
        pre = {
            "w13_pre_scale": torch.rand(5, 128, generator=g) + 0.5,
            "w2_pre_scale": torch.rand(5, 64, generator=g) + 0.5,
        }
        check(replace(weights, **pre), x, routing)
        check(replace(weights, **pre), x, replace(routing, on_input=True))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int8_int8"])
def test_slots_of_other_experts_are_zero_and_unread(name):
    weights, x, routing = make(name, tokens=6)
    weights = replace(weights, first_expert=2)
    ids = routing.ids.clone() + 2
    ids[::2, 1], ids[1, 0], ids[4] = -1, 2**31 - 1, 7
    routing = Routing(ids, routing.weights)
    check(weights, x, routing)
    away = (ids < 2) | (ids >= 7)
    for device, backend in runners(weights.spec):
        experts = moelten.pack(weights, device=device, backend=backend)
        rows, there = x.to(device), moved(routing, device)
        hidden = stages.gemm1(rows, experts, there, backend=backend)
        slots = stages.gemm2(hidden, experts, there, backend=backend)
        out = stages.combine(slots, experts, there, backend=backend)
        assert (hidden.cpu()[away] == 0).all() and (slots.cpu()[away] == 0).all()
        hidden[away.to(device)] = torch.nan
        assert torch.equal(stages.gemm2(hidden, experts, there, backend=backend), slots)
        slots[away.to(device)] = torch.inf
        assert torch.equal(stages.combine(slots, experts, there, backend=backend), out)


@pytest.mark.parametrize("name", ["mxfp4_bf16", "fp8block_fp8"])
def test_each_stage_is_its_formula(name):
    weights, x, routing = make(name, biases=True)
    spec = weights.spec
    for device, backend in runners(spec):
        experts = moelten.pack(weights, device=device, backend=backend)
        there = moved(routing, device)
        hidden = stages.gemm1(x.to(device), experts, there, backend=backend)
        slots = stages.gemm2(hidden, experts, there, backend=backend).cpu()
        hidden = hidden.cpu()
        a = round_activations(x.float(), spec.scheme.activations, None).double()
        b = round_activations(hidden.flatten(0, 1), spec.scheme.activations, None).double()
        w13 = moelten.dequantize(weights.w13, torch.float64).flatten(1, 2)
        w2 = moelten.dequantize(weights.w2, torch.float64)
        ids = routing.ids.flatten().long()
        h = torch.einsum("pnk,pk->pn", w13[ids], a.repeat_interleave(2, 0))
        h = h.view(-1, 2, spec.intermediate_size) + weights.w13_bias[ids]
        assert_matches(hidden.flatten(0, 1), spec.activation(h, ids))
        y = torch.einsum("pnk,pk->pn", w2[ids], b) + weights.w2_bias[ids]
        assert_matches(slots.flatten(0, 1), y * routing.weights.flatten()[:, None])


def test_something_between_the_gemms():
    """What the stages are for: a change of the hidden rows reaches the output."""
    weights, x, routing = make("bf16_bf16")
    for device, backend in runners(weights.spec):
        experts = moelten.pack(weights, device=device, backend=backend)
        there = moved(routing, device)
        hidden = stages.gemm1(x.to(device), experts, there, backend=backend)
        slots = stages.gemm2(2 * hidden, experts, there, backend=backend)
        out = stages.combine(slots, experts, there, torch.float32, backend=backend)
        assert_matches(out.cpu(), 2 * reference.moe(x, weights, routing))


def test_no_tokens():
    weights, x, routing = make("mxfp4_bf16", tokens=0)
    check(weights, x, routing)


def test_bad_arguments():
    weights, x, routing = make("mxfp4_bf16")
    experts = moelten.pack(weights, backend="cpu")
    hidden = stages.gemm1(x, experts, routing)
    with pytest.raises(ValueError, match=r"x: expected \[tokens, 128\]"):
        stages.gemm1(hidden[:, 0].contiguous(), experts, routing)
    for bad in (hidden.bfloat16(), hidden[:2], hidden[..., ::2], hidden.to("meta")):
        with pytest.raises(ValueError, match="hidden"):
            stages.gemm2(bad, experts, routing)
    slots = stages.gemm2(hidden, experts, routing)
    with pytest.raises(ValueError, match="slots: expected contiguous"):
        stages.combine(hidden, experts, routing)
    with pytest.raises(ValueError, match="expected dtype bf16, fp16 or fp32"):
        stages.combine(slots, experts, routing, torch.float64)
    with pytest.raises(NotImplementedError, match="unknown backend"):
        stages.gemm1(x, experts, routing, backend="nope")


def test_a_backend_without_stages_says_so(monkeypatch):
    class Whole:
        name, layout, devices = "whole", kernels.BACKENDS[1].layout, ("cpu",)
        refusals = kernels.BACKENDS[1].refusals
        run, workspace_bytes = kernels.BACKENDS[1].run, kernels.BACKENDS[1].workspace_bytes

    weights, x, routing = make("mxfp4_bf16")
    experts = moelten.pack(weights, backend="cpu")
    monkeypatch.setattr(kernels, "BACKENDS", (Whole(),))
    assert moelten.fused_moe(x, experts, routing).shape == x.shape
    with pytest.raises(NotImplementedError, match="whole runs layers only whole"):
        stages.gemm1(x, experts, routing)
