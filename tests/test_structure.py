"""The shape of the package: arrows never point back, files stay small, imports stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moelten

PACKAGE = Path(moelten.__file__).parent
# Each layer may import from itself and from those above it.
LAYERS = (
    {"errors", "formats", "casts", "packing", "layouts", "qtensor", "activations"},
    {"routing", "plan"},
    {"weights"},
    {"packed"},
    {"reference"},
    {"kernels"},
    {"moe", "stages", "quantized", "router"},
    {"checkpoints"},
    {"integrations"},
    {"commands"},
    {"cli"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Parts of moelten that a file imports, at module level or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: import by full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = (name.split(".") for name in found if name.split(".")[0] == "moelten")
    return {name[1] for name in inside if len(name) > 1 and name[1] in RANK}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    assert part(path) in RANK, f"{part(path)} has no place in LAYERS"
    for name in imported(path):
        assert RANK[name] <= RANK[part(path)], f"{path.name} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_explained(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert not text or ast.get_docstring(ast.parse(text)), "a module says what it is"


def test_two_folder_levels():
    assert all(len(p.relative_to(PACKAGE).parts) <= 2 for p in FILES)


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import moelten, moelten.cli", ("torch", "transformers", "rich.progress")),
        ("from moelten import fused_moe", ("triton", "transformers", "llvmlite", "matplotlib")),
    ],
)
def test_imports_stay_light(statement, absent):
    probe = f"{statement}\nimport sys\nprint([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cuda_is_not_initialised_by_import():
    probe = "import moelten.moe, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_resolves_and_is_documented():
    for name in moelten.__all__:
        value = getattr(moelten, name)
        if callable(value):
            assert value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moelten.nothing
