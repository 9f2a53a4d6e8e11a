"""Results of layers that quantize between their GEMMs, where a value lies between two codes.

What is quantized again differs between two right GEMMs in the last bits of fp32, so that a value
next to the middle of two codes takes one in the one and the other in the other. Such a flip moves
an output row by a whole step of one hidden element, which may be more than a row's bound. It is
right if a flip of values that are that near to the middle, and nothing else, leaves the bounds.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
from metrics import BOUNDS, assert_matches, errors
from torch import Tensor

from moelten import reference
from moelten.formats import Float, Format
from moelten.routing import Routing
from moelten.weights import ExpertWeights

NEAR = 1e-5  # relative; a GEMM's error in fp32 is less
MOST = 8  # flips tried of a row of hidden elements


def assert_matches_but_for_ties(
    out: Tensor, x: Tensor, weights: ExpertWeights, routing: Routing, expected: Tensor
) -> None:
    """`metrics.assert_matches`, against the reference with flips where those explain a row."""
    if not isinstance(weights.spec.scheme.activations, Float):
        worst = (out.double() - expected).norm(dim=1) > BOUNDS["row"] / 2 * expected.norm(dim=1)
        rows = worst.nonzero()[:, 0] if errors(out, expected)["all"] <= BOUNDS["all"] else []
        if len(rows):
            part = Routing(routing.ids[rows], routing.weights[rows], routing.on_input)
            expected = expected.clone()
            for flip in _flips(x[rows], weights, part):
                rest = out[rows].double() - expected[rows]
                better = (rest - flip).norm(dim=1) < rest.norm(dim=1)
                expected[rows] += flip * better[:, None]
    assert_matches(out, expected)


def _flips(x: Tensor, weights: ExpertWeights, routing: Routing):
    """What a flip of one hidden element of each row adds to the outputs, one after the other."""
    for slot in range(routing.ids.shape[1]):
        ids = routing.ids.clone()
        ids[:, torch.arange(ids.shape[1], device=ids.device) != slot] = -1
        alone = replace(routing, ids=ids)
        without = reference.moe(x, weights, alone)
        for which in range(MOST):
            with mock.patch.object(reference, "round_activations", _Flipping(which)):
                yield reference.moe(x, weights, alone) - without


def _largest(rows: Tensor, group: int) -> Tensor:
    """Where a group of columns has its largest element, which its scale follows."""
    magnitudes = torch.nn.functional.pad(rows.abs(), (0, -rows.shape[1] % group))
    groups = magnitudes.view(len(rows), -1, group)
    largest = groups == groups.amax(2, keepdim=True)
    return largest.view(magnitudes.shape)[:, : rows.shape[1]]


class _Flipping:
    """`round_activations`, but every second call, of hidden rows, flips their `which`-th tie."""

    def __init__(self, which: int) -> None:
        self.which, self.hidden, self.round = which, True, reference.round_activations

    def __call__(self, rows: Tensor, fmt: Format, *how) -> Tensor:
        self.hidden = not self.hidden
        codes = self.round(rows, fmt, *how)
        if not self.hidden:
            return codes
        largest = _largest(rows, fmt.block[1] or rows.shape[1])
        up, down = (
            self.round(torch.where(largest, rows, rows * factor), fmt, *how)
            for factor in (1 + NEAR, 1 - NEAR)
        )
        other = torch.where(up == codes, down, up)
        ties = other != codes
        return torch.where(ties & (ties.cumsum(1) == self.which + 1), other, codes)
