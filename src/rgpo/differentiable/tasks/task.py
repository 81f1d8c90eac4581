"""What a differentiable task is: batched, pure functions of tensors."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

Segment = tuple[tuple[float, float], tuple[float, float]]
"""A line to draw, in metres."""


class Task(ABC):
    """Dynamics, reward and observation of E environments at once, without any state of its own.

    All tensors have the environment as their first axis and share one floating dtype and device;
    gradients flow from every output to `state` and `action`. Nothing is done in place and nothing
    branches on values, so that the graph of a whole rollout can be differentiated. Randomness
    enters through `noise` alone, so that whoever draws the noise owns the randomness.
    """

    state_size: ClassVar[int]
    """S."""
    observation_size: ClassVar[int]
    """O."""
    action_size: ClassVar[int]
    """A."""
    noise_size: ClassVar[int]
    """Uniform numbers that one initial state takes."""
    max_steps: ClassVar[int]
    """Episodes are truncated after so many steps."""
    dt: ClassVar[float]
    """Seconds of one step."""
    bounded: ClassVar[bool] = True
    """Whether actions lie in [-1, 1]; otherwise any number is one."""
    view: ClassVar[tuple[float, float, float, float]] = (-2.5, 2.5, -2.0, 2.0)
    """Left, right, bottom and top of what is drawn."""

    @abstractmethod
    def initial(self, noise: Tensor) -> Tensor:
        """Initial states (E, S) from noise (E, noise_size), uniform on [0, 1)."""

    @abstractmethod
    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next state (E, S), reward (E,) and terminated (E,) bool, from (E, S) and (E, A)."""

    @abstractmethod
    def observe(self, state: Tensor) -> Tensor:
        """What the policy sees, (E, O)."""

    @abstractmethod
    def drawing(self, state: Tensor) -> list[Segment]:
        """Lines that show one state (S,) to a person."""

    def reset(
        self,
        number: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`number` initial states drawn with `generator`, on its device."""
        size = (number, self.noise_size)
        noise = torch.rand(size, generator=generator, dtype=dtype, device=generator.device)
        return self.initial(noise)


def between(noise: Tensor, low: float, high: float) -> Tensor:
    """Uniform noise on [0, 1) moved to [low, high)."""
    return low + (high - low) * noise
