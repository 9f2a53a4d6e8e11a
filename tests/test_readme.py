"""The README keeps its word: its example runs, its tables are made from results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from moelten.formats import SCHEMES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_first_example_runs_in_ten_lines():
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len([line for line in example.splitlines() if line]) <= 10
    names: dict = {}
    exec(example, names)
    assert names["y"].shape == (16, 256)


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
