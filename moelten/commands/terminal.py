"""How results look: one JSON value, or aligned text; and progress, on a terminal only.

Everything here takes the plain records that commands make and decides nothing about them. Results
go to stdout and progress to stderr, so a pipe sees results alone, without colours.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


def print_json(record: Any) -> None:
    """Print a JSON value."""
    typer.echo(json_text(record))


def json_text(record: Any) -> str:
    """A JSON value as text; JSON has no NaN or infinity, so those become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(record), indent=1)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Aligned columns, without colours or frames; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = rows and all(row[index][:1].isdigit() or row[index] == "-" for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=width, highlight=False, markup=False).print(table)


@contextmanager
def show_progress(total: int | None = None) -> Iterator[Callable[..., None]]:
    """A function that names the step being worked on: a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda label, total=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        steps = -1

        def step(label: str, total: int | None = total) -> None:
            nonlocal steps
            steps += 1
            bar.update(task, description=label, completed=steps, total=total)

        yield step


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} TiB"


def print_run(records: list[dict[str, Any]]) -> None:
    from moelten.commands.verify import OUTPUT_TOLERANCE

    columns = ["source", "scheme", "backend", "rel. error", "us/layer", "packed", "bf16", "writer"]
    rows = [
        [
            r["source"],
            r["scheme"],
            r["backend"],
            f"{r['rel_error']:.2e}",
            f"{r['us']:.0f}",
            format_bytes(r["packed_bytes"]),
            format_bytes(r["logical_bytes"]),
            r["writer"] or "-",
        ]
        for r in records
    ]
    print_table(columns, rows)
    for r in records:
        if "generated" in r:
            ids = " ".join(map(str, r["generated"]))
            typer.echo(f"{r['source']}: transformers generates {ids} with these experts")
    failed = [r["source"] for r in records if not r["ok"]]
    bound = f"{OUTPUT_TOLERANCE:.1e} relative error"
    typer.echo(
        f"FAILED: {', '.join(failed)} above {bound}" if failed else f"ok: all within {bound}"
    )


def print_spec(kind: dict[str, Any]) -> None:
    typer.echo(
        f"{kind['scheme']} on {kind['device']}: E={kind['num_experts']}, H={kind['hidden_size']}, "
        f"I={kind['intermediate_size']}, {kind['activation']}"
        + (f", with {', '.join(kind['extras'])}" if kind["extras"] else "")
    )
    chosen = next((v["backend"] for v in kind["verdicts"] if v["runs"]), None)
    for verdict in kind["verdicts"]:
        answer = "; ".join(verdict["reasons"]) or "would run"
        mark = "-> " if verdict["backend"] == chosen else "   "
        typer.echo(f"{mark}{verdict['backend']}: {answer}")


def print_checkpoint(found: dict[str, Any]) -> None:
    typer.echo(f"{found['path']}: {found['model_type']}, {found['format']}")
    typer.echo(
        f"routed experts of {found['layers']} layers: {format_bytes(found['experts_bytes'])} "
        f"stored, {format_bytes(found['logical_bytes'])} in bf16"
    )
    for kind in found["kinds"]:
        typer.echo(f"layers {_ranges(kind['layers'])}:")
        print_spec(kind)


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers with runs shortened: 1, 3..60."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("..".join(map(str, run)) for run in runs)


def print_quantized(record: dict[str, Any]) -> None:
    rows = [[layer, f"{error:.2e}"] for layer, error in record["layer_errors"].items()]
    print_table(["layer", "rel. error of weights"], rows)
    before, after = record["bytes_before"], record["bytes_after"]
    typer.echo(
        f"{record['target']}: {format_bytes(before)} -> {format_bytes(after)}, "
        f"{before / after:.2f}x smaller"
    )


def print_comparison(result: dict[str, Any]) -> None:
    rows = [
        [
            str(c["layer"]),
            str(len(c["experts"])),
            f"{c['rel_error']:.2e}",
            c["worst"],
            "ok" if c["ok"] else "FAILED" if c["finite"] else "FAILED: not finite",
        ]
        for c in result["layers"]
    ]
    print_table(["layer", "experts", "rel. error", "worst", "result"], rows)
    typer.echo(f"{'ok' if result['ok'] else 'FAILED'}: tolerance {result['tolerance']:.1e}")


def print_entries(entries: dict[str, Any], indent: int = 0) -> None:
    for key, value in entries.items():
        if isinstance(value, dict):
            typer.echo(f"{' ' * indent}{key}:")
            print_entries(value, indent + 2)
            continue
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        typer.echo(f"{' ' * indent}{key}: {'-' if text is None else text}")


def print_bench(records: list[dict[str, Any]]) -> None:
    first = records[0]
    rates = {r["mma_type"]: r["mma_tflops"] for r in records}
    typer.echo(
        f"{first['device']}"
        + (f", {first['threads']} threads" if "threads" in first else "")
        + f": reads {first['read_gbps']} GB/s, multiplies "
        + ", ".join(f"{name} at {rate}" for name, rate in rates.items())
        + " TFLOP/s"
    )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
        groups.setdefault((r["shape"], r["routing"]), []).append(r)
    for (shape, routing), group in groups.items():
        sizes = "E={num_experts}, H={hidden_size}, I={intermediate_size}, top-{top_k}"
        typer.echo(f"\n{shape}: {sizes.format(**group[0])}, {routing} routing")
        columns = _BENCH_COLUMNS | (_BASELINE_COLUMNS if "baseline" in first else {})
        print_table(list(columns), [[text(r) for text in columns.values()] for r in group])
    reasons = (r.get("baseline_missing") for r in records)
    for reason in dict.fromkeys(reason for reason in reasons if reason):
        typer.echo(f"no baseline: {reason}")


_BENCH_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "scheme": lambda r: str(r["scheme"]),
    "tokens": lambda r: str(r["tokens"]),
    "backend": lambda r: str(r["backend"]),
    "us": lambda r: f"{r['us']:.1f}",
    "p10": lambda r: f"{r['us_p10']:.1f}",
    "p90": lambda r: f"{r['us_p90']:.1f}",
    "GB/s": lambda r: f"{r['weight_gbps']:.1f}",
    "TFLOP/s": lambda r: f"{r['tflops']:.3g}",
    "% of floor": lambda r: f"{r['percent_of_floor']:.1f}",
    "rel. error": lambda r: f"{r['rel_error']:.2e}",
    "memory": lambda r: format_bytes(r["packed_bytes"]),
}
_BASELINE_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "baseline us": lambda r: f"{r['baseline_us']:.0f}" if r["baseline"] else "-",
    "bf16 memory": lambda r: format_bytes(r["baseline_bytes"]) if r["baseline"] else "-",
    "speedup": lambda r: f"{r['speedup']:.2f}" if r["baseline"] else "-",
    "baseline": lambda r: r["baseline"] or "none",
}
