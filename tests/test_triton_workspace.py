"""Calls inside a workspace, on Triton: exact, of any content, in chunks, and free of allocations.

Runs on a GPU, or in the interpreter through test_triton_interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ACTIVATIONS, Case, make_input, make_weights
from metrics import assert_matches
from triton_device import DEVICE, INTERPRET

# isort: split
import triton

import moelten
from moelten import reference
from moelten.formats import scheme
from moelten.kernels import arena, launches
from moelten.kernels.triton import TritonBackend
from moelten.routing import Routing

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SCHEMES = ("mxfp4_bf16", "int4g32_fp8", "nvfp4_nvfp4t", "fp8tensor_fp8tensor", "mxfp4_mxfp8")


def make(name: str, tokens=5, **changes):
    sizes = {"num_experts": 3, "hidden_size": 64, "intermediate_size": 32, "top_k": 2}
    case = Case(scheme(name), tokens=tokens, **(sizes | changes))
    weights, (x, routing) = make_weights(case), make_input(case)
    experts = moelten.pack(weights, device=DEVICE, backend="triton")
    routing = Routing(routing.ids.to(DEVICE), routing.weights.to(DEVICE))
    return weights, experts, x.to(DEVICE), routing


def needed(experts, tokens, top_k=2, on_input=False):
    return moelten.workspace_bytes(experts, tokens, top_k, on_input=on_input, backend="triton")


def run(experts, x, routing, workspace=None):
    out = torch.full_like(x, torch.nan)
    return moelten.fused_moe(x, experts, routing, out=out, workspace=workspace, backend="triton")


def filled(size: int, value: int = 0xFF) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_workspace_of_the_size_it_names(name, on_input):
    """The same bits, whatever it held; not a byte beyond it is touched."""
    _, experts, x, routing = make(name)
    routing = replace(routing, on_input=on_input)
    wanted = run(experts, x, routing)
    size = needed(experts, 5, on_input=on_input)
    room = filled(size + 512)
    for value in (0xFF, 0x7F):
        room.fill_(value)
        assert torch.equal(run(experts, x, routing, room[:size]), wanted)
        assert (room[size:] == value).all()
    assert int((room[:size] != 0x7F).sum()) > size // 4


def test_one_byte_less_than_a_token_takes_is_refused():
    _, experts, x, routing = make("mxfp4_fp8")
    one, all_five = needed(experts, 1), needed(experts, 5)
    for size in (0, one - 1):
        with pytest.raises(ValueError, match=f"at least {one} bytes.* 5 at once take {all_five}"):
            run(experts, x, routing, filled(size))
    first = Routing(routing.ids[:1], routing.weights[:1])
    run(experts, x[:1], first, filled(one))
    with pytest.raises(ValueError, match=f"at least {one} bytes.*got {one - 1}"):
        run(experts, x[:1], first, filled(one - 1))


@pytest.mark.parametrize("name", ["int4g32_fp8"] if INTERPRET else SCHEMES)
def test_less_room_means_more_chunks(name, monkeypatch):
    tokens = 3 if INTERPRET else 90
    weights, experts, x, routing = make(name, tokens)
    sizes = []
    inner = TritonBackend.run_chunk

    def counted(self, x, *rest):
        if not launches._COMPILING.get():
            sizes.append(x.shape[0])
        return inner(self, x, *rest)

    monkeypatch.setattr(TritonBackend, "run_chunk", counted)
    arena._prepare.cache_clear()
    expected = reference.moe(x.cpu(), weights, Routing(routing.ids.cpu(), routing.weights.cpu()))

    def split(most: int) -> list[int]:
        step = -(-tokens // -(-tokens // most))
        return [min(step, tokens - start) for start in range(0, tokens, step)]

    for size, chunks in (
        (needed(experts, tokens), [tokens]),
        (needed(experts, tokens) - 1, split(tokens - 1)),
        (needed(experts, 2), split(2)),
    ):
        sizes.clear()
        found = run(experts, x, routing, filled(size))
        assert sizes == chunks
        assert_matches(found.cpu(), expected)
        start = 0
        for count in chunks:
            part = slice(start, start + count)
            alone = run(experts, x[part], Routing(routing.ids[part], routing.weights[part]))
            assert torch.equal(found[part], alone)
            start += count


def test_without_one_the_backend_bounds_itself(monkeypatch):
    _, experts, x, routing = make("mxfp4_bf16", tokens=3)
    wanted = run(experts, x, routing, filled(needed(experts, 2)))

    def allow(size):
        monkeypatch.setattr(arena, "_OWN_BYTES", size)
        arena._prepare.cache_clear()

    allow(needed(experts, 2))
    assert torch.equal(run(experts, x, routing), wanted)
    allow(1)
    alone = run(experts, x, routing, filled(needed(experts, 1)))
    assert torch.equal(run(experts, x, routing), alone)


def test_no_tokens():
    _, experts, x, routing = make("mxfp4_bf16", tokens=0)
    assert run(experts, x, routing, filled(needed(experts, 0))).shape == (0, 64)


def test_the_operator_says_what_it_writes():
    _, experts, x, routing = make("mxfp4_bf16", tokens=2)
    tensors = list(experts.tensors.values())
    signature = f"{experts.signature}\ntriton"
    inputs = (x, routing.ids, routing.weights, False, tensors, signature)
    torch.library.opcheck(
        torch.ops.moelten.fused_moe_out.default,
        (*inputs, torch.zeros_like(x), filled(needed(experts, 2))),
    )


# On a GPU alone.

LAYERS = {
    "bf16": ("mxfp4_bf16", {}),
    "fp8": ("int4g32_fp8", {}),
    "static": ("fp8tensor_fp8tensor", {}),
    "nvfp4": ("nvfp4_nvfp4t", {}),
    "by expert": (
        "int4g32_fp8",
        {"num_experts": 5, "activation": ACTIVATIONS["per_expert"], "biases": True},
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 300])
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_allocated(layer, tokens, monkeypatch):
    name, changes = LAYERS[layer]
    _, experts, x, routing = make(name, tokens, **changes)
    workspace, out = filled(needed(experts, tokens)), torch.empty_like(x)
    for _ in range(2):
        before = torch.cuda.memory_stats()
        moelten.fused_moe(x, experts, routing, out=out, workspace=workspace)
        after = torch.cuda.memory_stats()
        for count in ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries"):
            assert after[count] == before[count], count
    wanted = out.clone()
    with monkeypatch.context() as without:  # the launches are repeated, not made again
        without.setattr(triton.JITFunction, "run", pytest.fail)
        for value in (0, 0xFF):
            out.fill_(torch.nan), workspace.fill_(value)
            moelten.fused_moe(x, experts, routing, out=out, workspace=workspace)
            assert torch.equal(out, wanted)
    # The counter counts: without a workspace there is an allocation.
    moelten.fused_moe(x, experts, routing, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > after["allocation.all.allocated"]


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
def test_captured_from_the_first_call(layer):
    """No warm-up: the first call after packing is the captured one; replays follow new inputs."""
    name, changes = LAYERS[layer]
    weights, experts, x, routing = make(name, 9, seed=1, **changes)
    workspace, out = filled(needed(experts, 9)), torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        moelten.fused_moe(x, experts, routing, out=out, workspace=workspace)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    for seed in (1, 2):
        case = Case(scheme(name), experts.spec.num_experts, 64, 32, 9, 2, seed=seed)
        new_x, fresh = make_input(case)
        x.copy_(new_x), routing.ids.copy_(fresh.ids), routing.weights.copy_(fresh.weights)
        out.fill_(torch.nan), workspace.fill_(0xFF)
        graph.replay()
        assert_matches(out.cpu(), reference.moe(new_x, weights, fresh))


@pytest.mark.gpu
def test_an_odd_address_is_refused():
    _, experts, x, routing = make("mxfp4_bf16")
    with pytest.raises(ValueError, match="multiple of 256"):
        run(experts, x, routing, filled(needed(experts, 5) + 16)[16:])
