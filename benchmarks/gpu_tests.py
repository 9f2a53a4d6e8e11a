"""Run the GPU tests and write benchmarks/results/gpu-tests.json: `python benchmarks/gpu_tests.py`.

Needs a GPU and a plain pytest. COMMIT in the environment names the commit where git cannot. Two
runs: everything marked `gpu` in tests/, and the suites of the Triton kernels, which choose the GPU
by themselves. What does not run is named: files that cannot be imported (an extra is missing), with
the reason, and skipped tests. A file that holds GPU tests and cannot be imported is a failure.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
# Compiled for other GPUs, and the interpreter's own: no kernel runs on a GPU there.
ELSEWHERE = {"test_triton_compile.py", "test_triton_interpreter.py"}


def suites() -> list[str]:
    """Test files of Triton kernels, and those of the public stages, which run on any device."""
    found = {p.name for p in TESTS.glob("test_triton*.py")} - ELSEWHERE
    return [str(TESTS / name) for name in sorted(found | {"test_stages.py"})]


def runs() -> list[list[str]]:
    return [["-m", "gpu", str(TESTS)], ["-m", "not gpu", *suites()]]


def commit() -> str:
    if named := os.environ.get("COMMIT"):
        return named
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def run(arguments: list[str], report: Path) -> dict[str, Any]:
    """One pytest run: its counts, and the names of what failed, was skipped or not imported."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q"]
    command += ["--continue-on-collection-errors", f"--junitxml={report}", *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    record = summary(ElementTree.parse(report))
    deselected = re.search(r"(\d+) deselected", done.stdout)
    return {
        "command": [Path(a).name for a in arguments],
        "exit": done.returncode,
        **record,
        "deselected": int(deselected[1]) if deselected else 0,
    }


def summary(report: Any) -> dict[str, Any]:
    """What a junit report says: a case without a class is a file that was not collected."""
    suite = report.getroot().find("testsuite")
    files, cases = [], []
    for case in suite.findall("testcase"):
        (cases if case.get("classname") else files).append(case)
    missing = {c.get("name"): reason(c) for c in files if c.find("error") is not None}
    skipped = [c for c in (*files, *cases) if c.find("skipped") is not None]
    failed = [c.get("name") for c in cases if {e.tag for e in c} & {"failure", "error"}]
    failed += [f"{name}: {why}" for name, why in missing.items() if holds_gpu_tests(name)]
    return {
        "tests": len(cases),
        "failed": failed,
        "skipped": {c.get("name"): reason(c) for c in skipped},
        "not_imported": missing,
        "seconds": float(suite.get("time")),
    }


def reason(case: Any) -> str:
    """The last line of an error, or why a test was skipped."""
    entry = case.find("error") if case.find("error") is not None else case.find("skipped")
    lines = (entry.text or entry.get("message") or "").strip().splitlines()
    return lines[-1].removeprefix("E").strip() if lines else "no reason given"


def holds_gpu_tests(module: str) -> bool:
    """Whether the file of a dotted test module has tests with the mark."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return not path.exists() or "mark.gpu" in path.read_text()


def main(target: Path) -> int:
    found = [run(arguments, target.with_suffix(".xml")) for arguments in runs()]
    target.with_suffix(".xml").unlink()
    record = {
        "commit": commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "runs": found,
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(r["failed"] or not r["tests"] for r in found))


if __name__ == "__main__":
    folder = ROOT / "benchmarks" / "results"
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "gpu-tests.json"))
