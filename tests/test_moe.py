"""The contract of fused_moe, on every backend that runs here, against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import ACTIVATIONS, ALL_SCHEMES, Case, make_input, make_weights
from metrics import assert_matches, within_bounds

import moelten
from moelten import kernels, reference
from moelten.formats import BF16, FP8_ROW, FP8_TENSOR, FP32, SCHEMES, Int4, scheme
from moelten.qtensor import QTensor
from moelten.routing import Routing

CPU = torch.device("cpu")


def backends(spec):
    return [v.backend for v in kernels.verdicts(spec, CPU) if v.runs]


def check(case: Case, weights=None, x=None, routing=None):
    weights = make_weights(case) if weights is None else weights
    if x is None:
        x, routing = make_input(case)
    expected = reference.moe(x, weights, routing)
    for backend in backends(weights.spec):
        packed = moelten.pack(weights, backend=backend)
        assert_matches(moelten.fused_moe(x, packed, routing), expected)


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_every_scheme(name):
    check(Case(ALL_SCHEMES[name]))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g32z_fp8", "fp8block_fp8", "int8_int8"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(name, activation):
    check(Case(scheme(name), activation=ACTIVATIONS[activation], biases=True))


@pytest.mark.parametrize("inter", [80, 192, 232, 320, 704, 1856])
@pytest.mark.parametrize("name", ["fp8block_bf16", "int8_int8", "nvfp4_bf16", "mxfp4_bf16"])
def test_any_intermediate_size(name, inter):
    group = scheme(name).weights.block[1]
    if scheme(name).weights.packed and inter % group:
        with pytest.raises(moelten.FormatError, match="multiple of its group"):
            make_weights(Case(scheme(name), 2, 64, inter))
    else:
        check(Case(scheme(name), 2, 64, inter, tokens=9, top_k=1))


@pytest.mark.parametrize("experts,top_k", [(1, 1), (3, 3), (60, 4), (129, 8), (289, 32)])
def test_any_number_of_experts(experts, top_k):
    check(Case(scheme("mxfp4_bf16"), experts, 64, 32, tokens=7, top_k=top_k))


def test_gpt_oss_width():
    check(Case(scheme("mxfp4_bf16"), 2, 2880, 96, tokens=5, top_k=2, biases=True))


@pytest.mark.parametrize("name", ["int4g32_bf16", "fp8block_fp8", "mxfp4_mxfp8", "nvfp4_nvfp4t"])
def test_adversarial_scales(name):
    """A distinct exponent per block, so that a shifted or swapped scale cannot go unseen."""
    case = Case(scheme(name), 4, 256, 128)
    weights = make_weights(case)
    g = torch.Generator().manual_seed(7)

    def spread(q: QTensor) -> QTensor:
        if q.scale.dtype == torch.uint8:
            shift = torch.randint(-6, 7, q.scale.shape, generator=g)
            return q.with_parts({"scale": (q.scale.int() + shift).to(torch.uint8)})
        factor = torch.exp2(torch.randint(-3, 4, q.scale.shape, generator=g).float())
        return q.with_parts({"scale": (q.scale.float() * factor).to(q.scale.dtype)})

    check(case, replace(weights, w13=spread(weights.w13), w2=spread(weights.w2)), *make_input(case))


@pytest.mark.parametrize("name", ["int4g32_bf16", "mxfp4_fp8", "fp8block_fp8"])
def test_one_hot_experts_and_positive_data(name):
    case = Case(scheme(name), 4, 512, 128, tokens=40, top_k=1)
    weights = make_weights(case)
    x, _ = make_input(case)
    routing = Routing(torch.full((40, 1), 2), torch.ones(40, 1))
    check(case, weights, x.abs(), routing)


def test_negative_scales_are_legal():
    case = Case(scheme("int4g32_bf16"))
    weights = make_weights(case)
    flipped = weights.w13.with_parts({"scale": -weights.w13.scale})
    check(case, replace(weights, w13=flipped), *make_input(case))


def test_zero_points_and_pre_scales():
    case = Case(scheme("int4g64z_fp8"), biases=True)
    weights = make_weights(case)
    g = torch.Generator().manual_seed(3)
    weights = replace(
        weights,
        w13_pre_scale=torch.rand(5, 256, generator=g) + 0.5,
        w2_pre_scale=torch.rand(5, 128, generator=g) + 0.5,
    )
    check(case, weights, *make_input(case))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g128_fp8tensor", "nvfp4_nvfp4"])
def test_router_weight_on_the_input(name):
    case = Case(scheme(name))
    x, routing = make_input(case)
    check(case, make_weights(case), x, replace(routing, on_input=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bad_ids_contribute_exactly_zero(dtype):
    case = Case(scheme("mxfp4_bf16"), tokens=64)
    weights, (x, routing) = make_weights(case), make_input(case)
    bad = torch.tensor([-1, 5, 6, 2**31 - 1, -(2**31)])
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(routing.ids.shape, generator=g) < 0.4
    noise = bad[torch.randint(0, 5, routing.ids.shape, generator=g)]
    ids = torch.where(mask, noise, routing.ids.long()).to(dtype)
    ids[3] = -1
    weighted = torch.where(mask, torch.nan, routing.weights)
    for backend in backends(weights.spec):
        packed = moelten.pack(weights, backend=backend)
        out = moelten.fused_moe(x, packed, Routing(ids, weighted))
        assert_matches(out, reference.moe(x, weights, Routing(ids, weighted)))
        assert (out[3] == 0).all()


def test_duplicate_ids_add_up():
    case = Case(scheme("int4g32_bf16"), tokens=8)
    x, _ = make_input(case)
    routing = Routing(torch.tensor([[1, 1, 1]] * 8), torch.rand(8, 3))
    check(case, make_weights(case), x, routing)


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int8_int8"])
def test_no_tokens(name):
    case = Case(scheme(name), tokens=0)
    weights, (x, routing) = make_weights(case), make_input(case)
    out = moelten.fused_moe(x, moelten.pack(weights), routing)
    assert out.shape == (0, 256) and out.dtype == x.dtype


@pytest.mark.parametrize("name", ["int4g32_bf16", "mxfp4_fp8", "fp8block_fp8", "nvfp4_nvfp4t"])
def test_rows_do_not_touch_each_other(name):
    """Whatever NaN or Inf other rows hold, a row's bits stay."""
    case = Case(scheme(name))
    weights, (x, routing) = make_weights(case), make_input(case)
    for backend in backends(weights.spec):
        packed = moelten.pack(weights, backend=backend)
        clean = moelten.fused_moe(x, packed, routing)
        for poison in (torch.nan, torch.inf):
            dirty = x.clone()
            dirty[::4] = poison
            out = moelten.fused_moe(dirty, packed, routing)
            keep = torch.arange(case.tokens) % 4 != 0
            assert torch.equal(out[keep], clean[keep])


