"""Runs the Triton suites in Triton's interpreter, in a process of its own: see test_triton.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = ("test_triton.py", "test_triton_scaled.py", "test_triton_routing.py")


def test_the_contract_in_the_interpreter():
    pytest.importorskip("triton")
    suites = [str(Path(__file__).with_name(name)) for name in SUITES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *suites],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
