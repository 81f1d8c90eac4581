"""Averages of past policies: the proximal policy of PPO-EWMA (arXiv 2110.00641, 2605.12070)."""

import torch
from torch import Tensor


class ParameterAverage:
    """Exponentially weighted average of parameters, bias-corrected from its first value on.

    After every optimiser step t: w <- decay w + 1, average <- average + (theta_t - average) / w,
    so that average = sum_k decay^(t-k) theta_k / sum_k decay^(t-k) (arXiv 2110.00641; recursion
    as in the authors' code). Parameters are any tensor (..., P), leading axes being independent
    policies; `decay` in [0, 1) broadcasts to it. decay = 0 is the newest policy.
    """

    def __init__(self, parameters: Tensor, decay: Tensor | float) -> None:
        given = torch.as_tensor(decay, dtype=parameters.dtype)
        if not bool(((given >= 0) & (given < 1)).all()):
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = given.to(parameters.device)
        self.average = parameters.detach().clone()
        self.weight = torch.ones_like(self.decay)

    def update(self, parameters: Tensor, steps: Tensor | float = 1) -> None:
        """Take in parameters that are `steps` optimiser steps on.

        More than one step counts as that many steps that all ended here.
        """
        kept = self.weight * self.decay**steps
        new = (1 - self.decay**steps) / (1 - self.decay)
        self.weight = (kept + new).to(self.average.dtype)
        self.average = self.average + (parameters.detach() - self.average) * (new / self.weight)

    def reset(self, parameters: Tensor, where: Tensor | None = None) -> None:
        """Start again from `parameters`, of every policy or of those with `where` True.

        2605.12070 resets once less than 90% of the tokens exert a force: the average has then
        fallen behind (rule: third-party notes).
        """
        chosen = torch.ones_like(self.weight, dtype=torch.bool) if where is None else where
        self.average = torch.where(chosen, parameters.detach(), self.average)
        self.weight = torch.where(chosen, 1, self.weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The average and its weight; the decay is configuration."""
        return {"average": self.average, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        self.average, self.weight = state["average"].clone(), state["weight"].clone()
