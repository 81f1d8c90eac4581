"""REINFORCE: the policy gradient without any correction for the age of the data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class Reinforce(Objective):
    """J = A log r, w = A (Williams 1992; the log gate of arXiv 2604.14895's table)."""

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return log_ratio * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(log_ratio) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return 1.0


register(
    Recipe(
        "reinforce",
        Reinforce(),
        paper="Williams 1992",
        summary="log-ratio surrogate: every sample keeps weight A however old it is",
    )
)
