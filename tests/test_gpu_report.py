"""The GPU report names whatever did not run: no file is left out in silence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FILES = {
    "test_missing.py": "import nothing_of_this_name\n",
    "test_lost.py": "import nothing_of_this_name, pytest\n@pytest.mark.gpu\ndef test_a(): pass\n",
    "test_optional.py": "import pytest\npytest.importorskip('nothing_of_this_name')\n",
    "test_some.py": (
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_good(): pass\n"
        "@pytest.mark.gpu\ndef test_bad(): assert False\n"
        "@pytest.mark.gpu\ndef test_later(): pytest.skip('not today')\n"
        "def test_elsewhere(): pass\n"
    ),
}


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_tests", BENCHMARKS / "gpu_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "tests").mkdir()
    for name, text in FILES.items():
        (tmp_path / "tests" / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_nothing_is_left_out_in_silence(script, tmp_path):
    found = script.run(["-m", "gpu", str(tmp_path / "tests")])
    missing = "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert found["tests"] == 3
    assert found["failed"] == ["test_bad", f"tests.test_lost: {missing}"]
    assert found["not_imported"] == dict.fromkeys(
        ("tests.test_lost", "tests.test_missing"), missing
    )
    assert set(found["skipped"]) == {"tests.test_optional", "test_later"}
    assert "not today" in found["skipped"]["test_later"]
    assert "nothing_of_this_name" in found["skipped"]["tests.test_optional"]
    assert str(tmp_path) not in "".join(found["skipped"].values())


@pytest.mark.parametrize(
    "printed, code, wanted",
    [
        ("hopper a_b T=3\n========= ERROR SUMMARY: 0 errors\n", 0, (True, True, 0)),
        ("hopper a_b T=3\n========= ERROR SUMMARY: 2 errors\n", 0, (True, False, 2)),
        ("hopper a_b T=3\n========= ERROR SUMMARY: 0 errors\n", 1, (True, False, 0)),
        ("hopper a_b T=3\nTraceback\n", 1, (True, False, 0)),
        ("========= Error: Device not supported\n", 1, (False, None, None)),
    ],
)
def test_memcheck_is_reported(script, tmp_path, monkeypatch, printed, code, wanted):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nprintf '{printed}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = script.memcheck()
    assert (found["ran"], found.get("passed"), found.get("errors")) == wanted
    assert found.get("cases", []) == (["hopper a_b T=3"] if "T=3" in printed else [])
    assert found["ran"] or found["why"]
    tool.unlink()
    assert script.memcheck() == {"ran": False, "why": "compute-sanitizer is not installed"}


def test_every_suite_of_the_kernels_is_run(script):
    names = {path.name for path in script.suites()}
    assert {"test_triton.py", "test_triton_fuzz.py", "test_triton_routing.py"} <= names
    assert "test_stages.py" in names and "test_triton_compile.py" not in names


def test_every_marked_file_is_run(script):
    marked = {Path(job[-1]).name for job in script.jobs() if job[1] == "gpu"}
    assert {"test_triton_gpu.py", "test_bench.py", "test_triton_workspace.py"} <= marked


def test_shares_hold_every_test_once(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "_LONG_SHARE", 2)
    arguments = ["-m", "gpu", str(tmp_path / "tests" / "test_some.py")]
    parts = script.shares(arguments)
    assert [len(part) for part in parts] == [2, 1]
    total = script.EMPTY
    for part in parts:
        total = script.add(total, script.run(part))
    whole = script.run(arguments)
    assert (total["tests"], total["failed"]) == (3, ["test_bad"])
    assert {k: total[k] for k in ("skipped", "not_imported")} == {
        k: whole[k] for k in ("skipped", "not_imported")
    }
    lost = ["-m", "gpu", str(tmp_path / "tests" / "test_lost.py")]
    assert script.shares(lost) == [lost]


def test_the_report(script, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    files = [["-m", "gpu", str(tmp_path / "tests" / name)] for name in FILES]
    checked = {"ran": True, "passed": True, "errors": 0, "cases": ["hopper a T=1"]}
    monkeypatch.setenv("COMMIT", "abc")
    monkeypatch.setattr(script, "_LONG_SHARE", 2)
    monkeypatch.setattr(script, "jobs", lambda: files)
    monkeypatch.setattr(script, "memcheck", lambda: checked)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert script.main(tmp_path / "report.json") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["commit"], report["gpu"], report["memcheck"]) == ("abc", "a GPU", checked)
    assert (report["tests"], report["failed"], report["unfinished"]) == (3, 2, [])
    assert [r["command"][-1] for r in report["runs"]] == list(FILES)
    monkeypatch.setattr(script, "jobs", lambda: [[*files[-1], "-k", "good"]])
    assert script.main(tmp_path / "report.json") == 0
    for found, code in (
        (checked | {"passed": False}, 1),
        ({"ran": False, "why": "compute-sanitizer is not installed"}, 0),
    ):
        monkeypatch.setattr(script, "memcheck", lambda found=found: found)
        assert script.main(tmp_path / "report.json") == code


def test_an_unfinished_file_goes_on_where_it_stopped(script, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    report, job = tmp_path / "report.json", ["-m", "gpu", str(tmp_path / "tests" / "test_some.py")]
    run = {"command": ["-m", "gpu", "test_some.py"], **script.EMPTY, "tests": 1}
    run["ran"] = ["tests/test_some.py::test_bad"]
    lost = {"command": ["-m", "gpu", "test_lost.py"], **script.EMPTY, "ran": []}
    unfinished = ["test_lost.py", "test_some.py"]
    record = {"commit": "abc", "unfinished": unfinished, "runs": [run, lost]}
    report.write_text(json.dumps(record))
    monkeypatch.setenv("COMMIT", "abc")
    others = ["-m", "gpu", str(tmp_path / "tests" / "test_lost.py")]
    monkeypatch.setattr(script, "jobs", lambda: [job, others])
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    script.main(report, only=["test_some.py"], onto=report)
    found = json.loads(report.read_text())
    assert (found["tests"], found["failed"], found["unfinished"]) == (3, 0, ["test_lost.py"])
    assert found["runs"][0]["tests"] == 3 and "ran" not in found["runs"][0]
    assert found["runs"][1]["ran"] == []


def test_a_later_report_keeps_what_did_not_change(script, tmp_path, monkeypatch):
    """And nothing else: what differs between two commits must have run again."""
    reports = tmp_path / "old.json", tmp_path / "new.json"
    commands = [["-m", "gpu", name] for name in ("test_a.py", "test_b.py")]
    monkeypatch.setattr(script, "jobs", lambda: commands)
    old = [{"command": c, **script.EMPTY, "tests": 3, "failed": ["x"]} for c in commands]
    new = [old[0] | {"tests": 2, "failed": []}, old[1] | {"tests": 0, "failed": []}]
    checked = {"ran": True, "passed": True}
    record = {"commit": "abc", "unfinished": [], "runs": old, "memcheck": checked}
    reports[0].write_text(json.dumps(record))
    record = {"commit": "def", "unfinished": ["test_b.py"], "runs": new}
    reports[1].write_text(json.dumps(record))
    changed = ["tests/test_a.py"]
    done = SimpleNamespace(stdout="\n".join(changed))
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: done)
    found = script.join(*reports)
    assert (found["commit"], found["tests"], found["failed"], found["unfinished"]) == (
        "def", 5, 1, []
    )  # fmt: skip
    assert [run.get("commit") for run in found["runs"]] == [None, "abc"]
    assert found["memcheck"] == checked | {"commit": "abc"}
    for name in ("tests/test_b.py", "tests/metrics.py", "moelten/moe.py"):
        done.stdout = f"tests/test_a.py\n{name}\n"
        with pytest.raises(SystemExit, match=f"{name} changed after"):
            script.join(*reports)


def test_reports_of_one_commit_go_together(script, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    report = tmp_path / "report.json"
    run = {"command": ["-m", "gpu", "test_a.py"], **script.EMPTY, "tests": 3}
    cut_short = run | {"command": ["-m", "gpu", "test_b.py"]}
    record = {"commit": "abc", "unfinished": ["test_b.py"], "runs": [run, cut_short]}
    report.write_text(json.dumps(record))
    monkeypatch.setenv("COMMIT", "abc")
    assert script.known(None) == ({}, None)
    runs = {json.dumps(run["command"]): script.EMPTY | {"tests": 3}}
    assert script.known(report) == (runs, None)
    checked = {"ran": True, "passed": True}
    report.write_text(json.dumps(record | {"memcheck": checked}))
    assert script.known(report) == (runs, checked)
    # What it lacks runs, the sample too; what it has does not.
    report.write_text(json.dumps(record | {"unfinished": []}))
    monkeypatch.setattr(script, "jobs", lambda: [run["command"]])
    monkeypatch.setattr(script, "memcheck", lambda: checked)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert script.main(tmp_path / "whole.json", onto=report) == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert (whole["tests"], whole["unfinished"], whole["memcheck"]) == (3, [], checked)
    monkeypatch.setenv("COMMIT", "def")
    with pytest.raises(SystemExit, match="is of abc, not of def"):
        script.known(report)
