"""Running moments of observations and of discounted returns, one set for every run."""

from typing import Any

import numpy as np


class RunningMoments:
    """Mean and variance of (R, n, ...) samples seen so far, kept apart for each of R runs.

    Chan's parallel update in float64; starts at mean 0, variance 1 with a weight of 1e-4 samples.
    """

    def __init__(self, runs: int, shape: tuple[int, ...]) -> None:
        self.mean = np.zeros((runs, *shape))
        self.variance = np.ones((runs, *shape))
        self.count = np.full(runs, 1e-4)

    def update(self, samples: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Take in samples (R, n, *shape), of each run those where `mask` (R, n) is True."""
        samples = samples.astype(np.float64)
        if mask is None or mask.all():
            number: Any = samples.shape[1]
            mean, variance = samples.mean(1), samples.var(1)
        else:
            number, mean, variance = _masked_moments(samples, mask)
        total = self.count + number
        share = (number / total).reshape(-1, *([1] * (mean.ndim - 1)))
        shift = mean - self.mean
        self.variance += share * (variance - self.variance + (1 - share) * shift**2)
        self.mean += share * shift
        self.count = total

    def state(self, run: int) -> dict[str, np.ndarray]:
        """What `restore` takes, for one run: arrays of at least one dimension."""
        parts = {"mean": self.mean, "variance": self.variance, "count": self.count}
        return {name: np.atleast_1d(array[run]).copy() for name, array in parts.items()}

    def restore(self, run: int, state: dict[str, np.ndarray]) -> None:
        """Take over the moments of one run from a checkpoint."""
        for name, array in (("mean", self.mean), ("variance", self.variance)):
            array[run] = state[name].reshape(array[run].shape)
        self.count[run] = state["count"][0]


def _masked_moments(
    samples: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number (R,), mean and variance (R, ...) of the samples under the mask; 0 of none."""
    number = mask.sum(1)
    shape = (*mask.shape, *([1] * (samples.ndim - 2)))
    keep, count = mask.reshape(shape), np.maximum(number, 1).reshape(-1, *shape[2:])
    mean = np.where(keep, samples, 0).sum(1) / count
    variance = np.where(keep, (samples - mean[:, None]) ** 2, 0).sum(1) / count
    return number, mean, variance


class ObservationNormalizer:
    """(x - mean) / std of "vector" observations, clipped to +-10, per run.

    The statistics are frozen within a rollout and its update, so that the behaviour policy is one
    function and every ratio starts at exactly 1; `refresh` brings them up to date in between.
    """

    def __init__(self, runs: int, size: int, *, enabled: bool) -> None:
        self.enabled = enabled
        self.moments = RunningMoments(runs, (size,))
        self.refresh()

    def refresh(self) -> None:
        """Use the moments as they are now, from the next call on; shapes (R, 1, O) float32."""
        moments = self.moments
        self.shift = moments.mean.astype(np.float32)[:, None]
        self.scale = (1 / np.sqrt(moments.variance + 1e-8)).astype(np.float32)[:, None]

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """Normalise (..., R, E, O) observations."""
        if not self.enabled:
            return vector
        centred = (vector - self.shift) * self.scale
        return np.clip(centred, -10, 10, out=centred)


class RewardScaler:
    """Divides rewards by the running deviation of the discounted return, clipped to +-10."""

    def __init__(self, runs: int, envs: int, gamma: float, *, enabled: bool) -> None:
        self.enabled, self.gamma = enabled, gamma
        self.moments = RunningMoments(runs, ())
        self.discounted = np.zeros((runs, envs))

    def __call__(self, reward: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Scale a rollout's (T, R, E) rewards; `done` marks the last step of each episode."""
        if not self.enabled:
            return reward
        returns = np.empty(reward.shape)
        running = self.discounted
        for t in range(len(reward)):
            running = self.gamma * running + reward[t]
            returns[t] = running
            running = running * ~done[t]
        self.discounted = running
        runs = reward.shape[1]
        self.moments.update(returns.transpose(1, 0, 2).reshape(runs, -1))
        scale = 1 / np.sqrt(self.moments.variance + 1e-8)
        return np.clip(reward * scale[:, None], -10, 10).astype(np.float32)
