"""Two-sided mask: importance sampling inside a band, nothing outside, whatever the sign of A."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.kl import KLPenalty
from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class TwoSidedMask(Objective):
    """J = clip(r, 1 - clip_low, 1 + clip_high) A, w = r A inside the band, 0 outside.

    PPO without its min: restoring samples are dropped too. The token mask of arXiv 2607.07508;
    IcePop applies it to the mismatch between trainer and inference engine, a correction of the
    data (`ppo-mis`), and not as here to the ratio that is optimised. For pathwise gradients
    (arXiv 2508.06214, Eq. 11) the sign of A must not matter: they move the action and do not push
    its probability up or down. These papers mask the gradient; the value is the function that
    this gradient belongs to.
    """

    clip_low: float = 0.5
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
        "two-sided-mask",
        TwoSidedMask(),
        paper="2607.07508",
        summary="importance sampling inside [0.5, 2], no force outside on either side",
        confidence="mask: third-party summaries; bounds: TRL's example for IcePop",
    ),
    Recipe(
        "reparam-mask",
        TwoSidedMask(clip_low=0.8),
        paper="2508.06214",
        summary="two-sided hard mask whatever the sign of A, with a KL penalty: for ReparamPPO",
        kl=KLPenalty(0.05),
        confidence="formula and band: two re-implementations and a review; KL: ours (paper 0.2)",
    ),
)
