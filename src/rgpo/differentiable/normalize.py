"""What policies and critics see: observations by the running moments of each run."""

import numpy as np
import torch
from torch import Tensor

from rgpo.control.normalize import RunningMoments


class Normalizer:
    """(x - mean) / std, clipped to +-10, of observations (..., R, E, O); frozen until `update`."""

    def __init__(
        self, runs: int, size: int, *, enabled: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.enabled, self.dtype, self.device = enabled, dtype, device
        self.moments = RunningMoments(runs, (size,))
        self.refresh()

    def refresh(self) -> None:
        """Use the moments as they are now."""

        def tensor(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, dtype=self.dtype, device=self.device)[:, None]

        self.shift = tensor(self.moments.mean)
        self.scale = tensor(1 / np.sqrt(self.moments.variance + 1e-8))

    def __call__(self, observation: Tensor) -> Tensor:
        """See the class."""
        if not self.enabled:
            return observation
        return torch.clamp((observation - self.shift) * self.scale, -10, 10)

    def update(self, raw: Tensor, mask: Tensor) -> None:
        """Take in observations (R, N, O) where `mask` (R, N), for all calls after this one."""
        self.moments.update(raw.double().cpu().numpy(), mask.cpu().numpy())
        self.refresh()

    def state(self, run: int) -> dict[str, Tensor]:
        """The moments of one run."""
        return {name: torch.from_numpy(array) for name, array in self.moments.state(run).items()}

    def restore(self, run: int, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.moments.restore(run, {name: tensor.numpy() for name, tensor in state.items()})
        self.refresh()
