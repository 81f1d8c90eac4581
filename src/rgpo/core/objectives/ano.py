"""ANO: a redescending pull back, bounded for A > 0."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class ANO(Objective):
    """J = G(r) A for A > 0 and (2 - G(2 - r)) A for A < 0 (arXiv 2605.02320).

        G'(x) = lag nu (1 - E) / ((1 + E) (E + nu)),   E = exp(a (x - 1 - eps))

    with a and nu such that G(1) = G'(1) = 1, G'(1 + eps) = 0 and min G' = -pull. So w = r G' A
    turns against A beyond 1 + eps (1 - eps for A < 0), and fades far out. Samples that lag behind
    are weighed up, by at most `lag`: for A < 0 and large r, w tends to lag r A, without bound.
    """

    epsilon: float = 0.2
    """Distance of the stationary ratio from 1."""

    lag: float = 10.0
    """What G' tends to far behind."""

    pull: float = 1.5
    """How far G' turns negative."""

    def __post_init__(self) -> None:
        require_positive(epsilon=self.epsilon, lag=self.lag, pull=self.pull)
        if self.pull >= self.lag:
            raise ValueError(f"pull {self.pull} must be below lag {self.lag}")

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        behind = self._antiderivative(torch.where(advantage > 0, ratio, 2 - ratio))
        behind = behind + 1 - self._antiderivative(torch.ones_like(ratio))
        return torch.where(advantage > 0, behind, 2 - behind) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        slope = self._slope(torch.where(advantage > 0, ratio, 2 - ratio))
        return ratio * slope * advantage

    @property
    def _shape(self) -> tuple[float, float]:
        """The rate a and nu."""
        p = self.pull / self.lag
        s = (2 * p + math.sqrt(2 * (p + 1))) / (1 - p)
        nu = (s * s - 2) / 2
        b, c = nu * (self.lag + 1) + 1, nu * (self.lag - 1)
        return -math.log(2 * c / (b + math.sqrt(b * b + 4 * c))) / self.epsilon, nu

    def _slope(self, x: Tensor) -> Tensor:
        """G', through logistic functions of z = a (x - 1 - eps) that cannot overflow."""
        rate, nu = self._shape
        z = rate * (x - 1 - self.epsilon)
        below, above = torch.sigmoid(-z), torch.sigmoid(z)
        return self.lag * nu * (below - above) * below / (above + nu * below)

    def _antiderivative(self, x: Tensor) -> Tensor:
        """G up to a constant; for z -> infinity the two terms go to 0 and do not cancel."""
        rate, nu = self._shape
        z = rate * (x - 1 - self.epsilon)
        c = (nu + 1) / (nu - 1)
        return self.lag / rate * ((c + 1) * logsigmoid(z) - c * logsigmoid(z - math.log(nu)))

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "ano",
        ANO(),
        paper="2605.02320",
        summary="pull back that fades again far out; lagging samples are weighed up",
        confidence="formula and constants: the authors' code",
    )
)
