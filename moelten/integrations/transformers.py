"""transformers: run a model's experts on moelten, from bf16 weights or straight from packed files.

Importing this module registers the experts implementation "moelten" and the quantizer "moelten",
which transformers itself never imports. Two ways in: `use_moelten` switches a loaded model, whose
weights stay its own; `load` opens a quantized checkpoint with its experts packed, or quantizes them
on the way. What `save_pretrained` writes afterwards is a checkpoint that other engines read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from moelten.checkpoints import Checkpoint
from moelten.formats import Format
from moelten.integrations.transformers_experts import experts_forward, is_experts, spec_of
from moelten.integrations.transformers_quantizer import (
    METHOD,
    MoeltenConfig,
    MoeltenExperts,
    MoeltenHfQuantizer,
    no_experts,
    packed_modules,
    recognise,
)

__all__ = ["MoeltenConfig", "MoeltenExperts", "load", "register", "use_moelten"]

_PLAIN = {"bf16", "fp16", "fp32"}
# Kimi-K2 comes with code of its own for what transformers knows as DeepSeek-V3.
_SAME_MODEL = {"kimi_k2": "deepseek_v3"}


def register() -> None:
    """Make "moelten" known to transformers, as importing this module does; harmless to repeat."""
    ExpertsInterface.register(METHOD, experts_forward)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(MoeltenConfig)
        register_quantizer(METHOD)(MoeltenHfQuantizer)
        for method in ("compressed-tensors", "mxfp4"):
            recognise(method)


def use_moelten(model: PreTrainedModel) -> int:
    """Run a loaded model's experts on moelten; returns how many experts modules do.

    The weights stay the model's own parameters, in bf16, fp16 or fp32, and backends that read them
    in place keep no copy. Raises UnsupportedError, before anything is switched, for experts that
    moelten cannot run exactly (naming the class and the reason) and for a model whose experts
    transformers would silently leave as they are, such as Llama 4.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> config = MixtralConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    >>> use_moelten(MixtralForCausalLM(config))
    2
    """
    packed = len(packed_modules(model))
    found: list[Any] = [module for module in model.modules() if is_experts(module)]
    for module in found:
        spec_of(module)
    if found:
        model.set_experts_implementation(METHOD)
    switched: int = sum(module.config._experts_implementation == METHOD for module in found)
    if not packed + switched:
        raise no_experts(model)
    return packed + switched


def load(
    path: str | Path,
    *,
    weight_format: Format | None = None,
    activation_format: Format | None = None,
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """`from_pretrained` for a local checkpoint, with its routed experts packed and run by moelten.

    weight_format:     quantize the experts to this on the way; None keeps the format of the files
    activation_format: how activations are quantized; None takes what the checkpoint says, and the
                       model's dtype where it says nothing
    auto_class:        e.g. AutoModelForImageTextToText
    kwargs:            those of `from_pretrained`: dtype, device_map, ...

    Memory holds the packed experts and one expert more. Quantized linears outside the experts are
    decoded to the model's dtype. A checkpoint that is not quantized, loaded without a
    weight_format, keeps its parameters, as with `use_moelten`.

    Raises CheckpointError for damaged or contradictory files and UnsupportedError for what moelten
    does not run: formats, activations, models without transformers' experts interface, disk
    offloading and transformers' tensor or expert parallelism.

    >>> from moelten import Int4
    >>> model = load("Qwen3-30B-A3B", weight_format=Int4(32))            # doctest: +SKIP
    >>> model.save_pretrained("Qwen3-30B-A3B-int4")                      # doctest: +SKIP
    """
    checkpoint = Checkpoint(path)
    config = kwargs.pop("config", None) or _read_config(checkpoint)
    plain = set(checkpoint.format_name.split(" + ")) <= _PLAIN
    keep = plain and weight_format is None and activation_format is None
    if not keep:
        for part in (config, config.get_text_config()):
            part.__dict__.pop("quantization_config", None)
        config.quantization_config = MoeltenConfig(weight_format, activation_format).to_dict()
    model: PreTrainedModel = auto_class.from_pretrained(path, config=config, **kwargs)
    if keep:
        use_moelten(model)
    return model


def _read_config(checkpoint: Checkpoint) -> Any:
    """The model's configuration; a type that transformers has under another name goes by that."""
    name = _SAME_MODEL.get(checkpoint.model_type)
    if name is None:
        return AutoConfig.from_pretrained(checkpoint.path)
    fields = {k: v for k, v in checkpoint.config.items() if k not in ("model_type", "auto_map")}
    return AutoConfig.for_model(name, **fields)


register()
