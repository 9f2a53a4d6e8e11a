"""Trees are timed in turns, and told apart where their outputs differ."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import ClassVar

import pytest

_FILE = Path(__file__).parent.parent / "benchmarks" / "compare.py"
_SPEC = importlib.util.spec_from_file_location("compare", _FILE)
compare = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(compare)


class Tree:
    """Answers as a tree's process does, and notes who was told what."""

    told: ClassVar[list[tuple]] = []
    norm: ClassVar[float]

    def __init__(self, name: str) -> None:
        self.name, self.times = name, iter((1.0, 2.0) if name == "old" else (0.5, 0.25))

    def tell(self, *order) -> None:
        self.order = order
        Tree.told.append((self.name, *order))

    def answer(self):
        what = self.order[0]
        if what == "capture":
            return 7.0 if self.name == "old" else Tree.norm
        return next(self.times) if what == "time" else None


@pytest.mark.parametrize("norm", [7.0, 8.0])
def test_trees_take_turns(monkeypatch, capsys, norm):
    monkeypatch.setattr(compare, "Tree", Tree)
    monkeypatch.setattr(Tree, "norm", norm, raising=False)
    Tree.told.clear()
    compare.compare(["old", "new"], ["A:mxfp4_bf16:64"])
    both = [("old",), ("new",)]
    wanted = [(*name, "load", "A", "mxfp4_bf16") for name in both]
    wanted += [(*name, "capture", 64) for name in both]
    assert Tree.told == wanted + [(*name, "time") for name in both * 2]
    differ = "" if norm == 7.0 else "  norms [7.0, 8.0]"
    line = f"A mxfp4_bf16 64: 1.0 2.0 | 0.5 0.2{differ}"
    assert capsys.readouterr().out.splitlines() == ["old  new", line]


def test_a_process_that_ends_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.sys, "executable", "true")
    tree = compare.Tree(f"{tmp_path},LIMIT=1")
    tree.process.wait()
    with pytest.raises(SystemExit, match="LIMIT=1: its process ended"):
        tree.answer()
