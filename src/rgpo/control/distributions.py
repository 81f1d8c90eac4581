"""Action distributions: stateless functions of flat network outputs, one class per action space.

Each turns parameters (..., `parameters`) and noise (..., `noise_size`) into stored actions
(..., `action_size`), and stored actions into log-probabilities, entropies and exact KLs (...),
summed over action dimensions. Stored actions are what the rollout keeps and `log_prob` takes;
`to_env` makes of them what `env.step` takes. Sampling is a deterministic function of the noise
(standard normal, or uniform on [0, 1)), so that whoever draws the noise owns the randomness.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from rgpo.core.kl import categorical_kl, normal_kl
from rgpo.errors import RgpoError

MAX_LOG_STD = 20.0
"""log_std is clamped to +-20: its square and the KL stay finite in float32. Not a bound in use."""


class Distribution(ABC):
    """What the training loop asks of the policy head; see the module for shapes."""

    noise: ClassVar[Literal["normal", "uniform"]]
    """The noise that `sample` takes."""
    action_dtype: ClassVar[torch.dtype]
    """Of stored actions."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Size of the last axis of `params`."""

    @property
    @abstractmethod
    def action_size(self) -> int:
        """Size of the last axis of stored actions."""

    @property
    def noise_size(self) -> int:
        """Size of the last axis of the noise."""
        return self.action_size

    @abstractmethod
    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """The action that `noise` (..., noise_size) selects; not differentiated by the library."""

    @abstractmethod
    def mode(self, params: Tensor) -> Tensor:
        """The most probable action (of SquashedNormal: before squashing)."""

    @abstractmethod
    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Log-probability of stored actions, summed over action dimensions."""

    @abstractmethod
    def entropy(self, params: Tensor) -> Tensor:
        """Entropy, summed over action dimensions."""

    @abstractmethod
    def kl(self, params_p: Tensor, params_q: Tensor) -> Tensor:
        """Exact KL(p || q), summed over action dimensions."""

    @abstractmethod
    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Stored actions (E, action_size) as elements of the action space (E, ...)."""


@dataclass(frozen=True)
class Normal(Distribution):
    """Independent normals for a Box; the environment receives the action clipped to its bounds.

    params = concat(mean, log_std), (..., 2A): a network with a state-independent log_std appends
    it to its A outputs. The log-probability is that of the unclipped action, as usual in PPO.
    """

    low: tuple[float, ...]
    """Lower bounds, flattened; may be -inf."""
    high: tuple[float, ...]
    """Upper bounds, flattened; may be inf."""
    shape: tuple[int, ...]
    """Shape of one action of the environment."""
    env_dtype: str
    """Its dtype."""

    noise = "normal"
    action_dtype = torch.float32

    @property
    def parameters(self) -> int:
        """2A."""
        return 2 * len(self.low)

    @property
    def action_size(self) -> int:
        """A."""
        return len(self.low)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Mean + std * noise."""
        mean, log_std = _split(params)
        return mean + torch.exp(log_std) * noise

    def mode(self, params: Tensor) -> Tensor:
        """The mean."""
        return _split(params)[0]

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Sum of -z^2 / 2 - log_std - log(2 pi) / 2 with z = (action - mean) / std."""
        mean, log_std = _split(params)
        z = (action - mean) * torch.exp(-log_std)
        return -(z**2 / 2 + log_std + math.log(2 * math.pi) / 2).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Sum of log_std + (1 + log(2 pi)) / 2."""
        return (_split(params)[1] + (1 + math.log(2 * math.pi)) / 2).sum(-1)

    def kl(self, params_p: Tensor, params_q: Tensor) -> Tensor:
        """See `rgpo.core.kl.normal_kl`."""
        return normal_kl(*_split(params_p), *_split(params_q))

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Clip to the bounds."""
        low, high = self._bounds
        return np.clip(action, low, high).astype(self.env_dtype).reshape(-1, *self.shape)

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.low, self.env_dtype), np.array(self.high, self.env_dtype)


