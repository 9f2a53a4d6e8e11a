"""The transformers integration: the same tokens with moelten's experts as without, or a refusal.

In fp32 the two differ by summation order alone. In bf16 transformers rounds between the GEMMs and
moelten does not, so logits differ by a few bf16 roundings (1%; a changed routing decision would be
5% and more); the seeds were chosen so that no greedy step is a tie at that distance.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    FAMILIES,
    greedy,
    llama4_config,
    logits,
    one_thread,  # noqa: F401
    prompt,
    tiny_model,
)

from moelten import SwiGLU, UnsupportedError, kernels, moe  # noqa: E402
from moelten.integrations import transformers_experts  # noqa: E402
from moelten.integrations.transformers import register, use_moelten  # noqa: E402
from moelten.integrations.transformers_experts import experts_forward, views  # noqa: E402
from moelten.kernels.cpu import CpuBackend, RowsLayout  # noqa: E402

MOE_LAYERS = {"deepseek_v3": 1, "glm4_moe": 1}
REFUSED = {"MuseSparkExperts": "normalizes each expert's output", "Inkling2Experts": "_apply_gate"}


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_generate_the_same_tokens(family, dtype, monkeypatch):
    model = tiny_model(family, dtype)
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    expected, tokens = logits(model), greedy(model)
    calls = []
    original = CpuBackend.run
    monkeypatch.setattr(CpuBackend, "run", lambda *a: calls.append(a) or original(*a))
    assert use_moelten(model) == MOE_LAYERS.get(family, 2)
    result = logits(model)
    assert len(calls) == MOE_LAYERS.get(family, 2)
    assert relative(result, expected) < (1e-6 if dtype == torch.float32 else 2e-2)
    assert torch.equal(greedy(model), tokens)


class AnyConfig:
    """Answers every size and name that an experts module asks its config for."""

    _experts_implementation = "moelten"
    mlp_hidden_act = "relu2"
    moe_latent_size = None
    mlp_gate_softcap = 30.0
    mlp_up_softcap = 30.0

    def __getattr__(self, name: str) -> object:
        answers = {"limit": 1.5, "alpha": 1.702, "act": "silu", "expert": 4, "eps": 1e-6}
        answers |= {"intermediate": 32, "ffn": 32, "hidden": 64, "softcap": 30.0}
        for part, answer in answers.items():
            if part in name:
                return answer
        raise AttributeError(name)


def experts_classes() -> list[type[nn.Module]]:
    """Every class of the installed transformers that uses its experts interface."""
    found = []
    models = Path(transformers.__file__).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        for name in re.findall(r"@use_experts_implementation.*\nclass (\w+)", file.read_text()):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            found.append(getattr(module, name))
    return found


def random_experts(kind: type[nn.Module]) -> nn.Module:
    experts = kind(AnyConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return experts


def random_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)])
    return torch.randn(7, 64, generator=generator), ids, torch.rand(7, 2, generator=generator)


@torch.no_grad()
def test_every_experts_class_matches_or_is_refused_by_name():
    grouped = importlib.import_module("transformers.integrations.moe").grouped_mm_experts_forward
    classes = experts_classes()
    assert len(classes) >= 60
    refused = {}
    for kind in classes:
        experts = random_experts(kind)
        try:
            result = experts_forward(experts, *random_input())
        except UnsupportedError as error:
            refused[kind.__name__] = str(error)
            continue
        expected = grouped(experts, *random_input())
        assert relative(result, expected) < 1e-5, kind.__name__
    assert refused.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        assert name in refused[name] and reason in refused[name]


def mixtral_experts() -> nn.Module:
    module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    return random_experts(module.MixtralExperts)


def test_unknown_gates_and_activations_are_refused(monkeypatch):
    experts = mixtral_experts()
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    with pytest.raises(UnsupportedError, match=r"MixtralExperts gates with .*<lambda>"):
        experts_forward(experts, *random_input())
    experts = mixtral_experts()
    experts.act_fn = nn.Tanh()
    with pytest.raises(UnsupportedError, match="MixtralExperts has act_fn Tanh with a gate"):
        experts_forward(experts, *random_input())
    gpt_oss = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss").GptOssExperts
    monkeypatch.setattr(gpt_oss, "_apply_gate", lambda self, gate_up: gate_up[..., ::2])
    with pytest.raises(UnsupportedError, match=r"GptOssExperts gates with .*<lambda>"):
        experts_forward(random_experts(gpt_oss), *random_input())


def test_a_refused_model_keeps_its_implementation():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.act_fn = nn.Tanh()
    with pytest.raises(UnsupportedError, match="Tanh"):
        use_moelten(model)
    assert model.get_experts_implementation() == {"": "grouped_mm"}


def test_llama4_is_refused_with_what_to_do():
    config = llama4_config()
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(UnsupportedError, match=r"Llama4ForCausalLM .* moelten\.MoELayer"):
        use_moelten(model)


def test_parameters_are_viewed_not_copied_and_their_updates_are_seen():
    model = tiny_model("gpt_oss")
    use_moelten(model)
    before = logits(model)
    experts = model.model.layers[0].mlp.experts
    parts = views(experts)
    assert parts["w13.data"].data_ptr() == experts.gate_up_proj.data_ptr()
    assert parts["w2.data"].data_ptr() == experts.down_proj.data_ptr()
    with torch.no_grad():
        experts.down_proj[:] *= 2
    doubled = logits(model)
    assert not torch.equal(before, doubled)
    experts.down_proj = nn.Parameter(experts.down_proj.detach() / 2)
    assert torch.equal(logits(model), before)


class FlippedLayout:
    """Canonical rows in reverse order: a layout that no view of a parameter can be."""

    name = "flipped"
    version = 1

    def pack(self, matrix):
        return {n: part.flip(-2) for n, part in RowsLayout().pack(matrix).items()}

    def unpack(self, parts, fmt, shape):
        return RowsLayout().unpack({n: part.flip(-2) for n, part in parts.items()}, fmt, shape)


class FlippedBackend(CpuBackend):
    name = "flipped"
    layout = FlippedLayout()

    def run(self, x, experts, routing, out, workspace=None):
        out.copy_(moe.fused_moe(x, moe.pack(experts.unpack(), backend="cpu"), routing))


def test_a_backend_with_its_own_layout_gets_a_copy_that_follows_updates(monkeypatch):
    experts = mixtral_experts()
    with torch.no_grad():
        expected = experts_forward(experts, *random_input())
        monkeypatch.setattr(kernels, "BACKENDS", (FlippedBackend(), *kernels.BACKENDS))
        transformers_experts._row_signature.cache_clear()
        packed = transformers_experts._packed_copy(experts)
        assert packed.layout.name == "flipped"
        assert transformers_experts._packed_copy(experts) is packed
        assert torch.equal(experts_forward(experts, *random_input()), expected)
        experts.down_proj *= 2
        assert torch.allclose(experts_forward(experts, *random_input()), 2 * expected)
        experts.down_proj = nn.Parameter(experts.down_proj / 2)
        assert torch.equal(experts_forward(experts, *random_input()), expected)
    transformers_experts._row_signature.cache_clear()


def test_sentinel_ids_contribute_nothing():
    experts = mixtral_experts()
    x, ids, weights = random_input()
    absent = torch.tensor([4, 9, -1, 4, 7, 4, 4])
    with torch.no_grad():
        result = experts_forward(experts, x, torch.stack([ids[:, 0], absent], 1), weights)
        expected = experts_forward(experts, x, ids, weights * torch.tensor([1.0, 0.0]))
    assert relative(result, expected) < 1e-6


def test_inference_only():
    experts = mixtral_experts()
    x, ids, weights = random_input()
    x.requires_grad_()
    with torch.no_grad():
        assert not experts_forward(experts, x, ids, weights).requires_grad
    with pytest.raises(UnsupportedError, match="inference only"):
        experts_forward(experts, x, ids, weights).sum().backward()


def test_registering_twice_is_harmless():
    register()
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_model("mixtral").config, experts_implementation="moelten"
    )
    assert use_moelten(model) == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_compiles_to_one_graph(family):
    model = tiny_model(family)
    use_moelten(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(prompt()).logits, model(prompt()).logits)
    torch._dynamo.reset()


def test_gates_carry_the_parameters_of_the_module():
    module = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    spec = transformers_experts.spec_of(random_experts(module.GptOssExperts))
    assert spec.activation == SwiGLU(1.702, 1.0, 1.5)
    assert spec.extras == ("w13_bias", "w2_bias")
