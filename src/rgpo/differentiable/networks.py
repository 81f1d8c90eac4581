"""Policies and critics of R runs: small MLPs with SiLU, all parameters in one matrix (R, P).

Every layer of all runs, and of all critics of a run, is one batched matrix product; a row of the
matrix is one run, so that gradient clip and optimiser are a few operations on the whole of it.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.tasks.task import Task

LOG_STD_RANGE = (-5.0, 2.0)
"""Of a log standard deviation that the network predicts (SAPO)."""


class Stack:
    """K networks of one shape for each of R runs; `rows` (R, P) holds the parameters of a run.

    `networks` are the initial tensors of all of them, by name, run by run.
    """

    def __init__(self, networks: Sequence[dict[str, Tensor]], number: int) -> None:
        self.number = number
        self.shapes = {name: tensor.shape for name, tensor in networks[0].items()}
        flat = [torch.cat([t.flatten() for t in network.values()]) for network in networks]
        self.rows = torch.stack(flat).view(len(networks) // number, -1)
        self.parts = self.split(self.rows)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the parameters there."""
        self.rows = self.rows.to(device, dtype)
        self.parts = self.split(self.rows)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (r, P) as parts (r * K, ...) by name; the derivative of all is a concatenation."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        pieces = rows.view(len(rows) * self.number, -1).split(sizes, dim=1)
        named = zip(self.shapes.items(), pieces, strict=True)
        return {name: piece.unflatten(1, shape) for (name, shape), piece in named}

    def state(self, run: int) -> dict[str, Tensor]:
        """The tensors of one run, (K, ...)."""
        mine = slice(run * self.number, (run + 1) * self.number)
        return {name: part[mine] for name, part in self.parts.items()}

    def restore(self, run: int, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, part in self.state(run).items():
            part.copy_(state[name])


class Actors(Stack):
    """Mean and log standard deviation (R, N, A) each, before squashing, from (R, N, O)."""

    def __init__(
        self, task: Task, config: ReparamConfig, generators: Sequence[torch.Generator]
    ) -> None:
        self.config, self.layers = config, len(config.hidden) + 1
        super().__init__([self._initial(task, config, one) for one in generators], 1)

    @staticmethod
    def _initial(
        task: Task, config: ReparamConfig, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Orthogonal weights of one run."""
        free = not config.state_dependent_std
        outputs = task.action_size if free else 2 * task.action_size
        widths = (task.observation_size, *config.hidden, outputs)
        tensors = {}
        for layer, (inputs, width) in enumerate(itertools.pairwise(widths)):
            gain = 0.01 if layer == len(widths) - 2 else math.sqrt(2)
            weight = nn.init.orthogonal_(torch.empty(width, inputs), gain, generator=generator)
            tensors |= {f"weight{layer}": weight.T, f"bias{layer}": torch.zeros(1, width)}
        log_std = torch.full((task.action_size,), config.initial_log_std)
        if free:
            return tensors | {"log_std": log_std[None]}
        tensors[f"bias{len(widths) - 2}"][0, task.action_size :] = log_std
        return tensors

    def __call__(self, observation: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the class; with other parameters (r, P) for observations of r runs if given."""
        parts = self.parts if rows is None else self.split(rows)
        x = observation
        for layer in range(self.layers):
            x = torch.baddbmm(parts[f"bias{layer}"], x, parts[f"weight{layer}"])
            x = functional.silu(x) if layer < self.layers - 1 else x
        if not self.config.state_dependent_std:
            return x, parts["log_std"].expand_as(x)
        mean, log_std = x.chunk(2, dim=-1)
        return mean, torch.clamp(log_std, *LOG_STD_RANGE)


class Critics(Stack):
    """K values of inputs of every run: (R, N, I) -> (R, K, N). Linear, layer norm, SiLU."""

    def __init__(
        self, inputs: int, config: ReparamConfig, generators: Sequence[torch.Generator]
    ) -> None:
        self.layers = len(config.hidden) + 1
        networks = [one for g in generators for one in self._initial(inputs, config, g)]
        super().__init__(networks, config.critics)

    @staticmethod
    def _initial(
        inputs: int, config: ReparamConfig, generator: torch.Generator
    ) -> list[dict[str, Tensor]]:
        """Orthogonal weights of the K critics of one run, layer by layer."""
        widths = (inputs, *config.hidden, 1)
        found: list[dict[str, Tensor]] = [{} for _ in range(config.critics)]
        for layer, (fan_in, width) in enumerate(itertools.pairwise(widths)):
            gain = math.sqrt(2) if width > 1 else 1.0
            for tensors in found:
                weight = torch.empty(fan_in, width)
                nn.init.orthogonal_(weight, gain, generator=generator)
                tensors |= {f"weight{layer}": weight, f"bias{layer}": torch.zeros(1, width)}
                if layer < len(widths) - 2:
                    tensors[f"scale{layer}"] = torch.ones(1, width)
                    tensors[f"shift{layer}"] = torch.zeros(1, width)
        return found

    def __call__(self, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
        """See the class; with other parameters (r, P) for inputs of r runs if given."""
        parts = self.parts if rows is None else self.split(rows)
        x = inputs[:, None].expand(-1, self.number, -1, -1).flatten(0, 1)
        for layer in range(self.layers):
            x = torch.baddbmm(parts[f"bias{layer}"], x, parts[f"weight{layer}"])
            if layer < self.layers - 1:
                x = functional.layer_norm(x, x.shape[-1:])
                x = torch.addcmul(parts[f"shift{layer}"], x, parts[f"scale{layer}"])
                x = functional.silu(x)
        return x.view(len(inputs), self.number, -1)
