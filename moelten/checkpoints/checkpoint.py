"""Checkpoint: the routed experts of a safetensors checkpoint, layer by layer, expert by expert.

Opening reads JSON and headers; a spec needs nothing more, because decoders run on tensors without
values. Experts stream: one is in memory at a time, each of its tensors is read once, and the rest
of the model is never touched. What the configuration and the files disagree on is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelten.checkpoints.config import Recipe, load_settings
from moelten.checkpoints.expert import (
    Matrix,
    join_halves,
    make_weights,
    read_matrix,
    split_fused,
    stack_experts,
)
from moelten.checkpoints.families import find_family
from moelten.checkpoints.names import GATED, UNGATED, LayerNames, find_experts
from moelten.checkpoints.projection import Projection
from moelten.checkpoints.reader import SafetensorsFiles
from moelten.checkpoints.recipes import DECODERS, find_recipe
from moelten.errors import CheckpointError, FormatError, UnsupportedError
from moelten.formats import FP8_TENSOR, NVFP4, Format, Scheme
from moelten.moe import pack_stream
from moelten.packed import PackedExperts
from moelten.weights import ExpertSpec, ExpertWeights

Fetch = Callable[[str, int | None], Tensor]
_STATIC = (FP8_TENSOR, NVFP4())
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PLAIN_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


class Checkpoint:
    """Routed experts of the checkpoint in a local directory.

    activation_format: how activations are quantized, instead of what the checkpoint says; input
                       scales of static formats are dropped if it is dynamic

    path, config, model_type: what they say
    format_name:              e.g. "compressed-tensors pack-quantized int4", "gpt-oss mxfp4", "bf16"
    layers:                   indices of the MoE layers

    Raises CheckpointError for a checkpoint that is truncated, incomplete or contradicts itself, and
    UnsupportedError for a format or an activation that moelten does not have, naming those it has.

    >>> experts = Checkpoint("gpt-oss-20b").load(0)            # doctest: +SKIP
    """

    def __init__(self, path: str | Path, *, activation_format: Format | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path} is no directory; checkpoints are local directories")
        self._settings = load_settings(self.path)
        self.config: dict[str, Any] = self._settings.config
        self.model_type = self._settings.model_type
        self._files = SafetensorsFiles(self.path)
        self._names = find_experts(self._files.tensors)
        self.layers: tuple[int, ...] = tuple(self._names)
        family = find_family(self._settings.text_type, self.model_type)
        self._activation = family.activation(self._settings.text)
        self._order = family.order
        self._override = activation_format
        self._recipes = {layer: self._first_recipe(layer) for layer in self.layers}
        names = dict.fromkeys(self._format_name(layer) for layer in self.layers)
        self.format_name = " + ".join(names)
        self._specs: dict[int, ExpertSpec] = {}

    def spec(self, layer: int) -> ExpertSpec:
        """What the experts of `layer` are, from the configuration and the headers alone.

        Checks the names, dtypes and shapes of every expert's tensors on the way.
        """
        if layer not in self._specs:
            count = self._count_experts(layer)
            self._check_uniform(layer)
            spec = self._decode(layer, 0, self._files.meta).spec
            self._check_hidden_size(layer, spec)
            self._specs[layer] = replace(spec, num_experts=count)
        return self._specs[layer]

    def experts(self, layer: int) -> Iterator[ExpertWeights]:
        """Every expert of `layer` in order, each with E = 1; only one is in memory at a time."""
        return (self.expert(layer, e) for e in range(self.spec(layer).num_experts))

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """One expert, with E = 1, as the checkpoint stores it: no value is rounded."""
        count = self.spec(layer).num_experts
        if not 0 <= expert < count:
            raise CheckpointError(f"expert {expert} is not in 0..{count - 1} of layer {layer}")
        return self._decode(layer, expert, self._files.read)

    def load(
        self, layer: int, *, device: torch.device | str = "cpu", backend: str | None = None
    ) -> PackedExperts:
        """The experts of `layer`, packed for the backend that will run them on `device`."""
        return pack_stream(self.spec(layer), self.experts(layer), device=device, backend=backend)

    def weights(self, layer: int) -> ExpertWeights:
        """All experts of `layer` in canonical form: the whole layer in memory."""
        return stack_experts(list(self.experts(layer)))

    def expert_tensor_names(self) -> set[str]:
        """Names of all tensors in the files that belong to routed experts."""
        return {name for names in self._names.values() for name in names.all()}

    def _layer(self, layer: int) -> LayerNames:
        if layer not in self._names:
            raise CheckpointError(f"layer {layer} has no routed experts; MoE layers: {self.layers}")
        return self._names[layer]

    def _first_recipe(self, layer: int) -> Recipe:
        names = self._names[layer]
        allowed = GATED if self._activation.gated else UNGATED
        if names.roles not in allowed:
            raise CheckpointError(
                f"layer {layer}: {type(self._activation).__name__} experts have "
                + " or ".join(", ".join(sorted(roles)) for roles in allowed)
                + f" projections, the files hold {', '.join(sorted(names.roles))}"
            )
        key, module = next(iter(names.modules.items()))
        return find_recipe(self._settings, module, frozenset(names.tensors[key]))

    def _format_name(self, layer: int) -> str:
        if self._recipes[layer].name:
            return self._recipes[layer].name
        names = next(iter(self._names[layer].tensors.values()))
        info = self._files.tensors[names.get("weight") or next(iter(names.values()))]
        return _PLAIN_NAMES.get(info.dtype, info.dtype)

    def _count_experts(self, layer: int) -> int:
        names = self._layer(layer)
        if names.fused:
            tensors = [self._files.tensors[name] for name in names.all()]
            sizes = {info.shape[:1] for info in tensors}
            if len(sizes) > 1 or () in sizes:
                raise CheckpointError(
                    f"layer {layer}: fused tensors disagree on the number of experts: "
                    + ", ".join(map(str, tensors))
                )
            count = tensors[0].shape[0]
        else:
            count = len(names.experts)
            if missing := sorted(set(range(names.experts[-1] + 1)) - set(names.experts)):
                raise CheckpointError(f"layer {layer}: missing tensors of experts {missing}")
        for key in _EXPERT_COUNTS:
            declared = self._settings.text.get(key)
            if isinstance(declared, int) and declared != count:
                raise CheckpointError(
                    f"layer {layer}: config.json says {key}={declared}, the files hold {count} "
                    "experts"
                )
        return count

    def _check_uniform(self, layer: int) -> None:
        """Every expert has the same tensors, in dtype and shape, and one format."""
        names, recipe = self._layer(layer), self._recipes[layer]
        like: dict[tuple[str, str], str] = {}
        for (expert, role), module in names.modules.items():
            own = names.tensors[expert, role]
            other = find_recipe(self._settings, module, frozenset(own))
            if other != recipe:
                raise UnsupportedError(
                    f"layer {layer} mixes formats: {module} is {other.name or 'plain'}, others are "
                    f"{recipe.name or 'plain'}; one layer has one format"
                )
            for suffix, name in own.items():
                self._check_like(like.setdefault((role, suffix), name), name)
        for expert in names.experts:
            for (role, suffix), name in like.items():
                if suffix not in names.tensors.get((expert, role), {}):
                    missing = re.sub(r"\.experts\.\d+\.", f".experts.{expert}.", name)
                    raise CheckpointError(
                        f"missing tensor {missing}; other experts have theirs, such as {name} in "
                        f"{self._files.tensors[name].file.name}"
                    )

    def _check_like(self, first: str, name: str) -> None:
        want, got = self._files.tensors[first], self._files.tensors[name]
        if (want.dtype, want.shape) != (got.dtype, got.shape):
            raise FormatError(
                f"{name} ({got}): expected {want.dtype} {list(want.shape)} as {first}"
            )

    def _check_hidden_size(self, layer: int, spec: ExpertSpec) -> None:
        text = self._settings.text
        declared = text.get("moe_latent_size") or text.get("hidden_size")
        if isinstance(declared, int) and declared != spec.hidden_size:
            raise CheckpointError(
                f"layer {layer}: config.json says hidden_size={declared}, expert matrices have "
                f"{spec.hidden_size}"
            )

    def _decode(self, layer: int, expert: int, fetch: Fetch) -> ExpertWeights:
        names, recipe = self._layer(layer), self._recipes[layer]
        roles = ("gate_up", "down") if "gate_up" in names.roles else ("gate", "up", "down")
        parts = {
            role: self._matrix(names, recipe, expert, role, fetch)
            for role in roles
            if role in names.roles
        }
        module = f"layer {layer}, expert {expert}"
        w2 = parts.pop("down")
        if "gate" in parts:
            w13 = join_halves(parts["gate"], parts["up"], module)
        else:
            (fused,) = parts.values()
            w13 = split_fused(fused, self._fused_order(layer))
        activations = self._activations(recipe, w2)
        return make_weights(w13, w2, self._activation, activations, expert)

    def _matrix(
        self, names: LayerNames, recipe: Recipe, expert: int, role: str, fetch: Fetch
    ) -> Matrix:
        key = (None, role) if names.fused else (expert, role)
        transposed = names.fused and recipe.decoder == "plain" and self._is_transposed(names)

        def one(name: str) -> Tensor:
            part = fetch(name, expert if names.fused else None)
            return part.mT if transposed and part.dim() == 2 else part

        native = recipe.activations
        activations = native if self._override is None else self._override
        if activations in _STATIC and activations != native:
            raise UnsupportedError(
                f"activation_format {activations.name} is static, and the input scales of this "
                f"checkpoint are for {native.name if native else 'none'}; use a dynamic one"
            )
        projection = Projection(
            names.modules[key],
            names.tensors[key],
            one,
            lambda name: str(self._files.tensors[name]),
        )
        return read_matrix(
            projection,
            DECODERS[recipe.decoder],
            recipe,
            static=activations in _STATIC,
            drop_input_scale=self._override is not None,
        )

    def _activations(self, recipe: Recipe, w2: Matrix) -> Format:
        """The activation format; UnsupportedError if these weights cannot run with it."""
        weights = w2.weight.format
        default = weights if recipe.decoder == "plain" else self._settings.dtype
        chosen = self._override or recipe.activations or default
        try:
            Scheme(weights, chosen).check()
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{error}; choose one with Checkpoint(..., activation_format=...)"
            ) from None
        return chosen

    def _fused_order(self, layer: int) -> str:
        if not self._activation.gated:
            return "no_gate"
        if self._order is None:
            raise UnsupportedError(
                f"layer {layer}: gate and up are fused, and their order is not known for model "
                f"type {self.model_type!r}; a wrong order would fail silently"
            )
        return self._order

    def _is_transposed(self, names: LayerNames) -> bool:
        """Whether fused plain matrices are [E, K, N]: only one reading fits both of them."""
        if "gate_up" not in names.roles:
            return False
        infos = [self._files.tensors[names.tensors[None, r]["weight"]] for r in ("gate_up", "down")]
        (rows, columns), (out, inner) = (info.shape[1:] for info in infos)
        if (rows, columns) == (2 * inner, out):
            return False
        if (columns, rows) == (2 * out, inner):
            return True
        raise FormatError(
            f"fused experts {infos[0]} and {infos[1]}: expected [E, 2I, H] with [E, H, I], or "
            "[E, H, 2I] with [E, I, H]"
        )
