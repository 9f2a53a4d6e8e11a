"""The table of backends, and the choice among them from metadata alone.

`BACKENDS` is in order of preference. A backend is a row here and one file: it names its layout,
says why it would refuse a spec on a device, and runs. Choosing is a pure function of (spec, device,
machine): no weights are read, nothing is timed, and what was asked for by name is honoured or
refused with reasons, never replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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

    def run(self, x: Tensor, experts: PackedExperts, routing: Routing, out: Tensor) -> None:
        """Write the layer's outputs [T, H] to out; inputs are already validated."""
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
    readers = [b for b in BACKENDS if b.layout.name == layout and name in (None, b.name)]
    for backend in readers:
        if device.type in backend.devices:
            return backend
    what = f"the layout {layout!r} on {device.type}"
    raise UnsupportedError(f"no backend reads {what}; readers: {[b.name for b in readers]}")
