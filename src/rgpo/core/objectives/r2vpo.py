"""R2VPO: a penalty on the variance of the ratio, with a fixed or an adaptive multiplier."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class R2VPO(Objective):
    """J = r A - lambda (r - 1)^2, w = r (A - 2 lambda (r - 1)) (arXiv 2601.03320, 2605.26784).

    The Lagrangian of E[(r - 1)^2] <= delta. Stationary at r = 1 + A / (2 lambda): the penalty
    does not scale with |A|, so that weak samples are held near r = 1 and strong ones are not.
    With lambda = |A| / (2 eps) per sample it would be SPO.
    """

    multiplier: float = 0.04
    """lambda."""

    homogeneous = False

    def __post_init__(self) -> None:
        if not 0 <= self.multiplier < float("inf"):
            raise ValueError(f"multiplier must be finite and not negative, got {self.multiplier}")

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        return ratio * advantage - self.multiplier * (ratio - 1) ** 2

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        return ratio * (advantage - 2 * self.multiplier * (ratio - 1))

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


@dataclass(frozen=True)
class DualR2VPO(R2VPO):
    """R2VPO with lambda <- max(0, lambda + rate (E[(r - 1)^2] - delta)) after every update.

    Gradient ascent on the dual of the constraint. The papers adapt lambda; how, and the constants,
    were not seen: inferred. The measured variance counts at most 2 delta, so that lambda rises no
    faster than it can fall and one wild ratio does not set it for good; where it is not a number,
    lambda stays.
    """

    multiplier: float = 1.0
    """lambda at the start."""

    delta: float = 0.02
    """Variance of the ratio per update that is aimed at; for small steps twice the KL."""

    rate: float = 10.0
    """Step size of the dual ascent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(delta=self.delta, rate=self.rate)

    def adapt(self, diagnostics: Mapping[str, float]) -> Self:
        """One dual step on the diagnostic `chi2`."""
        chi2 = diagnostics["chi2"]
        if math.isnan(chi2):
            return self
        step = self.rate * (min(chi2, 2 * self.delta) - self.delta)
        return replace(self, multiplier=max(0.0, self.multiplier + step))


register(
    Recipe(
        "r2vpo",
        R2VPO(),
        paper="2601.03320",
        summary="quadratic penalty on the ratio that does not scale with |A|",
        confidence="formula: third-party code and summaries; lambda: a third-party sandbox",
    ),
    Recipe(
        "r2vpo-dual-variant",
        DualR2VPO(),
        paper="2601.03320",
        summary="r2vpo whose multiplier holds the variance of the ratio at a target",
        confidence="adaptive lambda: third-party summaries; its rule and constants: inferred",
    ),
)
