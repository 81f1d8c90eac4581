"""A differentiable task as ordinary Gymnasium environments: NumPy in and out, no gradient.

`register_all` makes `gymnasium.make("rgpo/Pendulum")` and `gymnasium.make_vec` work, so that
score-function methods train on the very task that `ReparamPPO` differentiates: `TaskEnv` is one
environment, `TaskBatch` many as one computation, with the same numbers. What they hold is saved
exactly with a run's checkpoint.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rgpo.differentiable.tasks import TASKS, make_task
from rgpo.differentiable.tasks.task import Segment
from rgpo.differentiable.vector import action_space, observation_space
from rgpo.runs import checkpoint

HEIGHT = 360
"""Pixels of a drawn frame; the width follows from the task's view."""


class TaskEnv(gym.Env):
    """One environment of a task; actions are clipped to the bounds of the action space."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}  # type: ignore[misc]

    def __init__(self, task_name: str, render_mode: str | None = None) -> None:
        task = make_task(task_name)
        self.task_name, self.render_mode = task_name, render_mode
        self.metadata = self.metadata | {"render_fps": round(1 / task.dt)}  # type: ignore[misc]
        self.action_space, self.observation_space = action_space(task), observation_space(task)
        self.state, self.elapsed = np.zeros(task.state_size), 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """See Gymnasium; the initial state is drawn in float64."""
        super().reset(seed=seed)
        del options
        task = make_task(self.task_name)
        noise = torch.from_numpy(self.np_random.random((1, task.noise_size)))
        self.state, self.elapsed = task.initial(noise)[0].numpy().copy(), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """See Gymnasium; float64 inside."""
        task = make_task(self.task_name)
        space = self.action_space
        clipped = np.clip(action, space.low, space.high).astype(np.float64)  # type: ignore[attr-defined]
        with torch.no_grad():
            state = torch.from_numpy(self.state)[None]
            state, reward, terminated = task.step(state, torch.from_numpy(clipped)[None])
        self.state = state[0].numpy().copy()
        self.elapsed += 1
        truncated = self.elapsed >= task.max_steps and not terminated
        return self._observe(), float(reward), bool(terminated), bool(truncated), {}

    def _observe(self) -> np.ndarray:
        seen = make_task(self.task_name).observe(torch.from_numpy(self.state)[None])
        return seen[0].numpy().astype(np.float32)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The task's lines, black on white, (H, W, 3) uint8."""
        task = make_task(self.task_name)
        return draw(task.drawing(torch.from_numpy(self.state)), task.view)


class TaskBatch(gym.vector.VectorEnv):
    """E environments of a task as one computation; each gives exactly what `TaskEnv` gives.

    Each has a random generator of its own, so that it depends on its seed and its actions alone,
    wherever it stands in whichever batch (`rgpo.control.vectorized` wants that). Tasks of your own
    keep the law if their arithmetic treats every row alike, as element-wise functions do.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "independent": True,
    }

    def __init__(self, task_name: str, num_envs: int = 1) -> None:
        self.task, self.num_envs = make_task(task_name), num_envs
        self.single_action_space = action_space(self.task)
        self.single_observation_space = observation_space(self.task)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.generators = [np_random()[0] for _ in range(num_envs)]
        self.state = torch.zeros(num_envs, self.task.state_size, dtype=torch.float64)
        self.elapsed = np.zeros(num_envs, np.int64)
        self.ended = np.zeros(num_envs, bool)  # reset by the next step

    def reset(  # type: ignore[override]
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start all episodes anew; a single seed counts up from environment to environment."""
        del options
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        for i, own in enumerate(seeds or ()):
            if own is not None:
                self.generators[i] = np_random(own)[0]
        self._begin(np.arange(self.num_envs))
        self.ended = np.zeros(self.num_envs, bool)
        return self._observe(), {}

    @torch.inference_mode()
    def step(  # type: ignore[override]
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """See Gymnasium; where an episode had ended the action is ignored and a new one begins."""
        resets = self.ended
        space = self.single_action_space
        clipped = np.clip(actions, space.low, space.high).astype(np.float64)
        self.state, rewards, ends = self.task.step(self.state, torch.from_numpy(clipped))
        self.elapsed += 1
        if resets.any():
            self._begin(np.flatnonzero(resets))
        reward = np.where(resets, 0, rewards.numpy())
        terminated = ends.numpy() & ~resets
        truncated = (self.elapsed >= self.task.max_steps) & ~terminated
        self.ended = terminated | truncated
        return self._observe(), reward, terminated, truncated, {}

    def capture(self) -> list[dict[str, Any]]:
        """The exact state of every environment, as strict JSON if its numbers are finite."""
        states = self.state.tolist()
        return [
            {
                "state": states[i],
                "elapsed": int(self.elapsed[i]),
                "ended": bool(self.ended[i]),
                "generator": checkpoint.generator_state(self.generators[i]),
            }
            for i in range(self.num_envs)
        ]

    @torch.inference_mode()
    def restore(self, captured: Sequence[dict[str, Any]]) -> None:
        """Continue exactly where `capture` was called."""
        for i, one in enumerate(captured):
            self.state[i] = torch.tensor(one["state"], dtype=torch.float64)
            self.elapsed[i], self.ended[i] = one["elapsed"], one["ended"]
            self.generators[i] = checkpoint.restore_generator(one["generator"])

    @torch.inference_mode()
    def _begin(self, which: np.ndarray) -> None:
        """New episodes for the environments `which` (k,), each from its own generator."""
        size = self.task.noise_size
        noise = np.stack([self.generators[i].random(size) for i in which])
        self.state[torch.from_numpy(which)] = self.task.initial(torch.from_numpy(noise))
        self.elapsed[which] = 0

    @torch.inference_mode()
    def _observe(self) -> np.ndarray:
        return self.task.observe(self.state).numpy().astype(np.float32)


def draw(lines: list[Segment], view: tuple[float, float, float, float]) -> np.ndarray:
    """A picture of line segments, 5 pixels thick."""
    left, right, bottom, top = view
    scale = HEIGHT / (top - bottom)
    width = round((right - left) * scale / 2) * 2
    y, x = np.mgrid[:HEIGHT, :width]
    x, y = left + x / scale, top - y / scale
    frame = np.full((HEIGHT, width, 3), 255, np.uint8)
    for (ax, ay), (bx, by) in lines:
        length = max((bx - ax) ** 2 + (by - ay) ** 2, 1e-12)
        along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length, 0, 1)
        near = (x - ax - along * (bx - ax)) ** 2 + (y - ay - along * (by - ay)) ** 2
        frame[near < (2.5 / scale) ** 2] = (30, 41, 59)
    return frame


def register_all() -> None:
    """Make every task known to Gymnasium by its id; again does nothing.

    `gymnasium.make("rgpo/Task", task_name="module:ClassName")` makes a task of your own.
    """
    for name in (*TASKS, "rgpo/Task"):
        if name not in gym.registry:
            gym.register(
                name,
                f"{__name__}:TaskEnv",
                vector_entry_point=f"{__name__}:TaskBatch",
                kwargs={"task_name": name} if name in TASKS else {},
                disable_env_checker=True,
            )


register_all()
