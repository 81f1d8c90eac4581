"""DISPO: CISPO with bounds of its own for each sign of the advantage."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.objective import Objective, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class DISPO(Objective):
    """J = sg[clip(r, low, high)] A log r, the bounds chosen by the sign of A (arXiv 2602.00983).

    The paper splits on a correct or incorrect outcome, which is the sign of A where the baseline
    lies between the two rewards. Bounds are those of the ratio itself.
    """

    positive_low: float = 0.8
    """Smallest weight for A > 0."""

    positive_high: float = 11.0
    """Largest weight for A > 0."""

    negative_low: float = 0.0
    """Smallest weight for A <= 0."""

    negative_high: float = 101.0
    """Largest weight for A <= 0."""

    def __post_init__(self) -> None:
        for sign in ("positive", "negative"):
            low, high = getattr(self, f"{sign}_low"), getattr(self, f"{sign}_high")
            if not 0 <= low <= 1 <= high < float("inf"):
                raise ValueError(
                    f"need 0 <= {sign}_low <= 1 <= {sign}_high < inf, got {low} and {high}"
                )

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return self.weight(log_ratio.detach(), advantage) * log_ratio

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        positive = torch.clamp(ratio, self.positive_low, self.positive_high)
        negative = torch.clamp(ratio, self.negative_low, self.negative_high)
        return torch.where(advantage > 0, positive, negative) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return max(self.positive_high, self.negative_high)


register(
    Recipe(
        "dispo",
        DISPO(),
        paper="2602.00983",
        summary="truncated importance weight with four bounds, never zero for A > 0",
        confidence="formula: paper; bounds: a third party's notes",
    )
)
