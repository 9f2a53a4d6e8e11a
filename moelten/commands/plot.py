"""A picture of benchmark records; matplotlib is loaded when one is drawn, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Bars of time per point, ours beside the baseline, the floor as a line; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(records), 4.5), layout="constrained")
    places = range(len(records))
    axes.bar([p - 0.2 for p in places], [r["us"] for r in records], 0.4, label="moelten")
    baselines = [r["baseline_us"] or 0.0 for r in records]
    axes.bar([p + 0.2 for p in places], baselines, 0.4, label="transformers, bf16 weights")
    floors = [r["floor_us"] for r in records]
    axes.hlines(
        floors, [p - 0.4 for p in places], [p for p in places], "black", label="floor of moelten"
    )
    axes.set_xticks(list(places), [f"{r['scheme']}\nT={r['tokens']}" for r in records])
    axes.set_yscale("log")
    axes.set_ylabel("us per call")
    first = records[0]
    axes.set_title(
        f"{first['shape']}: E={first['num_experts']}, H={first['hidden_size']}, "
        f"I={first['intermediate_size']}, top-{first['top_k']} ({first['device']})"
    )
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
