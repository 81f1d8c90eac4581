"""Environments that their package steps as one computation, behind the same interface.

Which those are, their registration says: its `vector_entry_point` makes a
`gymnasium.vector.VectorEnv` whose metadata hold `"independent": True`. That promises

- environment i depends on its seed and its actions alone; `reset(seed=[...])` takes one seed each,
- autoreset NEXT_STEP, observations of a vector space,
- `capture()` gives one JSON value per environment, strict where its numbers are finite, and
  `restore` takes such a list, after which stepping continues bit for bit.

`rgpo.differentiable.gymnasium_view.TaskBatch` is one.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

from rgpo.control.environments import Environments, Step
from rgpo.control.observations import Observation
from rgpo.errors import RgpoError


class VectorizedEnvironments(Environments):
    """All environments by one call; a number that is not finite fails its environment alone."""

    backend = "vector"
    state_note = ""

    def __init__(self, spec: EnvSpec, seeds: Sequence[int], **kwargs: Any) -> None:
        if not is_independent(spec):
            raise RgpoError(
                f"{spec.id} registers no batch of independent environments: use backend auto."
            )
        self.batch: Any = gym.make_vec(
            spec, len(seeds), vectorization_mode="vector_entry_point", **kwargs
        )
        spaces = (self.batch.single_observation_space, self.batch.single_action_space)
        super().__init__(spec.id, seeds, *spaces)

    def reset(self) -> Observation:
        """See `Environments.reset`."""
        return self._begun(_encode(self.batch.reset(seed=self.seeds)[0]))

    def step_all(self, action: np.ndarray) -> Step:
        """See `Environments.step_all`; RgpoError if the computation as a whole raises."""
        self._check_count(action)
        try:
            observation, reward, terminated, truncated, _ = self.batch.step(action)
        except Exception as error:
            raise RgpoError(
                f"{self.env_id} raised {type(error).__name__}: {error}, and with it every run of "
                "the batch failed: repair the environment, or use backend gymnasium, where only "
                "the faulty run fails."
            ) from error
        flags = (np.array(terminated, bool), np.array(truncated, bool))
        return self._step(_encode(observation), np.array(reward, np.float32), *flags)

    def state(self) -> dict[str, Any]:
        """See `Environments.state`; None for an environment that failed: nobody continues it."""
        captured = self.batch.capture()
        kept = [None if i in self.failures else one for i, one in enumerate(captured)]
        return {"env_id": self.env_id, "environments": kept, "pending": self._pending.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Environments.restore`."""
        self._check_saved(state)
        self.batch.restore(state["environments"])
        self.failures = {}
        self._pending = np.array(state["pending"], bool)

    def close(self) -> None:
        """See `Environments.close`."""
        self.batch.close()


def is_independent(spec: EnvSpec) -> bool:
    """Whether the registration offers such a batch."""
    entry = spec.vector_entry_point
    try:
        creator: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    except (ImportError, gym.error.Error):  # of a package that is not there
        return False
    return bool(getattr(creator, "metadata", {}).get("independent"))


def _encode(vector: np.ndarray) -> Observation:
    return {"vector": np.array(vector, np.float32)}
