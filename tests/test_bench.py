"""bench: the records' schema and arithmetic, honest timing and draws, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from moelten import GPT_OSS
from moelten.cli import app
from moelten.commands import bench, bench_cpu, bench_gpu, bench_records, bench_workload, plot
from moelten.commands.bench_records import Ceilings, Timing, make_record, relative_error
from moelten.commands.bench_workload import Shape, draw_routing, find_shape
from moelten.errors import FormatError, UnsupportedError
from moelten.formats import SCHEMES, scheme
from moelten.qtensor import dequantize

TINY = Shape("tiny", 256, 128, 6, 2)
COMMON = {
    *("scheme", "shape", "hidden_size", "intermediate_size", "num_experts", "top_k", "tokens"),
    *("routing", "active_experts", "backend", "rounds", "us", "us_p10", "us_p90", "weight_gbps"),
    *("tflops", "floor_us", "percent_of_floor", "read_gbps", "mma_tflops", "mma_type"),
    *("rel_error", "packed_bytes", "device", "gpu", "torch", "triton", "commit", "date"),
}
CPU = COMMON | {
    *("baseline", "baseline_us", "speedup", "baseline_bytes", "baseline_missing"),
    *("threads", "transformers"),
}
GPU = COMMON | {"launches", "weight_copies", "calls"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only wait for a second thread, for long where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(bench_cpu, "cold_bytes", lambda: 4 << 20)
    measure = bench_cpu.measure_ceilings
    monkeypatch.setattr(bench_cpu, "measure_ceilings", lambda: measure(256))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def load(name, shape=TINY, backend=None):
    return bench_cpu.load(SCHEMES[name], shape, backend, generator())


def run(names, shapes, tokens, routings=("uniform",), **options):
    layers = bench.choose_layers([SCHEMES[name] for name in names], shapes, device="cpu")
    return list(bench.run(layers, tokens, routings=list(routings), device="cpu", **options))


# records


def test_records():
    records = run(
        ["int4g32_bf16", "mxfp4_bf16"], [TINY], [1, 5], ["uniform", "onehot"], seconds=0.1
    )
    assert [(r["scheme"], r["routing"], r["tokens"]) for r in records] == [
        (s, routing, t)
        for s in ("int4g32_bf16", "mxfp4_bf16")
        for routing in ("uniform", "onehot")
        for t in (1, 5)
    ]
    for r in records:
        assert set(r) == CPU
        assert 0 < r["rel_error"] <= 2.5e-3 and bench_records.is_right(r)
        assert r["us_p10"] <= r["us"] <= r["us_p90"]
        assert r["rounds"] >= 3
        assert r["baseline"].startswith("transformers ") and r["baseline_missing"] is None
        assert r["speedup"] == pytest.approx(r["baseline_us"] / r["us"], abs=1e-3)
        assert r["baseline_bytes"] == 2 * 3 * 6 * 256 * 128
        assert r["packed_bytes"] < 0.3 * r["baseline_bytes"]
        assert 2 <= r["active_experts"] <= min(6, 2 * r["tokens"])
        assert r["gpu"] is None and r["device"]


def test_floors():
    """The larger of bytes over bandwidth and FLOPs over the activations' own matrix rate."""
    timing = Timing([3e-6, 1e-6, 2e-6, 2e-6, 2e-6], active_experts=3.0, rel_error=1e-3)
    ceilings = Ceilings(read=1e12, mma={"bf16": 1e12, "fp8": 2e12})
    layer = load("int4g32_fp8")
    nbytes = layer.packed.nbytes / 6 * 3.0
    flops = 6 * 7 * 2 * 256 * 128
    bound_by_reads = make_record(layer, 7, "zipf", timing, replace(ceilings, read=1e9))
    assert bound_by_reads["floor_us"] == pytest.approx(nbytes / 1e9 * 1e6, abs=0.1)
    r = make_record(layer, 7, "zipf", timing, ceilings)
    assert (r["us"], r["us_p10"], r["us_p90"]) == (2.0, 1.4, 2.6)
    assert r["floor_us"] == pytest.approx(flops / 2e12 * 1e6, abs=0.1)
    assert (r["mma_type"], r["mma_tflops"]) == ("fp8", 2.0)
    assert r["percent_of_floor"] == pytest.approx(100 * flops / 2e12 / 2e-6, abs=0.01)
    assert r["weight_gbps"] == pytest.approx(nbytes / 2e-6 / 1e9, abs=0.01)
    assert r["tflops"] == pytest.approx(flops / 2e-6 / 1e12, abs=1e-4)
    assert not bench_records.is_right(r | {"rel_error": 2.6e-3})
    assert not bench_records.is_right(r | {"rel_error": float("nan")})


