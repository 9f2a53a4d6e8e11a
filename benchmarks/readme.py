"""Write the README's speed tables from benchmarks/results/*.json: `python benchmarks/readme.py`.

A result file is what `moelten bench --output` wrote: one from a CPU becomes a table beside its
baseline, one from a GPU a table, and the picture of the same name if there is one. What
`ragged.py` and `host.py` wrote becomes a sentence each. Other JSON files (reports) are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"

Record = dict[str, Any]
GPU_TIMES = (
    "microseconds per call (percent of the floor), median of CUDA graph replays over cold weights; "
    "routing is uniform unless named. The floor is the larger of two times: reading the active "
    "experts' packed bytes, and the useful FLOPs at the matrix rate of the activations' type."
)


def speed_section(results: Path) -> str:
    """Markdown of every result file in a folder: GPUs first, then CPUs, by name."""
    found = {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    runs = {path: run for path, run in found.items() if _is_run(run)}
    runs = {path: run for path, run in runs.items() if "aligned_us" not in run[0]}
    gpus = [gpu_tables(run, path) for path, run in runs.items() if run[0]["gpu"]]
    names = dict.fromkeys(run[0]["gpu"] for run in runs.values() if run[0]["gpu"])
    intro = [f"Whole MoE on one {name}: {GPU_TIMES}\n" for name in names]
    ragged = [ragged_line(run) for run in found.values() if _is_run(run, "aligned_us")]
    host = [host_line(record) for record in found.values() if "call_us" in record]
    cpus = [cpu_table(run) for run in runs.values() if not run[0]["gpu"]]
    return "\n".join(intro + gpus + ragged + host + cpus)


def _is_run(found: Any, field: str = "percent_of_floor") -> bool:
    return isinstance(found, list) and bool(found) and field in found[0]


def ragged_line(records: list[Record]) -> str:
    """Markdown of what `benchmarks/ragged.py` wrote."""
    ratios = sorted(r["us"] / r["aligned_us"] for r in records)
    layers = {(r["scheme"], r["shape"]) for r in records}
    return (
        f"{len(layers)} layers whose sizes no tile divides (among them I = 80, 232 and 1856, "
        "H = 2880 and 1856, 1 to 289 experts, top-31) take "
        f"{ratios[len(ratios) // 2]:.2f} times (median) to {ratios[-1]:.2f} times (worst) as long "
        f"as the next larger aligned ones; commit {_short(records[0]['commit'])}, "
        "`python benchmarks/ragged.py`.\n"
    )


def host_line(record: Record) -> str:
    """Markdown of what `benchmarks/host.py` wrote."""
    return (
        f"Outside CUDA graphs `fused_moe` returns after {record['call_us']:.0f} us "
        f"({record['call_us_workspace']:.0f} us with a workspace, "
        f"{record['call_us_other_layers']:.0f} us where each call is another layer's); all but the "
        f"driver's launches takes {record['call_us_without_launches']:.0f} us. A first "
        f"call takes {record['cold_first_call_s']:.1f} s where nothing is compiled "
        f"({record['cold_many_tokens_s']:.1f} s for many tokens), "
        f"{record['warm_new_shape_ms']:.0f} ms for a shape whose kernels are in Triton's cache; "
        f"commit {_short(record['commit'])}, `python benchmarks/host.py`.\n"
    )


def gpu_tables(records: list[Record], path: Path) -> str:
    """Markdown of one or more `moelten bench --device cuda` runs, which were written to `path`."""
    first = records[0]
    shapes = {r["shape"]: f"{r['shape']}: {_sizes(r)}" for r in records}
    lines = [*_grid(records), "", f"{'; '.join(shapes.values())}.", ""]
    kinds = dict.fromkeys(r["mma_type"] for r in records)
    rates = [
        f"{kind} {_range((r['mma_tflops'] for r in records if r['mma_type'] == kind), 0)}"
        for kind in kinds
    ]
    dates = sorted({r["date"][:10] for r in records})
    lines.append(
        f"Measured in the same run: reads {_range(r['read_gbps'] / 1e3 for r in records)} TB/s, "
        f"{', '.join(rates)} TFLOP/s, relative error at most "
        f"{max(r['rel_error'] for r in records):.1e}. torch {first['torch']}, Triton "
        f"{first['triton']}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit "
        f"{', '.join(dict.fromkeys(_short(r['commit']) for r in records))}. "
        f"{_command(records)}"
    )
    picture = path.with_suffix(".png")
    if picture.exists():
        place = f"benchmarks/results/{picture.name}"
        lines += ["", f"![Roofline and percent of the floor on {first['gpu']}]({place})"]
    return "\n".join(lines) + "\n"


def _grid(records: list[Record]) -> list[str]:
    """Rows of a table: a layer, scheme and backend each, a column per number of tokens."""
    tokens = sorted({r["tokens"] for r in records})
    rows = [
        "| layer | scheme | backend | " + " | ".join(f"T={count}" for count in tokens) + " |",
        "|---" * (3 + len(tokens)) + "|",
    ]
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for r in records:
        layer = r["shape"] if r["routing"] == "uniform" else f"{r['shape']}, {r['routing']} routing"
        row = cells.setdefault((layer, f"`{r['scheme']}`", r["backend"]), {})
        row[r["tokens"]] = f"{r['us']:.0f} ({r['percent_of_floor']:.0f} %)"
    for names, times in cells.items():
        rows.append("| " + " | ".join([*names, *(times.get(t, "") for t in tokens)]) + " |")
    return rows


def cpu_table(records: list[Record]) -> str:
    """Markdown of one `moelten bench --device cpu` run."""
    first = records[0]
    lines = [
        f"Whole MoE on a CPU, {_sizes(first)}, {first['routing']} routing, "
        f"weights cold, median of {min(r['rounds'] for r in records)} or more calls, beside "
        "transformers' fastest experts on the same weights in bf16, in the same process.",
        "",
        "| scheme | tokens | backend | ms | transformers bf16, ms | times faster | weight memory "
        "| rel. error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        memory = r["packed_bytes"] / r["baseline_bytes"]
        lines.append(
            f"| `{r['scheme']}` | {r['tokens']} | {r['backend']} | {r['us'] / 1e3:.2f} | "
            f"{r['baseline_us'] / 1e3:.2f} | {r['speedup']:.1f} | {memory:.2f} of bf16 | "
            f"{r['rel_error']:.1e} |"
        )
    lines += [
        "",
        f"{first['device']}, {first['threads']} threads; torch {first['torch']}, transformers "
        f"{first['transformers']}; {first['date'][:10]}, commit {_short(first['commit'])}. "
        "`moelten bench --device cpu` repeats it.",
    ]
    return "\n".join(lines) + "\n"


def _sizes(record: Record) -> str:
    names = {"E": "num_experts", "H": "hidden_size", "I": "intermediate_size"}
    sizes = ", ".join(f"{letter}={record[name]}" for letter, name in names.items())
    return f"{sizes}, top-{record['top_k']}"


def _short(commit: str | None) -> str:
    """Seven digits of a commit, and whether the tree was edited."""
    digits, _, edited = (commit or "unknown").partition("-")
    return digits[:7] + (f"-{edited}" if edited else "")


def _range(values: Iterable[float], digits: int = 2) -> str:
    """The smallest and the largest of some numbers."""
    texts = [f"{value:.{digits}f}" for value in sorted(values)]
    return " to ".join(dict.fromkeys((texts[0], texts[-1])))


def _command(records: list[Record]) -> str:
    """The command line that measures the first layer with its routing, and what that is of all."""
    first = records[0]
    group = [r for r in records if (r["shape"], r["routing"]) == (first["shape"], first["routing"])]
    options = (
        f"--{name} {','.join(dict.fromkeys(str(r[name]) for r in group))}"
        for name in ("shape", "scheme", "tokens", "routing", "backend")
    )
    what = "it" if len(group) == len(records) else "the first layer"
    return f"`moelten bench {' '.join(options)}` repeats {what}."


def with_tables(readme: str, results: Path = RESULTS) -> str:
    """The README with its tables made afresh."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + speed_section(results) + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
