"""What is remembered between calls of `fused_moe` on a GPU, and what is looked at every time.

No GPU: kernels, driver and current stream are stand-ins, so what the driver is told is seen here.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import Case, make_input, make_weights

import moelten
from moelten import kernels
from moelten.errors import FormatError, LayoutError
from moelten.formats import scheme
from moelten.kernels import arena, launches
from moelten.kernels.hopper import HopperBackend
from moelten.kernels.launches import Launches
from moelten.packed import PackedExperts

KINDS = {bool: "i1", int: "i32", float: "fp32"}


class Kernel:
    """Stands in for a Triton kernel: what it is compiled to says which arguments are addresses."""

    def __init__(self, inner, number: int, seen: list[int]) -> None:
        self.arg_names, self.number, self.seen = inner.arg_names, number, seen

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.seen.append(self.number)
            values = dict(zip(self.arg_names, arguments, strict=False))
            signature = {
                name: "*u8" if hasattr(value, "data_ptr") else KINDS.get(type(value), "constexpr")
                for name, value in values.items()
            }
            signature |= dict.fromkeys(named, "constexpr")
            facts = {"num_warps": 4, "shared": 0, "launch_pdl": False, "num_ctas": 1}
            scratch = {"global_scratch_size": 0, "profile_scratch_size": 0}
            return SimpleNamespace(
                function=self.number,
                metadata=SimpleNamespace(**facts, **scratch, launch_cooperative_grid=False),
                src=SimpleNamespace(signature=signature),
                name="kernel",
            )

        return run

    def warmup(self, *arguments, grid, **named):
        """Compiled before its first launch, which is what is counted."""


class Machine:
    """A Hopper GPU that runs on a CPU's tensors: what Triton was asked, what the driver was."""

    def __init__(self) -> None:
        self.compiled: list[int] = []
        self.launched: list[set[int]] = []

    def driver(self, config, function, parameters, extra) -> int:
        found = {ctypes.c_uint64.from_address(place).value for place in parameters._obj if place}
        self.launched.append(found)
        return 0

    def told(self, tensor: torch.Tensor) -> bool:
        """Whether some launch of the latest call got an address in this tensor."""
        start = tensor.data_ptr()
        return any(start <= at < start + tensor.nbytes for found in self.launched for at in found)

    def forget(self) -> None:
        self.compiled.clear()
        self.launched.clear()


@pytest.fixture
def machine(monkeypatch):
    pytest.importorskip("triton")
    from moelten.kernels import hopper_gemm, hopper_plan, triton_ops

    found = Machine()
    names = {
        "plan_kernel": hopper_plan,
        "decode_kernel": hopper_gemm,
        "combine_kernel": hopper_plan,
        "quantize_kernel": triton_ops,
    }
    for number, (name, module) in enumerate(names.items()):
        kernel = Kernel(getattr(module, name), number, found.compiled)
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(HopperBackend, "devices", ("cuda", "cpu"))
    monkeypatch.setattr(arena, "Launches", lambda device: Launches(torch.device("cuda", 7)))
    stand_ins = found.driver, lambda: 7, lambda device: 70 + device
    monkeypatch.setattr(launches, "_driver", lambda: stand_ins)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    arena._prepare.cache_clear()
    yield found
    arena._prepare.cache_clear()


def make(name="int4g32_bf16", tokens=5, **changes):
    sizes = {"num_experts": 8, "hidden_size": 128, "intermediate_size": 64, "top_k": 2}
    case = Case(scheme(name), tokens=tokens, **(sizes | changes))
    weights, (x, routing) = make_weights(case), make_input(case)
    backend = next(b for b in kernels.BACKENDS if b.name == "hopper")
    experts = PackedExperts.pack(weights.spec, weights.experts(), backend.layout, "cpu")
    return weights, experts, x, routing


def ready(machine, **changes):
    """A layer whose launches are recorded."""
    weights, experts, x, routing = make(**changes)
    moelten.fused_moe(x, experts, routing)
    assert len(machine.compiled) == 4 and not machine.launched
    machine.forget()
    moelten.fused_moe(x, experts, routing)
    assert len(machine.launched) == 4 and not machine.compiled
    machine.forget()
    return weights, experts, x, routing


def test_replaced_tensors_are_seen(machine):
    """Of the experts too: nothing keeps an address of theirs, however it changes."""
    weights, experts, x, routing = ready(machine)
    for name, part in list(experts.tensors.items()):
        old = experts.tensors[name] = part.clone()  # the one that was recorded lives on as `part`
        machine.forget()
        moelten.fused_moe(x, experts, routing)
        assert machine.told(old) and not machine.told(part) and not machine.compiled
        before = old.view_as(old)
        old.set_(part.clone())
        machine.forget()
        moelten.fused_moe(x, experts, routing)
        assert machine.told(old) and not machine.told(before) and not machine.compiled
    other = replace(experts, tensors={n: t.clone() for n, t in experts.tensors.items()})
    machine.forget()
    moelten.fused_moe(x, other, routing)
    for name, part in other.tensors.items():
        assert machine.told(part) and not machine.told(experts.tensors[name])
    starts = [part.data_ptr() for part in other.tensors.values()]
    other.update_expert(1, next(iter(weights.experts())))
    assert starts == [part.data_ptr() for part in other.tensors.values()]


def test_every_argument_is_looked_at(machine):
    _, experts, x, routing = ready(machine)
    out, moved = torch.empty_like(x), moelten.Routing(routing.ids.clone(), routing.weights.clone())
    size = moelten.workspace_bytes(experts, 5, 2)
    first, second = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    moelten.fused_moe(x, experts, routing, workspace=first)
    for workspace, absent in ((first, second), (second, first), (first, second)):
        machine.forget()
        rows = x.clone()
        moelten.fused_moe(rows, experts, moved, out=out, workspace=workspace)
        for tensor in (rows, moved.ids, moved.weights, out, workspace):
            assert machine.told(tensor)
        assert not any(machine.told(tensor) for tensor in (x, routing.ids, routing.weights, absent))


