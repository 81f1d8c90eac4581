"""Sample Dropout: samples far from r = 1 are left out, the others make up for them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.clips import clipped_value, clipped_weight
from rgpo.core.objective import Objective, Scope, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class SampleDropout(Objective):
    """PPO on the samples with |r - 1| < threshold, times N / N_kept (arXiv 2302.02299).

    N counts the batch and N_kept those samples, so that the mean is that of the kept ones. If none
    qualifies all are kept, as in the authors' code. The weights of few kept samples are large.
    """

    threshold: float = 1.0
    """Distance from 1 at which a sample is dropped."""

    clip: float = 0.2
    """Distance of PPO's bounds from 1."""

    scope: ClassVar[Scope] = "batch"
    needs: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        require_positive(threshold=self.threshold, clip=self.clip)

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        value = clipped_value(log_ratio, advantage, 1 - self.clip, 1 + self.clip)
        return self._factor(log_ratio.detach(), mask) * value

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        weight = clipped_weight(log_ratio, advantage, 1 - self.clip, 1 + self.clip)
        return self._factor(log_ratio, mask) * weight

    def _factor(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """N / N_kept for kept samples, else 0; 1 for all if none is kept."""
        keep = mask & (torch.abs(safe_ratio(log_ratio) - 1) < self.threshold)
        kept = keep.sum(-1, keepdim=True)
        factor = keep * mask.sum(-1, keepdim=True) / torch.clamp(kept, min=1).to(log_ratio.dtype)
        return torch.where(kept > 0, factor, 1)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "sample-dropout",
        SampleDropout(),
        paper="2302.02299",
        summary="PPO on the samples near r = 1, renormalised by their number",
        confidence="formula and defaults: the authors' code",
    )
)
