"""Run the GPU tests and write benchmarks/results/gpu-tests.json: `python benchmarks/gpu_tests.py`.

Needs a GPU and a plain pytest. COMMIT in the environment names the commit of a copy of the tree.
Every file with tests marked `gpu`, and the suites of the Triton kernels, which choose the GPU by
themselves, run side by side, a few tests per process, processes in turn on all GPUs: compiling is
what takes the time. What does not run is named: a file that cannot be imported (an extra is
missing) is a failure, skipped tests come with their reason. Meanwhile compute-sanitizer looks at a
sample, where the machine allows it, unless only some files run. The report is rewritten after each
process, so a run that is cut short loses nothing: `--only FILE ..` runs some files, and `--onto
REPORT` goes on after a report of the same commit, of an unfinished file with the tests that lack.

`--join OLD NEW`, in a repository, runs nothing: it writes the report NEW with what OLD has beside,
each with its commit, if no file of the package and no test differs that did not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
# Compiled for other GPUs, the interpreter's own, and one with nothing but marked tests.
ELSEWHERE = {"test_triton_compile.py", "test_triton_interpreter.py", "test_triton_gpu.py"}
EMPTY: dict[str, Any] = {
    "tests": 0,
    "failed": [],
    "skipped": {},
    "not_imported": {},
    "seconds": 0.0,
}
# Four processors are left to compute-sanitizer, which else takes longer than all tests.
WORKERS = min(max((os.cpu_count() or 1) - 4, 1), 56)
# Tests per process: few where each takes long, lest the last ones run alone.
_SHARE, _LONG_SHARE = 16, 3


def suites() -> list[Path]:
    """Test files of Triton kernels, and those of stages, which run on any device."""
    found = {p.name for p in TESTS.glob("test_triton*.py")} - ELSEWHERE
    return [TESTS / name for name in sorted(found | {"test_stages.py", "test_hopper_plan.py"})]


def commit() -> str:
    if named := os.environ.get("COMMIT"):
        return named
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def gpus() -> list[str]:
    """Names of the GPUs that processes may see."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(max(torch.cuda.device_count(), 1))]


def pytest(arguments: list[str], threads: int = 1, **environment: str) -> str:
    """What a run of pytest prints; it goes on after files that cannot be imported."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q"]
    command += ["--continue-on-collection-errors", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)} | environment
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, stdout=-1, text=True)
    return done.stdout


def shares(arguments: list[str], ran: Sequence[str] = ()) -> list[list[str]]:
    """The tests that pytest would run, but for some, a few per list; the arguments where it finds
    none.

    Neighbours, which take as long as each other, are dealt out.
    """
    printed = pytest(["--collect-only", *arguments])
    found = [line for line in printed.splitlines() if re.match(r"[\w/.]+\.py::", line)]
    names = [name for name in found if name not in ran]
    share = _SHARE if "not gpu" in arguments else _LONG_SHARE
    count = -(-len(names) // share)
    return [names[i::count] for i in range(count)] if found else [arguments]


def run(arguments: list[str], workers: int = 1, gpu: str = "0") -> dict[str, Any]:
    """One pytest run: its counts, and the names of what failed, was skipped or not imported."""
    threads = max((os.cpu_count() or 1) // workers, 1)
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        printed = pytest([f"--junitxml={report}", *arguments], threads, CUDA_VISIBLE_DEVICES=gpu)
        print(printed, flush=True)
        if not report.exists():
            return EMPTY | {"failed": [f"pytest wrote no report: {arguments}"]}
        return summary(ElementTree.parse(report))


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


def memcheck() -> dict[str, Any]:
    """What compute-sanitizer says of `memcheck.py`; not every machine lets it run."""
    script = [sys.executable, str(ROOT / "benchmarks" / "memcheck.py")]
    command = ["compute-sanitizer", "--tool", "memcheck", *script]
    if shutil.which(command[0]) is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, env=env, stdout=-1, stderr=-2, text=True)
    lines = done.stdout.splitlines()
    if "Device not supported" in done.stdout:
        return {"ran": False, "why": "compute-sanitizer says: Device not supported"}
    found = [re.match(r"=+ ERROR SUMMARY: (\d+) error", line) for line in lines]
    errors = [int(match[1]) for match in found if match]
    passed = errors == [0] and not done.returncode
    if not passed:
        print(done.stdout, flush=True)
    cases = [line for line in lines if re.match(r"\w+ \w+ T=\d+$", line)]
    return {"ran": True, "passed": passed, "errors": sum(errors), "cases": cases}


def add(total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The counts and names of two runs."""
    joined = {"skipped", "not_imported"}
    return {
        key: total[key] | part[key] if key in joined else total[key] + part[key] for key in EMPTY
    }


def reason(case: Any) -> str:
    """The last line of an error, or why a test was skipped; files as seen from the repository."""
    entry = case.find("error") if case.find("error") is not None else case.find("skipped")
    lines = (entry.text or entry.get("message") or "").strip().splitlines()
    last = lines[-1].removeprefix("E").strip() if lines else "no reason given"
    return last.replace(f"{ROOT}/", "")


def holds_gpu_tests(module: str) -> bool:
    """Whether the file of a dotted test module has tests with the mark."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return not path.exists() or "mark.gpu" in path.read_text()


def jobs() -> list[list[str]]:
    """pytest's arguments, one file each; what takes long first."""
    files = set(TESTS.glob("test_*.py")) - {TESTS / "test_gpu_report.py"}  # it writes such files
    marked = [path for path in sorted(files) if "mark.gpu" in path.read_text()]
    return [
        *(["-m", "gpu", str(path)] for path in marked),
        *(["-m", "not gpu", str(path)] for path in suites()),
    ]


