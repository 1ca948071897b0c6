"""Inputs for scoring: which requests share a pass, and which of its positions are read.

Batches are fixed by the requests and the batch size alone: inputs from long to short, equal ones once, as lm-eval's own
class has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Request = tuple[list[int], list[int]]
"""Context tokens and target tokens, each at least one."""


def plan_batches(requests: Sequence[Request], batch_size: int) -> list[list[list[int]]]:
    """Batches of at most `batch_size` inputs, long ones first; each input is the places of the requests that share it.

    Requests share an input where context + target without its last token are equal, and so many targets are read: the
    one-token choices of a question cost one row.
    """
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for place, (context, target) in enumerate(requests):
        groups.setdefault((tuple(context + target[:-1]), len(target)), []).append(place)
    ordered = sorted(groups.values(), key=lambda group: _sort_key(requests[group[0]]))
    return [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]


def _sort_key(request: Request) -> tuple[int, tuple[int, ...]]:
    tokens = tuple(request[0] + request[1])
    return -len(tokens), tokens


@dataclass(frozen=True)
class Batch:
    """Inputs padded on the right, and which of their positions are read.

    Attributes:
        ids: (B, S).
        lengths: (B,), without padding.
        prompt: (B,), context tokens.
        index: (R,) places in the flattened (B, S) that are read; targets: (R,) what is scored there.
        slots: by place of the request, its row and the slice of R that belongs to it.
    """

    ids: Tensor
    lengths: Tensor
    prompt: Tensor
    index: Tensor
    targets: Tensor
    slots: dict[int, tuple[int, slice]]

    @classmethod
    def build(cls, requests: Sequence[Request], groups: Sequence[Sequence[int]], device: torch.device) -> Batch:
        """The batch of some requests, as `plan_batches` groups them."""
        inputs = [(requests[group[0]][0] + requests[group[0]][1])[:-1] for group in groups]
        width = max(map(len, inputs))
        index: list[int] = []
        targets: list[int] = []
        slots, prompt = {}, []
        for row, group in enumerate(groups):
            for place in group:
                target = requests[place][1]
                end = row * width + len(inputs[row])
                slots[place] = (row, slice(len(index), len(index) + len(target)))
                index += range(end - len(target), end)
                targets += target
            prompt.append(len(inputs[row]) - len(requests[group[0]][1]) + 1)
        ids = [row + [0] * (width - len(row)) for row in inputs]
        lengths = [len(row) for row in inputs]
        as_tensor = partial(torch.tensor, device=device)
        read = as_tensor(index), as_tensor(targets)
        return cls(as_tensor(ids), as_tensor(lengths), as_tensor(prompt), *read, slots)

    @property
    def places(self) -> Tensor:
        """0..S-1 as (1, S), to compare with lengths."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None]
