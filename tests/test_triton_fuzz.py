"""Random routings on Triton: ids of every kind, in and out of range, and poison where none looks.

A thousand for each scheme on a GPU; thirty in the interpreter, through test_triton_interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import Case, make_weights
from metrics import assert_matches
from triton_device import DEVICE, INTERPRET

import moelten
from moelten import reference
from moelten.formats import Float, scheme
from moelten.routing import Routing
from moelten.weights import ExpertWeights

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROUTINGS = 15 if INTERPRET else 1000
SCHEMES = ("mxfp4_bf16", "int8_int8") if INTERPRET else (
    *("mxfp4_bf16", "int4g32_fp8", "fp8block_fp8", "int8_int8"),
)  # fmt: skip
EXPERTS, HIDDEN, INTER = 6, 64, 64
MOST = 18 if INTERPRET else 300
# Around the ends of small plans and tiles, in tokens for one slot.
EDGES = (0, 1, 2, 8) if INTERPRET else (0, 1, 15, 16, 17, 32, 63, 65, 127, 128, 129, 192, 256, 300)
BAD = torch.tensor([-1, EXPERTS, EXPERTS + 1, 2**31 - 1, -(2**31)])


@dataclass
class Layer:
    """A layer, a pool of tokens, and every token's output from every expert."""

    weights: ExpertWeights
    experts: moelten.PackedExperts
    pool: torch.Tensor
    outputs: torch.Tensor

    @classmethod
    def make(cls, name: str) -> Layer:
        case = Case(scheme(name), EXPERTS, HIDDEN, INTER, biases=True)
        weights, g = make_weights(case), torch.Generator().manual_seed(11)
        fmt = case.scheme.activations
        dtype = fmt.data_dtype if isinstance(fmt, Float) else torch.bfloat16
        pool = torch.randn(MOST, HIDDEN, generator=g).to(dtype)
        outputs = [reference.expert_mlp(pool.float(), weights, e) for e in range(EXPERTS)]
        experts = moelten.pack(weights, device=DEVICE, backend="triton")
        return cls(weights, experts, pool.to(DEVICE), torch.stack(outputs).to(DEVICE))

    def expected(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The reference's sum in slot order, from outputs computed once."""
        tokens = torch.arange(ids.shape[0], device=DEVICE)
        out = torch.zeros(ids.shape[0], HIDDEN, dtype=torch.float64, device=DEVICE)
        for slot in range(ids.shape[1]):
            here = valid(ids[:, slot])
            expert = torch.where(here, ids[:, slot].long(), 0)
            part = self.outputs[expert, tokens] * weights[:, slot, None].double()
            out += torch.where(here[:, None], part, 0.0)
        return out


def valid(ids: torch.Tensor) -> torch.Tensor:
    return (ids.long() >= 0) & (ids.long() < EXPERTS)


def draw(index: int) -> Routing:
    """A routing of its own kind: how many tokens, how skewed, how many bad ids, which dtypes."""
    g = torch.Generator().manual_seed(index)

    def pick(*choices):
        return choices[int(torch.randint(0, len(choices), (1,), generator=g))]

    top_k = pick(1, 2, 3, 4, 5, 6, 7, 8)
    tokens = int(torch.randint(0, MOST + 1, (1,), generator=g))
    if index % 2:
        tokens = min(max(pick(*EDGES) // top_k + pick(-1, 0, 1), 0), MOST)
    share = pick(
        torch.ones(EXPERTS), 1.0 / torch.arange(1, EXPERTS + 1) ** 2, torch.eye(EXPERTS)[2]
    )
    flat = torch.multinomial(share, tokens * top_k, replacement=True, generator=g) if tokens else []
    ids = torch.as_tensor(flat, dtype=torch.long).view(tokens, top_k)
    away = torch.rand(ids.shape, generator=g) < pick(0.0, 0.1, 0.5, 1.0)
    # Now and then a token of its own has no expert here.
    away |= torch.rand(tokens, 1, generator=g) < 0.2
    ids = torch.where(away, BAD[torch.randint(0, len(BAD), ids.shape, generator=g)], ids)
    weights = torch.rand(ids.shape, generator=g) + 0.1
    weights = torch.where(away, pick(torch.nan, torch.inf, 0.5), weights)
    return Routing(
        ids.to(pick(torch.int32, torch.int64)), weights.to(pick(torch.float32, torch.bfloat16))
    )


def run(layer: Layer, x: torch.Tensor, routing: Routing, poison: int) -> torch.Tensor:
    """A call whose output and workspace held `poison` bytes."""
    size = moelten.workspace_bytes(layer.experts, x.shape[0], routing.top_k, backend="triton")
    workspace = torch.full((size,), poison, dtype=torch.uint8, device=DEVICE)
    out = torch.full_like(x, torch.nan)
    return moelten.fused_moe(
        x, layer.experts, routing, out=out, workspace=workspace, backend="triton"
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_random_routings(name):
    layer, counts = Layer.make(name), {"tokens": 0, "away": 0, "unrouted": 0}
    for index in range(ROUTINGS):
        routing = draw(index)
        routing = Routing(routing.ids.to(DEVICE), routing.weights.to(DEVICE))
        x = layer.pool[: routing.num_tokens]
        clean = run(layer, x, routing, 0)
        assert_matches(clean, layer.expected(routing.ids, routing.weights))
        here = valid(routing.ids).any(1)
        assert (clean[~here] == 0).all(), index
        # Rows that no expert takes hold poison, and so does every byte of the workspace.
        for value, byte in ((torch.nan, 0xFF), (torch.inf, 0x7F)):
            dirty = torch.where(here[:, None], x, value)
            assert torch.equal(run(layer, dirty, routing, byte), clean), index
        counts["tokens"] += routing.num_tokens
        counts["away"] += int((~valid(routing.ids)).sum())
        counts["unrouted"] += int((~here).sum())
    # The draws are what they claim to be.
    assert counts["tokens"] > 3 * ROUTINGS and counts["away"] > counts["unrouted"] > ROUTINGS
