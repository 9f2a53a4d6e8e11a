"""A picture of benchmark records; matplotlib is loaded when one is drawn, and only then.

Above, one roofline per shape: the roofs are what the device did in the same run, a point below them
is what a call achieved. Beneath, how much of its floor each call reached.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well, and lines
# once colours are used up.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
_LINES = ("-", "--", ":")
_ROOF = "0.35"
# Points closer than this, as a ratio of intensities, share one label.
_SAME_PLACE = 1.3
# Shapes side by side, at most.
_COLUMNS = 4


def draw(records: list[Record], path: Path) -> None:
    """Write a PNG with a roofline per (shape, routing), and its share of the floor beneath."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["shape"], record["routing"]), []).append(record)
    names = list(dict.fromkeys(_series(r) for r in records))
    bands = -(-len(groups) // _COLUMNS)
    columns = -(-len(groups) // bands)
    figure, axes = pyplot.subplots(
        *(2 * bands, columns),
        figsize=(max(5.0 * columns, 6.5), 8.0 * bands),
        height_ratios=(3, 2) * bands,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    panels = [pair for band in range(bands) for pair in axes[2 * band : 2 * band + 2].T]
    for pair in panels[len(groups) :]:
        for empty in pair:
            empty.remove()
    for (upper, lower), group in zip(panels, groups.values(), strict=False):
        _draw_roofs(upper, records)
        _draw_layer(upper, lower, group, names)
    highest = max(r["percent_of_floor"] for r in records)
    for upper, lower in axes[:, 0].reshape(bands, 2):
        upper.set(ylabel="TFLOP/s", ylim=(min(r["tflops"] for r in records) / 2, None))
        lower.set(ylabel="% of the floor", ylim=(0, 1.05 * max(highest, 100)))
    where = f"{records[0]['device']}, torch {records[0]['torch']}, {records[0]['date'][:10]}"
    figure.suptitle(where, fontsize=11)
    handles = {line.get_label(): line for _, lower in panels for line in lower.lines}
    series = {"handles": [handles[name] for name in names], "labels": names}
    figure.legend(**series, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_layer(upper: Any, lower: Any, group: list[Record], names: list[str]) -> None:
    """One layer's points in both of its panels; `names` of all series give each its colour."""
    first = group[0]
    upper.set_title(
        f"{first['shape']}, {first['routing']} routing\n{first['num_experts']} experts, "
        f"top-{first['top_k']}, H={first['hidden_size']}, I={first['intermediate_size']}",
        fontsize=11,
    )
    for name in dict.fromkeys(_series(r) for r in group):
        lines, index = divmod(names.index(name), len(_COLOURS))
        points = sorted((r for r in group if _series(r) == name), key=lambda r: int(r["tokens"]))
        style: dict[str, Any] = {
            "color": _COLOURS[index],
            "marker": _MARKERS[(index + lines) % len(_MARKERS)],
            "linestyle": _LINES[lines % len(_LINES)],
        }
        upper.plot([intensity(r) for r in points], [r["tflops"] for r in points], **style)
        reached = [r["percent_of_floor"] for r in points]
        lower.plot([r["tokens"] for r in points], reached, **style, label=name)
    for text, x, y in place_labels(group):
        _annotate(upper, text, (x, y), (5, -13), "left")
    _label_axes(upper, lower)


def intensity(record: Record) -> float:
    """FLOP per byte of active weights."""
    return float(1e3 * record["tflops"] / record["weight_gbps"])


def place_labels(points: list[Record]) -> list[tuple[str, float, float]]:
    """Text, x and y for every number of tokens: the lower right corner of its points.

    Few tokens more often visit more experts than visit experts more often, so that their points
    coincide: those that would overlap share one label.
    """
    corners: dict[int, tuple[float, float]] = {}
    for r in sorted(points, key=lambda r: int(r["tokens"])):
        x, y = corners.get(r["tokens"], (0.0, math.inf))
        corners[r["tokens"]] = max(x, intensity(r)), min(y, r["tflops"])
    runs: list[list[int]] = []
    for tokens, (x, _) in corners.items():
        if runs and x < _SAME_PLACE * corners[runs[-1][0]][0]:
            runs[-1].append(tokens)
        else:
            runs.append([tokens])
    return [
        (
            "T=" + "-".join(map(str, dict.fromkeys((run[0], run[-1])))),
            max(corners[tokens][0] for tokens in run),
            min(corners[tokens][1] for tokens in run),
        )
        for run in runs
    ]


def _series(record: Record) -> str:
    return f"{record['scheme']} ({record['backend']})"


def _draw_roofs(axes: Any, records: list[Record]) -> None:
    """The bandwidth's slope up to the fastest matrix rate, and every matrix rate from the slope."""
    rates = {r["mma_type"]: r["mma_tflops"] for r in records}
    read, top = records[0]["read_gbps"] / 1e3, max(rates.values())
    reached = [intensity(r) for r in records]
    left, right = min(reached) / 2, 4 * max(*reached, top / read)
    axes.plot([left, top / read], [left * read, top], color=_ROOF, linewidth=1.2)
    for name, rate in rates.items():
        axes.plot([rate / read, right], [rate, rate], color=_ROOF, linewidth=1.2)
        number = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
        _annotate(axes, f"{name} {number} TFLOP/s", (right, rate), (0, 3), "right")
    middle = math.sqrt(left * top / read)
    text = f"reads {read:.2f} TB/s" if read >= 1 else f"reads {1e3 * read:.0f} GB/s"
    _annotate(axes, text, (middle, middle * read), (-8, 8), "right")


def _annotate(
    axes: Any, text: str, at: tuple[float, float], offset: tuple[int, int], align: str
) -> None:
    axes.annotate(
        text, at, xytext=offset, textcoords="offset points", ha=align, fontsize=9, color=_ROOF
    )


def _label_axes(upper: Any, lower: Any) -> None:
    upper.set(xscale="log", yscale="log", xlabel="FLOP per byte of active weights")
    lower.set(xlabel="tokens")
    lower.set_xscale("log", base=2)
    lower.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    for axes in (upper, lower):
        axes.grid(True, which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
