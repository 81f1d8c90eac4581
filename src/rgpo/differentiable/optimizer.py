"""Clip and AdamW of R runs: one row of a matrix (R, P) each, one never sees another."""

import torch
from torch import Tensor

BETAS, DECAY, EPSILON = (0.7, 0.95), 0.01, 1e-8


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), as PyTorch's, for rows (R, P).

    `max_norm` clips each row's gradient; 0 switches that off.
    """

    def __init__(self, rows: Tensor, max_norm: float) -> None:
        self.max_norm = max_norm
        self.first, self.second = torch.zeros_like(rows), torch.zeros_like(rows)
        self.steps = torch.zeros_like(rows[:, :1])

    def step(
        self, rows: Tensor, gradient: Tensor, rate: Tensor, active: Tensor | None = None
    ) -> Tensor:
        """Step in place where `active` (R, 1), rates (R, 1); the norms (R,) before the clip."""
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        if self.max_norm:
            gradient = gradient * torch.clamp(self.max_norm / (norm + 1e-6), max=1)
        changed = (rows, self.first, self.second, self.steps)
        before = changed if active is None else [tensor.clone() for tensor in changed]
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient * gradient, 1 - BETAS[1])
        root = torch.sqrt(1 - BETAS[1] ** self.steps)
        size = rate * root / (1 - BETAS[0] ** self.steps)
        rows.mul_(1 - rate * DECAY)
        rows.addcdiv_(self.first * size, self.second.sqrt().add_(EPSILON * root), value=-1)
        if active is not None:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(active, tensor, old))
        return norm[:, 0]

    def state(self, run: int) -> dict[str, Tensor]:
        """The tensors of one run."""
        return {name: getattr(self, name)[run] for name in ("first", "second", "steps")}

    def restore(self, run: int, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, tensor in state.items():
            getattr(self, name)[run] = tensor
