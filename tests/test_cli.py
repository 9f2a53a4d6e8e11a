"""The command line: results as JSON and as text, exit codes, errors in one line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moelten
from moelten import packing
from moelten.cli import app
from moelten.commands import demo, doctor, verify
from moelten.formats import SCHEMES
from moelten.kernels.cpu import CpuBackend

COMMANDS = ("run", "inspect", "quantize", "verify", "explain", "doctor", "bench")
RECORD = {
    *("scheme", "source", "rel_error", "ok", "us", "packed_bytes", "logical_bytes", "backend"),
    *("writer", "layers"),
}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def read_json(*arguments, code=0):
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def assert_refused(result, *words):
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only wait for a second thread, for long where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every demo checkpoint, written once."""
    folder = tmp_path_factory.mktemp("demos")
    return {name: demo.make(one, folder) for name, one in demo.DEMOS.items()}


@pytest.fixture(scope="module")
def demo_records():
    return read_json("run")


# help and version


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_is_fast_and_loads_no_torch(flag):
    probe = (
        "import sys\nfrom moelten.cli import app\n"
        f"try: app([{flag!r}], prog_name='moelten')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    best = 10.0
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-c", probe]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
    assert done.stderr.strip() == "False"
    assert best < 1.0
    assert "\x1b" not in done.stdout
    if flag == "--version":
        assert done.stdout == f"moelten {moelten.__version__}\n"
    else:
        assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "--json" in result.stdout


@pytest.mark.parametrize("arguments", ["nothing", "run --layers x", "run --unknown", "quantize a"])
def test_wrong_usage_is_exit_code_2(arguments):
    result = invoke(*arguments.split())
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.output


# run


def test_run_makes_checkpoints_and_verifies_them(demo_records):
    schemes = {r["source"]: r["scheme"] for r in demo_records}
    assert schemes == {
        "gpt-oss-mxfp4": "mxfp4_bf16",
        "kimi-int4": "int4g32_bf16",
        "deepseek-fp8": "fp8block_fp8",
        "deepseek-w4afp8": "int4g128_fp8",
        "qwen3-nvfp4": "nvfp4_bf16",
        "qwen3-int8": "int8_int8",
        "mixtral-fp8": "fp8_fp8",
        "qwen3-bf16": "bf16_bf16",
    }
    for r in demo_records:
        assert set(r) == RECORD | {"decoder", "generated"}
        # bf16 outputs cannot be exact: a zero would mean that nothing was compared.
        assert r["ok"] and 1e-4 < r["rel_error"] <= 2.5e-3
        assert r["us"] > 0 and r["writer"] and r["decoder"]
        quantized = r["scheme"] != "bf16_bf16"
        assert (r["packed_bytes"] < 0.7 * r["logical_bytes"]) == quantized
        assert len(r["generated"]) == 8 and all(0 <= i < 256 for i in r["generated"])


@pytest.mark.parametrize("name", ["gpt-oss-mxfp4", "kimi-int4"])
def test_run_generates_what_transformers_generates(name, made, demo_records):
    from transformers import AutoModelForCausalLM

    with demo.quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(made[name].path, dtype=torch.bfloat16)
        ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)
    (record,) = (r for r in demo_records if r["source"] == name)
    assert record["generated"] == ids[0, 3:].tolist()


def test_run_is_reproducible(made):
    path = made["kimi-int4"].path
    first, again = (read_json("run", path, "--seed", 3)[0]["rel_error"] for _ in range(2))
    assert first == again != read_json("run", path, "--seed", 4)[0]["rel_error"]


def test_run_on_a_folder(made):
    path = made["qwen3-nvfp4"].path
    (record,) = read_json("run", path, "--tokens", 3, "--backend", "cpu")
    assert set(record) == RECORD
    assert record["source"] == str(path) and record["layers"] == 2 and record["writer"] is None
    assert read_json("run", path, "--layers", 1)[0]["layers"] == 1
    text = invoke("run", path)
    assert text.exit_code == 0 and "\x1b" not in text.stdout and text.stderr == ""
    assert "nvfp4_bf16" in text.stdout and text.stdout.endswith("relative error\n")


