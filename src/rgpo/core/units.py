"""Sums and means over the elements of one unit, along the last axis (see `Objective.scope`)."""

import torch
from torch import Tensor


def unit_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x over the elements of each unit with `mask` True: (..., N) -> (..., 1)."""
    return torch.where(mask, x, 0).sum(-1, keepdim=True)


def unit_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the elements of each unit with `mask` True or 0: (..., N) -> (..., 1)."""
    return unit_sum(x, mask) / torch.clamp(mask.sum(-1, keepdim=True), min=1)


def through_own(x: Tensor, log_ratio: Tensor) -> Tensor:
    """The value of x, with the gradient of every element through its own log-ratio alone."""
    return x.detach() + (log_ratio - log_ratio.detach())
