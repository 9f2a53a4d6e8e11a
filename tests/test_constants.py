"""What kernels are compiled for, as Triton's cache on disk tells it apart."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.compiler import ASTSource

from moelten.formats import BF16, MXFP4
from moelten.kernels import constants
from moelten.kernels.hopper_decode import Task
from moelten.kernels.hopper_ring import Problem as HopperProblem
from moelten.kernels.hopper_schedule import Gemm
from moelten.kernels.triton_problem import Problem
from moelten.kernels.triton_variants import Target, make_variant


@triton.jit
def kernel(P: tl.constexpr):
    tl.static_assert(P.columns == 64)


def test_other_sources_are_other_kernels(monkeypatch):
    """A property may mean something else in a new version, with all kernels' text as it was."""
    variant = make_variant(MXFP4(), BF16, Target("cuda", 90), 16, 1)
    values = [Problem(64, 64, 1, "none", False, 16, variant), Gemm(64, 64, 1, "", "none", False)]
    hashes = []
    for value in values:
        hashes.append(ASTSource(kernel, {"P": "constexpr"}, {(0,): value}).hash())
    monkeypatch.setattr(constants, "sources", lambda: "others")
    for value in values:
        hashes.append(ASTSource(kernel, {"P": "constexpr"}, {(0,): value}).hash())
    assert len(set(hashes)) == 4
    assert all(issubclass(kind, constants.Constants) for kind in (Task, HopperProblem, Problem))


def test_sources_are_those_of_kernels(monkeypatch, tmp_path):
    """Of every file of the folder, whatever its name."""
    files = ("constants.py", "kernel.py")
    for name in files:
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(constants, "__file__", str(tmp_path / files[0]))
    before = constants.sources.__wrapped__()
    assert constants.sources.__wrapped__() == before
    for name in files:
        (tmp_path / name).write_text("x = 2\n")
        after = constants.sources.__wrapped__()
        assert after != before
        before = after
