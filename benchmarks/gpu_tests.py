"""Run the GPU tests and write benchmarks/results/gpu-tests.json: `python benchmarks/gpu_tests.py`.

Needs a GPU and a plain pytest. COMMIT in the environment names the commit where git cannot.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
RUNS = (
    ["-m", "gpu", str(TESTS / "test_triton_gpu.py")],
    [str(TESTS / "test_triton.py"), str(TESTS / "test_triton_routing.py")],
)


def commit() -> str:
    if named := os.environ.get("COMMIT"):
        return named
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def run(arguments: list[str], report: Path) -> dict[str, object]:
    """One pytest run: its counts and the names of what failed."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider"]
    subprocess.run([*command, "-q", f"--junitxml={report}", *arguments], check=False, cwd=ROOT)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    bad = [c.get("name") for c in cases if {e.tag for e in c} & {"failure", "error"}]
    skipped = [c.get("name") for c in cases if c.find("skipped") is not None]
    counts = {"tests": len(cases), "failed": bad, "skipped": skipped, "seconds": suite.get("time")}
    return {"command": [Path(a).name for a in arguments], **counts}


def main(target: Path) -> int:
    runs = [run(arguments, target.with_suffix(".xml")) for arguments in RUNS]
    target.with_suffix(".xml").unlink()
    record = {
        "commit": commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "runs": runs,
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(r["failed"] for r in runs))


if __name__ == "__main__":
    folder = ROOT / "benchmarks" / "results"
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "gpu-tests.json"))
