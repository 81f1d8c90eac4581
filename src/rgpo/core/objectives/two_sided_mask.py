"""Two-sided mask: importance sampling inside an interval, nothing outside, whatever A's sign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class TwoSidedMask(Objective):
    """J = clip(r, low, high) A without PPO's min, w = r A inside the interval, else 0.

    IcePop's mask, applied to the ratio that is optimised and not, as IcePop does, to the mismatch
    between trainer and inference engine (that is a correction of the data). Also the token mask of
    arXiv 2607.07508. Unlike PPO it drops restoring samples too.
    """

    low: float = 0.5
    """Smallest ratio that counts."""

    high: float = 2.0
    """Largest ratio that counts, and largest weight."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1 < self.high < float("inf"):
            raise ValueError(
                f"need 0 <= low < 1 < high < inf, got low {self.low}, high {self.high}"
            )

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return torch.clamp(safe_ratio(log_ratio), self.low, self.high) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        inside = (ratio >= self.low) & (ratio <= self.high)
        return ratio * advantage * inside

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return self.high


register(
    Recipe(
        "two-sided-mask",
        TwoSidedMask(),
        paper="2607.07508",
        summary="importance sampling inside [low, high], no force outside on either side",
        confidence="mask: third-party summaries; bounds: TRL's example for IcePop",
    )
)
