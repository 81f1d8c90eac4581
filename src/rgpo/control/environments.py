"""Batches of environments for training.

Gymnasium's own one after the other; as one computation where the task offers that (vectorized.py);
EnvPool's where that is the same task (envpool.py).

Autoreset is NEXT_STEP everywhere (Gymnasium 1.x): the step that ends an episode returns its final
observation, the next call ignores the action, resets, and is no transition (`Step.valid` False).

What happens in environment i depends only on `seeds[i]` and its actions, not on its neighbours nor
on its place in the batch, so that several runs can share one batch; nor does a failure spread.
"""

import difflib
import importlib
import importlib.util
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from rgpo.control import snapshot
from rgpo.control.observations import Observation, ObservationEncoder
from rgpo.errors import RgpoError

Backend = Literal["auto", "gymnasium", "vector", "envpool"]

_LIST_COMMAND = '`python -c "import gymnasium; gymnasium.pprint_registry()"`'
_ATARI_INSTALL = 'Atari needs ale-py and OpenCV: `pip install "rgpo[atari]"`.'


class EnvironmentFailed(RgpoError):  # noqa: N818
    """Environment `index` `what`, against which `advice` helps; `__cause__`: what it raised."""

    def __init__(self, index: int, what: str, advice: str = "repair the environment") -> None:
        super().__init__(f"Environment {index} of the batch {what}: {advice}.")
        self.index, self.what, self.advice = index, what, advice


class NonFiniteEnvironment(EnvironmentFailed):
    """An environment gave NaN or infinity; `part` is observation or reward."""

    def __init__(self, index: int, part: Literal["observation", "reward"]) -> None:
        super().__init__(
            index,
            f"gave a NaN or infinite {part}",
            "repair the environment, or bound its actions and observations by a wrapper",
        )
        self.part = part


@dataclass(frozen=True)
class Step:
    """What one call of `Environments.step` gave; E environments, fresh arrays."""

    observation: Observation
    """Encoded; the final observation where an episode has just ended."""
    reward: np.ndarray
    """float32 (E,)."""
    terminated: np.ndarray
    """bool (E,): the task ended, the value of what follows is 0."""
    truncated: np.ndarray
    """bool (E,): a limit ended the episode, the final observation still has a value."""
    valid: np.ndarray
    """bool (E,): False where this call only reset (reward 0, action ignored), or has failed."""


