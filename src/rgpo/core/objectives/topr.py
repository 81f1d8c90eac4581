"""TOPR per token: positives by likelihood, negatives by a truncated importance weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class TOPR(Objective):
    """J = sg[c] A log r with c = 1 for A > 0 and min(r, 1) for A < 0; w = c A (arXiv 2503.14286).

    Positives are imitated however far the policy has moved; negatives lose their force as the
    policy leaves them, which keeps the objective bounded. The paper splits on the sign of the
    reward, this library on that of the advantage. With sequence ratios it is `topr-sequence`.
    """

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return self.weight(log_ratio.detach(), advantage) * log_ratio

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        truncated = torch.exp(torch.clamp(log_ratio, max=0))
        return torch.where(advantage > 0, 1, truncated) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return 1.0


register(
    Recipe(
        "topr-token",
        TOPR(),
        paper="2503.14286",
        summary="likelihood for A > 0, truncated token ratio for A < 0",
        confidence="formula: third-party notes on the paper; token level: ROLL's code",
    ),
)