@dataclass(frozen=True)
class SquashedNormal(Normal):
    """Normals squashed by tanh and rescaled to the finite bounds of a Box.

    The stored action is u, before squashing: the environment receives
    (low + high) / 2 + (high - low) / 2 * tanh(u). Keeping u makes the density exact where tanh
    saturates in floating point.
    """

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Density of the environment's action: log N(u) - sum log |d action / d u|.

        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which neither cancels nor overflows.
        The correction does not depend on the parameters: ratios are those of the normals.
        """
        log_slope = 2 * (math.log(2) - action - F.softplus(-2 * action))
        return super().log_prob(params, action) - log_slope.sum(-1) - self._log_scale

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy of the normals BEFORE squashing; that after it has no closed form.

        It bounds the latter plus a constant from above: H(u) + sum log((high - low) / 2), since
        tanh contracts. As a bonus it keeps the std up; it does not notice saturated means.
        """
        return super().entropy(params)

    # KL: that of the normals is exact, because squashing is a bijection.

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Squash and rescale; clipped against rounding beyond the bounds."""
        low, high = self._bounds
        squashed = (low + high) / 2 + (high - low) / 2 * np.tanh(action)
        return super().to_env(squashed)

    @cached_property
    def _log_scale(self) -> float:
        return sum(
            math.log((high - low) / 2) for low, high in zip(self.low, self.high, strict=True)
        )


@dataclass(frozen=True)
class Categorical(Distribution):
    """A product of K categoricals for Discrete (K = 1) and MultiDiscrete; params are their logits.

    Stored actions (..., K) count from 0; `to_env` adds `start`. Uniform noise selects by inverse
    CDF, so probabilities below float32's 6e-8 are never sampled.
    """

    sizes: tuple[int, ...]
    """Number of choices of each of the K categoricals."""
    start: tuple[int, ...]
    """The environment's smallest action in each."""
    shape: tuple[int, ...]
    """Shape of one action of the environment; () for Discrete."""
    env_dtype: str
    """Its dtype."""

    noise = "uniform"
    action_dtype = torch.int64

    @property
    def parameters(self) -> int:
        """Sum of the sizes."""
        return sum(self.sizes)

    @property
    def action_size(self) -> int:
        """K."""
        return len(self.sizes)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """The first choice whose cumulative probability exceeds the noise."""
        chosen = []
        for part, uniform in zip(self._parts(params), noise.unbind(-1), strict=True):
            cumulative = torch.softmax(part, -1).cumsum(-1)
            # Scaled by the rounded total, uniform < 1 stays strictly below it.
            threshold = uniform[..., None] * cumulative[..., -1:]
            chosen.append((cumulative[..., :-1] <= threshold).sum(-1))
        return torch.stack(chosen, -1)

    def mode(self, params: Tensor) -> Tensor:
        """The choice of the largest logit in each."""
        return torch.stack([part.argmax(-1) for part in self._parts(params)], -1)

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Sum of the log-softmax at the chosen."""
        chosen = [
            torch.log_softmax(part, -1).gather(-1, index[..., None])[..., 0]
            for part, index in zip(self._parts(params), action.unbind(-1), strict=True)
        ]
        return _total(chosen)

    def entropy(self, params: Tensor) -> Tensor:
        """Sum of -p log p."""
        log_probs = [torch.log_softmax(part, -1) for part in self._parts(params)]
        return _total([-(log_p.exp() * log_p).sum(-1) for log_p in log_probs])

    def kl(self, params_p: Tensor, params_q: Tensor) -> Tensor:
        """See `rgpo.core.kl.categorical_kl`."""
        pairs = zip(self._parts(params_p), self._parts(params_q), strict=True)
        return _total([categorical_kl(p, q) for p, q in pairs])

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Add `start`."""
        shifted = action + np.array(self.start)
        return shifted.astype(self.env_dtype).reshape(-1, *self.shape)

    def _parts(self, params: Tensor) -> tuple[Tensor, ...]:
        return params.split(self.sizes, -1)


@dataclass(frozen=True)
class Bernoulli(Distribution):
    """Independent bits for MultiBinary; params are the logits of a 1."""

    shape: tuple[int, ...]
    """Shape of one action of the environment."""
    env_dtype: str
    """Its dtype."""

    noise = "uniform"
    action_dtype = torch.int64

    @property
    def parameters(self) -> int:
        """Number of bits."""
        return math.prod(self.shape)

    @property
    def action_size(self) -> int:
        """Number of bits."""
        return math.prod(self.shape)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """1 where the noise is below its probability."""
        return (noise < torch.sigmoid(params)).long()

    def mode(self, params: Tensor) -> Tensor:
        """1 where the logit is positive."""
        return (params > 0).long()

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Sum of log sigmoid(+-logit)."""
        return F.logsigmoid(torch.where(action > 0, params, -params)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Sum over bits and outcomes of -p log p."""
        one = torch.sigmoid(params) * F.logsigmoid(params)
        zero = torch.sigmoid(-params) * F.logsigmoid(-params)
        return -(one + zero).sum(-1)

    def kl(self, params_p: Tensor, params_q: Tensor) -> Tensor:
        """Sum over bits and outcomes of p (log p - log q)."""
        one = torch.sigmoid(params_p) * (F.logsigmoid(params_p) - F.logsigmoid(params_q))
        zero = torch.sigmoid(-params_p) * (F.logsigmoid(-params_p) - F.logsigmoid(-params_q))
        return (one + zero).sum(-1)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Cast."""
        return action.astype(self.env_dtype).reshape(-1, *self.shape)


def distribution_for(space: gym.Space, *, squash: bool = False) -> Distribution:
    """The distribution for an action space; `squash` takes SquashedNormal for a Box.

    Raises RgpoError for a space without one, and for `squash` without finite bounds to squash to.
    """
    dtype = str(space.dtype)
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        low, high = _floats(space.low), _floats(space.high)
        if squash and not np.isfinite(low + high).all():
            raise RgpoError(
                f"The action space {space} has no finite bounds to squash to: leave squashing off."
            )
        return (SquashedNormal if squash else Normal)(low, high, space.shape, dtype)
    if squash:
        raise RgpoError(
            f"Squashing needs a continuous action space, not {space}: leave squashing off."
        )
    if isinstance(space, gym.spaces.Discrete):
        return Categorical((int(space.n),), (int(space.start),), (), dtype)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return Categorical(_ints(space.nvec), _ints(space.start), space.shape, dtype)
    if isinstance(space, gym.spaces.MultiBinary):
        return Bernoulli(space.shape, dtype)
    raise RgpoError(
        f"The action space {space} is not supported: wrap the environment so that it takes a "
        "floating-point Box, Discrete, MultiDiscrete or MultiBinary."
    )


def _split(params: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_std = params.chunk(2, -1)
    return mean, log_std.clamp(-MAX_LOG_STD, MAX_LOG_STD)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _floats(array: Any) -> tuple[float, ...]:
    return tuple(float(x) for x in array.reshape(-1))


def _ints(array: Any) -> tuple[int, ...]:
    return tuple(int(x) for x in array.reshape(-1))
