"""The README keeps its word: its example runs, its tables are made from results."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from moelten.formats import SCHEMES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def example(start: str) -> str:
    """The first Python block after `start`."""
    return re.search(r"```python\n(.*?)```", README.split(start, 1)[1], re.S)[1]


def test_first_example_runs_in_ten_lines():
    lines = example("# moelten")
    assert len([line for line in lines.splitlines() if line]) <= 10
    names: dict = {}
    exec(lines, names)
    assert names["y"].shape == (16, 256)
    # An engine's example goes on from there.
    names["y"] = names["y"].clone().fill_(float("nan"))
    exec(example("## In an engine"), names)
    assert names["y"].isfinite().all()


@pytest.fixture(scope="module")
def generator():
    """benchmarks/readme.py as a module."""
    path = ROOT / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_speed_tables_are_generated_from_the_results(generator):
    assert generator.with_tables(README) == README


def test_results_of_a_gpu_become_a_table(generator, tmp_path):
    results = ROOT / "benchmarks" / "results"
    for name in ("cpu.json", "gpu-tests.json"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    cpu = json.loads((tmp_path / "cpu.json").read_text())
    before = generator.speed_section(tmp_path)
    assert before == generator.cpu_table(cpu)
    gpu = {"gpu": "NVIDIA H200", "mma_type": "bf16", "backend": "triton", "read_gbps": 4570.0}
    records = [
        r | gpu | {"shape": shape, "tokens": 4 * r["tokens"], "us": us, "percent_of_floor": 61.7}
        for r in cpu
        for shape, us in (("A", 12.4), ("gpt-oss-120b", 345.6))
    ][:-1]
    (tmp_path / "h200-triton.json").write_text(json.dumps(records))
    section = generator.speed_section(tmp_path)
    assert section.endswith("\n" + before) and section.startswith("Whole MoE on one NVIDIA H200: ")
    heads = "| layer | scheme | backend | T=4 | T=64 | T=512 |\n|---|---|---|---|---|---|\n"
    assert section.count(heads) == 1
    assert section.count("| A | `int4g32_bf16` | triton | 12 (62 %) | 12 (62 %) | 12 (62 %) |") == 1
    assert "| gpt-oss-120b | `mxfp4_bf16` | triton | 346 (62 %) | 346 (62 %) |  |" in section
    assert "\nA: E=32, H=2048, I=1024, top-4; gpt-oss-120b: E=32" in section
    for fact in (
        "4.57 TB/s",
        f"torch {cpu[0]['torch']}",
        cpu[0]["commit"][:7],
        cpu[0]["date"][:10],
    ):
        assert fact in section
    assert "![" not in section
    (tmp_path / "h200-triton.png").write_bytes(b"")
    assert "](benchmarks/results/h200-triton.png)" in generator.speed_section(tmp_path)
    skewed = generator.gpu_tables([r | {"routing": "zipf"} for r in records], tmp_path / "x.json")
    assert "| A, zipf routing | `int4g32_bf16` | triton | 12 (62 %) |" in skewed
    assert "--routing zipf --backend triton` repeats the first layer." in skewed
    edited = [r | {"commit": f"{r['commit']}-dirty"} for r in records]
    assert f"{cpu[0]['commit'][:7]}-dirty" in generator.gpu_tables(edited, tmp_path / "x.json")


def test_ragged_sizes_and_the_host_become_sentences(generator, tmp_path):
    point = {"us": 12.0, "aligned_us": 10.0, "scheme": "a", "shape": "b", "commit": "0123456789"}
    ragged = [point | {"percent_of_floor": 5}, point | {"us": 9.0}, point | {"us": 10.0}]
    (tmp_path / "h200-hopper-ragged.json").write_text(json.dumps(ragged))
    host = dict.fromkeys(("call_us", "call_us_workspace", "call_us_other_layers"), 14.2)
    host |= {
        "call_us_without_launches": 9.6,
        "cold_first_call_s": 5.25,
        "cold_many_tokens_s": 7.0,
        "warm_new_shape_ms": 30.5,
        "commit": "0123456789",
    }
    (tmp_path / "h200-host.json").write_text(json.dumps(host))
    section = generator.speed_section(tmp_path)
    assert "1 layers" in section and "1.00 times (median) to 1.20 times (worst)" in section
    assert "after 14 us" in section and "launches takes 10 us" in section
    assert "5.2 s" in section and "0123456," in section
    assert "| scheme" not in section


def test_support_matrix_names_every_format():
    matrix = README.split("## Support")[1].split("Checkpoints:")[0]
    named = set(re.findall(r"`(\w+)`", matrix))
    formats = {part.removesuffix("z") for name in SCHEMES for part in name.split("_")}
    assert formats - named == set()
