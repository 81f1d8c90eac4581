"""BAPO: clip bounds that balance the force of positive and negative advantages."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rgpo.core.clips import clipped_value, clipped_weight
from rgpo.core.objective import Objective, Scope, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register

Count = Literal["unclipped", "published"]


@dataclass(frozen=True)
class BAPO(Objective):
    """Dual-clip PPO whose bounds [low, high] of the ratio are searched for each batch (2510.18927).

    With P and N the contributions of positive and negative advantages, first `low` is raised in
    steps to `low_max`, then `high` to `high_max`, until P >= share (P + N). Bounds are constants
    of the gradient. What counts as a contribution:

    - unclipped: r |A| of the elements that keep their gradient, the paper's intent;
    - published: min(r, high) A and max(r, low) |A|, clipped ones included, the authors' code. There
      raising `low` can only raise N, so that a search that starts always ends at `low_max`, and
      only `high` can meet the target.

    A batch without positive contributions never meets it.
    """

    low: float = 0.6
    """Lower bound of the ratio at the start of the search."""

    low_max: float = 0.9
    """Largest lower bound."""

    high: float = 1.2
    """Upper bound at the start of the search."""

    high_max: float = 3.0
    """Largest upper bound."""

    step: float = 0.05
    """Distance of neighbouring candidates."""

    share: float = 0.5
    """Target of P / (P + N); the code's ratio P / N is share / (1 - share)."""

    dual_clip: float = 3.0
    """Ratio beyond which A < 0 exerts no force."""

    count: Count = "unclipped"
    """What counts as a contribution."""

    scope: ClassVar[Scope] = "batch"
    needs: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.low_max < 1:
            raise ValueError(f"need 0 < low <= low_max < 1, got {self.low} and {self.low_max}")
        if not 1 < self.high <= self.high_max < float("inf"):
            raise ValueError(
                f"need 1 < high <= high_max < inf, got {self.high} and {self.high_max}"
            )
        require_positive(step=self.step)
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1), got {self.share}")
        if not 1 < self.dual_clip < float("inf"):
            raise ValueError(f"dual_clip must be finite and exceed 1, got {self.dual_clip}")
        if self.count not in ("unclipped", "published"):
            raise ValueError(f"unknown count {self.count!r}: choose unclipped or published")

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        low, high = self.bounds(log_ratio.detach(), advantage, mask)
        return clipped_value(log_ratio, advantage, low, high, self.dual_clip)

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        low, high = self.bounds(log_ratio, advantage, mask)
        return clipped_weight(log_ratio, advantage, low, high, self.dual_clip)

    def bounds(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds of each unit, (..., B) -> (..., 1): all candidates at once, then the first."""
        lows = _candidates(self.low, self.low_max, self.step, log_ratio)
        highs = _candidates(self.high, self.high_max, self.step, log_ratio)
        positive, negative = self._contributions(log_ratio, advantage, mask, lows, highs)
        # the path of the search: every low with the first high, then every high with the last low
        low = torch.cat([lows, lows[-1:].expand(len(highs) - 1)])
        high = torch.cat([highs[:1].expand(len(lows) - 1), highs])
        before = positive[..., :1].expand(*positive.shape[:-1], len(lows) - 1)
        after = negative[..., -1:].expand(*negative.shape[:-1], len(highs) - 1)
        positive, negative = torch.cat([before, positive], -1), torch.cat([negative, after], -1)
        met = (positive > 0) & (positive * (1 - self.share) >= self.share * negative)
        met[..., -1] = True
        first = met.int().argmax(-1, keepdim=True)
        return low[first], high[first]

    def _contributions(
        self, log_ratio: Tensor, advantage: Tensor, mask: Tensor, lows: Tensor, highs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """P for every candidate `high` and N for every `low`: (..., H) and (..., L)."""
        ratio = safe_ratio(torch.where(mask, log_ratio, 0)).unsqueeze(-2)
        size = torch.where(mask, torch.abs(advantage), 0).unsqueeze(-2)
        positive, negative = (advantage > 0).unsqueeze(-2), (advantage < 0).unsqueeze(-2)
        lows, highs = lows.unsqueeze(-1), highs.unsqueeze(-1)
        if self.count == "published":
            upper, lower = torch.clamp(ratio, max=highs), torch.clamp(ratio, min=lows)
        else:
            upper = torch.where(ratio <= highs, ratio, 0)
            lower = torch.where((ratio >= lows) & (ratio <= self.dual_clip), ratio, 0)
        return (upper * size * positive).sum(-1), (lower * size * negative).sum(-1)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return max(self.high_max, self.dual_clip)


def _candidates(start: float, end: float, step: float, like: Tensor) -> Tensor:
    """From start to end, evenly, at most `step` apart."""
    count = math.ceil((end - start) / step - 1e-6) + 1
    return torch.linspace(start, end, count, dtype=like.dtype, device=like.device)


register(
    Recipe(
        "bapo",
        BAPO(),
        paper="2510.18927",
        summary="PPO with bounds moved until positives exert half of the force",
        confidence="search, ranges and share: paper and README; step: the authors' code",
    ),
    Recipe(
        "bapo-published",
        BAPO(low_max=0.8, high_max=2.0, count="published"),
        paper="2510.18927",
        summary="bapo as the authors' code has it: the search counts clipped samples too",
        confidence="formula and defaults: the authors' code",
    ),
)
