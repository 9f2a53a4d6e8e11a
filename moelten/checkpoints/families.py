"""What a model's configuration says of its experts' activation, and of fused gate/up order.

Most models are `act(gate) * up`, with the name of `act` in the configuration. Those that are more
have a row here; those that moelten cannot run are refused by name, and so is any model that carries
parameters of an activation without having a row. The order of fused rows is known for the models
listed and never assumed: swapping gate and up fails silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moelten.activations import GELU, Activation, GeGLU, ReGLU, ReLU2, SiLU, SwiGLU
from moelten.errors import CheckpointError, UnsupportedError

GATED: dict[str, Activation] = {
    "silu": SwiGLU(),
    "swish": SwiGLU(),
    "gelu": GeGLU(),
    "gelu_python": GeGLU(),
    "gelu_new": GeGLU("tanh"),
    "gelu_pytorch_tanh": GeGLU("tanh"),
    "gelu_python_tanh": GeGLU("tanh"),
    "gelu_fast": GeGLU("tanh"),
    "relu": ReGLU(),
}
UNGATED: dict[str, Activation] = {
    "relu2": ReLU2(),
    "silu": SiLU(),
    "swish": SiLU(),
    "gelu": GELU(),
    "gelu_pytorch_tanh": GELU("tanh"),
}
_ACT_KEYS = ("mlp_hidden_act", "hidden_activation", "hidden_act")
_PARAMETERS = ("swiglu_limit", "swiglu_limits", "swiglu_alpha", "swiglu_beta")


@dataclass(frozen=True)
class Family:
    """activation(text config) -> the experts' activation; order of fused rows, None if unknown."""

    activation: Callable[[dict[str, Any]], Activation]
    order: str | None = None


def _named(config: dict[str, Any]) -> Activation:
    extra = [key for key in _PARAMETERS if config.get(key) is not None]
    if extra:
        raise UnsupportedError(
            f"model type {config.get('model_type')!r} has {extra[0]}={config[extra[0]]}, and how "
            f"it enters the activation is known only for {', '.join(_FAMILIES)}"
        )
    return _look_up(config, GATED, "gated")


def _look_up(config: dict[str, Any], table: dict[str, Activation], kind: str) -> Activation:
    for key in _ACT_KEYS:
        name = config.get(key)
        if name is not None:
            if name not in table:
                raise UnsupportedError(
                    f"{kind} activation {name!r} is not supported; supported: {', '.join(table)}"
                )
            return table[name]
    raise CheckpointError(f"config.json names no activation ({' or '.join(_ACT_KEYS)})")


def _ungated(config: dict[str, Any]) -> Activation:
    return _look_up(config, UNGATED, "ungated")


def _clamped(config: dict[str, Any]) -> Activation:
    return SwiGLU(limit=float(config.get("swiglu_limit", 10.0)))


def _gpt_oss(config: dict[str, Any]) -> Activation:
    alpha, limit = config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)
    return SwiGLU(float(alpha), 1.0, float(limit))


_FAMILIES = {
    "gpt_oss": Family(_gpt_oss, "interleaved"),
    "openai_privacy_filter": Family(_gpt_oss, "gate_up"),
    "minimax_m3": Family(_gpt_oss, "gate_up"),
    "minimax_m3_vl": Family(_gpt_oss, "gate_up"),
    "deepseek_v4": Family(_clamped, "gate_up"),
    "glm5_next": Family(_clamped, "gate_up"),
    "hy_v4": Family(_clamped, "gate_up"),
    "nemotron_h": Family(_ungated, "no_gate"),
    "lfm2_moe": Family(lambda config: SwiGLU(), "gate_up"),
}
# Families with nothing special, whose fused tensors hold the gate rows first.
_GATE_UP = """
    afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3
    deepseek_v32 diffusion_gemma dots1 ernie4_5_moe exaone_moe flex_olmo flint gemma4 glm4_moe
    glm4_moe_lite glm4v_moe glm_moe_dsa granitemoe granitemoe_swa granitemoehybrid granitemoeshared
    hunyuan_v1_moe hy_v3 jamba kimi_linear kolibri1 laguna llama4 mellum mimo_v2_flash
    minimax minimax_m2 mistral4 mistral_large4 mixtral olmoe phimoe qwen2_moe
    qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp
    solar_open unlimited_ocr zaya
""".split()
_REFUSED = {
    "step3p5": "clamps the gate after silu",
    "step3p7": "clamps the gate after silu",
    "inkling": "stores gate and up in an order of its own",
    "inkling2": "caps gate and up with tanh",
    "muse_spark": "normalizes every expert's output",
}


def find_family(*model_types: str) -> Family:
    """The family of the first model type that is known; if none is, `act(gate) * up` and no order.

    Raises UnsupportedError for models whose experts compute something moelten does not.

    >>> find_family("gpt_oss").order
    'interleaved'
    """
    for model_type in model_types:
        name = model_type.removesuffix("_text")
        if name in _REFUSED:
            raise UnsupportedError(f"model type {name!r} is not supported: it {_REFUSED[name]}")
        if name in _FAMILIES:
            return _FAMILIES[name]
        if name in _GATE_UP:
            return Family(_named, "gate_up")
    return Family(_named)
