"""Sign-aware RGPO: the gate on the outward side only, with or without a pull back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.gates import Gate, log_cosh
from rgpo.core.kl import KLPenalty
from rgpo.core.objective import Objective, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class SignedRGPO(Objective):
    """RGPO's gate where A pushes the ratio further from 1; the side that leads back stays open.

    The published gate (arXiv 2604.14895) does not look at the sign of A: it also silences samples
    whose gradient would bring the policy back (A < 0 with r > 1, A > 0 with r < 1), which PPO's
    clip keeps. Here, with the normalised sigmoid gate ghat and c = `pull`,

    - outward (A > 0, r > 1 or A < 0, r < 1):  w = [r sech^2(k (r - 1)/2) - c tanh^2(k d/2)] A,
      the derivative of J = [ghat(r) - c (d - (2/k) tanh(k d/2))] A;
    - restoring (the other two):               w = min(r, cap) A,
      the derivative of J = r A up to the cap, cap (1 + log(r/cap)) A beyond it.

    Both sides meet in w = A at r = 1, and everything is bounded, unlike PPO, SPO and BPO. With
    c = 0 an overshooting sample is left alone; with c > 0 it is led back with at most c |A|, and
    c = 1 makes it stationary at |d| of about 1.8/k (sinh^2(k d/2) = r/c for small d). Ours; k as
    inferred for `rgpo`, cap and c chosen, not tuned.
    """

    sharpness: float = 10.0
    """k = 2/eps of the gate."""

    cap: float = 3.0
    """Largest weight on the restoring side: where dual-clip PPO gives up, this stays constant."""

    pull: float = 0.0
    """c: what the weight tends to far outside, against A."""

    def __post_init__(self) -> None:
        require_positive(sharpness=self.sharpness)
        if not 1 <= self.cap < float("inf"):
            raise ValueError(f"cap must be finite and at least 1, got {self.cap}")
        if not 0 <= self.pull < float("inf"):
            raise ValueError(f"pull must be finite and not negative, got {self.pull}")

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        half, edge = self.sharpness / 2, math.log(self.cap)
        overshoot = log_ratio - torch.tanh(half * log_ratio) / half
        outward = Gate(self.sharpness).value(log_ratio) - self.pull * overshoot
        restoring = torch.exp(torch.clamp(log_ratio, max=edge))
        restoring = restoring + self.cap * torch.relu(log_ratio - edge)
        return torch.where(_outward(log_ratio, advantage), outward, restoring) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        overshoot = 1 - torch.exp(-2 * log_cosh(self.sharpness / 2 * log_ratio))
        outward = Gate(self.sharpness).weight(log_ratio) - self.pull * overshoot
        restoring = torch.exp(torch.clamp(log_ratio, max=math.log(self.cap)))
        return torch.where(_outward(log_ratio, advantage), outward, restoring) * advantage

    @property
    def sup_weight(self) -> float:
        """Exact where the cap or the pull is above the gate's own supremum, else at least it."""
        return max(self.cap, self.pull, Gate(self.sharpness).sup_weight)


def _outward(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Whether following A leads further from r = 1; at r = 1 and A = 0 both answers agree."""
    return (advantage > 0) == (log_ratio > 0)


OURS = "ours: early trials only; k inferred as for rgpo, cap and pull chosen, not tuned"

register(
    Recipe(
        "rgpo-signed",
        SignedRGPO(),
        paper="ours, after 2604.14895",
        summary="the gate on the outward side only; restoring samples keep min(r, cap)",
        confidence=OURS,
    ),
    Recipe(
        "rgpo-signed-kl",
        SignedRGPO(),
        paper="ours, after 2604.14895",
        summary="rgpo-signed with the adaptive KL penalty of rgpo",
        kl=KLPenalty(1.0, target=0.01),
        confidence=OURS + "; KL schedule: that of 1707.06347",
    ),
    Recipe(
        "rgpo-pullback",
        SignedRGPO(pull=1.0),
        paper="ours, after 2604.14895",
        summary="rgpo-signed whose weight turns against A outside, boundedly",
        confidence=OURS,
    ),
)
