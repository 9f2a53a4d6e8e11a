"""Routing: ids are exact, weights are held to loops in plain Python and to transformers' routers.

The oracle below shares no code with the library: Python floats, `math`, one explicit fp32 rounding
per score, explicit sort keys. Ids must agree in every row, ties and masks included. Not here: what
the MoE layer does with a routing.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
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


# --- independent oracle ---------------------------------------------------------------------------


def f32(x: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def o_sigmoid(x: float) -> float:
    return f32(1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)))


def o_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return [f32(math.exp(x - top) / total) for x in row]


def o_sqrt_softplus(x: float) -> float:
    return f32(math.sqrt(max(x, 0.0) + math.log1p(math.exp(-abs(x)))))


def o_order(scores: list[float], k: int) -> list[int]:
    left, taken = list(range(len(scores))), []
    for _ in range(k):
        best = left[0]
        for e in left[1:]:
            if scores[e] > scores[best]:
                best = e
        left.remove(best)
        taken.append(best)
    return taken


def o_groups(choice: list[float], groups: int, keep: int, biased: bool) -> list[float]:
    size = len(choice) // groups
    score = []
    for g in range(groups):
        members = sorted(choice[g * size : (g + 1) * size], reverse=True)
        score.append(f32(members[0] + members[1]) if biased else members[0])
    kept = o_order(score, keep)
    return [c if e // size in kept else -INF for e, c in enumerate(choice)]


def o_route(
    name: str,
    row: list[float],
    k: int,
    bias: list[float] | None,
    groups: int,
    keep: int,
    rsf: float,
) -> tuple[list[int], list[float]]:
    score: Callable[[float], float] = o_sqrt_softplus if name.startswith("sqrt") else o_sigmoid
    p = o_softmax(row) if name.startswith("softmax") else [score(x) for x in row]
    by_logit = name.startswith("topk_") or name == "llama4"
    choice = list(row) if by_logit else p
    if bias is not None:
        choice = [f32(c + b) for c, b in zip(choice, bias, strict=True)]
    choice = [-INF if x == -INF else c for c, x in zip(choice, row, strict=True)]
    if keep < groups:
        choice = o_groups(choice, groups, keep, bias is not None)
    ids = o_order(choice, k)
    if name == "topk_raw":
        return ids, [row[e] for e in ids]
    if name == "topk_softmax":
        return ids, o_softmax([row[e] for e in ids])
    w = [p[e] for e in ids]
    if name not in ("softmax_topk", "sigmoid_topk", "topk_sigmoid", "llama4"):
        total = math.fsum(w)
        w = [x / max(total, 1e-20) for x in w]
    return ids, [x * rsf for x in w]


def oracle_rows(num_rows: int, num_experts: int) -> Tensor:
    """Grid values (many ties), Gaussian values, bfloat16 values, saturated ones, and masks."""
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(num_rows, num_experts, generator=g) * 2
    rows[0::4] = (rows[0::4] * 2).round() / 2
    rows[1::4] = rows[1::4].bfloat16().float()
    rows[2::8] = (rows[2::8] * 12).round()
    masked = torch.rand(num_rows, num_experts, generator=g) < 0.1
    masked[:, :4] = False  # leaves every row and every group of eight a live expert
    masked[:, 8:12] = False
    return rows.masked_fill(masked & (torch.arange(num_rows) % 3 == 0)[:, None], -INF)


ORACLE: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS if name != "minimax2"),
    *((name, {"bias": True, "routed_scaling_factor": 2.5}) for name in BIASED),
    ("deepseek_v3", {"bias": True, "num_expert_group": 4, "topk_group": 2}),
    ("deepseek_v3", {"num_expert_group": 4, "topk_group": 3, "routed_scaling_factor": 2.5}),
    ("deepseek_v3", {"bias": True, "num_expert_group": 2, "topk_group": 1}),
]


@pytest.mark.parametrize(("name", "options"), ORACLE)
def test_against_oracle(name: str, options: dict[str, Any]) -> None:
    kwargs, k = dict(options), 1 if name == "llama4" else 4
    rows = oracle_rows(2000, 16)
    bias = None
    if kwargs.pop("bias", False):
        g = torch.Generator().manual_seed(4)
        bias = kwargs["bias"] = (torch.randn(16, generator=g) * 4).round() / 8 - 0.7
    if kwargs.get("topk_group", 1) < kwargs.get("num_expert_group", 1):
        rows = torch.where(rows.isinf(), -40.0, rows)  # masks in groups: test_masked_group
    r = METHODS[name](rows, k, **kwargs)
    groups, keep = kwargs.get("num_expert_group", 1), kwargs.get("topk_group", 1)
    rsf = kwargs.get("routed_scaling_factor", 1.0)
    biases = None if bias is None else bias.tolist()
    expected = [o_route(name, row, k, biases, groups, keep, rsf) for row in rows.tolist()]
    assert r.ids.tolist() == [ids for ids, _ in expected]
    want = torch.tensor([w for _, w in expected], dtype=torch.float64)
    torch.testing.assert_close(r.weights.double(), want, atol=1e-6, rtol=1e-6)


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


def test_from_words_compiles_whole() -> None:
    words = torch.tensor([[0x0005BF00, -1]], dtype=torch.int32)
    torch.compiler.reset()
    r = torch.compile(Routing.from_words, fullgraph=True, backend="eager")(words)
    assert r.ids.tolist() == [[5, -1]] and r.weights[0, 0].item() == -0.5


# --- Routing and its packed words -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_routing_keeps_what_it_gets(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, -1], [5, 5], [2**31 - 1, -(2**31)]], dtype=dtype)
    for weight_dtype in (torch.float32, torch.bfloat16, torch.float16):
        r = Routing(ids, torch.ones(3, 2, dtype=weight_dtype), on_input=True)
        assert r.ids is ids and (r.num_tokens, r.top_k, r.on_input) == (3, 2, True)
    with pytest.raises(FrozenInstanceError):
        r.ids = ids  # type: ignore[misc]
    assert r == r and r != Routing(ids, torch.ones(3, 2))  # identity: tensors have no truth value


@pytest.mark.parametrize(
    ("ids", "weights", "error", "message"),
    [
        ([[0]], torch.ones(1, 1), TypeError, "ids: expected a tensor.*list"),
        (torch.zeros(1, 1).int(), 1.0, TypeError, "weights: expected a tensor.*float"),
        (
            torch.zeros(1, 1),
            torch.ones(1, 1),
            ValueError,
            r"int32 or int64.*float32 \[1, 1\].*cast",
        ),
        (torch.zeros(1, 1).short(), torch.ones(1, 1), ValueError, "ids: expected.*int16"),
        (torch.zeros(1, 1).int(), torch.ones(1, 1).int(), ValueError, "weights: expected float32"),
        (torch.zeros(1, 1).int(), torch.ones(1, 1).double(), ValueError, r"float64 \[1, 1\]"),
        (torch.zeros(2).int(), torch.ones(2), ValueError, r"ids: .*int32 \[2\].*reshape"),
        (torch.zeros(2, 1).int(), torch.ones(2), ValueError, r"weights: .*float32 \[2\]"),
        (torch.zeros(2, 1).int(), torch.ones(1, 2), ValueError, r"one shape.*\[2, 1\].*\[1, 2\]"),
        (torch.zeros(2, 1).int(), torch.ones(2, 1, device="meta"), ValueError, "cpu.*meta"),
    ],
)
def test_routing_refuses(ids: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Routing(ids, weights)


def test_routing_refuses_on_input() -> None:
    with pytest.raises(TypeError, match="on_input: expected True or False"):
        Routing(torch.zeros(1, 1).int(), torch.ones(1, 1), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expert", "weight", "word"),
    [
        (3, 0.75, 0x00033F40),
        (255, 1.0, 0x00FF3F80),
        (-1, 0.5, 0xFFFF3F00),
        (5, -0.5, 0x0005BF00),  # an unmasked sign extension makes this id -1
        (-1, -0.5, 0xFFFFBF00),
        (0, -0.0, 0x00008000),
        (32767, -INF, 0x7FFFFF80),
        (-32768, 1.0, 0x80003F80),
        (7, 1.00390625, 0x00073F80),  # halfway between bfloat16 neighbours: to even, down
        (7, 1.01171875, 0x00073F82),  # and up
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_words(expert: int, weight: float, word: int, dtype: torch.dtype) -> None:
    r = Routing(torch.tensor([[expert]], dtype=dtype), torch.tensor([[weight]]))
    words = r.to_words()
    assert words.dtype == torch.int32 and int(words.item()) & 0xFFFFFFFF == word
    back = Routing.from_words(words)
    assert back.ids.dtype == torch.int32 and back.ids.item() == expert
    expected = torch.tensor(weight).bfloat16()
    assert back.weights.dtype == torch.bfloat16 and back.weights.item() == expected.item()
    low, high = struct.unpack("<Hh", struct.pack("<i", words.item()))  # the kernel's struct
    assert high == expert and low == int(expected.view(torch.int16).item()) & 0xFFFF


def test_packed_words_carry_all_bits() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    ids = bits.flip(0)[:, None]
    r = Routing(ids, bits.to(torch.int16).view(torch.bfloat16)[:, None])
    back = Routing.from_words(r.to_words())
    assert torch.equal(back.ids, ids)
    assert torch.equal(back.weights.view(torch.int16).int()[:, 0], bits)


def test_packed_words_round_trip_a_method() -> None:
    r = routing.topk_raw(torch.randn(50, 16, generator=torch.Generator().manual_seed(7)), 12)
    assert bool((r.weights < 0).any())
    back = Routing.from_words(r.to_words(), on_input=True)
    assert torch.equal(back.ids, r.ids) and torch.equal(back.weights, r.weights.bfloat16())
    assert back.on_input


@pytest.mark.parametrize("expert", [32768, -32769, 2**31 - 1, 2**40])
def test_packed_words_refuse_wide_ids(expert: int) -> None:
    with pytest.raises(ValueError, match=r"expected int16 ids, got -?\d+\.\.\d+; -1 skips"):
        Routing(torch.tensor([[0, expert]]), torch.ones(1, 2)).to_words()


def test_from_words_refuses() -> None:
    with pytest.raises(ValueError, match=r"words: expected int32 \[T, top_k\], got int64 \[1, 1\]"):
        Routing.from_words(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"words: expected int32 \[T, top_k\], got int32 \[3\]"):
        Routing.from_words(torch.zeros(3, dtype=torch.int32))


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


# --- transformers' routers ------------------------------------------------------------------------

MOE: dict[str, Any] = {"hidden_size": 32, "num_experts_per_tok": 4}


def hf_router(model: str, router: str, config: str, **fields: Any) -> torch.nn.Module:
    pytest.importorskip("transformers")
    models = f"transformers.models.{model}"
    configuration = getattr(importlib.import_module(f"{models}.configuration_{model}"), config)
    cls = getattr(importlib.import_module(f"{models}.modeling_{model}"), router)
    module: torch.nn.Module = cls(configuration(**fields))
    g = torch.Generator().manual_seed(8)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape, generator=g) * 0.3)
    return module.eval()


def tokens() -> Tensor:
    return torch.randn(300, 32, generator=torch.Generator().manual_seed(9))


def compare(r: Routing, ids: Tensor, weights: Tensor) -> None:
    """Equal as sets of (id, weight) per row: transformers leaves the order of some routers open."""
    ids, theirs = ids.sort(dim=-1)
    ours = r.ids.long().sort(dim=-1)
    assert torch.equal(ours.values, ids)
    torch.testing.assert_close(
        r.weights.gather(1, ours.indices), weights.float().gather(1, theirs), atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("method", ["softmax_topk_renormalize", "topk_softmax"])
def test_transformers_mixtral(method: str) -> None:
    fields = {**MOE, "num_local_experts": 16}
    logits, weights, ids = hf_router("mixtral", "MixtralTopKRouter", "MixtralConfig", **fields)(
        tokens()
    )
    compare(METHODS[method](logits, 4), ids, weights)


@torch.no_grad()
@pytest.mark.parametrize("normalised", [True, False])
def test_transformers_qwen3_moe(normalised: bool) -> None:
    fields = {**MOE, "num_experts": 16, "norm_topk_prob": normalised}
    router = hf_router("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", **fields)
    logits, weights, ids = router(tokens())
    method = routing.softmax_topk_renormalize if normalised else routing.softmax_topk
    compare(method(logits, 4), ids, weights)


@torch.no_grad()
def test_transformers_gpt_oss() -> None:
    fields = {**MOE, "num_local_experts": 16}
    logits, weights, ids = hf_router("gpt_oss", "GptOssTopKRouter", "GptOssConfig", **fields)(
        tokens()
    )
    compare(routing.topk_softmax(logits, 4), ids, weights)


@torch.no_grad()
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("normalised", [True, False])
def test_transformers_deepseek_v3(groups: int, kept: int, normalised: bool) -> None:
    fields = {**MOE, "n_routed_experts": 16, "n_group": groups, "topk_group": kept}
    fields |= {"norm_topk_prob": normalised, "routed_scaling_factor": 2.5}
    router = hf_router("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", **fields)
    logits, weights, ids = router(tokens())
    bias = router.get_buffer("e_score_correction_bias")
    assert bool(bias.any())
    r = routing.deepseek_v3(
        logits,
        4,
        bias,
        num_expert_group=groups,
        topk_group=kept,
        routed_scaling_factor=2.5,
        norm_topk_prob=normalised,
    )
    compare(r, ids, weights)


@torch.no_grad()
def test_transformers_deepseek_v4() -> None:
    fields = {**MOE, "n_routed_experts": 16, "routed_scaling_factor": 1.5}
    router = hf_router("deepseek_v4", "DeepseekV4TopKRouter", "DeepseekV4Config", **fields)
    logits, weights, ids = router(tokens())
    bias = router.get_buffer("e_score_correction_bias")
    compare(routing.sqrt_softplus_topk(logits, 4, bias, routed_scaling_factor=1.5), ids, weights)


@torch.no_grad()
def test_transformers_minimax_m2() -> None:
    fields = {**MOE, "num_local_experts": 16}
    router = hf_router("minimax_m2", "MiniMaxM2TopKRouter", "MiniMaxM2Config", **fields)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(10))
    logits, weights, ids = router(tokens(), bias)
    compare(routing.minimax2(logits, 4, bias), ids, weights)


@torch.no_grad()
def test_transformers_llama4() -> None:
    fields = {**MOE, "num_local_experts": 16, "num_experts_per_tok": 1}
    scores, logits = hf_router("llama4", "Llama4Router", "Llama4TextConfig", **fields)(tokens())
    compare(routing.llama4(logits), scores.argmax(dim=-1, keepdim=True), scores.amax(-1, True))
