"""Observations of any Gymnasium space as at most two arrays: a float32 vector and a uint8 image."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from rgpo.errors import RgpoError

Observation = dict[str, np.ndarray]
"""Batched and encoded: keys among "vector" (float32, E x O) and "image" (uint8, E x C x H x W)."""


@dataclass(frozen=True)
class _Leaf:
    """One elementary space inside a nested one, and the keys that lead to it."""

    keys: tuple[str | int, ...]
    space: gym.Space

    @property
    def is_image(self) -> bool:
        space = self.space
        return (
            isinstance(space, gym.spaces.Box)
            and space.dtype == np.uint8
            and len(space.shape) in {3, 4}
        )

    def of(self, observation: Any) -> Any:
        for key in self.keys:
            observation = observation[key]
        return observation


class ObservationEncoder:
    """Writes single observations of `space` into the rows of batched arrays.

    Everything that is not an image is flattened as `gymnasium.spaces.flatten` does it (Box as it
    is, Discrete and MultiDiscrete one-hot, MultiBinary as bits) and concatenated in key order.
    A uint8 Box of 3 axes is an image, of 4 axes a stack of images; it becomes channels first, the
    frames of a stack next to each other on the channel axis. Images of equal height and width in
    one Dict share the array. Raises RgpoError for spaces that are none of these.
    """

    def __init__(self, space: gym.Space) -> None:
        leaves = list(_leaves(space, ()))
        self._images = [leaf for leaf in leaves if leaf.is_image]
        self._vectors = [leaf for leaf in leaves if not leaf.is_image]
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of one encoded observation under each key that this space has."""
        if self._vectors:
            size = sum(gym.spaces.flatdim(leaf.space) for leaf in self._vectors)
            self.shapes["vector"] = (size,)
        if self._images:
            self.shapes["image"] = _joint_image_shape(self._images)
        self._is_plain_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1

    def empty(self, count: int) -> Observation:
        """Fresh arrays for `count` observations, contents undefined."""
        return {
            key: np.empty((count, *shape), np.uint8 if key == "image" else np.float32)
            for key, shape in self.shapes.items()
        }

    def write(self, observation: Any, into: Observation, row: int) -> None:
        """Encode one `observation` of the space into row `row` of every array of `into`."""
        if self._is_plain_vector:  # by far the commonest space, and the cheapest way
            into["vector"][row] = observation
            return
        start = 0
        for leaf in self._vectors:
            part = gym.spaces.flatten(leaf.space, leaf.of(observation))
            into["vector"][row, start : start + part.size] = part
            start += part.size
        start = 0
        for leaf in self._images:
            image = _channels_first(np.asarray(leaf.of(observation)))
            into["image"][row, start : start + len(image)] = image
            start += len(image)


def _leaves(space: gym.Space, keys: tuple[str | int, ...]) -> Iterator[_Leaf]:
    if isinstance(space, gym.spaces.Dict):
        for key, part in space.spaces.items():
            yield from _leaves(part, (*keys, key))
    elif isinstance(space, gym.spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from _leaves(part, (*keys, index))
    elif isinstance(
        space,
        gym.spaces.Box | gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary,
    ):
        yield _Leaf(keys, space)
    else:
        where = "".join(f"[{key!r}]" for key in keys)
        raise RgpoError(
            f"The observation space{where} {space} is not supported: wrap the environment so that "
            "it gives Box, Discrete, MultiDiscrete or MultiBinary, or a Dict or Tuple of these."
        )


def _joint_image_shape(leaves: list[_Leaf]) -> tuple[int, ...]:
    shapes = [_channels_first(np.empty(leaf.space.shape, np.uint8)).shape for leaf in leaves]
    sizes = {shape[1:] for shape in shapes}
    if len(sizes) > 1:
        told = ", ".join(f"{h} x {w}" for h, w in sorted(sizes))
        raise RgpoError(
            f"The observation holds images of different sizes ({told}): wrap the environment so "
            "that they have one height and width, or only one is left."
        )
    return (sum(shape[0] for shape in shapes), *sizes.pop())


def _channels_first(image: np.ndarray) -> np.ndarray:
    """(H, W, C) or (C, H, W), or a stack of either, as (C, H, W); the channel axis is the smaller.

    Of the first and the last of the three image axes, that is; the last if they are equal.
    """
    if image.shape[-1] <= image.shape[-3]:
        image = np.moveaxis(image, -1, -3)
    return image.reshape(-1, *image.shape[-2:])
