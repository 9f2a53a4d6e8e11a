"""Routing: worked examples, the order of ties and masks, refusals, peers' enums.

Not here: independent oracles (test_routing_oracles.py), the packed words of a routing
(test_routing_words.py), and what the MoE layer does with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moelten import routing
from moelten.routing import METHODS, Routing, method_from_enum

INF, NAN = math.inf, math.nan
S = [1.0, 3.0, 2.0, 3.0, -1.0, 0.5, 2.5, 0.0]
B = [0.5, -0.3, 0.0, -0.4, 0.9, 0.0, 0.0, 0.3]
BIASED = ("minimax2", "deepseek_v3", "sqrt_softplus_topk")


def logits_of(*rows: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def call(name: str, logits: Tensor, top_k: int = 4, **kwargs: Any) -> Routing:
    """Any method by name, with the arguments that it cannot do without."""
    if name == "minimax2":
        kwargs.setdefault("bias", torch.zeros(logits.shape[1]))
    return METHODS[name](logits, 1 if name == "llama4" else top_k, **kwargs)


def check(r: Routing, ids: Sequence[int], weights: Sequence[float], tol: float = 5e-5) -> None:
    assert r.ids.dtype == torch.int32 and r.weights.dtype == torch.float32
    assert r.ids.tolist() == [list(ids)]
    assert r.weights[0].tolist() == pytest.approx(list(weights), abs=tol)


# --- worked examples ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("softmax_topk", [0.3068, 0.3068]),
        ("topk_softmax", [0.5, 0.5]),
        ("softmax_topk_renormalize", [0.5, 0.5]),
        ("topk_raw", [3.0, 3.0]),
        ("sigmoid_topk", [0.9526, 0.9526]),
        ("topk_sigmoid", [0.9526, 0.9526]),
        ("sigmoid_topk_renormalize", [0.5, 0.5]),
        ("minimax2", [0.5, 0.5]),
        ("deepseek_v3", [0.5, 0.5]),
        ("sqrt_softplus_topk", [0.5, 0.5]),
        ("llama4", [0.9526]),
    ],
)
def test_worked_example(name: str, weights: list[float]) -> None:
    r = call(name, logits_of(S), 2)
    check(r, [1, 3][: len(weights)], weights)
    assert r.on_input is (name == "llama4")
    assert (r.num_tokens, r.top_k) == (1, len(weights))


def test_every_method_has_a_worked_example() -> None:
    marks: Any = test_worked_example
    assert {row[0] for row in marks.pytestmark[0].args[1]} == set(METHODS)


def test_deepseek_v3_groups() -> None:
    kwargs: dict[str, Any] = {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    r = routing.deepseek_v3(logits_of(S), 2, torch.tensor(B), **kwargs)
    check(r, [0, 4], [1.82765, 0.67235], tol=1e-5)
    raw = routing.deepseek_v3(logits_of(S), 2, torch.tensor(B), norm_topk_prob=False, **kwargs)
    check(raw, [0, 4], [2.5 * 0.731059, 2.5 * 0.268941], tol=1e-5)


def test_group_score_is_top2_sum_with_bias_and_max_without() -> None:
    s = logits_of([2.0, -9.0, 1.0, 1.0])  # by maximum group 0 wins, by sum of two group 1
    assert routing.deepseek_v3(s, 2, num_expert_group=2).ids.tolist() == [[0, 1]]
    zero = torch.zeros(4)
    assert routing.deepseek_v3(s, 2, zero, num_expert_group=2).ids.tolist() == [[2, 3]]


def test_dropped_groups_stay_out_when_biased_scores_are_negative() -> None:
    bias = torch.tensor([-2.0, -2.0, -3.0, -4.0])  # a mask of 0 would beat every kept score
    r = routing.deepseek_v3(torch.zeros(1, 4), 2, bias, num_expert_group=2)
    check(r, [0, 1], [0.5, 0.5])


def test_group_ties_keep_the_lower_group_and_groups_of_one() -> None:
    zeros = torch.zeros(3, 8)
    for bias in (None, torch.zeros(8)):
        r = routing.deepseek_v3(zeros, 3, bias, num_expert_group=4, topk_group=2)
        assert r.ids.tolist() == [[0, 1, 2]] * 3
        r = routing.deepseek_v3(logits_of(S), 2, bias, num_expert_group=8, topk_group=3)
        assert r.ids.tolist() == [[1, 3]]


def test_bias_stays_fp32() -> None:
    """3.001 is 3.0 in bfloat16: rounding the bias would turn a win into a tie for id 0."""
    bias, zeros = torch.tensor([3.0, 3.001]), torch.zeros(1, 2)
    for name in BIASED:
        assert call(name, zeros, 1, bias=bias).ids.tolist() == [[1]]
        assert call(name, zeros, 1, bias=bias.bfloat16()).ids.tolist() == [[0]]
        assert call(name, zeros.bfloat16(), 1, bias=bias).ids.tolist() == [[1]]


def test_bias_selects_and_does_not_weigh() -> None:
    bias = torch.tensor([0.0, 100.0, 0.0, 50.0])
    for name in BIASED:
        check(call(name, torch.zeros(1, 4), 2, bias=bias), [1, 3], [0.5, 0.5])
        scaled = call(name, torch.zeros(1, 4), 2, bias=bias, routed_scaling_factor=3.0)
        check(scaled, [1, 3], [1.5, 1.5])


def test_saturation_tells_sigmoid_topk_from_topk_sigmoid() -> None:
    s = logits_of([0.0, 18.0, 25.0, 17.0])
    assert routing.sigmoid_topk(s, 3).ids.tolist() == [[1, 2, 3]]
    assert routing.topk_sigmoid(s, 3).ids.tolist() == [[2, 1, 3]]


def test_sqrt_softplus_where_it_turns_linear() -> None:
    x = torch.arange(0.0, 60.0, 0.125)
    r = routing.sqrt_softplus_topk(torch.stack([x, torch.zeros_like(x)], dim=1), 2)
    ratio = torch.tensor([math.sqrt(v + math.log1p(math.exp(-v))) for v in x.tolist()])
    ratio /= math.sqrt(math.log(2.0))
    torch.testing.assert_close(r.weights[:, 0] / r.weights[:, 1], ratio, atol=0, rtol=5e-7)


def test_renormalised_zero_sum_is_zero_not_nan() -> None:
    s = torch.full((1, 4), -200.0)  # sigmoid is 0 in fp32
    for name in ("sigmoid_topk_renormalize", "minimax2", "deepseek_v3"):
        check(call(name, s, 2), [0, 1], [0.0, 0.0])


# --- the order: ties, masks, NaN ------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_experts", [1, 3, 20, 40, 64, 257])
def test_equal_logits_go_to_the_lower_ids(name: str, num_experts: int) -> None:
    """Widths off the SIMD lane count, and values where an ulp between lanes would show."""
    k = 1 if name == "llama4" else min(4, num_experts)
    values = torch.cat(
        [torch.zeros(1), torch.randn(63, generator=torch.Generator().manual_seed(0))]
    )
    r = call(name, values[:, None].repeat(1, num_experts), k)
    assert r.ids.tolist() == [list(range(k))] * 64


@pytest.mark.parametrize("name", METHODS)
def test_low_precision_ties(name: str) -> None:
    for dtype, above in ((torch.bfloat16, 1.003), (torch.float16, 1.0004)):
        s = logits_of([0.0, 1.0, above, -1.0, 1.0], dtype=dtype)  # `above` rounds to 1.0
        k = 1 if name == "llama4" else 3
        r = call(name, s, k)
        assert r.ids.tolist() == [[1, 2, 4][:k]] and r.weights.dtype == torch.float32
        wide = call(name, s.float(), k)
        assert torch.equal(r.ids, wide.ids) and torch.equal(r.weights, wide.weights)


@pytest.mark.parametrize("name", METHODS)
def test_negative_zero_equals_zero(name: str) -> None:
    assert call(name, logits_of([-0.0, 0.0, -0.0]), 3).ids[0, 0] == 0
    assert call(name, logits_of([0.0, -0.0, 0.0]), 3).ids[0, 0] == 0


@pytest.mark.parametrize("name", METHODS)
def test_minus_inf_masks(name: str) -> None:
    """Even where the score of a finite logit rounds to the score of -inf."""
    s = logits_of([-INF, 0.0, -300.0, -INF, -400.0])
    r = call(name, s, 3)
    assert r.ids.tolist() == [[1, 2, 4][: r.top_k]] and bool(r.weights.isfinite().all())
    if name == "llama4":
        return
    last = call(name, s, 5)
    assert last.ids.tolist() == [[1, 2, 4, 0, 3]]
    masked = -INF if name == "topk_raw" else 0.0
    assert last.weights[0, 3:].tolist() == [masked, masked]
    if name in BIASED:
        big = torch.tensor([9.0, 0.0, 0.0, 9.0, 0.0])
        assert call(name, s, 3, bias=big).ids.tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("name", METHODS)
def test_minus_inf_row(name: str) -> None:
    r = call(name, torch.full((2, 6), -INF), 3)
    assert r.ids.tolist() == [list(range(r.top_k))] * 2


def test_masked_group() -> None:
    s = logits_of([-INF, -INF, 0.0, 0.0, 1.0, -INF])
    bias = torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0, 9.0])
    r = routing.deepseek_v3(s, 2, bias, num_expert_group=3, topk_group=1)
    assert r.ids.tolist() == [[2, 3]]
    # Kept groups 0 and 1 run out of live experts: expert 4 of the dropped group stays out.
    r = routing.deepseek_v3(s, 4, bias, num_expert_group=3, topk_group=2)
    assert r.ids.tolist() == [[2, 3, 0, 1]] and r.weights[0, 2:].tolist() == [0.0, 0.0]
    assert routing.deepseek_v3(s, 2, num_expert_group=3).ids.tolist() == [[4, 5]]


@pytest.mark.parametrize("name", METHODS)
def test_nan_rows_give_distinct_legal_ids(name: str) -> None:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    poison = torch.tensor([NAN, -NAN, INF, -INF])
    g = torch.Generator().manual_seed(2)
    where = torch.rand(64, 16, generator=g) < 0.4
    bad = torch.where(where, poison[torch.randint(4, (64, 16), generator=g)], rows)
    bad[0], bad[1] = NAN, -NAN
    kwargs: dict[str, Any] = (
        {"num_expert_group": 4, "topk_group": 2} if name == "deepseek_v3" else {}
    )
    r = call(name, bad, **kwargs)
    for ids in r.ids.tolist():
        assert len(set(ids)) == r.top_k and all(0 <= e < 16 for e in ids)
    assert r.ids[:2].tolist() == [list(range(r.top_k))] * 2
    positive = torch.where(bad.isnan(), NAN, bad)
    assert torch.equal(r.ids, call(name, positive, **kwargs).ids)
    # A poisoned row is its own affair.
    mixed = call(name, torch.cat([bad, rows]), **kwargs)
    clean = call(name, rows, **kwargs)
    assert torch.equal(mixed.ids[64:], clean.ids) and torch.equal(mixed.weights[64:], clean.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_order(dtype: torch.dtype) -> None:
    s = logits_of([1.0, NAN, INF, -INF, -NAN, 2.0], dtype=dtype)
    for name in ("topk_raw", "topk_softmax", "topk_sigmoid"):
        assert call(name, s, 6).ids.tolist() == [[1, 4, 2, 5, 0, 3]]
    assert routing.sqrt_softplus_topk(s, 6).ids.tolist() == [[1, 4, 2, 5, 0, 3]]
    assert routing.sigmoid_topk(s, 6).ids.tolist() == [[1, 4, 2, 5, 0, 3]]
    assert routing.softmax_topk(s, 6).ids.tolist() == [[0, 1, 2, 4, 5, 3]]  # every softmax is NaN
    assert routing.llama4(s).ids.tolist() == [[1]]


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_experts", [20, 60])
def test_a_row_does_not_depend_on_its_batch(name: str, num_experts: int) -> None:
    rows = torch.randn(200, num_experts, generator=torch.Generator().manual_seed(5)) * 3
    kwargs: dict[str, Any] = {"num_expert_group": 4, "topk_group": 3} if "deepseek" in name else {}
    whole = call(name, rows, 6, **kwargs)
    strided = call(name, rows.t().contiguous().t(), 6, **kwargs)
    assert torch.equal(strided.ids, whole.ids) and torch.equal(strided.weights, whole.weights)
    for t in range(200):
        one = call(name, rows[t : t + 1], 6, **kwargs)
        assert torch.equal(one.ids[0], whole.ids[t])
        assert torch.equal(one.weights[0], whole.weights[t])


@pytest.mark.parametrize("name", METHODS)
def test_no_tokens(name: str) -> None:
    kwargs: dict[str, Any] = {"num_expert_group": 4, "topk_group": 2} if "deepseek" in name else {}
    r = call(name, torch.zeros(0, 8), 3, **kwargs)
    assert r.ids.shape == r.weights.shape == (0, r.top_k) and r.num_tokens == 0
    assert r.to_words().shape == r.ids.shape


@pytest.mark.parametrize("name", METHODS)
def test_all_experts(name: str) -> None:
    r = call(name, logits_of(S), 8)
    assert sorted(r.ids[0].tolist()) == ([1] if name == "llama4" else list(range(8)))


@pytest.mark.parametrize("name", METHODS)
def test_gradient_reaches_the_logits(name: str) -> None:
    s = logits_of([0.3, -0.2, 0.9, 0.1]).requires_grad_()
    (grad,) = torch.autograd.grad((call(name, s, 2).weights[:, 0] ** 2).sum(), s)
    assert bool(grad.isfinite().all()) and bool(grad.any())


@pytest.mark.parametrize("name", METHODS)
def test_compiles_whole(name: str) -> None:
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(6))
    kwargs: dict[str, Any] = {"num_expert_group": 4, "topk_group": 2} if "deepseek" in name else {}

    def run(logits: Tensor) -> Routing:
        return call(name, logits, 3, **kwargs)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")(rows)
    eager = run(rows)
    assert isinstance(compiled, Routing) and compiled.on_input is eager.on_input
    assert torch.equal(compiled.ids, eager.ids) and torch.equal(compiled.weights, eager.weights)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_logits_and_top_k(name: str) -> None:
    method = METHODS[name]
    extra = {"bias": torch.zeros(4)} if name == "minimax2" else {}
    with pytest.raises(TypeError, match=r"logits: expected a tensor \[T, E\], got list"):
        method([[1.0]], 1, **extra)
    for bad in (torch.zeros(4), torch.zeros(2, 2, 4), torch.zeros(1, 4).int()):
        with pytest.raises(ValueError, match="logits: expected float32 or bfloat16 or float16"):
            method(bad, 1, **extra)
    with pytest.raises(ValueError, match=r"logits: .*got float64 \[1, 4\]; cast"):
        method(torch.zeros(1, 4).double(), 1, **extra)
    for top_k in (0, -1, 5, 2.0):
        with pytest.raises(ValueError, match="top_k"):
            method(torch.zeros(1, 4), top_k, **extra)
    with pytest.raises(ValueError, match=r"top_k: expected an int in 1\.\.0"):
        method(torch.zeros(1, 0), 1, **extra)


def test_llama4_refuses_more_than_one() -> None:
    with pytest.raises(ValueError, match="expected top_k=1, got 2; topk_sigmoid"):
        routing.llama4(torch.zeros(1, 4), 2)


@pytest.mark.parametrize("name", BIASED)
def test_methods_refuse_bias(name: str) -> None:
    for bias, error, message in (
        (torch.zeros(3), ValueError, r"bias: expected \[4\].*got float32 \[3\]"),
        (torch.zeros(1, 4), ValueError, r"bias: .*got float32 \[1, 4\]"),
        (torch.zeros(4).int(), ValueError, r"bias: .*got int32 \[4\]"),
        (torch.zeros(4, device="meta"), ValueError, "bias: .*on cpu, got.*on meta"),
        ([0.0] * 4, TypeError, "bias: expected a tensor"),
    ):
        with pytest.raises(error, match=message):
            METHODS[name](torch.zeros(1, 4), 1, bias)


def test_minimax2_needs_its_bias() -> None:
    with pytest.raises(TypeError, match="bias: expected a tensor"):
        METHODS["minimax2"](torch.zeros(1, 4), 1, None)


@pytest.mark.parametrize(
    ("groups", "kept", "top_k"),
    [(3, 1, 1), (0, 1, 1), (-2, 1, 1), (16, 1, 1), (2, 3, 1), (2, 0, 1), (2, -1, 1), (4, 1, 3)],
)
def test_deepseek_v3_refuses_groups(groups: int, kept: int, top_k: int) -> None:
    message = f"divide 8 experts.*num_expert_group={groups}, topk_group={kept}"
    with pytest.raises(ValueError, match=message):
        routing.deepseek_v3(torch.zeros(1, 8), top_k, num_expert_group=groups, topk_group=kept)


# --- peers' enums ---------------------------------------------------------------------------------

SAME = ["softmax_topk", "topk_softmax", "deepseek_v3", "llama4", "softmax_topk_renormalize"]
ENUMS: dict[str, dict[int, str]] = {
    "flashinfer": {
        **dict(enumerate(SAME)),
        **{5: "topk_raw", 6: "sigmoid_topk_renormalize", 7: "minimax2"},
        **{8: "sigmoid_topk", 9: "topk_sigmoid"},
    },
    "tensorrt_llm": {**dict(enumerate(SAME)), 5: "minimax2"},
    "vllm": {
        **dict(enumerate(SAME)),
        **{5: "topk_raw", 6: "sigmoid_topk_renormalize", 7: "minimax2", 8: "sigmoid_topk"},
        100: "sqrt_softplus_topk",
    },
}
UNSUPPORTED = [
    ("flashinfer", 10, "Unspecified"),
    ("tensorrt_llm", 6, "Unspecified"),
    ("tensorrt_llm", 7, "AdaptiveK"),
    ("vllm", 9, "Unspecified"),
    ("vllm", 101, "Custom"),
    ("vllm", 102, "Simulated"),
]


def test_enums() -> None:
    refused = {(library, value) for library, value, _ in UNSUPPORTED}
    for library, names in ENUMS.items():
        for value in range(-1, 110):
            if value in names:
                assert method_from_enum(library, value) == names[value]
                assert names[value] in METHODS
            elif (library, value) not in refused:
                with pytest.raises(ValueError, match=f"{library} has no RoutingMethodType {value}"):
                    method_from_enum(library, value)
    assert {m for names in ENUMS.values() for m in names.values()} == set(METHODS)


@pytest.mark.parametrize(("library", "value", "name"), UNSUPPORTED)
def test_enums_refuse_by_the_peers_name(library: str, value: int, name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"{library}'s {name} \({value}\).*Default"):
        method_from_enum(library, value)


def test_enums_refuse_unknown_library() -> None:
    with pytest.raises(ValueError, match=r"expected library in .*flashinfer.*got 'sglang'"):
        method_from_enum("sglang", 0)
