"""Advantages of completions from the rewards of all processes, group after group.

Rewards are (N,), the K completions of a prompt in adjacent places; NaN where no reward function
had anything to say about a completion, which then gets 0 and counts for nobody's baseline.
"""

import torch
from torch import Tensor

from rgpo.core.advantage import leave_one_out


def left_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards minus the mean of the others of the group."""
    group = torch.arange(len(rewards), device=rewards.device) // group_size
    scored = ~rewards.isnan()
    advantage = torch.zeros_like(rewards)
    advantage[scored] = leave_one_out(rewards[scored], group[scored])
    return advantage


def above_median(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards minus the median of the group."""
    groups = rewards.view(-1, group_size)
    above = groups - groups.nanquantile(0.5, dim=1, keepdim=True)
    return torch.nan_to_num(above, nan=0.0).flatten()


def above_baseline(rewards: Tensor, baseline: Tensor) -> Tensor:
    """Rewards minus a baseline (N,) that does not depend on the completion, as ReMax's."""
    return torch.nan_to_num(rewards - baseline, nan=0.0)
