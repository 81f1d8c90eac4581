"""V-MPO: a likelihood fit to the better half of a batch."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.kl import KLPenalty
from rgpo.core.objective import Objective, Scope, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class VMPO(Objective):
    """J_i = N psi_i log r_i, psi the softmax of A / eta over the upper part (arXiv 1909.12238).

    N counts the elements of the batch, so that their mean is sum_i psi_i log pi_i. Elements below
    the quantile weigh nothing; ties with it are kept. w = N psi does not depend on the ratio: what
    keeps the policy near the old one is the KL penalty alone.

    The paper adapts eta by a dual step and constrains the KL by a Lagrange multiplier. Here eta is
    fixed, and the recipe has the adaptive penalty of 1707.06347 in the multiplier's place.
    """

    temperature: float = 1.0
    """eta."""

    fraction: float = 0.5
    """Share of the batch that is imitated."""

    homogeneous = False
    unit_slope = False
    scope: ClassVar[Scope] = "batch"
    needs: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction}")

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        return self.weight(log_ratio, advantage, mask) * log_ratio

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102, ARG002
        lowest = torch.finfo(advantage.dtype).min
        score = torch.where(mask, advantage, lowest)
        count = mask.sum(-1, keepdim=True)
        rank = torch.ceil(count * self.fraction).long() - 1
        ordered = score.sort(-1, descending=True).values
        quantile = ordered.gather(-1, torch.clamp(rank, min=0))
        keep = mask & (score >= quantile)
        psi = torch.softmax(torch.where(keep, score / self.temperature, lowest), -1)
        return torch.where(keep, count * psi, 0)

    @property
    def sup_weight(self) -> float:
        """With advantages of +1 and -1: few +1 among -1, or +1 in exactly the upper part."""
        return max(math.exp(min(2 / self.temperature, 700.0)), 1 / self.fraction)


register(
    Recipe(
        "vmpo",
        VMPO(),
        paper="1909.12238",
        summary="softmax-weighted likelihood of the better half; the ratio plays no part",
        kl=KLPenalty(1.0, target=0.01),
        confidence=(
            "formula and fraction: rlax's code; eta fixed at 1 and the KL schedule of 1707.06347 "
            "in place of the paper's dual variables: ours"
        ),
    )
)
