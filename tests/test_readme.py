"""The README keeps its word: its example runs, its tables are made from results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from moelten.formats import SCHEMES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def example(start: str) -> str:
    """The first Python block after `start`."""
    return re.search(r"```python\n(.*?)```", README.split(start, 1)[1], re.S)[1]


def test_first_example_runs_in_ten_lines():
    lines = example("# moelten")
    assert len([line for line in lines.splitlines() if line]) <= 10
    names: dict = {}
    exec(lines, names)
    assert names["y"].shape == (16, 256)
    # An engine's example goes on from there.
    names["y"] = names["y"].clone().fill_(float("nan"))
    exec(example("## In an engine"), names)
    assert names["y"].isfinite().all()


def test_speed_table_is_generated_from_the_results():
    path = ROOT / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_table(README) == README


def test_support_matrix_names_every_format():
    matrix = README.split("## Support")[1].split("Checkpoints:")[0]
    named = set(re.findall(r"`(\w+)`", matrix))
    formats = {part.removesuffix("z") for name in SCHEMES for part in name.split("_")}
    assert formats - named == set()
