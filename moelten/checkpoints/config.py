"""Settings: what the JSON files of a checkpoint say about its model and its quantization.

Configurations nest (`text_config`), move (`compression_config`, `hf_quant_config.json`,
`quantize_config.json`) and overlap; here they become one frozen value, and a Recipe is what a
format's own module makes of it for one expert. Group sizes and block shapes come from here and are
never inferred from a tensor's shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moelten.checkpoints.reader import read_json
from moelten.errors import CheckpointError, UnsupportedError
from moelten.formats import BF16, FP16, FP32, Block, Float, Format

_NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
_DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32}


@dataclass(frozen=True)
class Recipe:
    """How to decode one expert's matrices, and how its activations are quantized.

    name:        of the format, for people
    decoder:     row of `recipes.DECODERS`
    activations: None: 16-bit or 32-bit, of the weights' own dtype
    group_size:  along K, for int4; None: one scale per row
    zero_point:  whether int4 codes have zero points
    blocks:      (rows, columns) that share a scale, for fp8 and int8
    stored_zero: what stored zero points lack of the real ones (GPTQ v1 stores them minus one)
    """

    name: str
    decoder: str
    activations: Format | None = None
    group_size: int | None = None
    zero_point: bool = False
    blocks: Block = (1, None)
    stored_zero: int = 0


@dataclass(frozen=True)
class Settings:
    """One checkpoint's configuration.

    config:       config.json
    text:         the part of it that describes the language model
    method:       quantization method, "" if there is none
    quantization: its parameters
    """

    config: dict[str, Any]
    text: dict[str, Any]
    method: str = ""
    quantization: dict[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def text_type(self) -> str:
        return str(self.text.get("model_type", self.model_type))

    @property
    def dtype(self) -> Float:
        """What 16-bit or 32-bit activations are: the model's dtype, bfloat16 unless it says."""
        for part in (self.text, self.config):
            name = part.get("dtype") or part.get("torch_dtype")
            if name is not None:
                name = str(name).removeprefix("torch.")
                if name not in _DTYPES:
                    raise UnsupportedError(f"model dtype {name!r}; supported: {', '.join(_DTYPES)}")
                return _DTYPES[name]
        return BF16

    def require(self, key: str, *sources: dict[str, Any]) -> Any:
        """A parameter of the quantization that has no default."""
        for source in sources or (self.quantization,):
            if source.get(key) is not None:
                return source[key]
        raise CheckpointError(f"the {self.method} configuration has no {key}; it is not guessed")


def load_settings(directory: Path) -> Settings:
    """Read config.json and whichever files describe the quantization."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json; a checkpoint is a local directory")
    config = read_json(path)
    text = config
    while nested := next((text[k] for k in _NESTED if isinstance(text.get(k), dict)), None):
        text = nested
    quantization = _find_quantization(directory, config, text)
    method = str(quantization.get("quant_method") or _guess_method(quantization)).lower()
    return Settings(config, text, method, quantization)


def _find_quantization(
    directory: Path, config: dict[str, Any], text: dict[str, Any]
) -> dict[str, Any]:
    for part in (config, text):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), dict):
                return _flatten(directory, part[key])
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if (directory / name).is_file():
            return _flatten(directory, read_json(directory / name))
    return {}


def _flatten(directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Lift parameters out of wrappers; add the per-layer table that ModelOpt keeps apart."""
    for wrapper in ("quantization", "quantization_config"):
        if isinstance(record.get(wrapper), dict):
            record = {**record, **record[wrapper]}
    table = directory / "quant_cfg.json"
    mixed = str(record.get("quant_algo")).upper() == "MIXED_PRECISION"
    if mixed and not record.get("quantized_layers") and table.is_file():
        record = {**record, "quantized_layers": read_json(table).get("quantized_layers")}
    return record


def _guess_method(quantization: dict[str, Any]) -> str:
    """The method of a configuration that does not name it, by parameters only it has."""
    for key, method in (
        ("quant_algo", "modelopt"),
        ("config_groups", "compressed-tensors"),
        ("desc_act", "gptq"),
        ("w_bit", "awq"),
    ):
        if key in quantization:
            return method
    return "unnamed" if quantization else ""


def module_names(module: str) -> set[str]:
    """A module's name and what it is called under the other prefixes of the same model."""
    tail = re.sub(r"^(model\.|language_model\.|thinker\.)+", "", module)
    prefixes = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
    return {module, *(prefix + tail for prefix in prefixes)}


def matches_regex(module: str, patterns: Iterable[str]) -> bool:
    """transformers' rule: a regex from the start up to a module boundary, or a suffix."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    names = module_names(module)
    try:
        return any(
            name.endswith(pattern) or re.match(f"(?:{pattern}){boundary}", name)
            for name in names
            for pattern in patterns
        )
    except re.error as error:
        raise CheckpointError(f"{error.pattern!r} of the configuration is no regex") from None


def matches_wildcard(module: str, patterns: Iterable[str]) -> bool:
    """ModelOpt's and Quark's rule: a shell wildcard, or a module and everything below it."""
    return any(
        re.match(pattern[3:], name) is not None
        if pattern.startswith("re:")
        else fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        for name in module_names(module)
        for pattern in patterns
    )