@pytest.mark.parametrize("wrong", ["zero", "nan", "swapped"])
def test_run_fails_where_the_layer_is_wrong(wrong, made, monkeypatch):
    right = verify.fused_moe

    def fused_moe(x, experts, routing):
        y = right(x, experts, routing)
        return {"zero": 0 * y, "nan": y * float("nan"), "swapped": y.flip(0)}[wrong]

    monkeypatch.setattr(verify, "fused_moe", fused_moe)
    path = made["kimi-int4"].path
    (record,) = read_json("run", path, code=1)
    assert not record["ok"]
    assert record["rel_error"] is None if wrong == "nan" else record["rel_error"] > 0.5
    text = invoke("run", path)
    assert text.exit_code == 1 and "FAILED" in text.stdout


def test_unknown_backend_is_named(made):
    assert_refused(invoke("run", made["kimi-int4"].path, "--backend", "none"), "none", "cpu")
    assert_refused(invoke("run", made["kimi-int4"].path, "--tokens", 0), "at least 1")


def test_run_skips_what_a_chosen_backend_refuses(monkeypatch):
    def refusals(backend, spec, device):
        return [] if spec.scheme.name == "int4g32_bf16" else ["int4 alone"]

    monkeypatch.setattr(CpuBackend, "refusals", refusals)
    result = invoke("run", "--backend", "cpu", "--json")
    assert result.exit_code == 0
    assert [r["source"] for r in json.loads(result.stdout)] == ["kimi-int4"]
    assert result.stderr.count("skipped ") == 7 and "int4 alone" in result.stderr
    monkeypatch.setattr(CpuBackend, "refusals", lambda *arguments: ["nothing"])
    result = invoke("run", "--backend", "cpu", "--json")
    assert result.exit_code == 2 and result.stdout == "" and "error: " in result.stderr


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert_refused(invoke("run"), "transformers", "pip install 'moelten[transformers]'")
    assert_refused(invoke("bench", "--plot", "x.png"), "pip install 'moelten[plot]'")
    report = read_json("doctor")
    assert "pip install 'moelten[cpu]'" in report["extras"]["cpu"]


# inspect


def test_inspect(made):
    path = made["gpt-oss-mxfp4"].path
    found = read_json("inspect", path)
    assert (found["model_type"], found["layers"]) == ("gpt_oss", 2)
    assert "mxfp4" in found["format"]
    with safe_open(path / "model.safetensors", "pt") as tensors:
        stored = {n: tensors.get_tensor(n).nbytes for n in tensors.keys() if ".experts." in n}
    assert found["experts_bytes"] == sum(stored.values())
    assert found["logical_bytes"] == 2 * 2 * 8 * 3 * 96 * 160
    (kind,) = found["kinds"]
    assert kind["layers"] == [0, 1] and kind["runs"]
    sizes = (kind["num_experts"], kind["hidden_size"], kind["intermediate_size"])
    assert kind["scheme"] == "mxfp4_bf16" and sizes == (8, 96, 160)
    assert "1.702" in kind["activation"] and kind["extras"] == ["w13_bias", "w2_bias"]
    text = invoke("inspect", path)
    assert text.exit_code == 0 and "mxfp4_bf16" in text.stdout and "would run" in text.stdout


def test_inspect_reads_headers_alone(made, tmp_path):
    path = tmp_path / "sparse"
    shutil.copytree(made["kimi-int4"].path, path)
    file = path / "model.safetensors"
    size = file.stat().st_size
    header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)  # zeros in place of every weight
    assert (
        read_json("inspect", path)["kinds"] == read_json("inspect", made["kimi-int4"].path)["kinds"]
    )


