"""The error metric and its bounds: relative Frobenius error, over all, worst row, worst tile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BOUNDS = {"all": 2.5e-3, "row": 4e-3, "tile": 5e-3}


def errors(result: Tensor, expected: Tensor) -> dict[str, float]:
    """Relative errors of result against expected, both [T, H]; 0/0 counts as 0."""
    a, b = result.double(), expected.double()
    worst = (
        _worst((a - b).norm(), b.norm()),
        _worst((a - b).norm(dim=1), b.norm(dim=1)),
        _worst(_tiles(a - b), _tiles(b)),
    )
    # All at once: a GPU is waited for a single time.
    *found, finite = torch.stack((*worst, torch.isfinite(result).all())).tolist()
    return dict(zip(BOUNDS, found if finite else [float("inf")] * 3, strict=True))


def within_bounds(result: Tensor, expected: Tensor) -> bool:
    found = errors(result, expected)
    return all(found[name] <= bound for name, bound in BOUNDS.items())


def assert_matches(result: Tensor, expected: Tensor) -> None:
    found = errors(result, expected)
    too_far = {n: f"{found[n]:.2e} > {b}" for n, b in BOUNDS.items() if not found[n] <= b}
    assert not too_far, too_far


def _tiles(x: Tensor) -> Tensor:
    """Frobenius norm of each 16x128 tile."""
    rows, columns = x.shape
    x = pad(x, (0, -columns % 128, 0, -rows % 16))
    return x.view(x.shape[0] // 16, 16, x.shape[1] // 128, 128).norm(dim=(1, 3))


def _worst(error: Tensor, scale: Tensor) -> Tensor:
    ratio = torch.where(error == 0, torch.zeros_like(error), error / scale)
    return ratio.max() if ratio.numel() else error.new_zeros(())
