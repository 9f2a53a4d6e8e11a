"""Routing against two oracles: loops in plain Python, and transformers' routers.

The loops share no code with the library: Python floats, `math`, one explicit fp32 rounding per
score, explicit sort keys. Ids must agree in every row, ties and masks included.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moelten import routing
from moelten.routing import METHODS, Routing

INF, NAN = math.inf, math.nan
BIASED = ("minimax2", "deepseek_v3", "sqrt_softplus_topk")


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