def known(report: Path | None) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """What a report of the same commit says, by its commands, and of the sample; nothing else.

    Of a file that is not finished the tests that ran are named, if the report does.
    """
    if report is None:
        return {}, None
    record = json.loads(report.read_text())
    if record["commit"] != commit():
        raise SystemExit(f"{report} is of {record['commit']}, not of {commit()}")
    missing, kept = record["unfinished"], (*EMPTY, "commit", "ran")
    done = [run for run in record["runs"] if run["command"][-1] not in missing or run.get("ran")]
    runs = {json.dumps(run["command"]): {k: run[k] for k in kept if k in run} for run in done}
    return runs, record.get("memcheck")


def join(old: Path, new: Path) -> dict[str, Any]:
    """The later report, and of the earlier one what the changes between them leave as it was."""
    first, later = (json.loads(path.read_text()) for path in (old, new))
    between = ["git", "-C", str(ROOT), "diff", "--name-only", first["commit"], later["commit"]]
    between += ["--", "moelten", "tests", "benchmarks/memcheck.py"]
    changed = subprocess.run(between, capture_output=True, text=True, check=True).stdout.split()
    again = {run["command"][-1] for run in later["runs"] if run["tests"]}
    elsewhere = {path.name for path in TESTS.glob("test_*.py")} - {job[-1] for job in named()}
    if other := [name for name in changed if Path(name).name not in again | elsewhere]:
        raise SystemExit(f"{', '.join(other)} changed after {old}, and did not run again")
    known = {json.dumps(run["command"]): run for run in first["runs"]}
    runs = [
        run if run["tests"] else {"commit": first["commit"]} | known[json.dumps(run["command"])]
        for run in later["runs"]
    ]
    missing = {run["command"][-1] for run in runs if not run["tests"]}
    missing |= again & {*later["unfinished"]} | {*first["unfinished"]} - again
    checked = later.get("memcheck") or {"commit": first["commit"]} | first["memcheck"]
    return later | counts(runs, missing) | {"memcheck": checked}


def counts(runs: list[dict[str, Any]], missing: set[str]) -> dict[str, Any]:
    """What a report says of all runs: files of which something did not run are missing."""
    return {
        "tests": sum(r["tests"] for r in runs),
        "failed": sum(len(r["failed"]) for r in runs),
        "unfinished": sorted(missing),
        "runs": runs,
    }


def write(
    target: Path, runs: list[dict[str, Any]], missing: set[str], checked: dict[str, Any] | None
) -> None:
    """The report so far: runs with their commands, files of which something did not run."""
    import torch
    import triton

    record: dict[str, Any] = {
        "commit": commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **counts(runs, missing),
    }
    target.write_text(
        json.dumps(record | ({"memcheck": checked} if checked else {}), indent=1) + "\n"
    )


def named() -> list[list[str]]:
    """The jobs, with names for paths."""
    return [[Path(argument).name for argument in job] for job in jobs()]


def main(target: Path, only: Sequence[str] = (), onto: Path | None = None) -> int:
    work, files = jobs(), named()
    before, checked = known(onto)
    runs = [before.get(json.dumps(command), EMPTY) for command in files]
    whole = [i for i, r in enumerate(runs) if r["tests"] and "ran" not in r]
    chosen = [i for i, c in enumerate(files) if c[-1] in only or not (only or i in whole)]
    left_out = [i for i in range(len(files)) if i not in (*chosen, *whole)]
    ran = {i: list(runs[i].get("ran", ())) for i in (*chosen, *left_out)}
    for index in chosen:
        runs[index] = runs[index] if ran[index] else EMPTY
    turns = itertools.cycle(gpus())
    with ThreadPoolExecutor(WORKERS) as pool:
        sample = [] if only or checked else [pool.submit(memcheck)]
        parts = pool.map(shares, [work[i] for i in chosen], [ran[i] for i in chosen])
        pending = {
            pool.submit(run, share, WORKERS, next(turns)): (index, share)
            for index, dealt in zip(chosen, parts, strict=True)
            for share in dealt
        }
        unfinished = [index for index, _ in pending.values()]
        for done in as_completed([*sample, *pending]):
            if done in sample:
                checked = done.result()
                print("memcheck:", checked, flush=True)
            else:
                index, share = pending[done]
                runs[index] = add(runs[index], done.result())
                ran[index] += share
                unfinished.remove(index)
            missing = {*unfinished, *left_out}
            so_far = [
                {"command": files[i]} | r | ({"ran": ran[i]} if i in missing else {})
                for i, r in enumerate(runs)
            ]
            write(target, so_far, {files[i][-1] for i in missing}, checked)
    for name, r in zip(files, runs, strict=True):
        print(f"{r['tests']:5} {len(r['failed']):3} failed  {name[-1]}")
    failed = any(r["failed"] or not r["tests"] for r in runs)
    return int(failed or not (checked and checked.get("passed", True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = ROOT / "benchmarks" / "results"
    parser.add_argument("target", nargs="?", type=Path, default=folder / "gpu-tests.json")
    parser.add_argument("--only", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--onto", type=Path, metavar="REPORT")
    parser.add_argument("--join", nargs=2, type=Path, metavar=("OLD", "NEW"))
    given = parser.parse_args()
    if given.join:
        given.target.write_text(json.dumps(join(*given.join), indent=1) + "\n")
    else:
        sys.exit(main(given.target, given.only, given.onto))
