"""Time sizes that no tile divides beside the next aligned ones: `python benchmarks/ragged.py`.

Needs a GPU. Both layers of a pair are points of `moelten bench`; the record of the ragged one, with
the other's time as `aligned_us`, goes to benchmarks/results/h200-hopper-ragged.json, of which
`readme.py` makes a sentence. The aligned layer is larger, so that a ratio above 1 is what ragged
sizes cost: the exit code is 1 above 1.3. Names of pairs as arguments choose among them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelten.commands import bench, terminal
from moelten.commands.bench_workload import Shape, find_shape
from moelten.commands.describe import find_scheme
from moelten.formats import Scheme

RESULTS = Path(__file__).parent / "results"
MOST = 1.3
TOKENS = [4, 64]
USUAL = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "top_k": 4}
STEPS = {"hidden_size": 128, "intermediate_size": 128, "num_experts": 4, "top_k": 8}


@dataclass(frozen=True)
class Pair:
    """A layer of ragged sizes, and one whose `names` sizes are the next larger aligned ones."""

    scheme: Scheme
    sizes: tuple[tuple[str, int], ...]
    names: tuple[str, ...]

    @property
    def ragged(self) -> Shape:
        return find_shape("A", USUAL | dict(self.sizes))

    @property
    def aligned(self) -> Shape:
        sizes = USUAL | dict(self.sizes)
        larger = {name: (sizes[name] // STEPS[name] + 1) * STEPS[name] for name in self.names}
        return find_shape("A", sizes | larger)

    @property
    def name(self) -> str:
        values = ",".join(str(dict(self.sizes)[name]) for name in self.names)
        return f"{self.scheme.name}:{'+'.join(self.names)}={values}"


def all_pairs() -> dict[str, Pair]:
    """Groups of 32 columns where they divide the sizes; else one scale per row, and none."""
    both = ("hidden_size", "intermediate_size")
    sizes: list[tuple[dict[str, int], tuple[str, ...]]] = [
        (dict(zip(both, (h, i), strict=True)), both)
        for h in (2880, 1856)
        for i in (80, 192, 232, 320, 704, 1856)
    ]
    for e in (1, 3, 60, 129, 289):
        sizes.append(({"num_experts": e, "top_k": min(e, 4)}, ("num_experts",)))
    sizes += [({"top_k": k}, ("top_k",)) for k in (7, 31)]
    found = []
    for changes, names in sizes:
        grouped = all(changes.get(name, 0) % 32 == 0 for name in both)
        for scheme in ("mxfp4_bf16", "int4_bf16") if grouped else ("bf16_bf16", "int4_bf16"):
            found.append(Pair(find_scheme(scheme), tuple(changes.items()), names))
    return {pair.name: pair for pair in found}


def measure(pairs: list[Pair], seconds: float, output: Path) -> list[dict[str, Any]]:
    """Records of the ragged layers, with `aligned_us`."""
    layers = [(p.ragged, p.scheme) for p in pairs] + [(p.aligned, p.scheme) for p in pairs]
    device = bench.choose_device("cuda")
    records = bench.run(
        list(dict.fromkeys(layers)), TOKENS, routings=["uniform"], device=device, seconds=seconds
    )
    points = {(r["scheme"], r["shape"], r["tokens"]): r for r in records}
    found = []
    for pair in pairs:
        for tokens in TOKENS:
            ours, theirs = (
                points[pair.scheme.name, shape.name, tokens]
                for shape in (pair.ragged, pair.aligned)
            )
            found.append(ours | {"aligned_us": theirs["us"]})
            ratio = ours["us"] / theirs["us"]
            print(
                f"{pair.name:56} T={tokens:<3} {ours['us']:8.1f} {theirs['us']:8.1f} {ratio:5.2f}"
            )
    output.write_text(terminal.json_text(found) + "\n")
    return found


def main() -> int:
    every = all_pairs()
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(every), metavar="PAIR")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one point's rounds")
    parser.add_argument("--output", type=Path, default=RESULTS / "h200-hopper-ragged.json")
    options = parser.parse_args()
    found = measure([every[name] for name in options.names], options.seconds, options.output)
    worst = max(r["us"] / r["aligned_us"] for r in found)
    print(f"{len(found)} points, at most {worst:.2f} of the aligned time")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
