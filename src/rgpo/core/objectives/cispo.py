"""CISPO: a clipped, detached importance weight on the log-likelihood."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class CISPO(Objective):
    """J = sg[clip(r, low, high)] A log r, w = clip(r, low, high) A: never zero (arXiv 2506.13585).

    `low` and `high` are bounds of the ratio itself, not distances from 1; frameworks disagree here,
    with effective caps from 0.2 to 6. A positive `low` removes the attenuation of tokens that the
    policy has left.
    """

    low: float = 0.0
    """Smallest weight; the paper has no lower bound."""

    high: float = 5.0
    """Largest weight."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high < float("inf"):
            raise ValueError(
                f"need 0 <= low <= 1 <= high < inf, got low {self.low}, high {self.high}"
            )

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        coefficient = torch.clamp(safe_ratio(log_ratio), self.low, self.high).detach()
        return coefficient * log_ratio * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return torch.clamp(safe_ratio(log_ratio), self.low, self.high) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return self.high


register(
    Recipe(
        "cispo",
        CISPO(),
        paper="2506.13585",
        summary="truncated importance weight that no sample ever loses",
        confidence="formula: paper; high = 5: ScaleRL's value, the paper's is undisclosed",
    )
)
