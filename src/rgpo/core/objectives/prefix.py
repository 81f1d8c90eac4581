"""PPO's clip on the ratio of the prefix: what the policy would still have written up to here."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.clips import clipped_value, clipped_weight
from rgpo.core.objective import Objective, Scope, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register
from rgpo.core.units import through_own


@dataclass(frozen=True)
class PrefixPPO(Objective):
    """PPO on c_t, the sum (or mean) of d up to token t, clipped in log-space (arXiv 2605.07331).

    J_t = min(e^c A, e^clip(c, -low_t, high_t) A), and at least e^dual_t A for A < 0. The gradient
    goes through the token's own d_t: w_t = e^c A_t where not clipped. (Through all tokens of the
    prefix, as `at_level` has it, an advantage that the tokens share would count once per later
    token.) Bounds scale with the t^growth of the standard deviation of a sum of t terms, those of
    a mean with t^-growth.
    """

    log_low: float = 0.025
    """Lower bound of c, as a distance from 0, at the first token."""

    log_high: float = 0.05
    """Upper bound of c at the first token."""

    log_dual: float | None = 0.05
    """Bound of c for A < 0, beyond which there is no force, at the first token. None: none."""

    growth: float = 0.5
    """Exponent in [0, 1] of the bounds' growth; 0 keeps them constant."""

    mean: bool = False
    """Whether c is the mean in place of the sum."""

    needs: ClassVar[tuple[str, ...]] = ("mask",)
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        require_positive(log_low=self.log_low, log_high=self.log_high)
        if self.log_dual is not None:
            require_positive(log_dual=self.log_dual)
        if not 0 <= self.growth <= 1:
            raise ValueError(f"growth must lie in [0, 1], got {self.growth}")

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        prefix, scale = self._prefix(log_ratio, mask)
        return clipped_value(through_own(prefix, log_ratio), advantage, *self._bounds(scale))

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        prefix, scale = self._prefix(log_ratio, mask)
        return clipped_weight(prefix, advantage, *self._bounds(scale))

    def _bounds(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dual = None if self.log_dual is None else safe_ratio(self.log_dual * scale)
        return torch.exp(-self.log_low * scale), safe_ratio(self.log_high * scale), dual

    def _prefix(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The c of every token and t^growth (t^-growth for means)."""
        position = torch.clamp(mask.to(log_ratio.dtype).cumsum(-1), min=1)
        total = torch.where(mask, log_ratio, 0).cumsum(-1)
        if self.mean:
            return total / position, position**-self.growth
        return total, position**self.growth

    @property
    def sup_weight(self) -> float:
        """Infinite without a dual clip, and where the bounds grow with the position."""
        if self.log_dual is None or (self.growth > 0 and not self.mean):
            return float("inf")
        return math.exp(max(self.log_dual, self.log_high))


_PPO_BOUNDS = PrefixPPO(-math.log(0.8), math.log(1.2), log_dual=None, growth=0.0)

register(
    Recipe(
        "ctpo",
        PrefixPPO(),
        paper="2605.07331",
        summary="clip on the exact ratio of the prefix, with bounds that grow like its spread",
        confidence="formula and defaults: authors' code",
    ),
    Recipe(
        "ppo-prefix-variant",
        _PPO_BOUNDS,
        paper="2605.07331",
        summary="PPO's bounds on the exact ratio of the prefix",
        confidence="formula: CTPO's code with growth 0; PPO's bounds: inferred",
    ),
    Recipe(
        "ppo-prefix-mean-variant",
        replace(_PPO_BOUNDS, mean=True),
        paper="2608.01418",
        summary="PPO's bounds on the geometric mean of the prefix's ratios",
        confidence="inferred from the paper's title (PNPO) and a mode of CTPO's code",
    ),
)
