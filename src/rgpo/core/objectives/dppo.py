"""DPPO: PPO's one-sided mask on a divergence of probabilities instead of their ratio."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rgpo.core.objective import Objective, safe_ratio
from rgpo.core.recipes import Recipe, register

Divergence = Literal["tv", "kl"]
ALMOST_ZERO = -1e-6  # largest log-probability, so that 1 - p has a logarithm


@dataclass(frozen=True)
class DPPO(Objective):
    """J = sg[min(r, cap) M] A log r, w = min(r, cap) M A (arXiv 2602.04879).

    With p = pi and q = pi_old of the action taken, M = 0 where A pushes p further from q (A > 0
    and p > q, or A <= 0 and p < q) and their divergence exceeds delta:

    - tv: |p - q|, the total variation of the two-event distribution "this action or another";
    - kl: KL(Bern(q) || Bern(p)).

    A ratio of 10 on a token of probability 1e-5 stays inside, one of 1.3 on a token of probability
    0.6 does not: PPO does the opposite. Needs discrete actions, and the rollout's own log-probs.
    """

    divergence: Divergence = "tv"
    """Which divergence the mask tests."""

    delta_low: float = 0.15
    """Threshold for A <= 0 and p < q."""

    delta_high: float = 0.15
    """Threshold for A > 0 and p > q."""

    cap: float = 20.0
    """Largest weight."""

    needs: ClassVar[tuple[str, ...]] = ("log_prob",)

    def __post_init__(self) -> None:
        if self.divergence not in ("tv", "kl"):
            raise ValueError(f"unknown divergence {self.divergence!r}: choose tv or kl")
        for name in ("delta_low", "delta_high"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 1 <= self.cap < float("inf"):
            raise ValueError(f"cap must be finite and at least 1, got {self.cap}")

    def value(self, log_ratio: Tensor, advantage: Tensor, log_prob: Tensor) -> Tensor:  # noqa: D102
        return self.weight(log_ratio.detach(), advantage, log_prob) * log_ratio

    def weight(self, log_ratio: Tensor, advantage: Tensor, log_prob: Tensor) -> Tensor:  # noqa: D102
        log_p = torch.clamp(log_prob.detach(), max=ALMOST_ZERO)
        log_q = torch.clamp(log_prob.detach() - log_ratio, max=ALMOST_ZERO)
        p, q = torch.exp(log_p), torch.exp(log_q)
        distance = torch.abs(p - q)
        if self.divergence == "kl":
            distance = q * (log_q - log_p) + (1 - q) * (torch.log1p(-q) - torch.log1p(-p))
        left_high = (advantage > 0) & (p > q) & (distance > self.delta_high)
        left_low = (advantage <= 0) & (p < q) & (distance > self.delta_low)
        truncated = torch.clamp(safe_ratio(log_ratio), max=self.cap)
        return truncated * advantage * ~(left_high | left_low)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return self.cap


CODE = "formula and deltas: the authors' code (token sums over a constant there); cap 20: TRL's"

register(
    Recipe(
        "dppo-tv",
        DPPO(),
        paper="2602.04879",
        summary="one-sided mask on the difference of the probabilities",
        confidence=CODE,
    ),
    Recipe(
        "dppo-kl",
        DPPO(divergence="kl", delta_low=0.05, delta_high=0.05),
        paper="2602.04879",
        summary="one-sided mask on the binary KL of the probabilities",
        confidence=CODE,
    ),
)
