"""Runs the Triton suites in Triton's interpreter, in processes of their own: see test_triton.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two processes of about the same length, side by side.
SUITES = (
    (
        *("test_triton.py", "test_triton_casts.py", "test_triton_plan.py"),
        *("test_triton_scaled.py", "test_hopper_plan.py"),
    ),
    (
        *("test_triton_fuzz.py", "test_triton_quantized.py", "test_triton_routing.py"),
        *("test_triton_workspace.py", "test_stages.py", "test_hopper_flow.py"),
    ),
)


def start(names: tuple[str, ...]) -> subprocess.Popen[str]:
    files = [str(Path(__file__).with_name(name)) for name in names]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_contract_in_the_interpreter():
    pytest.importorskip("triton")
    processes = [start(names) for names in SUITES]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
        assert " passed" in output and "skipped" not in output