def test_activations_are_held_to_their_own_matrix_rate():
    all_rates = Ceilings(1.0, {"bf16": 1.0, "fp8": 2.0, "int8": 2.0})
    held = {s.activations.name: all_rates.mma_type(s.activations) for s in SCHEMES.values()}
    sixteen = dict.fromkeys(("bf16", "fp16", "fp32", "nvfp4", "nvfp4t"), "bf16")
    eight = dict.fromkeys(("fp8", "fp8tensor", "fp8g128", "mxfp8"), "fp8")
    assert held == sixteen | eight | {"int8": "int8", "int8g128": "int8"}
    only = Ceilings(1.0, {"bf16": 1.0})
    assert {only.mma_type(s.activations) for s in SCHEMES.values()} == {"bf16"}


def test_commit(tmp_path, monkeypatch):
    source = tmp_path / "moelten" / "commands" / "bench_records.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(bench_records, "__file__", str(source))
    monkeypatch.delenv("COMMIT", raising=False)
    assert bench_records.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for line in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run(git + line, check=True)
    head = bench_records.commit()
    assert len(head) == 40
    (tmp_path / "notes").write_text("beside the package")
    assert bench_records.commit() == head
    source.write_text("edited")
    assert bench_records.commit() == f"{head}-dirty"
    monkeypatch.setenv("COMMIT", "abc")
    assert bench_records.commit() == "abc"
    monkeypatch.delenv("COMMIT")
    monkeypatch.setenv("PATH", "")
    assert bench_records.commit() is None


def test_relative_error_sees_a_wrong_output():
    layer = load("int4g32_bf16", backend="cpu")
    draw = layer.draw(9, "uniform")
    out = layer.run(draw, layer.packed)
    good = relative_error(layer.packed, draw, out, 1 << 30)
    assert good <= 2.5e-3
    tensors = {name: part.clone() for name, part in layer.packed.tensors.items()}
    tensors["w2.scale"][int(draw.routing.ids[0, 0])] *= 2
    wrong = layer.run(draw, replace(layer.packed, tensors=tensors))
    assert relative_error(layer.packed, draw, wrong, 1 << 30) > 100 * good
    # The last token is among those that are checked; however few weights may be decoded, one is.
    last = torch.cat((out[:-1], 2 * out[-1:]))
    assert relative_error(layer.packed, draw, last, 1 << 30) > 100 * good
    assert relative_error(layer.packed, draw, wrong, 1) > 100 * good
    assert not relative_error(layer.packed, draw, torch.full_like(out, torch.nan), 1) <= 1


# workload


SOME = "bf16_bf16 fp32_fp32 fp8block_fp8 int4g32_fp8tensor nvfp4_nvfp4 int4z_int8".split()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("sizes", [(256, 128), (320, 192)], ids=["whole", "partial blocks"])
def test_every_kind_of_scheme_has_a_layer(name, sizes):
    layer = load(name, Shape("tiny", *sizes, 6, 2))
    draw = layer.draw(3, "uniform")
    out = layer.run(draw, layer.packed)
    assert relative_error(layer.packed, draw, out, 1 << 30) <= 2.5e-3
    assert 0.1 < out.float().norm() / draw.x.float().norm() < 10
    # The baseline has the same weights, expert by expert.
    for expert in (0, 5):
        weights = layer.packed.unpack_expert(expert)
        w13 = dequantize(weights.w13)[0].flatten(0, 1).bfloat16()
        assert torch.equal(layer.decoded[0][expert], w13)
        assert torch.equal(layer.decoded[1][expert], dequantize(weights.w2)[0].bfloat16())


def test_experts_and_draws_differ():
    layer = load("int4g32_bf16")
    assert not torch.equal(layer.decoded[0][0], layer.decoded[0][1])
    assert not torch.equal(layer.decoded[1][0], layer.decoded[1][1])
    first, second = layer.draw(4, "uniform"), layer.draw(4, "uniform")
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(first.routing.ids, second.routing.ids)
    assert first.active_experts() == first.routing.ids.unique().numel()