def test_inspect_says_why_not(made):
    found = read_json("inspect", made["kimi-int4"].path, "--device", "cuda")
    (kind,) = found["kinds"]
    assert not kind["runs"]
    assert all(v["reasons"] for v in kind["verdicts"])


# verify


def test_verify(made):
    result = read_json("verify", made["gpt-oss-mxfp4"].path, "--experts", 0)
    assert result["ok"] and result["tolerance"] == 1e-6
    assert [c["experts"] for c in result["layers"]] == [list(range(8))] * 2
    assert all(c["rel_error"] <= 1e-7 and c["finite"] and c["worst"] for c in result["layers"])
    text = invoke("verify", made["gpt-oss-mxfp4"].path)
    assert text.exit_code == 0 and text.stdout.rstrip().endswith("ok: tolerance 1.0e-06")


def test_verify_catches_wrong_decoding(made, monkeypatch):
    monkeypatch.setattr(packing, "flip_offset", lambda packed: packed ^ 0x08)
    result = read_json("verify", made["kimi-int4"].path, code=1)
    assert not result["ok"] and result["layers"][0]["rel_error"] > 0.1
    assert "FAILED" in invoke("verify", made["kimi-int4"].path).stdout


def test_verify_catches_weights_that_are_not_finite(made, tmp_path):
    path = tmp_path / "broken"
    shutil.copytree(made["qwen3-bf16"].path, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.experts.7.down_proj.weight"][3, 5] = float("inf")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    result = read_json("verify", path, code=1)
    assert [c["ok"] for c in result["layers"]] == [True, False]
    assert not result["layers"][1]["finite"]


def test_verify_against_another_checkpoint(made, tmp_path):
    bf16, int8 = made["qwen3-bf16"].path, made["qwen3-int8"].path
    result = read_json("verify", int8, "--against", bf16)
    assert result["ok"] and all(1e-3 < c["rel_error"] < 0.02 for c in result["layers"])
    assert not read_json("verify", int8, "--against", bf16, "--tolerance", 1e-3, code=1)["ok"]
    other = demo.make(demo.DEMOS["qwen3-bf16"], tmp_path, seed=1).path
    result = read_json("verify", other, "--against", bf16, code=1)
    assert all(c["rel_error"] > 1 for c in result["layers"])
    assert_refused(
        invoke("verify", bf16, "--against", made["kimi-int4"].path), "not the same model"
    )


# quantize


@pytest.mark.parametrize("scheme", ["int4g32_bf16", "mxfp4_bf16", "nvfp4_bf16", "fp8_fp8"])
def test_quantize(scheme, made, tmp_path):
    weights, activations = scheme.split("_")
    source, target = made["qwen3-bf16"].path, tmp_path / weights
    arguments = ("--format", weights, "--activations", activations)
    record = read_json("quantize", source, target, *arguments)
    assert record["target"] == str(target) and record["bytes_after"] < record["bytes_before"]
    assert set(record["layer_errors"]) == {"0", "1"}
    against = read_json("verify", target, "--against", source, "--experts", 0)
    for layer in against["layers"]:
        error = record["layer_errors"][str(layer["layer"])]
        assert layer["rel_error"] == pytest.approx(error, rel=0.2) and 1e-3 < error < 0.2
    (ran,) = read_json("run", target)
    assert ran["ok"] and ran["scheme"] == scheme
    assert_refused(invoke("quantize", source, target, *arguments), "not empty")


def test_quantize_in_words(made, tmp_path):
    result = invoke("quantize", made["qwen3-bf16"].path, tmp_path / "q", "--format", "int4g32")
    assert result.exit_code == 0 and "smaller" in result.stdout and result.stderr == ""


def test_quantize_refuses(made, tmp_path):
    source = made["qwen3-bf16"].path
    refused = invoke("quantize", source, tmp_path / "q", "--format", "int3")
    assert_refused(refused, "int3", "int4g32", "mxfp4")
    refused = invoke("quantize", source, tmp_path / "q", "--format", "int4g128")
    assert_refused(refused, "128", "96")
    assert not (tmp_path / "q").exists()


# explain


def test_explain_a_scheme():
    (found,) = read_json("explain", "int4g32_bf16", "--num-experts", 8, "--hidden-size", 512)
    assert found["runs"] and (found["num_experts"], found["hidden_size"]) == (8, 512)
    assert {"backend": "cpu", "runs": True, "reasons": []} in found["verdicts"]
    text = invoke("explain", "int4g32_bf16")
    assert text.exit_code == 0 and "-> " in text.stdout


def test_explain_where_nothing_runs():
    (found,) = read_json("explain", "int4g32_bf16", "--device", "cuda", code=1)
    assert not found["runs"] and all(v["reasons"] for v in found["verdicts"])


def test_explain_a_checkpoint(made):
    (found,) = read_json("explain", made["deepseek-w4afp8"].path)
    assert found["scheme"] == "int4g128_fp8" and found["layers"] == [1]


def test_unknown_device_is_wrong_usage():
    result = invoke("explain", "int4g32_bf16", "--device", "tpu")
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_explain_unknown_scheme_lists_all():
    result = invoke("explain", "int4g23_bf16")
    assert_refused(result, "int4g32_bf16", *SCHEMES)


# doctor


def test_doctor():
    report = read_json("doctor")
    assert set(report) == {"versions", "cpu", "gpus", "backends", "extras"}
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] >= 1 and report["cpu"]["memory_gib"] > 0
    assert report["backends"]["on cpu"]["cpu"] == "would run"
    assert report["backends"]["on cuda"]["cpu"] != "would run"
    text = invoke("doctor")
    assert text.exit_code == 0 and "backends:" in text.stdout


