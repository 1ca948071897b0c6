"""What reduced precision changes: the same model in fp32 and in bf16 at a few positions of a text.

A second copy of the weights is never made: each module's weights are cast when it runs and given back after it, so a
model of 1.4B parameters in bf16 takes its largest weight in fp32 (0.4 GB) more, not 5.7 GB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from looplm.model.modeling import OuroForCausalLM

PASS_TOKENS = 64
COMPARED = 8
"""Positions compared, evenly spread over the pass."""


@dataclass(frozen=True)
class Agreement:
    """fp32 against bf16 at the last trained loop.

    Attributes:
        positions: how many were compared.
        same_token: at how many of them both prefer the same token.
        divergence: mean KL(fp32 || bf16) of the next-token distributions, in nats.
    """

    positions: int
    same_token: int
    divergence: float


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let every module compute in `dtype` for a while, whatever its weights are stored in."""
    stored: list[tuple[nn.Parameter, Tensor]] = []

    def cast(module: nn.Module, _: object) -> None:
        for weight in module.parameters(recurse=False):
            stored.append((weight, weight.data))
            weight.data = weight.data.to(dtype)

    def give_back(module: nn.Module, _: object, __: object) -> None:
        for _ in module.parameters(recurse=False):
            weight, data = stored.pop()
            weight.data = data

    hooks = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(cast))
            hooks.append(module.register_forward_hook(give_back, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def compare_precision(model: OuroForCausalLM, ids: Tensor) -> Agreement:
    """Run the first tokens of `ids` (S,) at full depth in fp32 and in bf16, and compare the read-outs."""
    piece = ids[: min(PASS_TOKENS, model.config.max_position_embeddings)].to(model.device)
    count = min(COMPARED, len(piece))
    positions = torch.linspace(0, len(piece) - 1, count, device=model.device).round().long()
    reads = []
    for dtype in (torch.float32, torch.bfloat16):
        with computing_in(model, dtype):
            logits = model(piece[None], exit_threshold=1.0, logits_to_keep=positions).logits
        reads.append(logits[0].double().log_softmax(-1))
    wide, narrow = reads
    divergence = (wide.exp() * (wide - narrow)).sum(-1).mean()
    return Agreement(count, int((wide.argmax(-1) == narrow.argmax(-1)).sum()), float(divergence))