def test_static_scales_hold_values_up_to_six():
    for name, reach in (("int4_fp8tensor", 448), ("fp8_fp8tensor", 448), ("nvfp4_nvfp4", 6 * 448)):
        first = bench_workload.random_expert(TINY.spec(SCHEMES[name]), generator())
        assert first.w13_input_scale.item() * reach == pytest.approx(6)
        assert first.w2_input_scale.item() * reach == pytest.approx(6)


def test_shapes_know_their_model():
    gpt_oss, a = find_shape("gpt-oss-120b", {}), find_shape("A", {})
    assert a == Shape("A", 4096, 2048, 256, 6)
    assert a.flops(10) == 6 * 10 * 6 * 4096 * 2048
    spec = gpt_oss.spec(scheme("mxfp4_fp8tensor"))
    assert spec.activation == GPT_OSS
    assert spec.extras == ("w13_bias", "w2_bias", "w13_input_scale", "w2_input_scale")
    assert a.spec(scheme("mxfp4_bf16")).extras == ()
    smaller = find_shape("gpt-oss-20b", {"num_experts": 5, "hidden_size": 64})
    assert smaller.name == "gpt-oss-20b(E=5,H=64)" and smaller.biases


def test_gpt_oss_layers_have_biases_and_no_baseline():
    shape = Shape("tiny-oss", 128, 64, 5, 2, GPT_OSS, biases=True)
    (record,) = run(["mxfp4_bf16"], [shape], [3], seconds=0.05)
    assert record["rel_error"] <= 2.5e-3
    assert record["baseline"] is None and "biases" in record["baseline_missing"]
    layer = load("mxfp4_bf16", shape)
    biases = layer.packed.tensors["w13_bias"]
    assert biases.abs().mean() > 0.1 and not torch.equal(biases[0], biases[1])


@pytest.mark.parametrize("kind", bench_workload.ROUTINGS)
def test_routing_draws(kind):
    routing = draw_routing(kind, 4000, 16, 4, generator())
    ids = routing.ids
    assert ids.shape == (4000, 4) and ids.min() >= 0 and ids.max() < 16
    assert all(len(set(row)) == 4 for row in ids[:200].tolist())
    assert torch.allclose(routing.weights.sum(-1), torch.ones(4000))
    assert routing.weights.median() > 0.1, "every slot counts in the error"
    share = torch.bincount(ids.flatten().long(), minlength=16) / 4000
    spread = share.max() / share.min()
    if kind == "uniform":
        assert spread < 1.3
    elif kind == "zipf":
        assert spread > 4 and share.max() < 1
    else:
        assert share.max() == 1 and share.sort().values[:-1].max() < 0.3
    hot = {
        draw_routing(kind, 50, 16, 4, generator(s)).ids.flatten().mode()[0].item() for s in range(9)
    }
    assert len(hot) > 3, "another expert is hot in every draw"


# timing


def test_slow_baselines_are_dropped_and_rounds_alternate():
    order = []

    def call(name, pause):
        def run(index):
            order.append((name, index))
            time.sleep(pause)

        return run

    calls = {"moelten": call("moelten", 0.02), "a": call("a", 0.004), "b": call("b", 0.1)}
    times = bench_cpu.time_rounds(calls, 0.1)
    assert set(times) == {"moelten", "a"}, "b is far slower than a; moelten always stays"
    rounds = order[6:]
    assert rounds[:2] == [("moelten", 0), ("a", 0)]
    assert rounds[2:4] == [("a", 1), ("moelten", 1)]
    assert len(times["a"]) == len(times["moelten"]) >= 3
    assert min(times["moelten"]) >= 0.02


def test_passes_over_cold_weights():
    """A pass reads several caches' worth, uses every copy equally often, and starts where it ended.

    Were the calls no multiple of the copies, a pass would begin with the copy it ended with.
    """
    cache = 60 << 20
    for active in (100, 1 << 20, 80 << 20, 239 << 20, 240 << 20, 5 << 30):
        copies = bench_gpu.num_copies(active, cache)
        assert copies * active >= 4 * cache
        assert copies == 1 or (copies - 1) * active < 4 * cache
        for tokens in (1, 63, 100, 4096, 100_000):
            calls = bench_gpu.num_calls(tokens, copies)
            assert calls % copies == 0 and calls >= max(8 if tokens <= 2048 else 1, copies)
            assert calls <= max(64, 8, copies) + copies
    assert [bench_gpu.num_calls(t, 1) for t in (1, 16, 64, 4096)] == [64, 64, 16, 4]


