"""bench: how long layers take, and how far that is from the floors of the machine they run on.

A point is (shape, scheme, routing, tokens). This file walks through the points; `bench_workload`
makes what is run, `bench_cpu` and `bench_gpu` time it, `bench_records` says what a time means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from moelten import kernels
from moelten.commands import bench_cpu, bench_gpu
from moelten.commands.bench_records import Ceilings, Record, make_record
from moelten.commands.bench_workload import ROUTINGS, Shape
from moelten.errors import FormatError, UnsupportedError
from moelten.formats import Scheme


class Machine(Protocol):
    """One kind of device: what it is, what it can do, and its timer."""

    def facts(self) -> Record: ...

    def measure_ceilings(self) -> Ceilings: ...

    def load(
        self, scheme: Scheme, shape: Shape, backend: str | None, generator: torch.Generator
    ) -> bench_cpu.CpuLayer | bench_gpu.GpuLayer: ...


MACHINES: dict[str, Machine] = {"cpu": bench_cpu, "cuda": bench_gpu}


@dataclass(frozen=True)
class Defaults:
    """What is run where nothing is asked for; seconds bounds the rounds of one point."""

    shape: str
    tokens: str
    seconds: float


DEFAULTS = {
    "cpu": Defaults("small", "1,16,128", 20.0),
    "cuda": Defaults("A", "1,4,16,64,256,1024,4096", 1.0),
}


def choose_device(wanted: str | None) -> str:
    """The wanted kind of device if this machine has it; by default a GPU, else the CPU."""
    present = torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise UnsupportedError(
            "torch sees no GPU on this machine (moelten doctor says more); --device cpu times the "
            "processor"
        )
    return wanted or ("cuda" if present else "cpu")


def choose_layers(
    schemes: list[Scheme],
    shapes: list[Shape],
    *,
    device: str,
    backend: str | None = None,
    skipped: Callable[[str], None] = lambda reason: None,
) -> list[tuple[Shape, Scheme]]:
    """Every shape in every scheme, less the pairs that no backend runs or whose groups do not fit.

    Those are reported to `skipped`; UnsupportedError if none is left.
    """
    layers, reasons = [], []
    for shape in shapes:
        for scheme in schemes:
            try:
                for columns, what in ((shape.hidden_size, "w13"), (shape.intermediate_size, "w2")):
                    scheme.weights.check_columns(columns, what)
                kernels.select(shape.spec(scheme), torch.device(device), backend)
            except (FormatError, UnsupportedError) as error:
                reasons.append(f"{scheme.name} at {shape.name}: {error}")
            else:
                layers.append((shape, scheme))
    if not layers:
        raise UnsupportedError("; ".join(reasons))
    for reason in reasons:
        skipped(reason)
    return layers


def run(
    layers: list[tuple[Shape, Scheme]],
    tokens: list[int],
    *,
    routings: list[str],
    device: str,
    backend: str | None = None,
    seconds: float = 1.0,
    seed: int = 0,
    progress: Callable[..., None] = lambda label, total: None,
) -> Iterator[Record]:
    """Yield one record per point, in the order of the arguments; `make_record` lists the fields.

    seconds bounds the rounds of one point. progress takes a label and how many labels will come.
    Raises UnsupportedError where the weights do not fit in memory.
    """
    for routing in routings:
        if routing not in ROUTINGS:
            raise FormatError(f"routing is {' or '.join(ROUTINGS)}, got {routing!r}")
    machine, total = MACHINES[device], 1 + len(layers) * (1 + len(routings) * len(tokens))
    generator = torch.Generator(device).manual_seed(seed)
    progress("measuring the ceilings", total)
    ceilings, facts = machine.measure_ceilings(), machine.facts()
    for shape, scheme in layers:
        progress(f"{shape.name}, {scheme.name}: packing", total)
        layer = machine.load(scheme, shape, backend, generator)
        for routing in routings:
            for count in tokens:
                progress(f"{shape.name}, {scheme.name}, {routing}: {count} tokens", total)
                timing = layer.time(count, routing, seconds)
                yield facts | make_record(layer, count, routing, timing, ceilings)
        del layer  # its memory is for the next