class Environments(ABC):
    """A batch of environments of one task behind one encoding; see the module for its laws."""

    backend: Literal["gymnasium", "vector", "envpool"]

    def __init__(
        self, env_id: str, seeds: Sequence[int], observation: gym.Space, action: gym.Space
    ) -> None:
        self.env_id = env_id
        self.seeds = list(seeds)
        self.num_envs = len(self.seeds)
        self.action_space = action
        """Of a single environment; `step` takes a batch of its elements."""
        self._encoder = ObservationEncoder(observation)
        self.observation_shapes = self._encoder.shapes
        """Shape of one encoded observation under each key."""
        self._pending = np.zeros(self.num_envs, bool)  # ended: the next call resets
        self.failures: dict[int, EnvironmentFailed] = {}
        """Environments that failed since the last `reset`, and how."""

    @abstractmethod
    def reset(self) -> Observation:
        """Start all environments anew from their seeds; called before the first `step`."""

    @abstractmethod
    def step_all(self, action: np.ndarray) -> Step:
        """Apply `action` (E, ...), elements of `action_space`, whatever single environments do.

        One that raises or gives a number that is not finite joins `failures`; it is not stepped
        again and gives zeros and no transition. Raises ValueError for another number of actions.
        """

    def step(self, action: np.ndarray) -> Step:
        """The same for whoever needs all of them: raises the first of the `failures`."""
        step = self.step_all(action)
        for failure in self.failures.values():
            raise failure
        return step

    @abstractmethod
    def close(self) -> None:
        """Free what the environments hold; they cannot be used again."""

    @property
    def state_note(self) -> str:
        """Why the exact state cannot be saved; empty if it can."""
        return f"{self.backend} does not tell the state of its environments"

    @property
    def exact_state(self) -> bool:
        """Whether `state` and `restore` continue bit for bit."""
        return not self.state_note

    def state(self) -> dict[str, Any] | None:
        """Everything that stepping depends on, as strict JSON; None if it cannot be captured.

        Every list in it has one element per environment, so that the parts of several runs can be
        taken apart and joined. The latest observation is not in it: whoever acts on it keeps it.
        """
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; needs no `reset` before it.

        Raises RgpoError if the state is of another task or batch.
        """
        raise RgpoError(f"The environments cannot be restored: {self.state_note} ({state!r:.40}).")

    def _check_saved(self, state: dict[str, Any]) -> None:
        saved = (state["env_id"], len(state["environments"]))
        if saved != (self.env_id, self.num_envs):
            raise RgpoError(
                f"The saved state is of {saved[1]} x {saved[0]}, not of "
                f"{self.num_envs} x {self.env_id}: resume with the same task and batch."
            )

    def _step(
        self,
        observation: Observation,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> Step:
        """Check the numbers, set aside what failed, and note which environments reset next."""
        for index in np.flatnonzero(~np.isfinite(reward)):
            self.failures.setdefault(int(index), NonFiniteEnvironment(int(index), "reward"))
        for index in _not_finite(observation):
            self.failures.setdefault(index, NonFiniteEnvironment(index, "observation"))
        valid = ~self._pending
        if self.failures:
            broken = list(self.failures)
            for array in (*observation.values(), reward, terminated, truncated, valid):
                array[broken] = 0
        self._pending = terminated | truncated
        return Step(observation, reward, terminated, truncated, valid)

    def _begun(self, observation: Observation) -> Observation:
        """The first observation of new episodes everywhere, checked; nothing is pending."""
        self._pending[:] = False
        self.failures = {}
        self._check_observation(observation)
        return observation

    def _check_observation(self, observation: Observation) -> None:
        for index in _not_finite(observation):
            raise NonFiniteEnvironment(index, "observation")

    def _check_count(self, action: np.ndarray) -> None:
        if len(action) != self.num_envs:
            raise ValueError(
                f"{self.num_envs} environments need as many actions, got {len(action)}"
            )


class GymnasiumEnvironments(Environments):
    """`gymnasium.make` in a loop: what SyncVectorEnv does, without gathering infos nobody reads."""

    backend = "gymnasium"

    def __init__(self, env_id: str, seeds: Sequence[int], **kwargs: Any) -> None:
        # All alike, wrappers included, so that a saved state fits at any place of any batch.
        self.envs = [_make(env_id, **kwargs) for _ in seeds]
        first = self.envs[0]
        super().__init__(env_id, seeds, first.observation_space, first.action_space)
        self._models = [snapshot.model_digest(env) for env in self.envs]

    def reset(self, seeds: Sequence[int] | None = None) -> Observation:
        """Start all environments anew from their seeds, or from these."""
        if seeds is not None:
            self.seeds = list(seeds)
        observation = self._encoder.empty(self.num_envs)
        index = 0
        try:
            for index, (env, seed) in enumerate(zip(self.envs, self.seeds, strict=True)):
                self._encoder.write(env.reset(seed=int(seed))[0], observation, index)
        except Exception as error:
            raise _failure(index, error) from error
        return self._begun(observation)

    def step_all(self, action: np.ndarray) -> Step:
        """See `Environments.step_all`."""
        self._check_count(action)
        observation = self._encoder.empty(self.num_envs)
        reward = np.zeros(self.num_envs, np.float32)
        terminated = np.zeros(self.num_envs, bool)
        truncated = np.zeros(self.num_envs, bool)
        write = self._encoder.write
        for index, env in enumerate(self.envs):
            if index in self.failures:
                continue
            try:
                if self._pending[index]:
                    single = env.reset()[0]
                else:
                    single, reward[index], terminated[index], truncated[index], _ = env.step(
                        action[index]
                    )
                write(single, observation, index)
            except Exception as error:  # noqa: BLE001 (anything may come out of an environment)
                self.failures[index] = _failure(index, error)
        return self._step(observation, reward, terminated, truncated)

    def render(self) -> np.ndarray:
        """The first environment as an image (H, W, 3); needs `render_mode="rgb_array"`."""
        frame: Any = self.envs[0].render()
        return np.asarray(frame)

    @property
    def state_note(self) -> str:
        """Why the exact state cannot be saved; empty if it can."""
        try:
            self._capture()
        except snapshot.Uncapturable as problem:
            return f"{self.env_id}: {problem}"
        return ""

    def state(self) -> dict[str, Any] | None:
        """See `Environments.state`."""
        try:
            environments = self._capture()
        except snapshot.Uncapturable:
            return None
        return {
            "env_id": self.env_id,
            "environments": environments,
            "pending": self._pending.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Environments.restore`."""
        self._check_saved(state)
        for env, one in zip(self.envs, state["environments"], strict=True):
            snapshot.restore(env, one)
        self.failures = {}
        self._pending = np.array(state["pending"], bool)

    def close(self) -> None:
        """See `Environments.close`."""
        for env in self.envs:
            env.close()

    def _capture(self) -> list[Any]:
        """None for an environment that failed: nobody continues it."""
        captured: list[Any] = []
        for index, (env, model) in enumerate(zip(self.envs, self._models, strict=True)):
            if index in self.failures:
                captured.append(None)
                continue
            if snapshot.model_digest(env) != model:
                raise snapshot.Uncapturable("changes its MuJoCo model")
            captured.append(snapshot.capture(env))
        return captured