def test_without_room_for_bf16_there_is_no_baseline(monkeypatch):
    monkeypatch.setattr(bench_cpu, "available_memory", lambda: 500_000)
    (record,) = run(["mxfp4_bf16"], [TINY], [1], seconds=0.05)
    assert record["baseline"] is record["baseline_us"] is record["speedup"] is None
    assert "do not fit" in record["baseline_missing"]
    monkeypatch.setattr(bench_cpu, "available_memory", lambda: 200_000)
    with pytest.raises(UnsupportedError, match=r"3 experts would fit: --num-experts"):
        run(["mxfp4_bf16"], [replace(TINY, num_experts=6)], [1])


# arguments


def test_bad_arguments():
    with pytest.raises(FormatError, match="uniform or zipf or onehot"):
        run(["mxfp4_bf16"], [TINY], [1], ["even"])
    with pytest.raises(FormatError, match=r"top_k is 1..4"):
        find_shape("A", {"num_experts": 4})
    with pytest.raises(UnsupportedError, match="gpt-oss-120b"):
        find_shape("gpt-2", {})


def test_pairs_that_cannot_be_are_skipped_by_name():
    skipped = []
    shapes = [TINY, replace(TINY, name="odd", hidden_size=320)]
    schemes = [scheme("int4g128_int8"), scheme("fp8block_fp8")]
    layers = bench.choose_layers(schemes, shapes, device="cpu", skipped=skipped.append)
    assert [(shape.name, s.name) for shape, s in layers] == [
        *(("tiny", "int4g128_int8"), ("tiny", "fp8block_fp8"), ("odd", "fp8block_fp8"))
    ]
    assert len(skipped) == 1 and "int4g128_int8 at odd: " in skipped[0] and "K=320" in skipped[0]
    with pytest.raises(UnsupportedError, match="K=320"):
        bench.choose_layers(schemes[:1], shapes[1:], device="cpu")


def test_device_is_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.choose_device(None) == "cuda" and bench.choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.choose_device(None) == "cpu"
    with pytest.raises(UnsupportedError, match="no GPU"):
        bench.choose_device("cuda")


# command


SIZES = "--hidden-size 128 --intermediate-size 64 --num-experts 4 --top-k 2"
LINE = f"bench --device cpu --scheme int4g32_bf16 --tokens 1,2 {SIZES} --seconds 0.05"


def test_command(tmp_path):
    files = ["--output", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    result = CliRunner().invoke(app, f"{LINE} --json".split() + files)
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout)
    assert [r["tokens"] for r in records] == [1, 2]
    assert records == json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, [*LINE.replace("1,2", "2,3").split(), *files])
    assert again.exit_code == 0, again.output
    merged = json.loads((tmp_path / "bench.json").read_text())
    assert [r["tokens"] for r in merged] == [1, 2, 3] and merged[0] == records[0]
    assert merged[1]["date"] >= records[1]["date"] and merged[1] != records[1]
    (tmp_path / "bench.json").write_text('{"tests": 5}')
    refused = CliRunner().invoke(app, [*LINE.split(), *files[:2]])
    assert refused.exit_code == 2 and "expected an array of bench's records" in refused.stderr
    assert (tmp_path / "bench.json").read_text() == '{"tests": 5}'
    more = "--scheme mxfp4_bf16 --shape small,gpt-oss-20b --routing zipf --routing onehot"
    text = CliRunner().invoke(app, f"{LINE} {more}".split()).stdout
    assert text.count("mxfp4_bf16") == text.count("int4g32_bf16") == 8
    assert "gpt-oss-20b(H=128,I=64,E=4,k=2): E=4, H=128, I=64, top-2, onehot routing" in text
    assert "% of floor" in text and "\x1b" not in text


