"""The epochs of policies and critics of R runs over one window, whose gradients are cached."""

import itertools
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rgpo.core.kl import normal_kl
from rgpo.core.recipes import Recipe
from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.networks import Actors, Critics
from rgpo.differentiable.optimizer import AdamW
from rgpo.differentiable.surrogate import Objectives, normal_entropy, reparam_surrogate
from rgpo.differentiable.tasks.task import Task


@dataclass
class Batch:
    """One window without graph, N = H * E samples of each run; 0 where an environment failed."""

    observation: Tensor
    """(R, N, O), normalised."""
    action: Tensor
    """(R, N, A), before squashing."""
    gradient: Tensor
    """G, (R, N, A)."""
    mean: Tensor
    """Of the behaviour policy, (R, N, A)."""
    log_std: Tensor
    """Likewise."""
    log_prob: Tensor
    """Of the actions under the behaviour policy, (R, N)."""
    mask: Tensor
    """(R, N) bool: False for the samples of environments that went wrong."""

    def at(self, index: Tensor | None) -> "Batch":
        """The samples of a minibatch of `Learner.minibatches`."""
        return Batch(**{f.name: picked(getattr(self, f.name), index) for f in fields(Batch)})


@dataclass(frozen=True)
class Schedule:
    """What the next update multiplies by, a column (R, 1) each."""

    learning_rate: Tensor
    critic_learning_rate: Tensor
    kl_coefficient: Tensor
    entropy_weight: Tensor


