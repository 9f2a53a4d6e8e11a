"""Write the README's speed tables from benchmarks/results/*.json: `python benchmarks/readme.py`.

A result file is what `moelten bench --output` wrote: one from a CPU becomes a table beside its
baseline, one from a GPU a table per shape, and the picture of the same name if there is one. Other
JSON files in the folder (reports) are left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"

Record = dict[str, Any]


def speed_section(results: Path) -> str:
    """Markdown of every result file in a folder: GPUs first, then CPUs, by name."""
    found = {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    runs = {path: run for path, run in found.items() if _is_run(run)}
    gpus = [gpu_tables(run, path) for path, run in runs.items() if run[0]["gpu"]]
    return "\n".join(gpus + [cpu_table(run) for run in runs.values() if not run[0]["gpu"]])


def _is_run(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and "percent_of_floor" in found[0]


def gpu_tables(records: list[Record], path: Path) -> str:
    """Markdown of one `moelten bench --device cuda` run, which was written to `path`."""
    first = records[0]
    lines = [
        f"Whole MoE on one {first['gpu']}: microseconds per call (percent of the floor), median of "
        "CUDA graph replays over cold weights. The floor is the larger of two times: reading the "
        "active experts' packed bytes, and the useful FLOPs at the matrix rate of the activations' "
        "type.",
        "",
    ]
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        groups.setdefault((r["shape"], r["routing"]), []).append(r)
    for (shape, routing), group in groups.items():
        lines += [f"{shape}: {_sizes(group[0])}, {routing} routing.", "", *_grid(group), ""]
    rates = {r["mma_type"]: f"{r['mma_type']} {r['mma_tflops']:.0f}" for r in records}
    dates = sorted({r["date"][:10] for r in records})
    lines.append(
        f"Measured in the same run: reads {first['read_gbps'] / 1e3:.2f} TB/s, "
        f"{', '.join(rates.values())} TFLOP/s, relative error at most "
        f"{max(r['rel_error'] for r in records):.1e}. torch {first['torch']}, Triton "
        f"{first['triton']}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit "
        f"{', '.join(dict.fromkeys(_short(r['commit']) for r in records))}. "
        f"`{_command(records)}` repeats it."
    )
    picture = path.with_suffix(".png")
    if picture.exists():
        place = f"benchmarks/results/{picture.name}"
        lines += ["", f"![Roofline and percent of the floor on {first['gpu']}]({place})"]
    return "\n".join(lines) + "\n"


def _grid(records: list[Record]) -> list[str]:
    """Rows of a table: a scheme each, a column per number of tokens."""
    tokens = sorted({r["tokens"] for r in records})
    cells = {(r["scheme"], r["backend"], r["tokens"]): r for r in records}
    rows = [
        "| scheme | backend | " + " | ".join(f"T={count}" for count in tokens) + " |",
        "|---" * (2 + len(tokens)) + "|",
    ]
    for scheme, backend in dict.fromkeys((r["scheme"], r["backend"]) for r in records):
        row = (cells.get((scheme, backend, count)) for count in tokens)
        texts = (f"{r['us']:.0f} ({r['percent_of_floor']:.0f} %)" if r else "" for r in row)
        rows.append(f"| `{scheme}` | {backend} | " + " | ".join(texts) + " |")
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


def _command(records: list[Record]) -> str:
    """The command line that measures the same points."""
    options = {
        f"--{name}": ",".join(dict.fromkeys(str(r[name]) for r in records))
        for name in ("shape", "scheme", "tokens", "routing")
    }
    return "moelten bench " + " ".join(f"{name} {value}" for name, value in options.items())


def with_tables(readme: str, results: Path = RESULTS) -> str:
    """The README with its tables made afresh."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + speed_section(results) + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
