"""RGPO's gate around the policy at the start of the update, for data of an older one."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.objectives.rgpo_signed import SignedRGPO
from rgpo.core.recipes import Recipe, register

Side = Literal["both", "outward"]


@dataclass(frozen=True)
class DecoupledRGPO(Objective):
    """J = sg[min(e^c, cap)] J_gate(u, A), u = pi / pi_prox, e^c = pi_prox / mu.

    A gate on r = pi / mu closes as the data grow old, however little this update has moved, and a
    restoring sample leads back to the old policy. Here, as in decoupled PPO (arXiv 2110.00641,
    2505.24298), the gate (arXiv 2604.14895) looks at the way of this update alone, and a truncated
    ratio corrects for the age of the data. Unlike there the weight is bounded on both sides of u:
    |w| <= cap sup|w_gate| |A|. Ours.
    """

    sharpness: float = 10.0
    """k = 2/eps of the gate."""

    side: Side = "both"
    """`both`: `RGPO`, blind to the sign of A; `outward`: `SignedRGPO`, whose restoring samples
    lead back to the proximal policy."""

    correction_high: float = 2.0
    """Largest correction, as in `ppo-tis`."""

    needs: ClassVar[tuple[str, ...]] = ("proximal_log_ratio",)

    def __post_init__(self) -> None:
        require_positive(sharpness=self.sharpness)
        if self.side not in ("both", "outward"):
            raise ValueError(f"unknown side {self.side!r}: choose both or outward")
        if not 1 <= self.correction_high < float("inf"):
            raise ValueError(
                f"correction_high must be finite and at least 1, got {self.correction_high}"
            )

    @property
    def gated(self) -> RGPO | SignedRGPO:
        """What acts on u."""
        return RGPO(self.sharpness) if self.side == "both" else SignedRGPO(self.sharpness)

    def value(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, proximal_log_ratio: Tensor
    ) -> Tensor:
        correction = self._correction(log_ratio.detach(), proximal_log_ratio.detach())
        return correction * self.gated.value(proximal_log_ratio, advantage)

    def weight(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, proximal_log_ratio: Tensor
    ) -> Tensor:
        correction = self._correction(log_ratio, proximal_log_ratio)
        return correction * self.gated.weight(proximal_log_ratio, advantage)

    def _correction(self, log_ratio: Tensor, proximal_log_ratio: Tensor) -> Tensor:
        limit = math.log(self.correction_high)
        return safe_ratio(torch.clamp(log_ratio - proximal_log_ratio, max=limit))

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return self.correction_high * self.gated.sup_weight


OURS = "ours: gate as in rgpo, cap of ppo-tis; nothing tuned"

register(
    Recipe(
        "rgpo-decoupled",
        DecoupledRGPO(),
        paper="ours, after 2604.14895",
        summary="the gate around the policy at the start of the update, data of an older one",
        confidence=OURS,
    ),
    Recipe(
        "rgpo-decoupled-signed",
        DecoupledRGPO(side="outward"),
        paper="ours, after 2604.14895",
        summary="rgpo-decoupled with the gate on the outward side only",
        confidence=OURS,
    ),
)
