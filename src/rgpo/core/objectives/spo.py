"""SPO: a quadratic penalty on the ratio in place of the clip."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class SPO(Objective):
    """J = r A - |A| (r - 1)^2 / (2 eps), w = r (A - |A| (r - 1)/eps) (arXiv 2401.16025).

    Stationary at r = 1 + eps sign(A); pulls back beyond it, growing like r^2.
    """

    epsilon: float = 0.2
    """Distance of the stationary ratio from 1."""

    def __post_init__(self) -> None:
        require_positive(epsilon=self.epsilon)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        return ratio * advantage - torch.abs(advantage) * (ratio - 1) ** 2 / (2 * self.epsilon)

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        return ratio * (advantage - torch.abs(advantage) * (ratio - 1) / self.epsilon)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "spo",
        SPO(),
        paper="2401.16025",
        summary="quadratic penalty that pulls overshooting samples back",
        confidence="formula and epsilon: the authors' code",
    )
)
