"""The actor-critic of one run: an MLP each for vectors, a shared CNN for images."""

import itertools
import math

import torch
from torch import Tensor, nn

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import Distribution, Normal
from rgpo.errors import RgpoError

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class ActorCritic(nn.Module):
    """Distribution parameters and value of a batch of encoded observations.

    Observations are a dict with "vector" (B, O) float32, "image" (B, C, H, W) uint8, or both.
    Initialisation is orthogonal with gain sqrt(2), 0.01 for the policy head and 1 for the value
    head (the usual choice for PPO, arXiv 2006.05990), from the given seed alone.
    """

    def __init__(
        self,
        observation_shapes: dict[str, tuple[int, ...]],
        distribution: Distribution,
        config: TrainConfig,
        seed: int,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        features = 0
        self.image: nn.Module | None = None
        if "image" in observation_shapes:
            self.image = _nature_cnn(observation_shapes["image"], generator)
            features += 512
        if "vector" in observation_shapes:
            features += observation_shapes["vector"][0]
        self.gaussian = isinstance(distribution, Normal)
        free_std = self.gaussian and not config.state_dependent_std
        outputs = distribution.parameters // 2 if free_std else distribution.parameters
        widths = (features, *config.hidden)
        self.actor = _mlp((*widths, outputs), config.activation, 0.01, generator)
        self.critic = _mlp((*widths, 1), config.activation, 1.0, generator)
        self.median: nn.Module | None = None
        if "median_advantage" in config.resolve().objective.needs:
            self.median = _mlp((*widths, 1), config.activation, 1.0, generator)
        self.log_std: nn.Parameter | None = None
        if free_std:
            self.log_std = nn.Parameter(torch.full((outputs,), config.initial_log_std))
        elif self.gaussian:
            with torch.no_grad():
                self.actor[-1].bias[outputs // 2 :] = config.initial_log_std  # type: ignore[index]

    def features(self, observation: dict[str, Tensor]) -> Tensor:
        """(B, F): image features and vector side by side."""
        parts = []
        if self.image is not None:
            parts.append(self.image(observation["image"].float() / 255))
        if "vector" in observation:
            parts.append(observation["vector"])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def forward(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Distribution parameters (B, P) and values (B,)."""
        features = self.features(observation)
        return self.head(features), self.critic(features).squeeze(-1)

    def medians(self, observation: dict[str, Tensor]) -> Tensor:
        """Medians (B,) of the return, of recipes that need them."""
        if self.median is None:
            raise ValueError("this recipe needs no median of the return")
        return self.median(self.features(observation)).squeeze(-1)

    def policy(self, observation: dict[str, Tensor]) -> Tensor:
        """Distribution parameters (B, P) alone."""
        return self.head(self.features(observation))

    def head(self, features: Tensor) -> Tensor:
        """Distribution parameters (B, P) from features (B, F)."""
        output = self.actor(features)
        if self.log_std is not None:
            return torch.cat([output, self.log_std.expand_as(output)], dim=-1)
        if self.gaussian:  # a predicted deviation must neither vanish nor explode
            mean, log_std = output.chunk(2, dim=-1)
            return torch.cat([mean, torch.clamp(log_std, -5, 2)], dim=-1)
        return output


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(
    widths: tuple[int, ...], activation: str, last_gain: float, generator: torch.Generator
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers += [_linear(inputs, outputs, math.sqrt(2), generator), ACTIVATIONS[activation]()]
    layers.append(_linear(widths[-2], widths[-1], last_gain, generator))
    return nn.Sequential(*layers)


def _nature_cnn(shape: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """The network of Mnih et al. 2015; RgpoError for images below 36 x 36."""
    if min(shape[1:]) < 36:
        raise RgpoError(
            f"images of {shape[1]} x {shape[2]} are too small for the CNN, which needs 36 x 36: "
            "wrap the environment to resize or flatten its observation"
        )
    convolutions = nn.Sequential(
        nn.Conv2d(shape[0], 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    for layer in convolutions:
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight, math.sqrt(2), generator=generator)
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        flat = convolutions(torch.zeros(1, *shape)).shape[-1]
    return nn.Sequential(*convolutions, _linear(flat, 512, math.sqrt(2), generator), nn.ReLU())
