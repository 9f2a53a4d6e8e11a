"""Time on a GPU: short bursts of calls with rests between them, lest it lowers its clocks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

_REST_SECONDS = 0.05


def time_burst(call: Callable[[], object], count: int) -> list[float]:
    """Seconds on the device of each of some calls after a rest, all enqueued before any ends."""
    torch.cuda.synchronize()
    time.sleep(_REST_SECONDS)
    event: Any = torch.cuda.Event
    events = [event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for after in events[1:]:
        call()
        after.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 for first, last in itertools.pairwise(events)]
