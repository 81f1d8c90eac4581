"""TRPO's step: natural gradient by conjugate gradient, then a line search (arXiv 1502.05477)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import Distribution
from rgpo.control.networks import ActorCritic
from rgpo.core.advantage import normalize
from rgpo.core.reduce import token_mean

if TYPE_CHECKING:
    from rgpo.control.learner import Batch

DAMPING = 0.1
CG_STEPS = 10
BACKTRACKS = 10
SHRINK = 0.8


def natural_gradient_step(
    policy: ActorCritic, distribution: Distribution, batch: "Batch", config: TrainConfig
) -> bool:
    """Maximise E[r A] subject to KL(old || new) <= config.max_kl; True if a step was taken.

    The direction solves (F + 0.1 I) x = gradient by 10 conjugate-gradient steps, F the Fisher
    matrix as the Hessian of the KL at the old policy; the step length puts the quadratic model of
    the KL at the radius, and is shrunk by 0.8 up to ten times until the surrogate improves and
    the exact KL is inside (section 5.1 and appendix C). Works on one run (no leading axis); leaves
    the parameters as they were if no step qualifies.
    """
    parameters = _actor_parameters(policy)
    advantage = batch.advantage
    if config.normalize_advantages:
        advantage = normalize(advantage, batch.mask)

    def surrogate_and_kl() -> tuple[Tensor, Tensor]:
        new = policy.policy(batch.observation)
        log_ratio = distribution.log_prob(new, batch.action) - batch.log_prob
        kl = token_mean(distribution.kl(batch.parameters, new), batch.mask)
        return token_mean(torch.exp(log_ratio) * advantage, batch.mask), kl

    surrogate, kl = surrogate_and_kl()
    gradient = _flat(torch.autograd.grad(surrogate, parameters, retain_graph=True))
    kl_gradient = _flat(torch.autograd.grad(kl, parameters, create_graph=True))

    def fisher(vector: Tensor) -> Tensor:
        product = torch.autograd.grad(kl_gradient @ vector, parameters, retain_graph=True)
        return _flat(product) + DAMPING * vector

    direction = conjugate_gradient(fisher, gradient)
    curvature = direction @ fisher(direction)
    if not curvature > 0:  # also catches NaN: no direction, no step
        return False
    full_step = torch.sqrt(2 * config.max_kl / curvature) * direction
    start = _flat(parameters).detach().clone()
    with torch.no_grad():
        for attempt in range(BACKTRACKS):
            _assign(parameters, start + SHRINK**attempt * full_step)
            new_surrogate, new_kl = surrogate_and_kl()
            if new_surrogate > surrogate and new_kl <= config.max_kl:
                return True
        _assign(parameters, start)
    return False


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, steps: int = CG_STEPS
) -> Tensor:
    """Solve product(x) = target for a symmetric positive definite product, from x = 0."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, square = residual.clone(), residual @ residual
    for _ in range(steps):
        if square < 1e-10 * (target @ target):
            break
        image = product(direction)
        alpha = square / (direction @ image)
        x = x + alpha * direction
        residual = residual - alpha * image
        new_square = residual @ residual
        direction = residual + new_square / square * direction
        square = new_square
    return x


def _actor_parameters(policy: ActorCritic) -> list[Tensor]:
    """What the policy alone depends on; a shared CNN belongs to the critic's Adam as well."""
    names = ("actor.", "image.", "log_std")
    return [p for n, p in policy.named_parameters() if n.startswith(names)]


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _assign(parameters: list[Tensor], flat: Tensor) -> None:
    offset = 0
    for parameter in parameters:
        count = parameter.numel()
        parameter.copy_(flat[offset : offset + count].view_as(parameter))
        offset += count
