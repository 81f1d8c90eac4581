"""The two-sided ratio mask of Reparameterization PPO."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.kl import KLPenalty
from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class ReparamMask(Objective):
    """J = clip(r, 1 - clip_low, 1 + clip_high) A, w = r A inside the band, 0 outside.

    Independent of the sign of A: made for pathwise gradients, which move the action and do not
    push its probability up or down (arXiv 2508.06214, Eq. 11). The paper masks the gradient; the
    value is the function that this gradient belongs to.
    """

    clip_low: float = 0.8
    """Distance of the lower edge from 1; 1 or more removes it."""

    clip_high: float = 1.0
    """Distance of the upper edge from 1."""

    def __post_init__(self) -> None:
        require_positive(clip_low=self.clip_low, clip_high=self.clip_high)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        return torch.clamp(ratio, 1 - self.clip_low, 1 + self.clip_high) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        inside = (ratio >= 1 - self.clip_low) & (ratio <= 1 + self.clip_high)
        return torch.where(inside, ratio * advantage, 0)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return 1 + self.clip_high


register(
    Recipe(
        "reparam-mask",
        ReparamMask(),
        paper="2508.06214",
        summary="two-sided hard mask whatever the sign of A, with a KL penalty: for ReparamPPO",
        kl=KLPenalty(0.05),
        confidence="formula and band: two re-implementations and a review; KL: ours (paper 0.2)",
    )
)
