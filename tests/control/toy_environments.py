"""Environments with known behaviour, registered under `toy/` for the tests of this folder."""

import gymnasium as gym
import numpy as np


class Counter(gym.Env):
    """Counts its steps; terminates after `end` of them, and misbehaves at step `fault`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, end=4, fault=0, kind="", render_mode=None):
        self.end, self.fault, self.kind = end, fault, kind
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.count = 0
        self.episode = self.np_random.random()
        return np.array([0, self.episode]), {}

    def step(self, action):
        self.count += 1
        observation, reward = np.array([self.count, self.episode]), 1.0 + action
        if self.count == self.fault:
            if self.kind == "raise":
                raise ZeroDivisionError("the wheel came off")
            if self.kind == "reward":
                reward = np.nan
            else:
                observation = observation * np.inf
        return observation, reward, self.count == self.end, False, {}

    def render(self):
        return np.full((20, 31, 3), 10 * self.count, np.uint8)


class Fragile(Counter):
    """Goes wrong at its step number `fault`, all episodes together, if its seed is a victim's."""

    victims: tuple[int, ...] = ()

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.break_at, self.fault = self.fault, 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seeded, self.total = seed, 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.total += 1
        broken = self.total == self.break_at and self.seeded in self.victims
        self.fault = self.count + 1 if broken else 0
        return super().step(action)


class Opaque(Counter):
    """Holds something of which nobody can know whether it changes."""

    def __init__(self):
        super().__init__()
        self.engine = object()


def register():
    if "toy/Counter-v0" not in gym.registry:
        gym.register("toy/Counter-v0", entry_point=Counter)
        gym.register("toy/Opaque-v0", entry_point=Opaque)
