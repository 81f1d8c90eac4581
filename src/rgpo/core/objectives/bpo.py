"""BPO and GBPO: an absolute loss towards a bounded target ratio."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class BPO(Objective):
    """J = -|r - rho| |A|, w = sign(rho - r) |A| r (arXiv 2604.18578).

        rho = 1 - low + (low + high) s(m / temperature)

    s is the logistic sigmoid, m the return or score less its *median* given the state or prompt:
    under |r - 1| <= eps the optimal policy is 1 + eps sign(Q - median Q) times the old one. The
    direction comes from m alone, |A| only scales it; overshooting samples are pulled back with
    undiminished weight, and the kink at rho makes large steps dither around it.
    """

    low: float = 0.3
    """Distance of the smallest target from 1."""

    high: float = 0.3
    """Distance of the largest target from 1."""

    temperature: float = 1e-3
    """Width of the transition between the two; 0.001 makes it practically a step."""

    needs: ClassVar[tuple[str, ...]] = ("median_advantage",)
    unit_slope = False

    def __post_init__(self) -> None:
        require_positive(high=self.high, temperature=self.temperature)
        if not 0 < self.low < 1:
            raise ValueError(f"low must lie in (0, 1), got {self.low}")

    def value(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, median_advantage: Tensor
    ) -> Tensor:
        distance = torch.abs(safe_ratio(log_ratio) - self._target(median_advantage))
        return -distance * torch.abs(advantage)

    def weight(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, median_advantage: Tensor
    ) -> Tensor:
        ratio = safe_ratio(log_ratio)
        return torch.sign(self._target(median_advantage) - ratio) * torch.abs(advantage) * ratio

    def _target(self, median_advantage: Tensor) -> Tensor:
        share = torch.sigmoid(median_advantage / self.temperature)
        return 1 - self.low + (self.low + self.high) * share

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "bpo",
        BPO(),
        paper="2604.18578",
        summary="pulled to 1 +- eps by the sign of the return less its median",
        confidence="formula and defaults: the authors' code (SB3; no advantage normalisation)",
    ),
    Recipe(
        "gbpo",
        BPO(temperature=1e-4),
        paper="2604.18578",
        summary="bpo for groups: by the score less its group's median, over the group's std",
        confidence="formula: the authors' code (verl); temperature: its README, its config has 1",
    ),
)
