"""A window: H steps of R runs of E environments with the graph attached; the action gradients.

    R = sum_t gamma^c_t r_t + bootstraps,      G_t = dR / da_t,

c counts from the window's start and from 0 again after a reset inside it; a truncated episode and
the window's end are continued by the target critic at the final observation, gamma^(c+1) V, with
the graph attached; a terminated one by 0. G is the total derivative: through the dynamics and
through the later actions of the same policy (arXiv 2204.07137, 2508.06214).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.differentiable.surrogate import normal_entropy, squash_log_slope
from rgpo.differentiable.vector import TaskVectorEnv, maybe_any
from rgpo.errors import RgpoError

Function = Callable[[Tensor], Tensor]
Policy = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Window:
    """What was seen and done, (H, R, E, ...); data only, but for `action` and `objective`."""

    raw: Tensor
    """Observations as the environment gave them, (H, R, E, O)."""
    observation: Tensor
    """As the policy saw them."""
    final: Tensor
    """Observations after each step and before any reset, as the policy would see them."""
    action: list[Tensor]
    """Before squashing, H of (R, E, A), in the graph."""
    mean: Tensor
    """Of the behaviour policy, (H, R, E, A)."""
    log_std: Tensor
    """Likewise."""
    reward: Tensor
    """The environment's, (H, R, E)."""
    bonus: Tensor
    """The entropy's share of the reward, (H, R, E); 0 without soft rewards."""
    discount: Tensor
    """gamma^c_t, (H, R, E)."""
    terminated: Tensor
    """(H, R, E) bool."""
    truncated: Tensor
    """(H, R, E) bool."""
    objective: Tensor
    """R of each environment, (R, E), in the graph."""


def unroll(
    environments: TaskVectorEnv,
    actor: Policy,
    normalize: Function,
    bootstrap: Function,
    noise: Tensor,
    *,
    gamma: float,
    entropy_reward: Tensor | None = None,
) -> Window:
    """Act for H steps with noise (H, R, E, A) and keep the graph, unless gradients are off.

    `environments` are R * E, run by run; `bootstrap` maps normalised observations (R, E, O) to
    values (R, E). With `entropy_reward` (R, 1) that multiple of the entropy of the action, as the
    environment sees it, is added to every reward; the policy's own part of it does not depend on
    the action and is left to the entropy bonus.
    """
    bounded, lead = environments.task.bounded, noise.shape[1:3]
    noise = noise.detach().requires_grad_(torch.is_grad_enabled())  # the actions join the graph
    observation = environments.detach().unflatten(0, lead)
    discount = torch.ones_like(noise[0, ..., 0])
    total = torch.zeros_like(discount)
    kept: dict[str, list[Tensor]] = {name: [] for name in _KEPT}
    actions = []
    for t in range(len(noise)):
        seen = normalize(observation)
        mean, log_std = actor(seen)
        action = mean + torch.exp(log_std) * noise[t]
        raw = observation
        step = environments.step((torch.tanh(action) if bounded else action).flatten(0, 1))
        given = (*step[:4], step[4]["final_obs"])
        observation, reward, terminated, truncated, final = (x.unflatten(0, lead) for x in given)
        final = normalize(final)
        bonus = torch.zeros_like(reward)
        if entropy_reward is not None:
            slope = squash_log_slope(action) if bounded else 0.0
            bonus = entropy_reward * (normal_entropy(log_std) + slope)
        total = total + discount * (reward + bonus)
        goes_on = truncated | ~terminated if t == len(noise) - 1 else truncated
        if maybe_any(goes_on):
            total = total + torch.where(goes_on, gamma * discount * bootstrap(final), 0)
        these = (raw, seen, final, mean, log_std, reward, bonus, discount, terminated, truncated)
        for name, tensor in zip(_KEPT, these, strict=True):
            kept[name].append(tensor.detach())
        actions.append(action)
        discount = torch.where(terminated | truncated, 1, gamma * discount)
    stacked = {name: torch.stack(tensors) for name, tensors in kept.items()}
    return Window(action=actions, objective=total, **stacked)


_KEPT = (
    "raw",
    "observation",
    "final",
    "mean",
    "log_std",
    "reward",
    "bonus",
    "discount",
    "terminated",
    "truncated",
)


def action_gradients(window: Window) -> Tensor:
    """G, (H, R, E, A), by one back-propagation through time; parameters get no gradient.

    Raises RgpoError if no gradient reaches the actions or an operation in place broke the graph.
    """
    return torch.stack(_gradients(window.objective.sum(), window.action))


def _gradients(total: Tensor, actions: list[Tensor]) -> list[Tensor]:
    if not total.requires_grad:
        raise RgpoError(_NO_GRADIENT)
    try:
        found = torch.autograd.grad(total, actions, allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RgpoError(
            "the task changes a tensor in place that its gradient needs: return new tensors from "
            "step and observe"
        ) from error
    if any(gradient is None for gradient in found):
        raise RgpoError(_NO_GRADIENT)
    return list(found)


_NO_GRADIENT = (
    "no gradient reaches the action: the task is not differentiable (does it detach, round or "
    "leave torch?); train it with the score function, or with --algo reppo, instead"
)


def require_gradient(environments: TaskVectorEnv) -> None:
    """RgpoError unless reward or next observation depend on the action through the graph."""
    size = (environments.num_envs, environments.task.action_size)
    action = torch.zeros(size, dtype=environments.dtype, device=environments.device)
    action.requires_grad_()
    state, reward, _ = environments.task.step(environments.state, action)
    (gradient,) = _gradients(environments.task.observe(state).sum() + reward.sum(), [action])
    if not bool((gradient != 0).any()):
        raise RgpoError(_NO_GRADIENT)


def graph_bytes(
    environments: TaskVectorEnv, actor: Policy, normalize: Function, bootstrap: Function, runs: int
) -> int:
    """Bytes that the graph of one step holds, counted on one; with a truncation, as the worst."""
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    lead = (runs, environments.num_envs // runs)
    size = (*lead, environments.task.action_size)
    noise = torch.zeros(size, dtype=environments.dtype, device=environments.device)
    noise.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        mean, log_std = actor(normalize(environments.detach().unflatten(0, lead)))
        action = torch.tanh(mean + torch.exp(log_std) * noise).flatten(0, 1)
        state, reward, _ = environments.task.step(environments.state, action)
        final = normalize(environments.task.observe(state).unflatten(0, lead))
        kept = (reward, torch.where(reward > 0, bootstrap(final).flatten(), 0))
    del kept
    return sum(sizes.values())