@pytest.mark.parametrize("amax", [0.0, 2.0**-149, 1e-38, 1e-30, 1.0, 6e4])
@pytest.mark.parametrize("name", ["int4g32_fp8", "int4g128_int8", "mxfp4_mxfp8", "nvfp4_nvfp4t"])
def test_extreme_rows_stay_finite(name, amax):
    case = Case(scheme(name), tokens=4)
    weights, (_, routing) = make_weights(case), make_input(case)
    x = torch.full((4, 256), amax)
    out = moelten.fused_moe(x, moelten.pack(weights), routing)
    assert torch.isfinite(out).all()
    if amax == 0:
        assert (out == 0).all()


def test_same_bits_every_time():
    case = Case(scheme("int4g32_bf16"))
    weights, (x, routing) = make_weights(case), make_input(case)
    for backend in backends(weights.spec):
        packed = moelten.pack(weights, backend=backend)
        first = moelten.fused_moe(x, packed, routing)
        assert all(torch.equal(first, moelten.fused_moe(x, packed, routing)) for _ in range(20))


def test_out_is_written():
    case = Case(scheme("mxfp4_bf16"))
    weights, (x, routing) = make_weights(case), make_input(case)
    packed = moelten.pack(weights)
    out = torch.full_like(x, torch.nan)
    assert moelten.fused_moe(x, packed, routing, out=out) is out
    assert torch.equal(out, moelten.fused_moe(x, packed, routing))


