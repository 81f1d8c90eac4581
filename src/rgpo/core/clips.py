"""PPO's clip: flat where A has pushed the ratio beyond a bound, untouched on the way back.

    J = min(r A, clip(r, low, high) A) = min(r, high) A for A > 0 and max(r, low) A for A < 0.

With a `ceiling` (dual clip, arXiv 1912.09729) also flat for A < 0 beyond r = ceiling. Bounds are
those of the ratio itself, numbers or tensors that broadcast, and never carry a gradient.
"""

import torch
from torch import Tensor

from rgpo.core.objective import safe_ratio


def clipped_value(
    log_ratio: Tensor,
    advantage: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    ceiling: Tensor | float | None = None,
) -> Tensor:
    """J, elementwise."""
    ratio = safe_ratio(log_ratio)
    upper = torch.clamp(ratio, max=high)
    lower = torch.clamp(ratio, min=low)
    if ceiling is not None:
        lower = torch.clamp(lower, max=ceiling)
    return torch.where(advantage > 0, upper, lower) * advantage


def clipped_weight(
    log_ratio: Tensor,
    advantage: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    ceiling: Tensor | float | None = None,
) -> Tensor:
    """W = dJ / d log r, elementwise: r A where J is not flat."""
    ratio = safe_ratio(log_ratio)
    restoring = ratio >= low
    if ceiling is not None:
        restoring = restoring & (ratio <= ceiling)
    return ratio * advantage * torch.where(advantage > 0, ratio <= high, restoring)
