"""Write the README's speed table from benchmarks/results/*.json: `python benchmarks/readme.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"


def cpu_table(records: list[dict[str, Any]]) -> str:
    """Markdown of one `moelten bench --device cpu` run."""
    first = records[0]
    lines = [
        f"Whole MoE on a CPU, E={first['num_experts']}, H={first['hidden_size']}, "
        f"I={first['intermediate_size']}, top-{first['top_k']}, {first['routing']} routing, "
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
        f"{first['transformers']}; {first['date'][:10]}, commit {first['commit'][:7]}. "
        "`moelten bench --device cpu` repeats it.",
    ]
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The README with its table made afresh."""
    records = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    before, rest = readme.split(BEGIN)
    return before + BEGIN + cpu_table(records) + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text()))
