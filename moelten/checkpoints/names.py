"""Where a checkpoint keeps its routed experts: tensor names, sorted by layer, expert and role.

Two ways of storing are known. Per expert: `…layers.3.mlp.experts.7.up_proj.weight`, with any
block name between layer and experts, and w1, w3, w2 for gate, up, down. Fused over experts:
`…layers.3.mlp.experts.gate_up_proj`, with what would be the suffix appended (`_blocks`, `_bias`).
Roles are read off names and never guessed from shapes. Shared experts and multi-token-prediction
modules are not routed experts of a layer and are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from moelten.errors import CheckpointError, UnsupportedError

ROLES = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "gate_up_proj": "gate_up",
}
GATED = ({"gate", "up", "down"}, {"gate_up", "down"})
UNGATED = ({"up", "down"},)
_EXPERTS = r"(?P<experts>(?P<prefix>(?:.*\.)?)layers\.(?P<layer>\d+)\.(?:.*\.)?experts)\."
_PER_EXPERT = re.compile(_EXPERTS + r"(?P<expert>\d+)\.(?P<projection>\w+)\.(?P<suffix>.+)")
_FUSED = re.compile(
    _EXPERTS + r"(?P<projection>gate_up_proj|up_proj|down_proj)(?:_(?P<suffix>\w+))?"
)
# Fused tensors drop the "weight" of their per-expert suffix.
_FUSED_SUFFIXES = {None: "weight", "scale_inv": "weight_scale_inv"}
_EXTRA_MODULES = re.compile(r"(^|\.)(mtp|draft|eagle)\w*\.")


@dataclass
class LayerNames:
    """Tensors of one layer's routed experts.

    tensors: (expert, role) -> suffix -> tensor name; expert is None where experts are fused
    modules: (expert, role) -> module name, for the patterns of a configuration
    """

    tensors: dict[tuple[int | None, str], dict[str, str]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    modules: dict[tuple[int | None, str], str] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        return any(expert is None for expert, _ in self.tensors)

    @property
    def experts(self) -> list[int]:
        """Indices of the experts, in order; empty where they are fused."""
        return sorted({expert for expert, _ in self.tensors if expert is not None})

    @property
    def roles(self) -> set[str]:
        return {role for _, role in self.tensors}

    def all(self) -> Iterable[str]:
        return (name for part in self.tensors.values() for name in part.values())

    def add(self, name: str, match: re.Match[str]) -> None:
        groups = match.groupdict()
        expert = int(groups["expert"]) if "expert" in groups else None
        projection, suffix = groups["projection"], groups["suffix"]
        if projection not in ROLES:
            raise UnsupportedError(
                f"{name}: expert projections are known as {', '.join(ROLES)}, not {projection!r}"
            )
        key = expert, ROLES[projection]
        if expert is None:
            suffix = _FUSED_SUFFIXES.get(suffix, suffix)
        if suffix in self.tensors[key]:
            raise CheckpointError(
                f"{name} and {self.tensors[key][suffix]} are the same part of one expert"
            )
        self.tensors[key][suffix] = name
        module = f"{groups['experts']}.{projection}" if expert is None else name[: -len(suffix) - 1]
        # Input scales may sit under another name (w1 beside gate_proj): the weight's name counts.
        if "weight" in suffix or key not in self.modules:
            self.modules[key] = module


def find_experts(names: Collection[str]) -> dict[int, LayerNames]:
    """Layers with routed experts, by index, in order.

    Raises UnsupportedError for projections or several models under unknown names, CheckpointError
    if there are no routed experts or a layer stores them in two ways.
    """
    prefixes: dict[str, dict[int, LayerNames]] = defaultdict(lambda: defaultdict(LayerNames))
    for name in sorted(names):
        if ".experts." not in name or _EXTRA_MODULES.search(name):
            continue
        match = _PER_EXPERT.fullmatch(name) or _FUSED.fullmatch(name)
        if match:
            prefixes[match["prefix"]][int(match["layer"])].add(name, match)
    if not prefixes:
        raise CheckpointError(
            "no routed experts: expected tensors such as model.layers.0.mlp.experts.0.up_proj.* or "
            f"model.layers.0.mlp.experts.gate_up_proj among {len(names)} tensors"
        )
    if len(prefixes) > 1:
        raise UnsupportedError(
            f"routed experts of several models: layers under {', '.join(map(repr, prefixes))}; "
            "split the checkpoint"
        )
    (layers,) = prefixes.values()
    for layer, found in layers.items():
        if found.fused and found.experts:
            raise CheckpointError(f"layer {layer}: experts are stored one by one and fused as well")
    return dict(sorted(layers.items()))