def test_doctor_survives_a_broken_section(monkeypatch):
    def broken():
        raise RuntimeError("driver on fire")

    monkeypatch.setattr(doctor, "gpus", broken)
    report = read_json("doctor")
    assert report["gpus"] == {"error": "RuntimeError: driver on fire"}
    assert "error" not in report["cpu"]


# bad input


@pytest.mark.parametrize("command", ["run", "inspect", "verify"])
def test_bad_checkpoints_are_one_line(command, made, tmp_path):
    assert_refused(invoke(command, tmp_path / "none"), "none", "expected a checkpoint folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(invoke(command, empty), "empty")
    cut = tmp_path / "cut"
    shutil.copytree(made["kimi-int4"].path, cut)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(invoke(command, cut), "truncated")
    garbage = tmp_path / "garbage"
    shutil.copytree(made["kimi-int4"].path, garbage)
    (garbage / "config.json").write_text("{not json")
    assert_refused(invoke(command, garbage), "config.json")
    foreign = tmp_path / "foreign"
    shutil.copytree(made["kimi-int4"].path, foreign)
    config = json.loads((foreign / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gguf"}
    (foreign / "config.json").write_text(json.dumps(config))
    assert_refused(invoke(command, foreign), "gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_on_the_terminal_and_json_is_not(made):
    import pty

    master, slave = pty.openpty()
    probe = "from moelten.cli import app; app()"
    command = [sys.executable, "-c", probe, "verify", str(made["qwen3-int8"].path), "--json"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    shown = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=environment) as child:
        os.close(slave)
        # Read while it runs: a full terminal would block it. At its end, reading fails.
        with contextlib.suppress(OSError):
            while part := os.read(master, 1 << 16):
                shown += part
        result = json.load(child.stdout)
    os.close(master)
    assert child.returncode == 0 and result["ok"]
    assert b"layer 1" in shown and b"\x1b" in shown


def test_without_a_terminal_there_are_no_colours():
    probe = "import sys; from moelten.cli import app; app(['doctor'])"
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "" and "\x1b" not in done.stdout