def test_a_wrong_result_fails_after_printing(tmp_path, monkeypatch):
    make = bench.make_record
    monkeypatch.setattr(bench, "make_record", lambda *a: make(*a) | {"rel_error": float("nan")})
    output = ["--output", str(tmp_path / "bench.json")]
    result = CliRunner().invoke(app, f"{LINE} --json".split() + output)
    assert result.exit_code == 1
    assert [r["rel_error"] for r in json.loads(result.stdout)] == [None, None]
    assert len(json.loads((tmp_path / "bench.json").read_text())) == 2
    assert result.stderr.count("error: int4g32_bf16 at small(") == 2 and "nan" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--tokens 1,x", "1,16,128"),
        ("--scheme int5_bf16", "schemes:"),
        ("--shape A,gpt-2", "shapes:"),
        ("--routing even", "uniform or zipf or onehot"),
        ("--hidden-size 0", "hidden_size is at least 1"),
        ("--backend none --num-experts 2 --top-k 1", "backends:"),
    ],
)
def test_command_refuses(arguments, message):
    result = CliRunner().invoke(app, f"bench --device cpu {arguments}".split())
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


# plot


def point(tokens, tflops, gbps, **fields):
    measured = {"tokens": tokens, "tflops": tflops, "weight_gbps": gbps, "percent_of_floor": 50.0}
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32}
    machine = {"read_gbps": 4500.0, "mma_tflops": 800.0, "mma_type": "bf16", "device": "H200"}
    run = {"shape": "A", "routing": "uniform", "backend": "triton", "scheme": "mxfp4_bf16"}
    return measured | sizes | machine | run | {"torch": "2", "date": "2026-11-21"} | fields


def test_labels_of_points_that_coincide_are_one():
    one, four, many = point(1, 8.0, 2000.0), point(4, 7.0, 1600.0), point(64, 30.0, 1000.0)
    other = point(64, 20.0, 400.0, scheme="fp8_fp8")
    assert plot.intensity(many) == 30.0
    assert plot.place_labels([other, many, four, one]) == [
        ("T=1-4", pytest.approx(4.375), 7.0),
        ("T=64", pytest.approx(50.0), 20.0),
    ]


def test_plot(tmp_path):
    records = [point(t, t * 2.0, 900.0, shape=s) for t in (1, 64, 300) for s in ("A", "B")]
    records += [point(1, 2.0, 400.0, scheme="int4_fp8", mma_type="fp8", mma_tflops=1500.0)]
    plot.draw(records, tmp_path / "a.png")
    plot.draw(records[:1], tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# GPU


def test_the_read_kernel_loads_16_bytes_a_thread():
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moelten.commands.bench_ceilings import READS, sum_kernel

    pointers = {"values_ptr": "*i32", "sums_ptr": "*i32"}
    block, warps, steps = READS[0]
    source = ASTSource(
        sum_kernel,
        pointers | dict.fromkeys(("BLOCK", "STEPS"), "constexpr"),
        {"BLOCK": block, "STEPS": steps},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    ptx = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps}).asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    assert len(loads) == block * steps // (32 * warps * 4)
    assert all("v4.b32" in line for line in loads)


CEILINGS = """
import torch
from moelten.commands.bench_ceilings import READS, int8_product, read_sums
values = torch.randint(-9, 10, (1 << 20,), dtype=torch.int32)
for block, warps, steps in READS:
    wanted = values.view(-1, block * steps).sum(1, dtype=torch.int32)
    assert torch.equal(read_sums(values, block, warps, steps), wanted)
a, b = torch.randint(-127, 128, (2, 1024, 1024), dtype=torch.int8)
assert torch.equal(int8_product(a, b).double(), a.double() @ b.double().T)
"""


def test_the_ceilings_kernels_do_their_work():
    """What reads too little or multiplies wrongly is no ceiling; here in Triton's interpreter."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", CEILINGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_gpu_records():
    shape = Shape("oss", 320, 320, 8, 2, GPT_OSS, biases=True)
    schemes = [scheme("mxfp4_bf16"), scheme("int8_int8")]
    layers = bench.choose_layers(schemes, [shape], device="cuda")
    routings = ["uniform", "onehot"]
    records = list(bench.run(layers, [1, 70], routings=routings, device="cuda", seconds=0.05))
    assert len(records) == 8
    for r in records:
        assert set(r) == GPU
        assert bench_records.is_right(r), r
        assert 0 < r["us_p10"] <= r["us"] <= r["us_p90"]
        assert 0 < r["percent_of_floor"] < 100
        assert 3 <= r["launches"] <= 7
        assert r["calls"] % r["weight_copies"] == 0
        assert r["read_gbps"] > 100 and r["mma_type"] == r["scheme"].split("_")[1]
