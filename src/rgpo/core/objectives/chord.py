"""CHORD: tokens of an expert as a second data stream beside reinforcement learning.

loss = (1 - mu) policy_loss(..., own rollouts) + mu policy_loss("chord-phi", ..., expert tokens),
each over its own number of tokens (arXiv 2508.11408). For the expert stream the advantage is 1
and the behaviour log-prob 0: the expert is taken to be certain of its token, so that the value is
the usual log-likelihood.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rgpo.core.objective import Objective
from rgpo.core.objectives.reinforce import Reinforce
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class ExpertTokens(Objective):
    """J = sg[c] A log r, w = c A with c a function of p = pi(token), of the present policy.

    - phi:        c = p (1 - p), nothing to learn where the policy is sure either way.
    - importance: c = p, the ratio to an expert of probability 1. An ablation of the paper: it
      makes the entropy collapse.
    """

    form: Literal["phi", "importance"] = "phi"
    """Which function of p."""

    needs: ClassVar[tuple[str, ...]] = ("log_prob",)

    def __post_init__(self) -> None:
        if self.form not in ("phi", "importance"):
            raise ValueError(f"unknown form {self.form!r}: choose phi or importance")

    def value(self, log_ratio: Tensor, advantage: Tensor, log_prob: Tensor) -> Tensor:  # noqa: D102
        return self._coefficient(log_prob).detach() * log_ratio * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor, log_prob: Tensor) -> Tensor:  # noqa: D102
        return self._coefficient(log_prob) * torch.ones_like(log_ratio) * advantage

    def _coefficient(self, log_prob: Tensor) -> Tensor:
        probability = torch.exp(torch.clamp(log_prob, max=0))
        if self.form == "importance":
            return probability
        return probability * -torch.expm1(torch.clamp(log_prob, max=0))

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return 0.25 if self.form == "phi" else 1.0

    @property
    def unit_slope(self) -> bool:  # noqa: D102
        return False


def expert_share(
    step: int, *, peak: float = 0.9, valley: float = 0.05, warmup: int = 0, decay: int = 200
) -> float:
    """CHORD-mu's weight of the expert loss at optimiser step `step`, from 0.

    Linear from 0 to `peak` over `warmup` steps, then a half cosine to `valley` over `decay` steps,
    then `valley`. Defaults: paper. CHORD-phi uses 0.1 throughout.
    """
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / decay) if decay else 1.0
    return valley + (peak - valley) * (1 + math.cos(math.pi * done)) / 2


_SOURCE = "formula: paper and frameworks' code"

register(
    Recipe(
        "chord-phi",
        ExpertTokens(),
        paper="2508.11408",
        data="expert",
        summary="expert tokens weighed by p (1 - p): a second stream with A = 1, mu = 0.1",
        confidence=_SOURCE,
    ),
    Recipe(
        "chord-mu",
        Reinforce(),
        paper="2508.11408",
        data="expert",
        summary="plain log-likelihood of expert tokens: a second stream, A = 1, mu on a schedule",
        confidence=_SOURCE,
    ),
    Recipe(
        "chord-is",
        ExpertTokens(form="importance"),
        paper="2508.11408",
        data="expert",
        summary="expert tokens weighed by p, the paper's ablation that loses its entropy",
        confidence=_SOURCE,
    ),
)
