"""EnvPool's C++ environments behind the same interface, where it has the same task."""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np

from rgpo.control.environments import Environments, Step, suggestion
from rgpo.control.observations import Observation
from rgpo.errors import RgpoError

# Tasks of which EnvPool 1.2.5 was found to be the same: spaces, time limits, terminations and, from
# equal states and actions, rewards and next states (Hopper, HalfCheetah, Walker2d to 1e-12, Swimmer
# in the median, classic control to float32; Ant and Humanoid to 1e-5 in the median). Its Atari is
# not: no sticky actions, and it presses FIRE after a reset.
_SAME_IN_ENVPOOL = {
    "gymnasium.envs.mujoco": "envpool.mujoco.gym",
    "gymnasium.envs.classic_control": "envpool.classic_control",
}


class EnvPoolEnvironments(Environments):
    """EnvPool's C++ environments in sync mode, which gives them back in the order of `seeds`.

    EnvPool does not tell the state of its environments, so a resumed run starts new episodes.
    An episode that terminates exactly at its time limit counts as truncated. An environment that
    gives NaN fails alone; where EnvPool itself stops, all its environments do.
    """

    backend = "envpool"

    def __init__(self, env_id: str, seeds: Sequence[int], *, threads: int, **kwargs: Any) -> None:
        import envpool

        arguments = {"num_envs": len(seeds), "num_threads": threads, **kwargs}
        arguments["seed"] = [int(seed) for seed in seeds]
        with _without_precision_warnings():
            spec = envpool.make_spec(env_id, **arguments)
            observation, action = spec.observation_space, spec.action_space
        if not all(
            isinstance(s, gym.spaces.Box | gym.spaces.Discrete) for s in (observation, action)
        ):
            raise RgpoError(f"{env_id} has nested spaces in EnvPool: use backend gymnasium.")
        super().__init__(env_id, seeds, observation, action)
        self._is_plain_vector = len(observation.shape) == 1
        self._make = lambda: envpool.make_gymnasium(env_id, **arguments)
        self._pool: Any = None

    def reset(self) -> Observation:
        """See `Environments.reset`."""
        with _without_precision_warnings():
            self._pool = self._make()  # EnvPool takes seeds only when it is made
            return self._begun(self._encode(self._pool.reset()[0]))

    def step_all(self, action: np.ndarray) -> Step:
        """See `Environments.step_all`; RgpoError if EnvPool stops."""
        self._check_count(action)
        try:
            batch, reward, terminated, truncated, _ = self._pool.step(action)
        except Exception as error:
            raise RgpoError(
                f"EnvPool stopped with {type(error).__name__}: {error}, and with it every run of "
                "the batch: start again with backend gymnasium, where only the faulty run fails."
            ) from error
        reward = reward.astype(np.float32)
        return self._step(self._encode(batch), reward, terminated.copy(), truncated.copy())

    def close(self) -> None:
        """See `Environments.close`."""
        if self._pool is not None:
            self._pool.close()

    def _encode(self, batch: np.ndarray) -> Observation:
        if self._is_plain_vector:
            return {"vector": np.array(batch, np.float32)}
        observation = self._encoder.empty(self.num_envs)
        for row, single in enumerate(batch):
            self._encoder.write(single, observation, row)
        return observation


def is_same_task(env_id: str) -> bool:
    """Whether EnvPool is installed and has this task of Gymnasium's, the same one."""
    spec = gym.registry.get(env_id)
    home = str(spec.entry_point).partition(":")[0] if spec is not None else ""
    package = next((ours for ours in _SAME_IN_ENVPOOL if home.startswith(ours)), None)
    if package is None or importlib.util.find_spec("envpool") is None:
        return False
    if package.endswith("mujoco") and not env_id.endswith("-v5"):
        return False
    import envpool

    entry = envpool.registration.registry.specs.get(env_id)
    return entry is not None and entry[0] == _SAME_IN_ENVPOOL[package]


def require_task(env_id: str) -> None:
    """Raise RgpoError unless EnvPool is installed and has a task of this id."""
    if importlib.util.find_spec("envpool") is None:
        raise RgpoError(
            'EnvPool is not installed: `pip install "rgpo[fast]"`, or use backend gymnasium.'
        )
    import envpool

    known = envpool.list_all_envs()
    if env_id not in known:
        raise RgpoError(
            f"EnvPool has no environment {env_id!r}{suggestion(env_id, known)}: "
            "use backend gymnasium, or list EnvPool's by "
            '`python -c "import envpool; print(envpool.list_all_envs())"`.'
        )


@contextmanager
def _without_precision_warnings() -> Iterator[None]:
    """EnvPool declares float32 spaces by float64 bounds, at which Gymnasium warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)
        yield