def test_layer_routes_and_runs():
    case = Case(scheme("mxfp4_bf16"))
    weights, (x, _) = make_weights(case), make_input(case)
    gate = torch.randn(5, 256)
    layer = moelten.MoELayer(
        moelten.pack(weights), gate, lambda logits: moelten.topk_softmax(logits, 2)
    )
    routing = moelten.topk_softmax(x.float() @ gate.T, 2)
    assert_matches(layer(x[None])[0], reference.moe(x, weights, routing))


# Mutations: each must break the bounds, or the bounds could not fail.


def swap_halves(w):
    return replace(w, w13=w.w13.map(lambda t: t.flip(1) if t.dtype.itemsize > 1 else t[:, [1, 0]]))


def shift_scales(w):
    return replace(w, w13=w.w13.with_parts({"scale": w.w13.scale.roll(1, -1)}))


def swap_experts(w):
    return replace(w, w2=w.w2.map(lambda t: t[[1, 0, *range(2, t.shape[0])]]))


def drop_group(w):
    data = w.w13.data.clone()
    data[..., -16:] = 0
    return replace(w, w13=w.w13.with_parts({"data": data}))


def ignore_limit(w):
    return replace(w, activation=replace(w.activation, limit=None))


@pytest.mark.parametrize(
    "mutate", [swap_halves, shift_scales, swap_experts, drop_group, ignore_limit]
)
@pytest.mark.parametrize("name", ["int4g32_bf16", "mxfp4_fp8", "mxfp4_bf16", "int4g64_int8"])
def test_mutations_break_the_bounds(name, mutate):
    case = Case(scheme(name), activation=moelten.SwiGLU(1.702, 1.0, 1.0))
    weights, (x, routing) = make_weights(case), make_input(case)
    expected = reference.moe(x, weights, routing)
    assert within_bounds(moelten.fused_moe(x, moelten.pack(weights), routing), expected)
    wrong = moelten.fused_moe(x, moelten.pack(mutate(weights)), routing)
    assert not within_bounds(wrong, expected)


# Semantics that a backend could drop: each must change the output to what the reference says.


def test_no_parameter_is_ignored():
    case = Case(scheme("int4g32_bf16"), activation=moelten.SwiGLU(1.3, 0.5, 2.0), biases=True)
    weights, (x, routing) = make_weights(case), make_input(case)
    base = moelten.fused_moe(x, moelten.pack(weights), routing)
    variants = [replace(weights, activation=moelten.SwiGLU(1.4, 0.5, 2.0))]
    variants += [replace(weights, activation=moelten.SwiGLU(1.3, 0.6, 2.0))]
    variants += [replace(weights, activation=moelten.SwiGLU(1.3, 0.5, 1.0))]
    variants += [replace(weights, **{n: t * 1.5}) for n, t in weights.extras().items()]
    variants += [replace(weights, first_expert=1)]
    for variant in variants:
        out = moelten.fused_moe(x, moelten.pack(variant), routing)
        assert not within_bounds(out, base)
        assert_matches(out, reference.moe(x, variant, routing))


# The registered operator.


def op_arguments(name="mxfp4_bf16"):
    case = Case(scheme(name), biases=True)
    packed = moelten.pack(make_weights(case))
    x, routing = make_input(case)
    tensors = list(packed.tensors.values())
    return packed, x, routing, (x, routing.ids, routing.weights, False, tensors, packed.signature)


def test_opcheck():
    _, x, _, arguments = op_arguments()
    torch.library.opcheck(torch.ops.moelten.fused_moe.default, arguments)
    torch.library.opcheck(
        torch.ops.moelten.fused_moe_out.default, (*arguments, torch.empty_like(x))
    )


def test_compile_fullgraph():
    packed, x, routing, _ = op_arguments()

    def layer(x, ids, weights):
        return moelten.fused_moe(x * 2, packed, Routing(ids, weights)) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (33, 7):
        arguments = x[:rows], routing.ids[:rows], routing.weights[:rows]
        assert torch.equal(compiled(*arguments), layer(*arguments))


