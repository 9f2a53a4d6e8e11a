"""The workspace of a call: how it is measured, cut and refused; test_triton_workspace uses it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cases import Case, make_input, make_weights

import moelten
from moelten import kernels
from moelten.errors import FormatError
from moelten.formats import scheme
from moelten.kernels.arena import ALIGNMENT, Arena, chunk_tokens, heap
from moelten.weights import ExpertSpec


def test_an_arena_measures_what_it_serves():
    wanted = [(torch.float32, 3, 5), (torch.uint8, 7), (torch.bfloat16, 1), (torch.int32, 0)]
    counted = Arena()
    for request in wanted:
        assert counted.take(*request).is_meta
    assert counted.size == 3 * ALIGNMENT
    buffer = torch.zeros(counted.size, dtype=torch.uint8)
    served = Arena(buffer)
    parts = [served.take(*request) for request in wanted]
    for part, (dtype, *shape) in zip(parts, wanted, strict=True):
        assert (part.dtype, list(part.shape), part.is_contiguous()) == (dtype, shape, True)
        assert (part.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0 or not part.numel()
        part.fill_(1)
    assert int(buffer.count_nonzero()) == 15 * 2 + 7 + 2  # 1.0 is two bytes that are not zero
    with pytest.raises(RuntimeError):
        served.take(torch.uint8, 1)
    assert heap(torch.device("cpu"))(torch.int8, 2, 3).shape == (2, 3)


def test_chunks_are_few_and_nearly_equal():
    for tokens in range(1, 60):
        for limit in range(10, 700, 7):
            step = chunk_tokens(tokens, limit, lambda t: 10 * t)
            assert 10 * step <= limit
            assert -(-tokens // step) == -(-tokens // min(tokens, limit // 10))
    with pytest.raises(FormatError, match=r"at least 10 bytes.*all 4 at once take 40.*got 9"):
        chunk_tokens(4, 9, lambda t: 10 * t)


@pytest.fixture(params=["sm_80", "sm_90a", "gfx950"])
def triton(request, monkeypatch):
    """The portable backend, on a GPU that it takes for granted."""
    pytest.importorskip("triton")
    from triton_targets import pretend

    pretend(monkeypatch, request.param)
    return next(b for b in kernels.BACKENDS if b.name == "triton")


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g128_fp8", "nvfp4_nvfp4", "fp32_fp32"])
def test_bytes_never_shrink_with_tokens(name, triton):
    """Also where tiles grow, so that there are fewer, and rows are tiny."""
    counts = [*range(300), *range(4080, 4110), *range(8180, 8200)]
    for experts, hidden, inter in ((1, 16, 16), (256, 16, 16), (256, 4096, 2048)):
        spec = ExpertSpec(scheme(name), experts, hidden, inter)
        for top_k in (1, 6):
            sizes = [triton.workspace_bytes(spec, t, top_k) for t in counts]
            assert sizes[0] == 0 and all(a <= b for a, b in pairwise(sizes))
            assert triton.workspace_bytes(spec, 9, top_k, True) >= sizes[9]


def test_bytes_of_a_billion_tokens(triton):
    """Python's integers: 10**9 pairs of a row of 4096 outputs in fp32 are 16 TB, not a wrap."""
    spec = ExpertSpec(scheme("mxfp4_fp8"), 256, 4096, 2048)
    tokens = 10**9
    # Outputs, hidden and its codes, of 1 or (widened to fp16) 2 bytes; and the inputs' codes.
    needed = {
        code: 6 * tokens * (4 * 4096 + (4 + code) * 2048) + tokens * code * 4096 for code in (1, 2)
    }
    assert needed[1] < triton.workspace_bytes(spec, tokens, 6) < 1.01 * needed[2]


@pytest.mark.parametrize("name", ["mxfp4_bf16", "fp8block_fp8"])
def test_a_cpu_needs_none_and_leaves_one_alone(name):
    case = Case(scheme(name))
    weights, (x, routing) = make_weights(case), make_input(case)
    for backend in [
        v.backend for v in moelten.explain(weights) if v.runs and v.backend != "triton"
    ]:
        experts = moelten.pack(weights, backend=backend)
        assert moelten.workspace_bytes(experts, 33, 3, backend=backend) == 0
        wanted = moelten.fused_moe(x, experts, routing, backend=backend)
        for size in (0, 100):
            workspace = torch.full((size,), 7, dtype=torch.uint8)
            out = torch.full_like(x, torch.nan)
            found = moelten.fused_moe(
                x, experts, routing, out=out, workspace=workspace, backend=backend
            )
            assert found is out and torch.equal(out, wanted) and (workspace == 7).all()


