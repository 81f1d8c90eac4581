"""M2PO: clip bounds from a budget on the second moment of the log-ratio."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.clips import clipped_value, clipped_weight
from rgpo.core.objective import Objective, Scope, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class M2PO(Objective):
    """PPO's clip to [e^-tau, e^tau], or none, by the batch's own log-ratios (arXiv 2510.01161).

    Over the outward elements (A > 0, r > 1 or A < 0, r < 1): if the mean of d^2 is within the
    budget nothing is clipped. Otherwise tau is such that the mean of min(d^2, tau^2) equals it, and
    the bounds are widened to [1 - floor_low, 1 + floor_high] at least. Both are constants of the
    gradient. No dual clip: w is unbounded for A < 0 and r > 1.

    The authors' code rounds tau down to the next |d| of the batch and reads the sign of A from the
    first token of each row; here tau is exact and every element has its own sign.
    """

    budget: float = 0.04
    """Largest mean of d^2 over outward elements."""

    floor_low: float = 0.3
    """Distance of the lower bound from 1 is at least this; 0 for none."""

    floor_high: float = 0.5
    """Distance of the upper bound from 1 is at least this; 0 for none."""

    scope: ClassVar[Scope] = "batch"
    needs: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        require_positive(budget=self.budget)
        if not 0 <= self.floor_low <= 1:
            raise ValueError(f"floor_low must lie in [0, 1], got {self.floor_low}")
        if not 0 <= self.floor_high < float("inf"):
            raise ValueError(f"floor_high must be finite and not negative, got {self.floor_high}")

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        return clipped_value(log_ratio, advantage, *self.bounds(log_ratio, advantage, mask))

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        return clipped_weight(log_ratio, advantage, *self.bounds(log_ratio, advantage, mask))

    def bounds(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The two bounds of the ratio for each unit, (..., B) -> (..., 1), detached."""
        d = log_ratio.detach()
        outward = mask & (d != 0) & ((advantage > 0) == (d > 0)) & (advantage != 0)
        square = torch.where(outward, d, 0) ** 2
        target = self.budget * outward.sum(-1, keepdim=True)
        tau = torch.sqrt(_water_level(square, target))
        low = torch.clamp(torch.exp(-tau), max=1 - self.floor_low)
        high = torch.clamp(torch.exp(tau), min=1 + self.floor_high)
        free = square.sum(-1, keepdim=True) <= target
        return torch.where(free, 0, low), torch.where(free, torch.inf, high)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


def _water_level(x: Tensor, target: Tensor) -> Tensor:
    """The level t with sum min(x, t) = target over the last axis, for x >= 0; (..., 1).

    Where sum x <= target there is none, and the result means nothing.
    """
    ordered = x.sort(-1).values
    partial = ordered.cumsum(-1)
    above = torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
    filled = partial + ordered * above  # sum min(x, ordered[k]), which grows with k
    k = torch.clamp((filled < target).sum(-1, keepdim=True), max=x.shape[-1] - 1)
    rest = target - (partial - ordered).gather(-1, k)
    return torch.clamp(rest, min=0) / (above[k] + 1)


register(
    Recipe(
        "m2po",
        M2PO(),
        paper="2510.01161",
        summary="PPO that clips only as much as a budget on the mean squared log-ratio asks",
        confidence="formula and defaults: the authors' code; the floors are not in the paper",
    )
)