def make_environments(
    env_id: str,
    seeds: Sequence[int],
    *,
    backend: Backend = "auto",
    threads: int = 1,
    **kwargs: Any,
) -> Environments:
    """Make one environment of `env_id` per seed.

    "auto" takes EnvPool if it is installed, has the same task (MuJoCo v5, classic control) and no
    `kwargs` are given, which not all share; then "vector", the task's own batch, if it has one;
    otherwise Gymnasium. `threads` is EnvPool's (one is best on few cores). `kwargs` go to
    `gymnasium.make`, `gymnasium.make_vec` or `envpool.make`. Atari ids get the usual
    preprocessing: 84 x 84 grey, frames skipped and stacked by 4.

    Raises RgpoError: unknown id, missing package, unsupported space, a seed that is not in
    [0, 2^31), or an environment that cannot be made with these arguments.
    """
    if not seeds:
        raise ValueError("a batch of environments needs at least one seed")
    for seed in seeds:
        if not 0 <= seed < 2**31:
            raise RgpoError(f"The environment seed {seed} must be at least 0 and below 2^31.")
    from rgpo.control import envpool, vectorized  # which need this module

    if backend == "auto":
        backend = "gymnasium" if kwargs else best_backend(env_id)
    if backend == "gymnasium":
        return GymnasiumEnvironments(env_id, seeds, **kwargs)
    try:
        if backend == "vector":
            return vectorized.VectorizedEnvironments(_find(env_id), seeds, **kwargs)
        envpool.require_task(env_id)
        return envpool.EnvPoolEnvironments(env_id, seeds, threads=threads, **kwargs)
    except (AssertionError, TypeError, ValueError) as error:
        raise _unmakeable(env_id, error) from error


def best_backend(env_id: str) -> Backend:
    """What "auto" takes without `kwargs`."""
    from rgpo.control import envpool, vectorized

    if envpool.is_same_task(env_id):
        return "envpool"
    return "vector" if vectorized.is_independent(_find(env_id)) else "gymnasium"


def _make(env_id: str, **kwargs: Any) -> gym.Env:
    """`gymnasium.make` with the usual wrappers for Atari; raises RgpoError if it cannot."""
    spec = _find(env_id)
    is_atari = str(spec.entry_point).startswith("ale_py")
    try:
        if isinstance(spec.entry_point, str):  # MuJoCo is imported before it can warn
            importlib.import_module(spec.entry_point.partition(":")[0])
        _divert_mujoco_warnings()
        if not is_atari:
            return gym.make(spec, **kwargs)
        env = gym.make(spec, **{"frameskip": 1, **kwargs})
        return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env), 4)
    except gym.error.DependencyNotInstalled as error:
        if is_atari:
            raise RgpoError(_ATARI_INSTALL) from error
        raise _unmakeable(env_id, error) from error
    except Exception as error:
        raise _unmakeable(env_id, error) from error


def _find(env_id: str) -> Any:
    """The registered spec of "Id-v0" or "module:Id-v0"."""
    module, _, name = env_id.rpartition(":")
    if name not in gym.registry and importlib.util.find_spec("ale_py"):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for each one made
        gym.register_envs(ale_py)
    if name.startswith("rgpo/"):  # the library's own differentiable tasks, as ordinary ones
        importlib.import_module("rgpo.differentiable.gymnasium_view")
    try:
        if module:
            importlib.import_module(module)
        return gym.spec(name)
    except ModuleNotFoundError as error:
        raise RgpoError(
            f"The module {module!r} of {env_id!r} is not there ({error}): install it, or run from "
            "the folder that holds it."
        ) from error
    except gym.error.NamespaceNotFound as error:
        if name.startswith("ALE/"):
            raise RgpoError(_ATARI_INSTALL) from error
        raise RgpoError(
            f"No installed package registers {env_id!r}: install the one that does and name the "
            f'module it is imported by, "module:{name}".'
        ) from error
    except gym.error.Error as error:
        raise RgpoError(
            f"There is no environment {env_id!r}{suggestion(name, gym.registry)}; "
            f"{_LIST_COMMAND} lists those there are."
        ) from error


def suggestion(env_id: str, known: Any) -> str:
    """Ids among `known` that are near `env_id`, as part of a sentence; empty if none is."""
    close = difflib.get_close_matches(env_id, list(known), n=3, cutoff=0.6)
    return f", did you mean {' or '.join(close)}?" if close else ""


def _unmakeable(env_id: str, error: BaseException) -> RgpoError:
    return RgpoError(
        f"{env_id} could not be made ({type(error).__name__}: {error}): "
        "check its arguments and the packages it needs."
    )


def _divert_mujoco_warnings() -> None:
    """Log MuJoCo's warnings instead of writing them to MUJOCO_LOG.TXT in the user's folder.

    What its models say of themselves at every load (settotalmass is deprecated) is dropped.
    """
    mujoco = sys.modules.get("mujoco")
    if mujoco is None or mujoco.get_mju_user_warning() is not None:
        return

    def tell(message: str) -> None:
        if "is deprecated" not in message:
            logging.getLogger(__name__).warning("MuJoCo: %s", message)

    mujoco.set_mju_user_warning(tell)


def _not_finite(observation: Observation) -> list[int]:
    """The environments whose vector has a number that is not finite."""
    vector = observation.get("vector")
    if vector is None or np.isfinite(vector).all():
        return []
    return [int(index) for index in np.flatnonzero(~np.isfinite(vector).all(axis=1))]


def _failure(index: int, error: Exception) -> EnvironmentFailed:
    failure = EnvironmentFailed(index, f"raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
