"""PPO's clipped surrogate, symmetric, asymmetric, dual-clipped and per sequence."""

from dataclasses import dataclass

from torch import Tensor

from rgpo.core.clips import clipped_value, clipped_weight
from rgpo.core.objective import Objective, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class PPO(Objective):
    """J = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (arXiv 1707.06347, Eq. 7).

    w = r A while the ratio has not left the interval on the side that A pushes to, else 0. For
    A < 0 and r > 1 nothing bounds the weight unless `dual_clip` is set, then J = max(J, c A) for
    A < 0 (arXiv 1912.09729) and w = 0 beyond r = c.
    """

    clip_low: float = 0.2
    """Distance of the lower bound from 1; 1 or more removes it."""

    clip_high: float = 0.2
    """Distance of the upper bound from 1."""

    dual_clip: float | None = None
    """c > 1: ratios beyond it exert no force when A < 0. None: unbounded, as in the paper."""

    def __post_init__(self) -> None:
        require_positive(clip_low=self.clip_low, clip_high=self.clip_high)
        if self.dual_clip is not None and not 1 + self.clip_high < self.dual_clip < float("inf"):
            raise ValueError(f"dual_clip must be finite and exceed 1 + clip_high: {self.dual_clip}")

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return clipped_value(log_ratio, advantage, *self._bounds, self.dual_clip)

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return clipped_weight(log_ratio, advantage, *self._bounds, self.dual_clip)

    @property
    def _bounds(self) -> tuple[float, float]:
        return 1 - self.clip_low, 1 + self.clip_high

    @property
    def sup_weight(self) -> float:  # noqa: D102
        if self.dual_clip is None:
            return float("inf")
        return self.dual_clip


register(
    Recipe(
        "ppo",
        PPO(),
        paper="1707.06347",
        summary="one-sided hard clip; the restoring side keeps its full weight",
    ),
    Recipe(
        "ppo-dual-clip",
        PPO(dual_clip=3.0),
        paper="1912.09729",
        summary="PPO whose weight is also bounded for A < 0 and large ratios",
        confidence="formula: frameworks' code; c = 3: verl's default",
    ),
    Recipe(
        "grpo",
        PPO(),
        paper="2402.03300",
        summary="PPO's clip, every sequence's mean counting alike; for group-relative advantages",
        reduction="sequence-mean",
    ),
    Recipe(
        "dapo",
        PPO(clip_high=0.28),
        paper="2503.14476",
        summary="PPO with clip-higher and a token mean over the global batch",
    ),
    Recipe(
        "gspo",
        PPO(clip_low=3e-4, clip_high=4e-4),
        paper="2507.18071",
        summary="PPO's clip on the length-normalised sequence ratio",
        level="sequence",
        reduction="sequence-mean",
    ),
)
