"""GIPO: a Gaussian trust weight in the log-ratio."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class GIPO(Objective):
    """J = sg[exp(-(d/sigma)^2 / 2)] r A, w = exp(d - d^2 / (2 sigma^2)) A (arXiv 2603.03955).

    The Gaussian is detached, the ratio is not; the weight peaks at d = sigma^2.
    """

    sigma: float = 0.5
    """Width of the trust weight in log-ratio."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 8:
            raise ValueError(f"sigma must lie in (0, 8], got {self.sigma}")

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        trust = torch.exp(-0.5 * (log_ratio / self.sigma) ** 2).detach()
        return trust * safe_ratio(log_ratio) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return torch.exp(log_ratio - 0.5 * (log_ratio / self.sigma) ** 2) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return math.exp(self.sigma**2 / 2)


register(
    Recipe(
        "gipo",
        GIPO(),
        paper="2603.03955",
        summary="Gaussian trust weight on both sides of r = 1",
        confidence="formula and sigma: the authors' AcceRL code (2603.18464)",
    )
)
