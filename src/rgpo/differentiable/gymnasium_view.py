"""A differentiable task as an ordinary Gymnasium environment: NumPy in and out, no gradient.

`register_all` makes `gymnasium.make("rgpo/Pendulum")` work, so that score-function methods train
on the very task that `ReparamPPO` differentiates. State and random generator are plain NumPy, so
that a run's checkpoint holds them exactly.
"""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch

from rgpo.differentiable.tasks import TASKS, make_task
from rgpo.differentiable.tasks.task import Segment
from rgpo.differentiable.vector import action_space, observation_space

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
            kwargs = {"task_name": name} if name in TASKS else {}
            gym.register(name, f"{__name__}:TaskEnv", kwargs=kwargs, disable_env_checker=True)


register_all()
