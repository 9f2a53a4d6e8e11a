"""Run the GPU tests and write benchmarks/results/gpu-tests.json: `python benchmarks/gpu_tests.py`.

Needs a GPU and a plain pytest. COMMIT in the environment names the commit of a copy of the tree.
Every file with tests marked `gpu`, and the suites of the Triton kernels, which choose the GPU by
themselves, run side by side: compiling is what takes the time. What does not run is named: a file
that cannot be imported (an extra is missing) is a failure, skipped tests come with their reason.
The report is rewritten after each file, so a run that is cut short loses nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
# Compiled for other GPUs, the interpreter's own, and one with nothing but marked tests.
ELSEWHERE = {"test_triton_compile.py", "test_triton_interpreter.py", "test_triton_gpu.py"}
WORKERS = 8


def suites() -> list[Path]:
    """Test files of Triton kernels, and that of the public stages, which run on any device."""
    found = {p.name for p in TESTS.glob("test_triton*.py")} - ELSEWHERE
    return [TESTS / name for name in sorted(found | {"test_stages.py"})]


def commit() -> str:
    if named := os.environ.get("COMMIT"):
        return named
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def run(arguments: list[str], workers: int = 1) -> dict[str, Any]:
    """One pytest run: its counts, and the names of what failed, was skipped or not imported."""
    threads = max((os.cpu_count() or 1) // workers, 1)
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q"]
        command += ["--continue-on-collection-errors", f"--junitxml={report}", *arguments]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        print(done.stdout, flush=True)
        if not report.exists():
            return {"command": arguments, "tests": 0, "failed": ["pytest wrote no report"]}
        record = summary(ElementTree.parse(report))
    deselected = re.search(r"(\d+) deselected", done.stdout)
    return {
        "command": [Path(a).name for a in arguments],
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


def jobs() -> list[list[str]]:
    """pytest's arguments, one file each."""
    marked = [path for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    return [
        *(["-m", "not gpu", str(path)] for path in suites()),
        *(["-m", "gpu", str(path)] for path in marked),
    ]


def main(target: Path) -> int:
    import torch
    import triton

    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        pending = [pool.submit(run, arguments, WORKERS) for arguments in jobs()]
        for done in as_completed(pending):
            found.append(done.result())
            record = {
                "commit": commit(),
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "tests": sum(r["tests"] for r in found),
                "failed": sum(len(r["failed"]) for r in found),
                "files_missing": len(pending) - len(found),
                "runs": found,
            }
            target.write_text(json.dumps(record, indent=1) + "\n")
    print(
        *(f"{r['tests']:5} {len(r['failed']):3} failed  {r['command'][-1]}" for r in found),
        sep="\n",
    )
    return int(any(r["failed"] or not r["tests"] for r in found))


if __name__ == "__main__":
    folder = ROOT / "benchmarks" / "results"
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "gpu-tests.json"))
