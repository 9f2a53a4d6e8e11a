"""Independent decoding: it agrees with the formats' own libraries, and moelten agrees with it."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_cases import CASES, write_case
from checkpoint_writers import Sizes, plain, write_config, write_model
from test_checkpoints import fused, gpt_oss

from moelten import CheckpointError, UnsupportedError
from moelten.checkpoints import Checkpoint
from moelten.checkpoints.families import find_family
from moelten.commands import demo, run, verify
from moelten.commands.definition import StoredExperts, activation_of, decode_matrix


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_runs_and_decodes(path):
    """One layer's outputs and every layer's decoding, against the definition."""
    (result,) = run.run_checkpoint(path, layers=1, tokens=2)
    assert 0 < result.rel_error <= verify.OUTPUT_TOLERANCE
    checkpoint = Checkpoint(path)
    compared = list(verify.compare_decoding(checkpoint, 2))
    assert [c.layer for c in compared] == list(checkpoint.layers)
    assert all(c.finite and 0 <= c.rel_error <= verify.DECODING_TOLERANCE for c in compared)
    return result


@pytest.mark.parametrize("name", demo.DEMOS)
def test_definition_agrees_with_the_format_s_own_library(name, tmp_path):
    made = demo.make(demo.DEMOS[name], tmp_path)
    mine, theirs = StoredExperts(made.path), StoredExperts(made.path, made.decode)
    for layer in Checkpoint(made.path).layers:
        for expert in (0, 3, 7):
            wanted = dict(theirs.expert(layer, expert).items())
            got = dict(mine.expert(layer, expert).items())
            assert got.keys() == wanted.keys()
            for part, values in got.items():
                assert verify.relative_error(values, wanted[part]) < 1e-7
    assert sum(f.stat().st_size for f in made.path.iterdir()) < 4 << 20
    config = json.loads((made.path / "config.json").read_text())
    assert config["model_type"] and config["hidden_size"] <= 256
    assert ("quantization_config" in config) == (name != "qwen3-bf16")


@pytest.mark.parametrize("name", CASES)
def test_every_format(name, tmp_path):
    write_case(tmp_path, name)
    assert assert_runs_and_decodes(tmp_path).scheme == CASES[name].scheme


@pytest.mark.parametrize("quantized", [True, False])
def test_gpt_oss(quantized, tmp_path):
    gpt_oss(tmp_path, Sizes(hidden=96, inter=64), quantized)
    assert_runs_and_decodes(tmp_path)


@pytest.mark.parametrize("transposed", [True, False])
def test_fused_experts(transposed, tmp_path):
    fused(tmp_path, 96, 48, transposed)
    assert_runs_and_decodes(tmp_path)


def test_experts_without_a_gate(tmp_path):
    sizes = Sizes(hidden=32, inter=48)
    write_model(tmp_path, plain(torch.bfloat16), sizes, roles=("up", "down"))
    write_config(tmp_path, sizes, model_type="nemotron_h", mlp_hidden_act="relu2")
    assert_runs_and_decodes(tmp_path)


def test_activations_by_definition():
    """Against the specification's own, which the importers choose by another road."""
    gate, up = 8 * torch.randn(2, 5, 16, dtype=torch.float64)
    for config in (
        {"model_type": "gpt_oss"},
        {"model_type": "gpt_oss", "swiglu_limit": 3.0, "swiglu_alpha": 1.5},
        {"model_type": "deepseek_v4"},
        {"model_type": "qwen3_moe", "hidden_act": "silu"},
    ):
        wanted = find_family(config["model_type"]).activation(config)
        h = torch.stack((gate, up), 1)
        expected = wanted(h, torch.zeros(5, dtype=torch.long))
        assert torch.allclose(activation_of(config)(gate, up), expected)
    assert activation_of({"model_type": "nemotron_h"}) is None


def test_what_is_not_known_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="weight_codebook"):
        decode_matrix({"weight_codebook": torch.zeros(4, 4)}, {})
    made = demo.make(demo.DEMOS["qwen3-bf16"], tmp_path)
    with pytest.raises(CheckpointError, match="layer 1, expert 99 has no up_proj"):
        StoredExperts(made.path).expert(1, 99)


def test_a_reading_of_other_sizes_is_an_error_not_a_number(tmp_path):
    write_case(tmp_path, "kimi int4")

    def decoder(parts, quantization):
        return decode_matrix(parts, quantization)[:, :16]

    with pytest.raises(CheckpointError, match="by definition"):
        run.run_checkpoint(tmp_path, decoder=decoder)


def test_sample_spreads_over_the_experts():
    assert verify.sample(384, 4) == (0, 128, 255, 383)
    assert verify.sample(8, 1) == (0,)
    assert verify.sample(8, None) == verify.sample(8, 99) == tuple(range(8))


def test_a_record_keeps_a_nan():
    good = run.LayerRun(0, "int4_bf16", "cpu", 1e-3, 1.0, 1, 1)
    bad = run.LayerRun(1, "int4_bf16", "cpu", float("nan"), 1.0, 1, 1)
    for layers in ([good, bad], [bad, good]):
        record = run.record(layers, "x", None)
        assert not record["ok"] and record["rel_error"] != record["rel_error"]
    assert run.record([good], "x", None)["ok"]
