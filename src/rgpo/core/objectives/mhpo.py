"""MHPO: a saturated log-ratio, damped by hazards on both sides."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rgpo.core.gates import log_cosh
from rgpo.core.objective import Objective, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class MHPO(Objective):
    """J = exp(psi - sg[zeta]) A, w = exp(psi - zeta) sech^2(d / c) A (arXiv 2603.16929).

        psi = c tanh(d / c)
        zeta = (softplus(psi) / scale_high)^shape_high + (softplus(-psi) / scale_low)^shape_low

    zeta, the cumulative hazard of two Weibull laws, is not 0 at r = 1: as published w(1) is
    0.265 A and w never exceeds 0.396 |A|. `normalize` divides J by its slope at r = 1.
    """

    saturation: float = 1.5
    """c: the largest |psi|."""

    shape_high: float = 1.5
    """Exponent of the hazard for r > 1."""

    scale_high: float = 1.0
    """Scale of the hazard for r > 1."""

    shape_low: float = 2.0
    """Exponent of the hazard for r < 1."""

    scale_low: float = 0.8
    """Scale of the hazard for r < 1."""

    normalize: bool = False
    """Whether the slope at r = 1 is made 1."""

    def __post_init__(self) -> None:
        require_positive(
            saturation=self.saturation,
            shape_high=self.shape_high,
            scale_high=self.scale_high,
            shape_low=self.shape_low,
            scale_low=self.scale_low,
        )

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        psi = self._psi(log_ratio)
        return torch.exp(psi - self._damping(psi).detach()) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        psi = self._psi(log_ratio)
        exponent = psi - self._damping(psi) - 2 * log_cosh(log_ratio / self.saturation)
        return torch.exp(exponent) * advantage

    def _psi(self, log_ratio: Tensor) -> Tensor:
        return self.saturation * torch.tanh(log_ratio / self.saturation)

    def _damping(self, psi: Tensor) -> Tensor:
        """zeta, less its value at r = 1 if normalised."""
        high = (softplus(psi) / self.scale_high) ** self.shape_high
        low = (softplus(-psi) / self.scale_low) ** self.shape_low
        return high + low - (self._hazard_at_one if self.normalize else 0)

    @property
    def _hazard_at_one(self) -> float:
        log2 = math.log(2)
        high = math.pow(log2 / self.scale_high, self.shape_high)
        return high + math.pow(log2 / self.scale_low, self.shape_low)

    @property
    def unit_slope(self) -> bool:  # noqa: D102
        return self.normalize

    @property
    def sup_weight(self) -> float:
        """By search: w has no maximum in closed form."""
        return _supremum(self)


@cache
def _supremum(objective: MHPO) -> float:
    """Largest weight on a grid of log-ratios that is refined around its maximum."""
    low, high = -20 * objective.saturation, 20 * objective.saturation
    for _ in range(5):
        grid = torch.linspace(low, high, 2001, dtype=torch.float64)
        weight = objective.weight(grid, torch.ones_like(grid))
        best, step = int(weight.argmax()), (high - low) / 2000
        low, high = float(grid[best]) - step, float(grid[best]) + step
    return float(weight.max())


THIRD = "formula and constants: three third-party sources that agree"

register(
    Recipe(
        "mhpo",
        MHPO(),
        paper="2603.16929",
        summary="hazard-damped saturated ratio; also scales the step to a quarter",
        reduction="sequence-mean",
        confidence=THIRD,
    ),
    Recipe(
        "mhpo-normalized",
        MHPO(normalize=True),
        paper="2603.16929",
        summary="mhpo with slope 1 at r = 1, to compare at equal learning rates",
        reduction="sequence-mean",
        confidence=THIRD + "; normalisation: ours",
    ),
)
