"""What a window says of R runs: every metric of the new policies, and the episodes that ended."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgpo.core.diagnostics import KL_SPIKE, ratio_diagnostics
from rgpo.core.kl import normal_kl
from rgpo.differentiable.learner import Batch, Learner, shares
from rgpo.differentiable.surrogate import normal_entropy, normal_log_prob, squash_log_slope
from rgpo.differentiable.window import Window


@torch.no_grad()
def measure(learner: Learner, batch: Batch, *, bounded: bool) -> dict[str, Tensor]:
    """Every diagnostic of the new policies against the old ones, on the whole window: (R,) each."""
    mean, log_std = learner.actor(batch.observation)
    log_ratio = normal_log_prob(mean, log_std, batch.action) - batch.log_prob
    ones = torch.ones_like(log_ratio)
    weight = learner.objectives.weight(log_ratio, ones)
    share = shares(batch.mask, log_ratio.dtype)
    kl = normal_kl(batch.mean, batch.log_std, mean, log_std)
    entropy = normal_entropy(log_std)
    if bounded:
        entropy = entropy + squash_log_slope(batch.action)
    norm = torch.linalg.vector_norm(batch.gradient, dim=-1)
    metrics = ratio_diagnostics(log_ratio, ones, weight, batch.mask)
    metrics["kl"] = (kl * share).sum(1)
    metrics["kl_spike"] = metrics["kl"] > KL_SPIKE
    metrics["entropy"] = (entropy * share).sum(1)
    metrics["ratio_kept"] = ((weight != 0) * share).sum(1)
    metrics["action_gradient_norm"] = (norm * share).sum(1)
    metrics["action_gradient_max"] = norm.amax(1)
    return metrics


@torch.no_grad()
def variances(batch: Batch, discounted_advantage: Tensor) -> dict[str, Tensor]:
    """Variance over samples of the two estimators of the same d J / d mean(s_t), (R,) each."""
    score = (batch.action - batch.mean) * torch.exp(-2 * batch.log_std)
    return {
        "variance_pathwise": _variance(batch.gradient, batch.mask),
        "variance_score": _variance(score * discounted_advantage[..., None], batch.mask),
    }


def _variance(sample: Tensor, mask: Tensor) -> Tensor:
    """Of samples (R, N, A) under the mask (R, N), summed over the last axis: (R,)."""
    keep, count = mask[..., None], mask.sum(1)
    sample = torch.where(keep, sample, 0)
    mean = sample.sum(1, keepdim=True) / torch.clamp(count, min=1)[:, None, None]
    squares = torch.where(keep, (sample - mean) ** 2, 0).sum((1, 2))
    return squares / torch.clamp(count - 1, min=1)


class Episodes:
    """Returns and lengths of the episodes of R runs of E environments, as they end."""

    def __init__(self, elapsed: Tensor) -> None:
        """`elapsed` (R, E): steps already in the first episodes, which do not count unless 0."""
        self.running_return = np.zeros(elapsed.shape)
        self.running_length = np.zeros(elapsed.shape, dtype=np.int64)
        self.whole = elapsed.cpu().numpy() == 0
        """Where the present episode counts, (R, E): seen from its start."""

    def add(self, window: Window, alive: Tensor) -> list[dict[str, Any]]:
        """Take in a window; of each run the mean return and length of those that ended in it.

        Where `alive` (R, E) is False the episode is forgotten, and a new one begins after it.
        """
        healthy = alive.cpu().numpy()
        self.whole &= healthy
        rewards = np.where(healthy, window.reward.double().cpu().numpy(), 0)
        ends = (window.terminated | window.truncated).cpu().numpy()
        ended: list[list[tuple[float, int]]] = [[] for _ in self.whole]
        for reward, done in zip(rewards, ends, strict=True):
            self.running_return += reward
            self.running_length += 1
            for run, place in np.argwhere(done & self.whole):
                at = (run, place)
                ended[run].append((float(self.running_return[at]), int(self.running_length[at])))
            self.running_return[done], self.running_length[done] = 0, 0
            self.whole |= done & healthy
        self.running_return[~healthy], self.running_length[~healthy] = 0, 0
        self.whole |= ~healthy
        return [
            {
                "return": float(np.mean([one[0] for one in mine])) if mine else None,
                "episode_length": float(np.mean([one[1] for one in mine])) if mine else None,
                "episodes": len(mine),
            }
            for mine in ended
        ]

    def state(self, run: int) -> dict[str, Tensor]:
        """The tensors of one run."""
        return {name: torch.from_numpy(getattr(self, name)[run]) for name in _EPISODE_STATE}

    def restore(self, run: int, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name in _EPISODE_STATE:
            getattr(self, name)[run] = state[name].numpy()


_EPISODE_STATE = ("running_return", "running_length", "whole")
