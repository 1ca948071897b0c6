"""The plane in which states vary most, loop by loop (Ouro section 7.1): PCA of the last prompt token's state.

The paper shows benign and harmful prompts of one model in such planes and says that loops draw them apart. What a
picture shows is measured here by `separation`, in the plane only; `explained` says how much of the states that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.evaluation.answers import batches, beyond_training, padded
from looplm.model.modeling import OuroForCausalLM


@dataclass(frozen=True)
class Plane:
    """The states of N prompts after one loop.

    Attributes:
        loop: counted from 1.
        explained: shares of the summed variance along both axes.
        separation: between harmful and benign prompts; None where one kind is missing.
        points: N (first, second) coordinates, in the order of the prompts.
    """

    loop: int
    explained: tuple[float, float]
    separation: float | None
    points: list[tuple[float, float]]


@torch.no_grad()
def prompt_states(
    model: OuroForCausalLM,
    prompts: Sequence[Sequence[int]],
    loops: int,
    report: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """The state after every loop at the last token of each prompt, (N, T, D) fp32 on the CPU."""
    states, done = torch.empty(len(prompts), loops, model.config.hidden_size), 0
    for places in batches([len(prompt) for prompt in prompts]):
        ids, last = padded([prompts[place] for place in places])
        with beyond_training():
            run = model.model(ids.to(model.device), num_loop_steps=loops)
        kept = [state[torch.arange(len(places)), last].float().cpu() for state in run.loop_states]
        states[places] = torch.stack(kept, dim=1)
        done += len(places)
        report(done / len(prompts))
    return states


def planes(states: Tensor, harmful: Sequence[bool]) -> list[Plane]:
    """The plane of every loop; `states` is (N, T, D). None of fewer than three prompts, which always lie in one."""
    if len(states) < 3:
        return []
    found = []
    for loop in range(states.shape[1]):
        points, explained = pca(states[:, loop])
        found.append(Plane(loop + 1, explained, separation(points, harmful), [(x, y) for x, y in points.tolist()]))
    return found


def pca(states: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The two leading principal components of (N, D): coordinates (N, 2), and the share of the variance of each.

    The sign of an axis is that of its largest entry, so that the same states give the same picture.
    """
    centred = states.double() - states.double().mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    total = float(sizes.square().sum())
    shares = [float(size) ** 2 / total if total else 0.0 for size in sizes[:2]]
    return centred @ axes.T, (shares[0], shares[1])


def separation(points: Tensor, harmful: Sequence[bool]) -> float | None:
    """How far the middles of the two kinds are apart, in root mean squared distances of prompts from their own middle.

    0 where the middles coincide; None without two prompts of either kind, infinite where no prompt is off its middle.
    """
    kind = torch.tensor(list(harmful))
    clouds = [points[kind], points[~kind]]
    if min(map(len, clouds)) < 2:
        return None
    middles = [cloud.mean(0) for cloud in clouds]
    within = sum(float((cloud - middle).square().sum()) for cloud, middle in zip(clouds, middles, strict=True))
    between = float((middles[0] - middles[1]).norm())
    spread = math.sqrt(within / len(points))
    return between / spread if spread else math.inf if between else 0.0