def test_another_kind_of_call_is_not_repeated(machine):
    """Other sizes, types, layers or workspaces ask Triton; what follows from them differs."""
    _, experts, x, routing = ready(machine)
    ids, weights = routing.ids, routing.weights
    room = torch.empty(moelten.workspace_bytes(experts, 5, 2), dtype=torch.uint8)
    less = room[: moelten.workspace_bytes(experts, 3, 2)]
    _, other, *_ = make(name="mxfp4_bf16")
    later = replace(experts, spec=replace(experts.spec, first_expert=1))
    biased = replace(
        experts,
        spec=replace(experts.spec, extras=("w2_bias",)),
        tensors=experts.tensors | {"w2_bias": torch.zeros(8, 128)},
    )
    for layer, rows, choice, workspace, count in (
        (experts, x[:4], moelten.Routing(ids[:4], weights[:4]), None, 4),
        (
            experts,
            x,
            moelten.Routing(ids[:, :1].contiguous(), weights[:, :1].contiguous()),
            None,
            4,
        ),
        (experts, x, moelten.Routing(ids.long(), weights), None, 4),
        (experts, x, moelten.Routing(ids, weights.half()), None, 4),
        (experts, x, moelten.Routing(ids, weights, on_input=True), None, 5),
        (experts, x, routing, room, 4),
        (experts, x, routing, less, 8),
        (other, x, routing, None, 4),
        (later, x, routing, None, 4),
        (biased, x, routing, None, 4),
    ):
        machine.forget()
        moelten.fused_moe(rows, layer, choice, workspace=workspace)
        assert len(machine.compiled) == count and not machine.launched
        moelten.fused_moe(rows, layer, choice, workspace=workspace)
        assert len(machine.compiled) == len(machine.launched) == count


def test_equal_layers_share_what_was_recorded(machine):
    ready(machine)
    _, experts, x, routing = make()
    moelten.fused_moe(x, experts, routing)
    assert not machine.compiled
    assert all(machine.told(part) for part in experts.tensors.values())


def test_a_repeated_call_is_checked_again(machine):
    """Each call of the kind that was launched before, with one thing wrong."""
    _, experts, x, routing = ready(machine)
    ids, weights = routing.ids, routing.weights
    size = moelten.workspace_bytes(experts, 5, 2)
    old = replace(experts, version=experts.version + 1)
    meta = {name: part.to("meta") for name, part in experts.tensors.items()}
    for error, message, layer, rows, choice, given in (
        (LayoutError, f"packed as hopper v{old.version}", old, x, routing, {}),
        (FormatError, "x is on cpu, the experts are packed for meta",
         replace(experts, tensors=meta), x, routing, {}),
        (FormatError, "x is on meta", experts, x.to("meta"), routing, {}),
        (FormatError, "routing is on meta", experts, x,
         moelten.Routing(ids.to("meta"), weights.to("meta")), {}),
        (FormatError, "x: expected contiguous", experts, x.T.contiguous().T, routing, {}),
        (FormatError, "packed for torch.bfloat16", experts, x.half(), routing, {}),
        (FormatError, r"expected \[tokens, 128\]", experts, x[:, :64].contiguous(), routing, {}),
        (FormatError, r"expected \[tokens, 128\]", experts, x[None], routing, {}),
        (FormatError, "routing is for 5 tokens, x has 4", experts, x[:4], routing, {}),
        (TypeError, "expected Routing", experts, x, ids, {}),
        (TypeError, "expected PackedExperts", experts.spec, x, routing, {}),
        (FormatError, "out: expected", experts, x, routing, {"out": x[:4].clone()}),
        (FormatError, "out: expected", experts, x, routing, {"out": x.float()}),
        (FormatError, "out: expected", experts, x, routing, {"out": x.to("meta")}),
        (FormatError, "out: expected contiguous", experts, x, routing,
         {"out": x.T.contiguous().T}),
        (FormatError, "workspace: expected contiguous", experts, x, routing,
         {"workspace": torch.empty(size)}),
        (FormatError, "workspace is on meta", experts, x, routing,
         {"workspace": torch.empty(size, dtype=torch.uint8, device="meta")}),
    ):  # fmt: skip
        moelten.fused_moe(x, experts, routing)
        machine.forget()
        with pytest.raises(error, match=message):
            moelten.fused_moe(rows, layer, choice, **given)
        assert not machine.launched and not machine.compiled
    experts.tensors.update(meta)
    with pytest.raises(FormatError, match="x is on cpu, the experts are packed for meta"):
        moelten.fused_moe(x, experts, routing)


def test_threads_with_layers_of_their_own(machine):
    """Equal layers on several threads: each launch gets the addresses of one of them."""
    ready(machine)
    own = [make() for _ in range(4)]

    def work(experts, x, routing):
        for _ in range(50):
            moelten.fused_moe(x, experts, routing)

    threads = [threading.Thread(target=work, args=layer[1:]) for layer in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(machine.launched) == 4 * 50 * 4 and not machine.compiled
    data = {layer[1].tensors["w13.data"].data_ptr(): layer for layer in own}
    second = {layer[1].tensors["w2.data"].data_ptr(): layer for layer in own}
    for start in range(0, len(machine.launched), 4):
        _, gemm1, gemm2, _ = machine.launched[start : start + 4]
        (one,), (two,) = gemm1 & set(data), gemm2 & set(second)
        assert data[one] is second[two] and data[one][2].data_ptr() in gemm1
