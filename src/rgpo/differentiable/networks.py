"""Policy and critics: small MLPs with SiLU, the critics' layers stacked into one product each."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

LOG_STD_RANGE = (-5.0, 2.0)
"""Of a log standard deviation that the network predicts (SAPO)."""


class Actor(nn.Module):
    """Mean and log standard deviation (N, A) each, of the action before squashing, from (N, O)."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        *,
        initial_log_std: float,
        state_dependent_std: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.state_dependent_std = state_dependent_std
        outputs = 2 * action_size if state_dependent_std else action_size
        self.body = _mlp((observation_size, *hidden, outputs), generator)
        if state_dependent_std:
            with torch.no_grad():
                self.body[-1].bias[action_size:] = initial_log_std  # type: ignore[index]
        else:
            self.log_std = nn.Parameter(torch.full((action_size,), initial_log_std))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        output = self.body(observation)
        if not self.state_dependent_std:
            return output, self.log_std.expand_as(output)
        mean, log_std = output.chunk(2, dim=-1)
        return mean, torch.clamp(log_std, *LOG_STD_RANGE)


class Critics(nn.Module):
    """K values of a batch of inputs: (N, I) -> (K, N). Layers: linear, layer norm, SiLU."""

    def __init__(
        self, inputs: int, hidden: tuple[int, ...], number: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        widths = (inputs, *hidden, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        for fan_in, width in itertools.pairwise(widths):
            weight = torch.empty(number, fan_in, width)
            for one in weight:
                nn.init.orthogonal_(one, math.sqrt(2) if width > 1 else 1.0, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(number, 1, width)))
        for width in hidden:
            self.scales.append(nn.Parameter(torch.ones(number, 1, width)))
            self.shifts.append(nn.Parameter(torch.zeros(number, 1, width)))

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        x = inputs.expand(len(self.weights[0]), -1, -1)
        for layer, (scale, shift) in enumerate(zip(self.scales, self.shifts, strict=True)):
            x = torch.baddbmm(self.biases[layer], x, self.weights[layer])
            x = functional.layer_norm(x, x.shape[-1:])
            x = functional.silu(torch.addcmul(shift, x, scale))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).squeeze(-1)


def _mlp(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        last = len(layers) == 2 * (len(widths) - 2)
        nn.init.orthogonal_(linear.weight, 0.01 if last else math.sqrt(2), generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.SiLU()]
    return nn.Sequential(*layers)
