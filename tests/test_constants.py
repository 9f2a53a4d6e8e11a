"""What kernels are compiled for, as Triton's cache on disk tells it apart."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.compiler import ASTSource

from moelten.formats import BF16, MXFP4
from moelten.kernels import constants
from moelten.kernels.hopper_decode import Task, decode_kernel
from moelten.kernels.hopper_prefill import prefill_kernel
from moelten.kernels.hopper_ring import Problem as HopperProblem
from moelten.kernels.hopper_schedule import Gemm
from moelten.kernels.triton_problem import Problem
from moelten.kernels.triton_variants import Target, make_variant

KERNELS = Path(constants.__file__).parent


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


def test_kernels_are_identified_by_those_sources(monkeypatch):
    """One from another, and anew when any source changes; Triton does not read them again."""
    monkeypatch.setattr(prefill_kernel, "hash", None)
    monkeypatch.setattr(decode_kernel, "hash", None)
    constants.identify(prefill_kernel)
    constants.identify(decode_kernel)
    first = prefill_kernel.cache_key
    assert first != decode_kernel.cache_key
    monkeypatch.setattr(prefill_kernel, "hash", None)
    monkeypatch.setattr(constants, "sources", lambda: "others")
    constants.identify(prefill_kernel)
    assert prefill_kernel.cache_key != first


def jitted(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions that Triton compiles or calls while it does."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if {"jit", "constexpr_function"} & names(*f.decorator_list)]


def names(*nodes: ast.AST) -> set[str]:
    found = [node for top in nodes for node in ast.walk(top)]
    return {n.attr for n in found if isinstance(n, ast.Attribute)} | {
        n.id for n in found if isinstance(n, ast.Name)
    }


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_use_nothing_from_elsewhere(path):
    """What they are made of lies beside them, so that the sources are all that makes them."""
    tree = ast.parse(path.read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    elsewhere = {
        alias.asname or alias.name
        for node in imports
        if not node.module.startswith(("moelten.kernels", "triton"))
        for alias in node.names
    }
    assert not [f.name for f in jitted(tree) if elsewhere & names(*f.body)]
