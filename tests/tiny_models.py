"""Tiny random models of every family that the tests run: two layers, H = 64, I = 32."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_writers import Encoder
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Llama4TextConfig,
    PretrainedConfig,
    PreTrainedModel,
)

_SHARED = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation never stops early
    "pad_token_id": 0,
}
_LATENT_ATTENTION = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_DEEPSEEK = {
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "qwen3_moe": {
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "mixtral": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {**_DEEPSEEK, **_LATENT_ATTENTION, "n_group": 2, "topk_group": 1},
    "glm4_moe": {**_DEEPSEEK, "n_group": 1, "topk_group": 1},
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "minimax_m2": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
}
# Seeds for which no greedy step and no routing decision is close: in bf16 the winning logit leads
# by 0.1 at least, and noise of a bf16 rounding on every expert's output changes no token.
_SEEDS = {
    "qwen3_moe": 4,
    "mixtral": 1,
    "gpt_oss": 2,
    "deepseek_v3": 4,
    "glm4_moe": 0,
    "olmoe": 10,
    "minimax_m2": 9,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small lose more to threads than they gain, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: int) -> PreTrainedModel:
    """A random model of one family, in `dtype`: matrices are N(0, 0.2), biases N(0, 0.1)."""
    config = AutoConfig.for_model(family, **{**_SHARED, **FAMILIES[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of vectors, such as sinks, which from_config draws
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(_SEEDS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                std = 0.1 if name.endswith("_bias") else 0.2
                parameter.normal_(std=std, generator=generator)
    return model.to(dtype)


def prompt() -> torch.Tensor:
    """Token ids [2, 6]."""
    return torch.randint(1, 128, (2, 6), generator=torch.Generator().manual_seed(1))


def greedy(model: PreTrainedModel, tokens: int = 6) -> torch.Tensor:
    """Token ids [2, 6 + tokens] of greedy generation from the prompt."""
    with torch.no_grad():
        return model.generate(prompt(), max_new_tokens=tokens, do_sample=False)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """fp32 logits [2, 6, 128] of the prompt."""
    with torch.no_grad():
        return model(prompt()).logits.float()


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})


def save_quantized(
    model: PreTrainedModel,
    path: Path,
    quantization: dict | None,
    experts: Encoder,
    linears: Encoder | None = None,
    **config: object,
) -> PreTrainedModel:
    """Save a bf16 model with its experts encoded, and with `linears` all other projections too.

    Returns the model that the files describe: fp32, with the values that the encoders decode.
    """
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    values = {name: tensor.float() for name, tensor in tensors.items()}
    for name in list(tensors):
        encode = experts if re.search(r"\.experts\.\d+\.", name) else linears
        if encode is None or not re.search(r"(_proj|_mqa|\.w[123])\.weight$", name):
            continue
        stored = encode(tensors.pop(name))
        values[name] = stored.values.float()
        tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in stored.tensors.items()}
    reference = path / "reference"
    reference.mkdir()
    for folder, content in ((path, tensors), (reference, values)):
        save_tensors(content, folder)
    record = json.loads((path / "config.json").read_text())
    (reference / "config.json").write_text(json.dumps(record))
    if quantization is not None:
        record["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps({**record, **config}))
    return AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)


def llama4_config() -> PretrainedConfig:
    """A model whose experts transformers cannot replace."""
    return Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        pad_token_id=0,
    )
