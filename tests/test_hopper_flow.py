"""All of the Hopper backend but its GEMMs, against the reference, in Triton's interpreter.

The GEMMs, which only a Hopper GPU runs, are replaced by what they promise to write, computed from
the weights: so rows, positions, orders of columns, scales and paddings must all fit together.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_hopper_plan
import torch
from cases import Case, make_input, make_weights
from metrics import assert_matches
from test_hopper_plan import in_order_of_sums
from test_hopper_plan import ordered as reordered
from triton_device import INTERPRET

if not INTERPRET:
    pytest.skip("runs through test_triton_interpreter.py", allow_module_level=True)

from moelten import dequantize, reference
from moelten.formats import scheme
from moelten.kernels import hopper_gemm
from moelten.kernels.hopper import HopperBackend
from moelten.packed import PackedExperts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def in_order(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Columns as they are in memory, of rows in the order of operands; the rest are zeros."""
    rows = reordered(rows)  # twice is not at all
    assert not rows[:, columns:].any()
    return rows[:, :columns]


def by_column(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales of rows [R, groups] for each of the columns."""
    if scale.shape[1] == 1:
        return scale.double()
    return scale.double().repeat_interleave(128, 1)[:, :columns]


def scales_of(x) -> torch.Tensor:
    """Scales [groups, positions] from what `hopper_rows.quantize` wrote."""
    found = x.scale[..., 0].double()
    if x.global_scale is None:
        return found
    # Units of units, from the last one back.
    back = found[1:].flip(0).cumprod(0).flip(0)
    return torch.cat([back, torch.ones_like(found[:1])]) * x.global_scale


class Gemms:
    """`hopper_gemm.grouped_gemm` and `prefill_gemm`, by their promises, for layers of weights."""

    def __init__(self, weights):
        self.weights, self.calls, self.begun = weights, [], None

    def layer(self, matrix, rows, expert: int, epilogue) -> torch.Tensor:
        """[rows, N] of one expert, in fp64, lest codes of what is quantized again flip."""
        first = matrix.rows == self.weights.spec.intermediate_size
        w = dequantize((self.weights.w13 if first else self.weights.w2)[expert], torch.float64)
        if not first:
            y = rows @ w.T
            return y if epilogue.bias is None else y + epilogue.bias[expert]
        y = torch.einsum("rk,hnk->rhn", rows, w)
        if epilogue.bias is not None:
            y = y + epilogue.bias[expert].view(y.shape[1:])
        y = self.weights.activation(y, torch.full((len(rows),), expert))
        return y if epilogue.post_scale is None else y * epilogue.post_scale[expert]

    def tiles(self, plan):
        for tile in range(int(plan.count[0])):
            yield plan.tiles[:3, tile].tolist()

    def few(self, x, matrix, plan, out, variant, *, first, rows_per_source=1, epilogue):
        self.calls.append("few")
        columns, width = -(-matrix.columns // 8) * 8, -(-matrix.rows // 8) * 8
        data = x.data.flatten()
        out[1:] = 0
        into = out[0].flatten()
        for expert, start, stop in self.tiles(plan):
            for pair in plan.pairs[start:stop].tolist():
                source = pair // rows_per_source
                row = data[source * columns :][: matrix.columns].double()
                if x.scale is not None:
                    row = row * by_column(x.scale[source, None], matrix.columns)[0]
                y = self.layer(matrix, row[None], expert, epilogue)[0]
                if epilogue.router is not None:
                    y = y * epilogue.router.flatten()[pair]
                into[pair * width :][:width] = 0
                into[pair * width :][: matrix.rows] = y.to(out.dtype)

    def many(self, x, matrix, plan, out, variant, *, ordered, awaited, epilogue):
        """GEMM2, if it may begin before GEMM1 ends, does every tile as soon as that has."""
        sources = plan.pairs if ordered and variant.gathers else None
        self.calls.append("many" if sources is None else "gathers")
        own = (x, matrix, out, variant, ordered, sources, epilogue)
        if ordered and awaited:
            self.begun = own
            return
        for tile in self.tiles(plan):
            if awaited:
                self.tile(*self.begun, *tile)
            self.tile(*own, *tile)

    def tile(self, x, matrix, out, variant, ordered, sources, epilogue, expert, start, stop):
        rows = x.data[start:stop] if sources is None else x.data[sources[start:stop].long()]
        rows = in_order(rows, matrix.columns).double()
        if variant.grouped:
            rows = rows * by_column(scales_of(x).T[start:stop], matrix.columns)
        elif x.scale is not None:
            at = slice(start, stop) if sources is None else sources[start:stop].long()
            rows = rows * x.scale[at].view(-1, 1)
        y = self.layer(matrix, rows, expert, epilogue)
        if ordered:
            out[start:stop] = reordered(y.to(out.dtype))
        else:
            out[start:stop] = in_order_of_sums(y.float())


no_overlap = test_hopper_plan.no_overlap


def run(monkeypatch, weights, x, routing) -> tuple[torch.Tensor, list[str]]:
    gemms = Gemms(weights)
    monkeypatch.setattr(hopper_gemm, "grouped_gemm", gemms.few)
    monkeypatch.setattr(hopper_gemm, "prefill_gemm", gemms.many)
    operand = "fp16" if weights.spec.scheme.activations.name == "fp16" else "bf16"
    backend, out = HopperBackend(operand), torch.full_like(x, torch.nan)
    packed = PackedExperts.pack(weights.spec, weights.experts(), backend.layout, x.device)
    size = backend.workspace_bytes(weights.spec, len(x), routing.top_k, routing.on_input)
    workspace = torch.full((size,), 0x7F, dtype=torch.uint8)
    backend.run(x, packed, routing, out, workspace)
    return out, gemms.calls


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("tokens", [3, 40, 70, 150])
@pytest.mark.parametrize(
    "name",
    [
        *("mxfp4_bf16", "int4g32_bf16", "int4_fp8", "int4g32_fp8", "int8_int8", "fp8_fp16"),
        "fp8block_fp8",
    ],
)
def test_layers(monkeypatch, no_overlap, name, tokens, on_input):
    """Whole groups of columns, or sizes that are padded to 8 by one kernel and to 32 by another."""
    sizes = (192, 96) if "g32" in name or name == "mxfp4_bf16" else (200, 88)
    if scheme(name).activations.block[1] == 128:
        # Several groups of activations, the last one not whole.
        sizes = (328, 168)
    case = Case(scheme(name), 4, *sizes, tokens, top_k=2, biases=True)
    weights, (x, routing) = make_weights(case), make_input(case)
    pre_scale = torch.rand(4, sizes[1], generator=torch.Generator().manual_seed(1)) + 0.5
    weights = replace(weights, w2_pre_scale=pre_scale)
    routing.ids[2] = -1
    routing = replace(routing, on_input=on_input)
    out, calls = run(monkeypatch, weights, x, routing)
    wanted = {3: ["few", "few"], 150: ["many", "many"]}
    assert calls == wanted.get(tokens, ["gathers", "many"])
    assert_matches(out, reference.moe(x, weights, routing))
