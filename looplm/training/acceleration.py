"""What makes training fast on this machine, decided by measurement: bf16 products and compiled layers.

On CPUs with bf16 matrix units autocast roughly doubles the rate of models of a few million parameters; on CPUs
without, it is many times slower. So `auto` times one product in each dtype and takes bf16 only where it wins.
"""

import functools
import time
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

BF16_GAIN = 1.5
"""Least speed-up of a bf16 product over fp32 that pays for the casts around it."""


def choose_autocast(setting: Literal["auto", "bfloat16", "none"], device: torch.device, width: int) -> bool:
    """Whether to run under bf16 autocast; `auto` measures products of (1024, width) x (width, 4 width)."""
    if setting != "auto":
        return setting == "bfloat16"
    wide, narrow = (_seconds_a_product(device, width, dtype) for dtype in (torch.float32, torch.bfloat16))
    return wide / narrow >= BF16_GAIN


def _seconds_a_product(device: torch.device, width: int, dtype: torch.dtype) -> float:
    left = torch.randn(1024, width, device=device).to(dtype)
    right = torch.randn(width, 4 * width, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - began)
    return best


@functools.cache
def compiler_fault() -> str | None:
    """Why `torch.compile` cannot work here, in one line; None where it does."""
    try:
        torch.compile(lambda x: x.exp() + 1, dynamic=False)(torch.zeros(8))
    except Exception as error:  # whatever the toolchain raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def check_compiler(settings: Iterable[Literal["auto", "on", "off"]]) -> None:
    """Refuse `on` where no compiler works.

    Raises:
        ValueError: says why, and what to do.
    """
    if "on" in settings and (fault := compiler_fault()) is not None:
        raise ValueError(f"compile is 'on', but no compiler works here ({fault}); install g++ or use 'off'")


def compile_layers(model: nn.Module, setting: Literal["auto", "on", "off"]) -> str | None:
    """Compile every decoder layer in place: one graph serves all layers and loops.

    Returns:
        None if compiled, else why not.

    Raises:
        ValueError: as `check_compiler`.
    """
    layers = [module for module in model.modules() if type(module).__name__ == "OuroDecoderLayer"]
    if setting == "off":
        for layer in layers:
            layer._compiled_call_impl = None
        return "switched off"
    check_compiler([setting])
    fault = compiler_fault()
    if fault is not None:
        return f"no working C++ compiler; install g++ for about twice the speed ({fault})"
    for layer in layers:
        if layer._compiled_call_impl is None:  # else a stage before this one has compiled it
            layer.compile(dynamic=False)
    return None
