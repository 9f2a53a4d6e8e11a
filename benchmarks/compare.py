"""Time trees of the package beside each other: `python benchmarks/compare.py OLD NEW --points ...`.

Needs a GPU. A tree is a folder with the package, as `git archive COMMIT moelten | tar x -C FOLDER`
makes one, that has `GpuLayer.capture`; it times itself by its own bench. TREE,NAME=VALUE sets
variables of the environment for it. A point is shape:scheme:tokens,tokens. Each tree has a process
of its own, which holds the same layer; all compile side by side, and then are timed in turns,
twice, in short bursts over cold weights, so that what the machine does meanwhile is the same for
all. Printed are the medians of each turn in microseconds, and the outputs' norms where they differ.

Nothing is checked or recorded: that is what tests and `moelten bench` are for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TURNS = 2
SECONDS = 0.4


class Tree:
    """A process that runs one tree, and does what it is told a line at a time."""

    def __init__(self, named: str) -> None:
        folder, *variables = named.split(",")
        caches = Path(tempfile.gettempdir()) / "moelten-compare" / named.replace("/", "_")
        env = os.environ | {"PYTHONPATH": str(Path(folder).resolve())}
        env |= {"TRITON_CACHE_DIR": str(caches)}
        env |= dict(variable.split("=", 1) for variable in variables)
        command = [sys.executable, __file__, "--work"]
        self.name = named
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, env=env, text=True)

    def tell(self, *order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended; what it said stands above")
        return json.loads(line)


def ask(trees: list[Tree], *order: Any) -> list[Any]:
    """All at the same time: what each answers."""
    for tree in trees:
        tree.tell(*order)
    return [tree.answer() for tree in trees]


def compare(names: list[str], points: list[str]) -> None:
    trees = [Tree(name) for name in names]
    print("  ".join(names), flush=True)
    for point in points:
        shape, scheme, counts = point.split(":")
        ask(trees, "load", shape, scheme)
        for tokens in map(int, counts.split(",")):
            norms = ask(trees, "capture", tokens)
            times = [[ask([tree], "time")[0] for tree in trees] for _ in range(TURNS)]
            medians = (" ".join(f"{t:.1f}" for t in turns) for turns in zip(*times, strict=True))
            differ = f"  norms {norms}" if len(set(norms)) > 1 else ""
            print(f"{shape} {scheme} {tokens}: {' | '.join(medians)}{differ}", flush=True)


def work() -> None:
    """What one tree's process does: a layer at a time, of which one graph."""
    import torch

    from moelten.commands import bench_gpu
    from moelten.commands.bench_workload import SHAPES
    from moelten.formats import scheme

    layer: Any = None
    held: Any = None
    for line in sys.stdin:
        what, *of = json.loads(line)
        answer: Any = None
        if what == "load":
            layer = held = None
            generator = torch.Generator("cuda").manual_seed(0)
            layer = bench_gpu.load(scheme(of[1]), SHAPES[of[0]], None, generator)
        elif what == "capture":
            held = None
            held = layer.capture(of[0], "uniform")
            held.graph.replay()
            answer = round(held.out.float().norm().item(), 4)
        else:
            times = bench_gpu.time_replays(held.graph, SECONDS)
            answer = statistics.median(times) / len(held.draws) * 1e6
        print(json.dumps(answer), flush=True)


def main() -> None:
    if sys.argv[1:] == ["--work"]:
        work()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trees", nargs="+", metavar="TREE[,NAME=VALUE]")
    parser.add_argument("--points", nargs="+", required=True, metavar="SHAPE:SCHEME:TOKENS,..")
    given = parser.parse_args()
    compare(given.trees, given.points)


if __name__ == "__main__":
    main()
