"""Importing, packing, updating and sharding experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, make_input, make_weights
from metrics import assert_matches

import moelten
from moelten import kernels, reference
from moelten.formats import BF16, MXFP4, NVFP4, SCHEMES, Int4, scheme
from moelten.packed import PackedExperts, decode_spec, encode_spec
from moelten.qtensor import QTensor, dequantize, quantize
from moelten.weights import ExpertWeights

CPU = torch.device("cpu")
ORDERS = {
    "gate_up": lambda gate, up: torch.cat([gate, up], 1),
    "up_gate": lambda gate, up: torch.cat([up, gate], 1),
    "interleaved": lambda gate, up: torch.stack([gate, up], 2).flatten(1, 2),
}


def same(a: QTensor, b: QTensor) -> bool:
    return a.format == b.format and all(
        torch.equal(part.view(torch.uint8), b.tensors()[name].view(torch.uint8))
        for name, part in a.tensors().items()
    )


def same_weights(a: ExpertWeights, b: ExpertWeights) -> bool:
    extras = zip(a.extras().values(), b.extras().values(), strict=True)
    return (
        a.spec == b.spec
        and same(a.w13, b.w13)
        and same(a.w2, b.w2)
        and all(torch.equal(x, y) for x, y in extras)
    )


def layouts(spec):
    return [b for b in kernels.BACKENDS if not b.refusals(spec, CPU)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", [BF16, Int4(32), MXFP4(), moelten.FP8()], ids=lambda f: f.name)
def test_orders_of_gate_and_up(order, fmt):
    gate, up, w2 = torch.randn(3, 64, 96), torch.randn(3, 64, 96), torch.randn(3, 96, 64)
    bias = torch.randn(3, 2, 64)
    raw = ORDERS[order](gate, up)
    raw_bias = ORDERS[order](bias[:, 0], bias[:, 1])
    for w13 in (raw, quantize(raw, fmt)):
        weights = ExpertWeights.from_tensors(
            w13,
            w2 if isinstance(w13, torch.Tensor) else quantize(w2, fmt),
            gate_up_order=order,
            weight_format=fmt,
            w13_bias=raw_bias,
        )
        assert same(weights.w13, quantize(torch.stack([gate, up], 1), fmt))
        assert torch.equal(weights.w13_bias, bias)


def test_order_has_no_default():
    w13, w2 = torch.randn(2, 8, 32), torch.randn(2, 32, 4)
    for order in (None, "w31"):
        with pytest.raises(ValueError, match="gate_up_order is required and has no default"):
            ExpertWeights.from_tensors(w13, w2, gate_up_order=order)


def test_blocks_that_mix_gate_and_up_are_refused():
    w13, w2 = quantize(torch.randn(2, 192, 128), moelten.FP8((128, 128))), torch.randn(2, 128, 96)
    w2 = quantize(w2, moelten.FP8((128, 128)))
    with pytest.raises(ValueError, match="mix gate and up"):
        ExpertWeights.from_tensors(w13, w2, gate_up_order="gate_up")


BAD_WEIGHTS = {
    "shape": (lambda w: replace(w, w2=w.w2[:2]), r"need w13 \[2, 2, 128, 256\]"),
    "axes": (lambda w: replace(w, w13=w.w13[0]), "from_tensors"),
    "formats": (lambda w: replace(w, w2=w.w2.with_parts({})), None),
    "bias dtype": (
        lambda w: replace(w, w2_bias=torch.zeros(5, 256, dtype=torch.bfloat16)),
        r"w2_bias: expected torch.float32 \[5, 256\], got torch.bfloat16",
    ),
    "bias shape": (lambda w: replace(w, w13_bias=torch.zeros(5, 256)), r"\[5, 2, 128\]"),
    "input scale": (lambda w: replace(w, w2_input_scale=torch.ones(5)), "dynamic: drop it"),
    "static": (
        lambda w: replace(w, activation_format=moelten.FP8((None, None))),
        "static and need one scale",
    ),
    "activation": (
        lambda w: replace(w, activation=moelten.SwiGLU((1.0, 2.0))),
        r"one per expert \(5\), got 2",
    ),
    "gate": (lambda w: replace(w, activation=moelten.ReLU2()), r"need w13 \[5, 1, 128, 256\]"),
}


@pytest.mark.parametrize("bad", [name for name, (_, message) in BAD_WEIGHTS.items() if message])
def test_bad_weights_are_refused(bad):
    change, message = BAD_WEIGHTS[bad]
    with pytest.raises(ValueError, match=message):
        change(make_weights(Case(scheme("int4g32_bf16"))))


def test_two_formats_are_refused():
    weights = make_weights(Case(scheme("int4g32_bf16")))
    other = make_weights(Case(scheme("mxfp4_bf16")))
    with pytest.raises(ValueError, match="use one format"):
        replace(weights, w2=other.w2)


@pytest.mark.parametrize("name", ["mxfp4_bf16", "fp8block_bf16", "int4g32_bf16", "nvfp4_bf16"])
def test_nan_scales_are_refused_before_anything_is_written(name):
    case = Case(scheme(name))
    weights = make_weights(case)
    bad = weights.w2.scale.clone()
    if bad.dtype == torch.uint8:
        bad[1, 2, 0] = 255
    else:
        bad[1, 2 if bad.shape[1] > 2 else 0, 0] = torch.nan
    damaged = replace(weights, w2=weights.w2.with_parts({"scale": bad}))
    with pytest.raises(ValueError, match="w2: 1 scales are NaN or infinite"):
        moelten.pack(damaged)
    packed = moelten.pack(weights)
    before = {n: t.clone() for n, t in packed.tensors.items()}
    with pytest.raises(ValueError, match="NaN"):
        packed.update_expert(1, damaged.expert_range(1, 2))
    for part, tensor in packed.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), before[part].view(torch.uint8))


@pytest.mark.parametrize("name", SCHEMES)
def test_packing_inverts(name):
    weights = make_weights(Case(SCHEMES[name], 3, 128, 128, biases=True))
    for backend in layouts(weights.spec):
        packed = PackedExperts.pack(weights.spec, weights.experts(), backend.layout, CPU)
        assert same_weights(packed.unpack(), weights)
        assert same_weights(packed.unpack_expert(1), weights.expert_range(1, 2))
        assert decode_spec(encode_spec(packed.spec)) == packed.spec


@pytest.mark.parametrize("inter", [80, 192, 232, 704, 1856])
def test_padding_is_internal_and_small(inter):
    weights = make_weights(Case(scheme("fp8block_bf16"), 2, 2880 // 8, inter))
    for backend in layouts(weights.spec):
        packed = PackedExperts.pack(weights.spec, weights.experts(), backend.layout, CPU)
        assert same_weights(packed.unpack(), weights)


def test_update_expert_keeps_pointers_and_equals_a_fresh_pack():
    case = Case(scheme("int4g32_bf16"), biases=True)
    old, new = make_weights(case), make_weights(replace(case, seed=9))
    x, routing = make_input(case)
    for backend in layouts(old.spec):
        packed = PackedExperts.pack(old.spec, old.experts(), backend.layout, CPU)
        pointers = [t.data_ptr() for t in packed.tensors.values()]
        for expert in range(5):
            packed.update_expert(expert, new.expert_range(expert, expert + 1))
        fresh = PackedExperts.pack(new.spec, new.experts(), backend.layout, CPU)
        assert [t.data_ptr() for t in packed.tensors.values()] == pointers
        assert all(torch.equal(packed.tensors[n], t) for n, t in fresh.tensors.items())
        out = moelten.fused_moe(x, packed, routing)
        assert torch.equal(out, moelten.fused_moe(x, fresh, routing))


def test_packing_leaves_the_source_alone():
    case = Case(scheme("int4g32_bf16"))
    weights, other = make_weights(case), make_weights(replace(case, seed=3))
    packed = moelten.pack(weights)
    before = dequantize(weights.w13)
    packed.update_expert(0, other.expert_range(0, 1))
    assert torch.equal(before, dequantize(weights.w13))


def test_update_expert_checks_first():
    packed = moelten.pack(make_weights(Case(scheme("int4g32_bf16"))))
    with pytest.raises(ValueError, match=r"expert 7 is not in 0\.\.4"):
        packed.update_expert(7, make_weights(Case(scheme("int4g32_bf16"), 1)))
    with pytest.raises(ValueError, match="expert 0: expected"):
        packed.update_expert(0, make_weights(Case(scheme("int4g64_bf16"), 1)))


def test_permuted_experts_give_the_same_bits():
    case = Case(scheme("mxfp4_bf16"), top_k=2)
    weights, (x, routing) = make_weights(case), make_input(case)
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = weights.map(lambda t: t[order])
    ids = torch.argsort(order)[routing.ids.long()]
    out = moelten.fused_moe(x, moelten.pack(weights), routing)
    assert torch.equal(out, moelten.fused_moe(x, moelten.pack(moved), replace(routing, ids=ids)))


@pytest.mark.parametrize("name", ["int4g32_bf16", "fp8block_bf16", "nvfp4_bf16", "int8_bf16"])
@pytest.mark.parametrize("world", [2, 3])
def test_tensor_shards_sum_to_the_whole(name, world):
    case = Case(scheme(name), intermediate_size=416 if "block" not in name else 448, biases=True)
    weights, (x, routing) = make_weights(case), make_input(case)
    expected = reference.moe(x, weights, routing)
    for backend in layouts(weights.spec):
        packed = PackedExperts.pack(weights.spec, weights.experts(), backend.layout, CPU)
        total, sizes = torch.zeros_like(expected), []
        for rank in range(world):
            shard = packed.shard(rank, world)
            sizes.append(shard.spec.intermediate_size)
            piece = shard.unpack()
            assert same_weights(piece, weights.shard(rank, world))
            total += reference.moe(x, piece, routing)
            assert_matches(moelten.fused_moe(x, shard, routing), reference.moe(x, piece, routing))
        assert sum(sizes) == case.intermediate_size
        assert ((total - expected).norm() / expected.norm()) < 4e-3  # bf16 intermediates, halved


def test_a_shard_that_would_cut_groups_is_refused():
    packed = moelten.pack(make_weights(Case(scheme("fp8block_bf16"), intermediate_size=192)))
    with pytest.raises(ValueError, match="multiples of 128, which gives 2 slices"):
        packed.shard(0, 4)
    with pytest.raises(ValueError, match=r"rank 2 is not in 0\.\.1"):
        packed.shard(2, 2)


def test_expert_ranges_sum_to_the_whole():
    case = Case(scheme("mxfp4_bf16"), activation=moelten.SwiGLU((1.0, 1.1, 1.2, 1.3, 1.4)))
    weights, (x, routing) = make_weights(case), make_input(case)
    packed = moelten.pack(weights)
    parts = [packed.expert_range(0, 2), packed.expert_range(2, 5)]
    assert parts[1].tensors["w2.data"].data_ptr() == packed.tensors["w2.data"][2].data_ptr()
    for part in parts:
        first = part.spec.first_expert
        piece = weights.expert_range(first, first + part.spec.num_experts)
        assert_matches(moelten.fused_moe(x, part, routing), reference.moe(x, piece, routing))
    total = sum(moelten.fused_moe(x, part, routing).double() for part in parts)
    whole = reference.moe(x, weights, routing)
    assert (total - whole).norm() / whole.norm() < 4e-3


def test_packed_bytes_are_logical_bytes():
    weights = make_weights(Case(scheme("int4g32_bf16"), 4, 512, 256))
    for backend in layouts(weights.spec):
        packed = PackedExperts.pack(weights.spec, weights.experts(), backend.layout, CPU)
        assert weights.nbytes <= packed.nbytes <= 1.02 * weights.nbytes
        assert packed.nbytes < packed.spec.logical_bytes / 3


def test_wrong_layout_is_refused():
    weights = make_weights(Case(scheme("bf16_bf16")))
    packed = moelten.pack(weights, backend="cpu")
    stale = replace(packed, version=0)
    x, routing = make_input(Case(scheme("bf16_bf16")))
    with pytest.raises(TypeError, match="packed as rows v0, the kernel reads rows v1"):
        moelten.fused_moe(x, stale, routing)
    with pytest.raises(TypeError, match="5 experts first"):
        replace(packed, tensors={"w2.data": torch.zeros(3)})


def test_differing_gate_and_up_globals_are_kept():
    w13 = torch.randn(2, 2, 32, 64) * torch.tensor([1.0, 30.0])[:, None, None]
    weights = ExpertWeights(quantize(w13, NVFP4()), quantize(torch.randn(2, 64, 32), NVFP4()))
    assert weights.w13.global_scale.shape == (2, 2)
    assert (weights.w13.global_scale[:, 1] > 5 * weights.w13.global_scale[:, 0]).all()
    case = Case(scheme("nvfp4_bf16"), 2, 64, 32, top_k=1)
    x, routing = make_input(case)
    out = moelten.fused_moe(x, moelten.pack(weights), routing)
    assert_matches(out, reference.moe(x, weights, routing))
