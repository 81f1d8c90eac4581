"""AWR: advantage-weighted regression, a likelihood fit that ignores the ratio."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class AWR(Objective):
    """J = min(exp(A / beta), cap) log r, w = min(exp(A / beta), cap) (arXiv 1910.00177).

    w does not depend on the ratio and is never negative: bad actions are imitated less, not pushed
    away. Not proportional to A; meant for normalised advantages. The value target of the paper,
    TD(lambda) over a replay buffer, is the trainer's.
    """

    beta: float = 1.0
    """Temperature of the advantage."""

    cap: float = 20.0
    """Largest weight."""

    homogeneous = False
    unit_slope = False

    def __post_init__(self) -> None:
        require_positive(beta=self.beta, cap=self.cap)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return self.weight(log_ratio, advantage) * log_ratio

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102, ARG002
        return torch.exp(torch.clamp(advantage / self.beta, max=math.log(self.cap)))

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return min(math.exp(1 / self.beta), self.cap)


register(
    Recipe(
        "awr",
        AWR(),
        paper="1910.00177",
        summary="likelihood weighted by exp(A / beta); the ratio plays no part",
        confidence="formula, beta and cap: the authors' code",
    )
)
