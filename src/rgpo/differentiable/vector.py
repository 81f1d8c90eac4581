"""Vector environments of a differentiable task, on tensors."""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rgpo.differentiable.tasks.task import Task


def action_space(task: Task) -> gym.spaces.Box:
    """Of a single environment."""
    bound = 1.0 if task.bounded else np.inf
    return gym.spaces.Box(-bound, bound, (task.action_size,), np.float32)


def observation_space(task: Task) -> gym.spaces.Box:
    """Of a single environment."""
    return gym.spaces.Box(-np.inf, np.inf, (task.observation_size,), np.float32)


class TaskVectorEnv(gym.vector.VectorEnv):
    """E environments of one task behind Gymnasium's interface; tensors in and out, graph attached.

    Finished environments reset in the same step: `info["final_obs"]` (E, O) is the observation
    before any reset, attached to the graph, for the bootstrap of a truncated episode, and
    `info["_final_obs"]` says where an episode ended. A reset cuts the gradient of that
    environment alone. `detach` cuts the graph of all and keeps the states.

    Several seeds share the environments equally among them, in their order; each has its own
    generator, whose numbers do not depend on the others.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "differentiable": True,
    }

    def __init__(
        self,
        task: Task,
        num_envs: int,
        *,
        seed: int | Sequence[int] = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.task, self.num_envs = task, num_envs
        self.device, self.dtype = torch.device(device), dtype
        self.single_action_space = action_space(task)
        self.single_observation_space = observation_space(task)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.reset(seed=seed)

    def reset(  # type: ignore[override]
        self,
        *,
        seed: int | Sequence[int] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start all episodes anew; without a seed from the generators as they are.

        With `options={"stagger": True}` as if each had already run for a random number of steps,
        so that the environments do not all reach the same phase of the task at once.
        """
        if seed is not None:
            seeds = [seed] if isinstance(seed, int) else seed
            self.generators = [torch.Generator(self.device).manual_seed(one) for one in seeds]
        self.elapsed = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self.state = self._fresh(torch.ones_like(self.elapsed, dtype=torch.bool))
        if options and options.get("stagger"):
            for generator, part in zip(self.generators, self._parts(self.elapsed), strict=True):
                part.random_(0, self.task.max_steps, generator=generator)
        return self.task.observe(self.state), {}

    def step(  # type: ignore[override]
        self, actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Observation (E, O), reward, terminated, truncated (E,) and info, from actions (E, A)."""
        state, reward, terminated = self.task.step(self.state, actions)
        final = observation = self.task.observe(state)
        elapsed = self.elapsed + 1
        truncated = (elapsed >= self.task.max_steps) & ~terminated
        done = terminated | truncated
        if maybe_any(done):
            state = torch.where(done[:, None], self._fresh(done), state)
            elapsed = torch.where(done, 0, elapsed)
            observation = self.task.observe(state)
        self.state, self.elapsed = state, elapsed
        return observation, reward, terminated, truncated, {"final_obs": final, "_final_obs": done}

    def detach(self) -> Tensor:
        """Cut the graph, keep the states; the present observation."""
        self.state = self.state.detach()
        return self.task.observe(self.state)

    def restart(self, which: Tensor) -> None:
        """Begin new episodes where `which` (E,) is True."""
        self.state = torch.where(which[:, None], self._fresh(which), self.state.detach())
        self.elapsed = torch.where(which, 0, self.elapsed)

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each generator, of a tensor (E, ...)."""
        return tensor.chunk(len(self.generators))

    def _fresh(self, needed: Tensor) -> Tensor:
        """Initial states (E, S), drawn where a generator has environments that need one."""
        size = (self.num_envs, self.task.noise_size)
        noise = torch.zeros(size, dtype=self.dtype, device=self.device)
        parts = zip(self.generators, self._parts(noise), self._parts(needed), strict=True)
        for generator, part, mine in parts:
            if maybe_any(mine):
                part.uniform_(generator=generator)
        return self.task.initial(noise)


def maybe_any(flags: Tensor) -> bool:
    """Whether any is True; on an accelerator always yes, because asking would wait for it."""
    return flags.device.type != "cpu" or bool(flags.any())
