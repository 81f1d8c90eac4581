"""BIRIS per action: an absolute penalty on the ratio's distance from 1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register

NOISE = 1e-5
"""Distance of r from 1 that means nothing: that of float32 log-probs computed twice."""


@dataclass(frozen=True)
class BIRIS(Objective):
    """J = r A - alpha |r - 1|, w = r (A - alpha sign(r - 1)) (arXiv 2209.07074).

    Shifts the advantage by alpha towards the old policy: samples with |A| < alpha are pulled to
    r = 1, all others keep their direction, without bound. Distances up to NOISE count as 0, or the
    sign at the start of every update would be that of the rounding. The paper's ratio is that of
    the whole trajectory.
    """

    alpha: float = 0.1
    """Strength of the penalty."""

    homogeneous = False

    def __post_init__(self) -> None:
        require_positive(alpha=self.alpha)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        return ratio * advantage - self.alpha * torch.relu(torch.abs(ratio - 1) - NOISE)

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        apart = torch.abs(ratio - 1) > NOISE
        return ratio * (advantage - self.alpha * torch.sign(ratio - 1) * apart)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "biris-token",
        BIRIS(),
        paper="2209.07074",
        summary="importance sampling with an absolute penalty on the ratio of each action",
        confidence="formula and alpha: the authors' code; per action instead of trajectory: ours",
    ),
)
