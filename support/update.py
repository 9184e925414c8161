"""One step of the optimizer: fp16's scale, several processes, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.cli import InputError
from support.distributed import average
from support.report import phase


def gradient_step(
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], None],
    weights: Tensor,
    max_grad_norm: float,
    scale: float = 1.0,
) -> Tensor:
    """Take a step along the gradient that backward(weights) adds to each `.grad`, linear in
    weights; averaged over processes, and scaled down to max_grad_norm where it is longer.

    scale: a power of two that the weights, and so all that fp16 has to hold, are multiplied by;
    should it overflow, once more by a smaller one. Returns the gradient's norm before clipping.
    """
    parameters = optimizer.param_groups[0]["params"]
    with phase("update"):
        for factor in (scale, scale / 256):
            optimizer.zero_grad(set_to_none=True)
            backward(factor * weights)
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.div_(factor)
                average(p.grad)
            norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            if norm.isfinite():
                break
        require_finite("the gradient", norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def fp16_scale(autocast: torch.dtype | None, weights: Tensor, numel: int) -> float:
    """A power of two for the weights of means over `numel` latent elements: in fp16 it brings what
    would underflow to at most 2**-6 an element, and leaves the rest for sums. Otherwise 1."""
    if autocast != torch.float16 or not weights.any():
        return 1.0
    return 2.0 ** round(math.log2(numel / weights.abs().max().item()) - 6)


def require_finite(what: str, values: Tensor) -> None:
    """Stop before anything is learned from NaN or infinity."""
    if not values.isfinite().all():
        remedy = "a lower --learning-rate or --guidance-scale, a higher --kl-weight, another --dtype"
        raise InputError(f"{what} is not finite; try, in a new run, {remedy}.")
