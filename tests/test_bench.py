"""bench: the records' schema, honest baselines and floors, routing draws, refusals."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from moelten.cli import app
from moelten.commands import bench
from moelten.errors import FormatError, UnsupportedError
from moelten.formats import SCHEMES, scheme
from moelten.qtensor import dequantize

TINY = bench.Shape("tiny", 256, 128, 6, 2)
KEYS = {
    *("scheme", "shape", "hidden_size", "intermediate_size", "num_experts", "top_k", "tokens"),
    *("routing", "active_experts", "backend", "rounds", "us", "us_p10", "us_p90", "weight_gbps"),
    *("tflops", "floor_us", "percent_of_floor", "read_gbps", "mma_tflops", "rel_error"),
    *("packed_bytes", "baseline", "baseline_us", "speedup", "baseline_bytes", "baseline_missing"),
    *("device", "threads", "gpu", "torch", "triton", "transformers", "commit", "date"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only wait for a second thread, for long where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(bench, "cold_bytes", lambda: 4 << 20)
    measure = bench.measure_floors
    monkeypatch.setattr(bench, "measure_floors", lambda sweep: measure(sweep, 256))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_records():
    schemes = [scheme("int4g32_bf16"), scheme("mxfp4_bf16")]
    records = list(bench.run(schemes, TINY, [1, 5], seconds=0.2))
    assert [(r["scheme"], r["tokens"]) for r in records] == [
        (s.name, t) for s in schemes for t in (1, 5)
    ]
    for r in records:
        assert set(r) == KEYS
        assert 0 < r["rel_error"] <= 2.5e-3
        assert r["us_p10"] <= r["us"] <= r["us_p90"]
        assert r["rounds"] >= 3
        assert r["baseline"].startswith("transformers ") and r["baseline_missing"] is None
        assert r["speedup"] == pytest.approx(r["baseline_us"] / r["us"], abs=1e-3)
        assert r["baseline_bytes"] == 2 * 3 * 6 * 256 * 128
        assert r["packed_bytes"] < 0.3 * r["baseline_bytes"]
        assert r["active_experts"] <= min(6, 2 * r["tokens"])
        assert r["percent_of_floor"] == pytest.approx(
            100 * r["floor_us"] / r["us"], rel=0.05, abs=0.01
        )
        assert r["gpu"] is None and r["device"]


SOME = "bf16_bf16 fp32_fp32 fp8block_fp8 int4g32_fp8tensor nvfp4_nvfp4 int4z_int8".split()


@pytest.mark.parametrize("name", SOME)
def test_every_kind_of_scheme_has_a_layer(name):
    layer = bench.make_layer(SCHEMES[name], TINY, None, generator())
    packed, decoded = layer.packed, layer.decoded
    draw = bench.make_draws(SCHEMES[name], TINY, 3, "uniform", generator())[0]
    assert bench.relative_error(packed, draw) <= 2.5e-3
    # The baseline has the same weights, expert by expert.
    for expert in (0, 5):
        weights = packed.unpack_expert(expert)
        w13 = dequantize(weights.w13)[0].flatten(0, 1).bfloat16()
        assert torch.equal(decoded[0][expert], w13)
        assert torch.equal(decoded[1][expert], dequantize(weights.w2)[0].bfloat16())


def test_experts_differ():
    layer = bench.make_layer(scheme("int4g32_bf16"), TINY, None, generator())
    assert not torch.equal(layer.decoded[1][0], layer.decoded[1][1])


def test_relative_error_sees_a_wrong_layer():
    packed = bench.make_layer(scheme("int4g32_bf16"), TINY, "cpu", generator()).packed
    draw = bench.make_draws(scheme("int4g32_bf16"), TINY, 3, "uniform", generator())[0]
    wrong = {name: part.clone() for name, part in packed.tensors.items()}
    good = bench.relative_error(packed, draw)
    expert = int(draw.routing.ids[0, 0])
    wrong["w2.scale"][expert] *= 2
    run = bench.fused_moe
    try:
        bench.fused_moe = lambda x, experts, routing: run(
            x, replace(packed, tensors=wrong), routing
        )
        assert bench.relative_error(packed, draw) > 100 * good
    finally:
        bench.fused_moe = run


@pytest.mark.parametrize("kind", bench.ROUTINGS)
def test_routing_draws(kind):
    routing = bench.draw_routing(kind, 4000, 16, 4, generator())
    ids = routing.ids
    assert ids.shape == (4000, 4) and ids.min() >= 0 and ids.max() < 16
    assert all(len(set(row)) == 4 for row in ids[:200].tolist())
    assert torch.allclose(routing.weights.sum(-1), torch.ones(4000))
    share = torch.bincount(ids.flatten().long(), minlength=16) / 4000
    spread = share.max() / share.min()
    if kind == "uniform":
        assert spread < 1.3
    elif kind == "zipf":
        assert spread > 4 and share.max() < 1
    else:
        assert share.max() == 1 and share.sort().values[:-1].max() < 0.3


def test_slow_baselines_are_dropped_and_rounds_alternate():
    order = []

    def call(name, pause):
        def run(draw):
            order.append((name, draw))
            time.sleep(pause)

        return run

    calls = {"moelten": call("moelten", 0.02), "a": call("a", 0.001), "b": call("b", 0.01)}
    times = bench.time_rounds(calls, ["d0", "d1"], 0.1)
    assert set(times) == {"moelten", "a"}, "b is ten times slower than a; moelten always stays"
    rounds = order[6:]
    assert rounds[:2] == [("moelten", "d0"), ("a", "d0")]
    assert rounds[2:4] == [("a", "d1"), ("moelten", "d1")]
    assert len(times["a"]) == len(times["moelten"]) >= 3
    assert min(times["moelten"]) >= 0.02


def test_without_room_for_bf16_there_is_no_baseline(monkeypatch):
    monkeypatch.setattr(bench, "_available_memory", lambda: 500_000)
    (record,) = bench.run([scheme("mxfp4_bf16")], TINY, [1], seconds=0.05)
    assert record["baseline"] is record["baseline_us"] is record["speedup"] is None
    assert "do not fit" in record["baseline_missing"]
    monkeypatch.setattr(bench, "_available_memory", lambda: 100_000)
    with pytest.raises(UnsupportedError, match="GiB of memory"):
        list(bench.run([scheme("mxfp4_bf16")], TINY, [1]))


def test_bad_arguments():
    with pytest.raises(FormatError, match="uniform or zipf or onehot"):
        list(bench.run([scheme("mxfp4_bf16")], TINY, [1], routing="even"))
    with pytest.raises(FormatError, match=r"top_k is 1..6"):
        list(bench.run([scheme("mxfp4_bf16")], replace(TINY, top_k=7), [1]))
    with pytest.raises(UnsupportedError, match="gpt-oss-120b"):
        bench.find_shape("gpt-2", {})
    assert bench.find_shape("A", {}) == bench.Shape("A", 4096, 2048, 256, 6)
    assert bench.find_shape("A", {"top_k": 2}) == bench.Shape("custom", 4096, 2048, 256, 2)


def test_command(tmp_path):
    sizes = "--hidden-size 128 --intermediate-size 64 --num-experts 4 --top-k 2"
    files = ["--output", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    line = f"bench --scheme int4g32_bf16 --tokens 1,2 {sizes} --seconds 0.05 --json"
    result = CliRunner().invoke(app, line.split() + files)
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout)
    assert [r["tokens"] for r in records] == [1, 2]
    assert records == json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = CliRunner().invoke(app, line.removesuffix(" --json").split())
    assert (
        "% of floor" in text.stdout and "int4g32_bf16" in text.stdout and "\x1b" not in text.stdout
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--device cuda", "GPUs are not timed"),
        ("--tokens 1,x", "1,16,128"),
        ("--scheme int5_bf16", "schemes:"),
        ("--shape gpt-2", "shapes:"),
        ("--hidden-size 0", "hidden_size is at least 1"),
        ("--backend none --num-experts 2 --top-k 1", "backends:"),
    ],
)
def test_command_refuses(arguments, message):
    result = CliRunner().invoke(app, f"bench {arguments}".split())
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