def test_layer_compiles_fullgraph():
    case = Case(scheme("mxfp4_bf16"))
    layer = moelten.MoELayer(
        moelten.pack(make_weights(case)),
        torch.randn(5, 256),
        lambda logits: moelten.topk_softmax(logits, 2),
    )
    x, _ = make_input(case)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_gradient_is_refused():
    packed, x, routing, _ = op_arguments()
    out = moelten.fused_moe(x.requires_grad_(), packed, routing)
    with pytest.raises(NotImplementedError, match="inference only"):
        out.float().sum().backward()


# Bad input: a clear error before any work.


BAD = {
    "dtype": (lambda x, r: (x.half(), r), "packed for torch.bfloat16 activations"),
    "width": (lambda x, r: (x[:, :64].contiguous(), r), r"expected \[tokens, 256\]"),
    "axes": (lambda x, r: (x[0], r), r"expected \[tokens, 256\]"),
    "strides": (lambda x, r: (x.T.contiguous().T, r), "contiguous"),
    "tokens": (lambda x, r: (x[:5], r), "routing is for 33 tokens"),
    "device": (lambda x, r: (x.to("meta"), r), "x is on meta"),
    "raw routing": (lambda x, r: (x, r.ids), "expected Routing"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused(bad):
    case = Case(scheme("mxfp4_bf16"))
    packed, (x, routing) = moelten.pack(make_weights(case)), make_input(case)
    change, message = BAD[bad]
    with pytest.raises((ValueError, TypeError), match=message):
        x, routing = change(x, routing)
        moelten.fused_moe(x, packed, routing)


def test_raw_weights_are_refused():
    case = Case(scheme("mxfp4_bf16"))
    weights, (x, routing) = make_weights(case), make_input(case)
    with pytest.raises(TypeError, match=r"moelten\.pack"):
        moelten.fused_moe(x, weights, routing)


def test_wrong_out_is_refused():
    packed, x, routing, _ = op_arguments()
    with pytest.raises(ValueError, match="out: expected"):
        moelten.fused_moe(x, packed, routing, out=torch.empty(1))


def test_explain_names_every_backend_and_reason():
    spec = make_weights(Case(scheme("int4g32_bf16"))).spec
    assert [v.backend for v in moelten.explain(spec)] == [b.name for b in kernels.BACKENDS]
    assert backends(spec)[-1] == "cpu"
    for verdict in moelten.explain(spec, "xpu"):
        assert not verdict.runs and all(verdict.reasons)
    with pytest.raises(NotImplementedError, match="no backend runs"):
        kernels.select(spec, torch.device("xpu"))
    with pytest.raises(NotImplementedError, match="unknown backend 'nope'"):
        moelten.pack(make_weights(Case(scheme("int4g32_bf16"))), backend="nope")


def test_unsupported_pairs_are_refused():
    with pytest.raises(NotImplementedError, match="int8_fp8tensor is not supported; int8 weights"):
        moelten.Scheme(moelten.Int8(), FP8_TENSOR).check()
    with pytest.raises(NotImplementedError, match="unknown scheme 'int3_bf16'; supported"):
        scheme("int3_bf16")
    assert scheme("int4g32_fp8").activations == FP8_ROW
    assert moelten.Scheme(Int4(32), BF16) in SCHEMES.values()
    assert scheme("bf16_bf16").weights == BF16 != FP32


PEAK = """
import resource, sys, torch, moelten
from cases import Case, make_input, make_weights
case = Case(moelten.scheme("int4g32_bf16"), 4, 1024, 512, tokens=24576, top_k=4)
packed, (x, routing) = moelten.pack(make_weights(case), backend=sys.argv[1]), make_input(case)
few = moelten.Routing(routing.ids[:64], routing.weights[:64])
out = torch.zeros_like(x)
moelten.fused_moe(x[:64].contiguous(), packed, few)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moelten.fused_moe(x, packed, routing, out=out)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown - packed.spec.logical_bytes // 4)
"""


@pytest.mark.parametrize("backend", backends(make_weights(Case(scheme("int4g32_bf16"))).spec))
def test_peak_memory_is_bounded(backend):
    """At most one expert + 256 MiB beyond inputs and output, in a process of its own."""
    run = [sys.executable, "-c", PEAK, backend]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        run, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 256 << 20, f"{int(done.stdout) >> 20} MiB"