class Learner:
    """Policies, critics, target critics and optimisers of R runs."""

    def __init__(
        self,
        task: Task,
        configs: list[ReparamConfig],
        recipes: list[Recipe],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config = configs[0]
        self.objectives = Objectives([recipe.objective for recipe in recipes])
        limits = [torch.inf if c.target_kl is None else 1.5 * c.target_kl for c in configs]
        self.kl_limit = torch.tensor(limits, dtype=dtype, device=device)[:, None]
        self.stops = any(c.target_kl is not None for c in configs)
        self.penalised = any(recipe.kl is not None for recipe in recipes)
        seeds = [torch.Generator().manual_seed(c.seed) for c in configs]
        inputs = task.observation_size + (task.action_size if config.algo == "reppo" else 0)
        self.actor = Actors(task, config, seeds)
        self.critics = Critics(inputs, config, seeds)
        self.targets = Critics(inputs, config, seeds)
        for stack in (self.actor, self.critics, self.targets):
            stack.to(device, dtype)
        self.targets.rows.copy_(self.critics.rows)
        self.optimizers = {
            name: AdamW(stack.rows, config.max_grad_norm)
            for name, stack in (("actor", self.actor), ("critics", self.critics))
        }
        self.generators = [torch.Generator(device).manual_seed(c.seed + 1) for c in configs]

    def minibatches(self, size: int, number: int) -> list[Tensor | None]:
        """Rows (R, n) of samples (R * N, ...), from each run's own generator; None: all at once."""
        if number == 1:
            return [None]
        device = self.actor.rows.device
        orders = [torch.randperm(size, generator=g, device=device) for g in self.generators]
        rows = torch.stack([order + run * size for run, order in enumerate(orders)])
        return list(rows.chunk(number, dim=1))

    # ---- policies -------------------------------------------------------------------------

    def update_actor(self, batch: Batch, schedule: Schedule) -> dict[str, Tensor]:
        """M epochs over the window: the mean gradient norm and the steps taken, (R,) each."""
        active = torch.ones_like(self.kl_limit, dtype=torch.bool)
        total, steps = torch.zeros_like(self.kl_limit[:, 0]), torch.zeros_like(active[:, 0]).int()
        size, number = batch.mask.shape[1], self.config.minibatches
        # all drawn beforehand: where one run stops says nothing about another's numbers
        orders = [self.minibatches(size, number) for _ in range(self.config.epochs)]
        for index in itertools.chain(*orders):
            gradient, kl = self._actor_gradient(batch.at(index), schedule)
            if self.stops:
                active = active & ~(kl > self.kl_limit)
                if not bool(active.any()):
                    break
            norm = self.optimizers["actor"].step(
                self.actor.rows, gradient, schedule.learning_rate, active if self.stops else None
            )
            total += torch.where(active[:, 0], norm, 0)
            steps += active[:, 0]
        return {"gradient_norm": total / torch.clamp(steps, min=1), "optimizer_steps": steps}

    def _actor_gradient(self, batch: Batch, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Gradients (R, P), and the mean KL (R, 1) before the step."""
        rows = self.actor.rows.detach().requires_grad_()
        losses, kl = self.actor_losses(batch, schedule, rows)
        (gradient,) = torch.autograd.grad(losses.sum(), rows)
        return gradient, kl.detach()[:, None]

    def actor_losses(self, batch: Batch, schedule: Schedule, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Minus surrogate, plus KL penalty, minus entropy bonus; and the mean KL: (R,) each."""
        mean, log_std = self.actor(batch.observation, rows)
        surrogate, _, _ = reparam_surrogate(
            self.objectives, mean, log_std, batch.action, batch.gradient, batch.log_prob
        )
        share = shares(batch.mask, mean.dtype)
        loss = -(surrogate * share).sum(1)
        kl = torch.zeros_like(loss)
        if self.penalised or self.stops:
            kl = (normal_kl(batch.mean, batch.log_std, mean, log_std) * share).sum(1)
        if self.penalised:
            loss = loss + schedule.kl_coefficient[:, 0] * kl
        if self.config.entropy_coefficient:
            entropy = (normal_entropy(log_std) * share).sum(1)
            loss = loss - schedule.entropy_weight[:, 0] * entropy
        return loss, kl

    # ---- critics --------------------------------------------------------------------------

    def update_critics(
        self, inputs: Tensor, returns: Tensor, mask: Tensor, schedule: Schedule
    ) -> None:
        """Regression of inputs (R, N, I) on returns (R, N); then the targets follow."""
        optimizer, rate = self.optimizers["critics"], schedule.critic_learning_rate
        for _ in range(self.config.critic_epochs):
            for index in self.minibatches(mask.shape[1], self.config.critic_minibatches):
                some = (picked(tensor, index) for tensor in (inputs, returns, mask))
                optimizer.step(self.critics.rows, self._critic_gradient(*some), rate)
        self.targets.rows.lerp_(self.critics.rows, 1 - self.config.target_keep)

    def _critic_gradient(self, inputs: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """Gradients (R, P) of the squared error, summed over critics.

        Each learns as if alone, but for the joint gradient clip.
        """
        rows = self.critics.rows.detach().requires_grad_()
        error = self.critics(inputs, rows) - returns[:, None]
        loss = (error**2 * shares(mask, returns.dtype)[:, None]).sum()
        (gradient,) = torch.autograd.grad(loss, rows)
        return gradient

    # ---- checkpoints ----------------------------------------------------------------------

    def state(self, run: int) -> dict[str, Tensor]:
        """Everything of one run, by name."""
        tensors = {"generator": self.generators[run].get_state()}
        for prefix, holder in self._holders().items():
            tensors |= {f"{prefix}.{name}": t for name, t in holder.state(run).items()}
        return tensors

    def restore(self, run: int, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.generators[run].set_state(tensors["generator"])
        for prefix, holder in self._holders().items():
            holder.restore(run, part_of(tensors, f"{prefix}."))

    def _holders(self) -> dict[str, Any]:
        stacks = {"actor": self.actor, "critics": self.critics, "targets": self.targets}
        return stacks | {f"adam.{name}": one for name, one in self.optimizers.items()}


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def picked(tensor: Tensor, index: Tensor | None) -> Tensor:
    """Samples (R, n, ...) of a minibatch from those of a window (R, N, ...)."""
    if index is None:
        return tensor
    return tensor.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def shares(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (number of samples of the run) where `mask` (R, N) is True, else 0: sums are means."""
    return mask.to(dtype) / torch.clamp(mask.sum(1, keepdim=True), min=1)
