"""Rollouts: R policies side by side in E environments each, for T steps.

Observations reach the policies normalised by statistics that are frozen within a rollout and take
it in at its end. Episodes go on from one rollout to the next.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from rgpo.control.distributions import Distribution
from rgpo.control.environments import Environments
from rgpo.control.normalize import ObservationNormalizer

Act = Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]
"""Actions (R, E, A) for (R, E, ...) observations and (R, E, K) noise."""


@dataclass
class Rollout:
    """What R policies saw and did: (R, T, E, ...), observations (R, T + 1, E, ...)."""

    observation: dict[str, np.ndarray]
    """As the policies saw them: vectors are normalised."""

    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    """False for the dummy step of an autoreset."""

    episodes: list[list[tuple[float, int]]] = field(default_factory=list)
    """Per run, return and length of every episode that ended."""

    seconds_act: float = 0.0
    seconds_step: float = 0.0


class Collector:
    """The environments of R runs, and what of them lasts from one rollout to the next."""

    def __init__(
        self,
        environments: Environments,
        distribution: Distribution,
        normalizer: ObservationNormalizer,
        runs: int,
    ) -> None:
        self.environments, self.distribution = environments, distribution
        self.normalizer, self.runs = normalizer, runs
        self.envs = environments.num_envs // runs
        self.current = environments.reset()
        """The observations that the next actions answer to, as the environments gave them."""
        self.running_return = np.zeros(environments.num_envs)
        self.running_length = np.zeros(environments.num_envs, dtype=np.int64)

    def collect(self, act: Act, noise: np.ndarray) -> Rollout:
        """As many steps of every environment as there is noise (R, T, E, K)."""
        steps = noise.shape[1]
        rollout = self._empty_rollout(steps)
        lead = (self.runs, self.envs)
        size = self.environments.observation_shapes.get("vector", (0,))[0]
        raw = np.empty((self.runs, steps, self.envs, size), dtype=np.float32)
        for t in range(steps):
            acting = time.perf_counter()
            seen = {k: v.reshape(*lead, *v.shape[1:]) for k, v in self.current.items()}
            if "vector" in seen:
                raw[:, t] = seen["vector"]
                seen["vector"] = self.normalizer(seen["vector"])
            action = act(seen, noise[:, t])
            stepping = time.perf_counter()
            flat = action.reshape(-1, action.shape[-1])
            step = self.environments.step_all(self.distribution.to_env(flat))
            stepped = time.perf_counter()
            for key, array in seen.items():
                rollout.observation[key][:, t] = array
            rollout.action[:, t] = action
            for name in ("reward", "terminated", "truncated", "valid"):
                getattr(rollout, name)[:, t] = getattr(step, name).reshape(lead)
            self.current = step.observation
            rollout.seconds_act += stepping - acting
            rollout.seconds_step += stepped - stepping
        last = {k: v.reshape(*lead, *v.shape[1:]) for k, v in self.current.items()}
        if "vector" in last:
            last["vector"] = self.normalizer(last["vector"])
            self.normalizer.moments.update(raw.reshape(self.runs, -1, raw.shape[-1]))
        for key, array in last.items():
            rollout.observation[key][:, steps] = array
        rollout.episodes = self._finished_episodes(rollout)
        return rollout

    def _empty_rollout(self, time: int) -> Rollout:
        steps = (self.runs, time, self.envs)
        seen = {
            key: np.empty((self.runs, time + 1, self.envs, *v.shape[1:]), dtype=v.dtype)
            for key, v in self.current.items()
        }
        size = (*steps, self.distribution.action_size)
        action = torch.empty(size, dtype=self.distribution.action_dtype).numpy()
        flags = [np.empty(steps, dtype=bool) for _ in range(3)]
        return Rollout(seen, action, np.empty(steps, dtype=np.float32), *flags)

    def _finished_episodes(self, rollout: Rollout) -> list[list[tuple[float, int]]]:
        """Returns and lengths of the episodes that ended, by run, in the order they ended."""
        time_first = (rollout.reward.shape[1], self.runs * self.envs)
        reward = np.moveaxis(rollout.reward, 0, 1).reshape(time_first).astype(np.float64)
        valid = np.moveaxis(rollout.valid, 0, 1).reshape(time_first)
        done = np.moveaxis(rollout.terminated | rollout.truncated, 0, 1).reshape(time_first)
        total = self.running_return + np.cumsum(reward, axis=0)
        length = self.running_length + np.cumsum(valid, axis=0)
        episodes: list[list[tuple[float, int]]] = [[] for _ in range(self.runs)]
        spent_return = np.zeros_like(self.running_return)
        spent_length = np.zeros_like(self.running_length)
        for t, i in np.argwhere(done):
            ended = (float(total[t, i] - spent_return[i]), int(length[t, i] - spent_length[i]))
            episodes[i // self.envs].append(ended)
            spent_return[i], spent_length[i] = total[t, i], length[t, i]
        self.running_return = total[-1] - spent_return
        self.running_length = length[-1] - spent_length
        return episodes