BAD = {
    "dtype": (lambda: torch.empty(8), "contiguous torch.uint8"),
    "axes": (lambda: torch.empty(2, 4, dtype=torch.uint8), "contiguous torch.uint8"),
    "strides": (lambda: torch.empty(8, dtype=torch.uint8)[::2], "contiguous torch.uint8"),
    "device": (lambda: torch.empty(8, dtype=torch.uint8, device="meta"), "workspace is on meta"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_workspaces_are_refused(bad):
    case = Case(scheme("mxfp4_bf16"))
    experts, (x, routing) = moelten.pack(make_weights(case)), make_input(case)
    make, message = BAD[bad]
    with pytest.raises(FormatError, match=message):
        moelten.fused_moe(x, experts, routing, workspace=make())


def test_what_cannot_be_free_of_allocations_is_refused():
    case = Case(scheme("mxfp4_bf16"))
    experts, (x, routing) = moelten.pack(make_weights(case)), make_input(case)
    workspace = torch.empty(0, dtype=torch.uint8)
    strided = moelten.Routing(routing.ids.T.contiguous().T, routing.weights)
    assert moelten.fused_moe(x, experts, strided).shape == x.shape
    with pytest.raises(FormatError, match="must be contiguous"):
        moelten.fused_moe(x, experts, strided, workspace=workspace)
    with pytest.raises(FormatError, match="out: expected contiguous"):
        moelten.fused_moe(x, experts, routing, out=x.T.contiguous().T)
    with pytest.raises(FormatError, match="tokens >= 0 and top_k >= 1"):
        moelten.workspace_bytes(experts, -1, 2)


def test_no_gradient_is_lost_in_silence():
    case = Case(scheme("mxfp4_bf16"))
    experts, (x, routing) = moelten.pack(make_weights(case)), make_input(case)
    x.requires_grad_()
    for given in ({"out": torch.empty_like(x)}, {"workspace": torch.empty(0, dtype=torch.uint8)}):
        with pytest.raises(NotImplementedError, match="inference only"):
            moelten.fused_moe(x, experts, routing, **given)
        with torch.no_grad():
            moelten.fused_moe(x, experts, routing, **given)


# The registered operator with a workspace.


def op_arguments():
    case = Case(scheme("mxfp4_bf16"))
    experts, (x, routing) = moelten.pack(make_weights(case)), make_input(case)
    tensors = list(experts.tensors.values())
    inputs = (x, routing.ids, routing.weights, False, tensors, experts.signature)
    return experts, x, routing, inputs


def test_opcheck():
    _, x, _, inputs = op_arguments()
    for workspace in (None, torch.zeros(512, dtype=torch.uint8)):
        torch.library.opcheck(
            torch.ops.moelten.fused_moe_out.default, (*inputs, torch.empty_like(x), workspace)
        )


def test_compile_fullgraph():
    experts, x, routing, _ = op_arguments()
    workspace = torch.zeros(64, dtype=torch.uint8)

    def layer(x, ids, weights, workspace):
        out = torch.empty_like(x)
        routing = moelten.Routing(ids, weights)
        return moelten.fused_moe(x * 2, experts, routing, out=out, workspace=workspace) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (33, 7):
        arguments = x[:rows], routing.ids[:rows], routing.weights[:rows], workspace
        assert torch.equal(compiled(*arguments), layer(*arguments))


class Exported(torch.nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, ids, weights, workspace):
        routing = moelten.Routing(ids, weights)
        return moelten.fused_moe(x, self.experts, routing, workspace=workspace)


def test_export():
    experts, x, routing, _ = op_arguments()
    workspace = torch.zeros(64, dtype=torch.uint8)
    arguments = (x, routing.ids, routing.weights, workspace)
    program = torch.export.export(Exported(experts), arguments)
    assert "moelten.fused_moe_out" in str(program.graph)
    assert torch.equal(program.module()(*arguments), moelten.fused_moe(x, experts, routing))


def test_parameters_by_expert_are_packed():
    """Nothing is left to make at the first call: the table goes where the weights go."""
    activation = moelten.SwiGLU((1.0, 1.5, 2.0, 2.5, 3.0), 0.25, (1.0, 2.0, 3.0, 4.0, 5.0))
    weights = make_weights(Case(scheme("mxfp4_bf16"), activation=activation))
    experts = moelten.pack(weights)
    table = experts.tensors["activation_table"]
    wanted = torch.tensor([[1 + e / 2, 0.25, e + 1.0] for e in range(5)])
    assert torch.equal(table, wanted)
    assert torch.equal(experts.expert_range(2, 4).tensors["activation_table"], wanted[2:4])
    assert torch.equal(experts.shard(0, 2).tensors["activation_table"], wanted)
    assert experts.unpack().activation == activation
    no_limit = moelten.SwiGLU((1.0, 2.0), 0.0, None).table()
    assert torch.equal(no_limit, torch.tensor([[1.0, 0.0, torch.inf], [2.0, 0.0, torch.inf]]))
    plain = moelten.pack(make_weights(Case(scheme("mxfp4_bf16"))))
    assert "activation_table" not in plain.tensors
