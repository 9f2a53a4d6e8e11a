"""The table of backends, and the choice among them from metadata alone.

`BACKENDS` is in order of preference. A backend is a row here and one file: it names its layout,
says why it would refuse a spec on a device, and runs. Choosing is a pure function of (spec, device,
machine): no weights are read, nothing is timed, and what was asked for by name is honoured or
refused with reasons, never replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moelten.errors import UnsupportedError
from moelten.kernels.cpu import CpuBackend
from moelten.kernels.hopper import HopperBackend
from moelten.kernels.triton import TritonBackend
from moelten.kernels.x86 import X86Backend
from moelten.packed import Layout, PackedExperts
from moelten.routing import Routing
from moelten.weights import ExpertSpec


class Backend(Protocol):
    """One way to run a layer."""

    @property
    def name(self) -> str: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def devices(self) -> tuple[str, ...]:
        """The torch device types it knows, whatever this machine has."""
        ...

    def refusals(self, spec: ExpertSpec, device: torch.device) -> list[str]:
        """Every reason why this backend cannot run `spec` on `device` here; empty if it can."""
        ...

    def workspace_bytes(
        self, spec: ExpertSpec, tokens: int, top_k: int, on_input: bool = False
    ) -> int:
        """What `run` takes for all tokens at once; never less for more tokens, 0 if it needs none.

        on_input: whether the router weight multiplies the expert's input
        """
        ...

    def run(
        self,
        x: Tensor,
        experts: PackedExperts,
        routing: Routing,
        out: Tensor,
        workspace: Tensor | None = None,
    ) -> None:
        """Write the layer's outputs [T, H] to out; inputs are already validated.

        workspace: uint8; with one, a GPU backend allocates nothing and runs as many tokens at once
        as fit; it raises FormatError, before any launch, where one token does not fit.
        """
        ...


@runtime_checkable
class StagedBackend(Backend, Protocol):
    """A backend whose GEMMs can be used one by one: `moelten.stages` says what each does.

    The stages in sequence give the bits that `run` gives.
    """

    def gemm1(self, x: Tensor, experts: PackedExperts, routing: Routing, hidden: Tensor) -> None:
        """Write the pairs with an expert here to hidden, fp32 [T, k, I] of zeros."""
        ...

    def gemm2(
        self, hidden: Tensor, experts: PackedExperts, routing: Routing, slots: Tensor
    ) -> None:
        """Write the pairs with an expert here to slots, fp32 [T, k, H] of zeros."""
        ...

    def combine(self, slots: Tensor, experts: PackedExperts, routing: Routing, out: Tensor) -> None:
        """Write each token's sum to out [T, H]."""
        ...


BACKENDS: tuple[Backend, ...] = (
    X86Backend(),
    CpuBackend(),
    HopperBackend("bf16"),
    HopperBackend("fp16"),
    TritonBackend(),
)


@dataclass(frozen=True)
class Verdict:
    """What one backend answers to a spec; it runs when there are no reasons against it."""

    backend: str
    reasons: tuple[str, ...]

    @property
    def runs(self) -> bool:
        return not self.reasons


def verdicts(spec: ExpertSpec, device: torch.device) -> list[Verdict]:
    """Every backend's answer, in order of preference."""
    return [Verdict(b.name, tuple(b.refusals(spec, device))) for b in BACKENDS]


def select(spec: ExpertSpec, device: torch.device, name: str | None = None) -> Backend:
    """The first backend that runs `spec` on `device`, or the one called `name`."""
    candidates = [b for b in BACKENDS if name in (None, b.name)]
    if not candidates:
        known = ", ".join(b.name for b in BACKENDS)
        raise UnsupportedError(f"unknown backend {name!r}; backends: {known}")
    for backend in candidates:
        if not backend.refusals(spec, device):
            return backend
    answers = "; ".join(f"{b.name}: {', '.join(b.refusals(spec, device))}" for b in candidates)
    raise UnsupportedError(f"no backend runs {spec.scheme.name} on {device} ({answers})")


def backend_of(layout: str, device: torch.device, name: str | None = None) -> Backend:
    """The first backend that reads a layout on a kind of device, or the reader called `name`.

    Backends may share a layout: the same packed rows serve a CPU and a GPU.
    """
    kind, readers = device.type, []
    for backend in BACKENDS:
        if backend.layout.name == layout and name in (None, backend.name):
            if kind in backend.devices:
                return backend
            readers.append(backend)
    what = f"the layout {layout!r} on {device.type}"
    raise UnsupportedError(f"no backend reads {what}; readers: {[b.name for b in readers]}")
