"""Advantages and value targets, from rewards and values or from groups of rewards.

Arrays over time lead with it: (T, ...). Step t goes from state s_t to s_{t+1}; `value` is V(s_t)
and `next_value` is V(s_{t+1}) of that very transition. Where an episode ends the two kinds of end
differ, and both cut every sum over later steps:

- `terminated`: the task is over, V(s_{t+1}) counts as 0, whatever `next_value` holds;
- `truncated`: the episode was stopped (a time limit), so `next_value` must be the value of the
  final observation, NOT of the first observation after the reset, and is bootstrapped from.

`gamma` and `lam` are numbers or tensors that broadcast to (T, ...), for a discount that depends
on the step (1 inside an action and gamma between actions: POAD) or on the run.

All results are float32 at least. Standard deviations are unbiased (n - 1), as in TRL and verl.
"""

import torch
from torch import Tensor

from rgpo.core.checks import (
    require_boolean,
    require_broadcast_to,
    require_floating,
    require_integer,
    require_same_shape,
    working_dtype,
)
from rgpo.core.ratio import raw_ratio


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: Tensor | float,
    lam: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, (T, ...) each (arXiv 1506.02438).

        delta_t = reward_t + gamma next_value_t [not terminated_t] - value_t
        A_t     = delta_t + gamma lam A_{t+1} [not terminated_t and not truncated_t]
        return_t = A_t + value_t

    ValueError unless all tensors have one shape, the ends are boolean, the rest is floating and
    gamma and lam broadcast.
    """
    _require_time_arrays(reward, value, next_value, terminated, truncated, gamma=gamma, lam=lam)
    value = value.to(working_dtype(reward, value, next_value))
    next_value = torch.where(terminated, 0, next_value).to(value.dtype)
    delta = reward + gamma * next_value - value
    going = (~(terminated | truncated)).to(value.dtype)
    advantage = _accumulate(delta, going * (gamma * lam))
    return advantage, advantage + value


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: Tensor | float,
    lam: Tensor | float = 1.0,
    *,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace value targets vs and policy-gradient advantages, (T, ...) each (arXiv 1802.01561).

        rho_t = min(rho_bar, r_t),   c_t = lam min(c_bar, r_t),   r_t = exp(log_ratio_t)
        vs_t - V_t = rho_t delta_t + gamma c_t (vs_{t+1} - V_{t+1}) [episode goes on]
        A_t        = rho_t (reward_t + gamma vs_{t+1} - V_t)

    delta as in `gae`. vs_{t+1} is 0 after a termination and `next_value` after a truncation and
    at the end of the arrays. Everything is treated as data: no gradient flows through the result.
    """
    _require_time_arrays(
        reward, value, next_value, terminated, truncated, log_ratio, gamma=gamma, lam=lam
    )
    if not (rho_bar > 0 and c_bar > 0):
        raise ValueError(f"rho_bar and c_bar must be positive, got {rho_bar} and {c_bar}")
    with torch.no_grad():
        dtype = working_dtype(reward, value, next_value, log_ratio)
        value, ratio = value.to(dtype), raw_ratio(log_ratio.to(dtype))
        rho, c = torch.clamp(ratio, max=rho_bar), lam * torch.clamp(ratio, max=c_bar)
        next_value = torch.where(terminated, 0, next_value).to(value.dtype)
        going = (~(terminated | truncated)).to(dtype)
        delta = reward + gamma * next_value - value
        excess = _accumulate(rho * delta, going * (gamma * c))
        next_excess = torch.cat([excess[1:], torch.zeros_like(excess[:1])]) * going
        return value + excess, rho * (delta + gamma * next_excess)


def group_relative(reward: Tensor, group: Tensor | None = None, *, scale: bool = True) -> Tensor:
    """GRPO's advantage: reward minus its group's mean, over its standard deviation if `scale`.

    `reward` is (B, K), a group per row, or of any shape with integer ids `group` of that shape
    (arXiv 2402.03300; without scale arXiv 2503.20783). A group of one and a group of equal
    rewards give exactly 0.
    """
    group = _rows(reward) if group is None else group
    if scale:
        return group_normalize(reward, group)
    return _centred(reward, group, None)[0]


def leave_one_out(reward: Tensor, group: Tensor | None = None) -> Tensor:
    """RLOO's advantage: reward minus the mean of the OTHER rewards of its group (2402.14740).

    Groups as in `group_relative`. Equal to K / (K - 1) times the centred reward; a group of one
    has no baseline and gives 0.
    """
    group = _rows(reward) if group is None else group
    centred, count, _ = _centred(reward, group, None)
    return centred * count / torch.clamp(count - 1, min=1)


def optimal_baseline(reward: Tensor, squared_norm: Tensor, log_weight: Tensor) -> Tensor:
    """The baseline b of least variance per group (OPOB, arXiv 2602.17616): (B, K) -> (B, 1).

        b = sum W^2 |g|^2 R / sum W^2 |g|^2,    W = exp(log_weight)

    minimises sum W^2 |g|^2 (R - b)^2, what the samples say of the variance of sum W (R - b) g with
    g = grad log pi of a sequence, `squared_norm` its squared length. The sample's own reward is
    part of it, so that a bias of order 1/K remains. Where every norm is 0: the mean.
    """
    require_same_shape(reward=reward, squared_norm=squared_norm, log_weight=log_weight)
    require_floating(reward=reward, squared_norm=squared_norm, log_weight=log_weight)
    share = torch.exp(2 * (log_weight - log_weight.amax(-1, keepdim=True))) * squared_norm
    total = share.sum(-1, keepdim=True)
    weighted = (share * reward).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, weighted, reward.mean(-1, keepdim=True))


def red_drop(
    reward: Tensor,
    group: Tensor | None = None,
    *,
    scale: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """RED-Drop: `group_relative` on groups whose surplus of bad samples is dropped (2509.24203).

    In every group the samples below its mean reward are thinned out at random until they are no
    more than the others; mean and standard deviation are those of the kept ones. Groups as in
    `group_relative`. Returns the advantage, 0 where dropped, and the boolean `kept`. The authors'
    code leaves dropped samples in the loss's denominator; put `kept` into the mask to take them
    out.
    """
    group = _rows(reward) if group is None else group
    bad = _centred(reward, group, None)[0] < 0
    index = torch.unique(group, return_inverse=True)[1]
    surplus = _group_sum(2 * bad.to(torch.long) - 1, index)
    # bad samples of one group next to each other, in random order: their rank among them
    chance = torch.rand(reward.numel(), generator=generator, device=reward.device)
    order = chance.argsort()
    order = order[(2 * index.flatten() + bad.flatten())[order].argsort(stable=True)]
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    first = torch.full_like(place, len(order)).scatter_reduce(
        0, index.flatten(), torch.where(bad.flatten(), place, len(order)), "amin"
    )
    rank = place.view_as(index) - first[index]
    kept = ~(bad & (rank < surplus))
    if scale:
        return group_normalize(reward, group, kept), kept
    return _centred(reward, group, kept)[0], kept


def normalize(
    x: Tensor,
    mask: Tensor | None = None,
    dim: int | tuple[int, ...] | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / (std + eps) over `dim` (None: all of x) and the elements with `mask` True.

    `mask` is boolean with the shape of x; masked elements become 0 and may hold inf or NaN. Equal
    elements, one element or none give exactly 0.
    """
    require_same_shape(x=x, mask=mask)
    require_floating(x=x)
    require_boolean(mask=mask)
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    dims = tuple(range(x.dim())) if dim is None else dim
    x = torch.where(keep, x, 0).to(working_dtype(x))
    # shifted first: the mean of equal numbers is then exact, and a large offset costs no digits
    peak = _without(x, keep).amax(dims, keepdim=True)
    x = torch.where(keep, x - peak, 0)
    count = torch.clamp(keep.sum(dims, keepdim=True), min=1)
    x = torch.where(keep, x - x.sum(dims, keepdim=True) / count, 0)
    variance = (x**2).sum(dims, keepdim=True) / torch.clamp(count - 1, min=1)
    return x / (torch.sqrt(variance) + eps)


def group_normalize(
    x: Tensor, group: Tensor, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """(x - mean) / (std + eps) within the elements of equal `group` id and with `mask` True.

    `group` holds any integers and has the shape of x, as has `mask`; masked elements become 0.
    Groups of one or of equal elements give exactly 0. eps as in verl (TRL: 1e-4).
    """
    centred, count, index = _centred(x, group, mask)
    variance = _group_sum(centred**2, index) / torch.clamp(count - 1, min=1)
    return centred / (torch.sqrt(variance) + eps)


def _centred(x: Tensor, group: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """X minus its group's mean (0 where masked), the group's size >= 1, and its index, per element.

    Shifted by the group's maximum first, so that equal elements give exactly 0.
    """
    require_same_shape(x=x, group=group, mask=mask)
    require_floating(x=x)
    require_integer(group=group)
    require_boolean(mask=mask)
    index = torch.unique(group, return_inverse=True)[1]
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    x = torch.where(keep, x, 0).to(working_dtype(x))
    low = torch.full_like(x, torch.finfo(x.dtype).min).flatten()
    peak = low.scatter_reduce(0, index.flatten(), _without(x, keep).flatten(), "amax")[index]
    x = torch.where(keep, x - peak, 0)
    count = torch.clamp(_group_sum(keep.to(x.dtype), index), min=1)
    return torch.where(keep, x - _group_sum(x, index) / count, 0), count, index


def _without(x: Tensor, keep: Tensor) -> Tensor:
    """X as data, with the lowest number in place of masked elements, to take a maximum of."""
    return torch.where(keep, x.detach(), torch.finfo(x.dtype).min)


def _group_sum(x: Tensor, index: Tensor) -> Tensor:
    """For every element the sum over its group; `index` in [0, x.numel()) has x's shape."""
    total = torch.zeros_like(x).flatten().scatter_add(0, index.flatten(), x.flatten())
    return total[index]


def _rows(reward: Tensor) -> Tensor:
    if reward.dim() != 2:
        raise ValueError(f"reward must be (B, K) or come with group ids, got {tuple(reward.shape)}")
    return torch.arange(reward.shape[0], device=reward.device).unsqueeze(1).expand_as(reward)


def _accumulate(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t y_{t+1} along the first axis, with nothing after the end.

    By doubling the span that every y_t covers: log2(T) vectorised steps in place of T small ones.
    """
    span = 1
    while span < x.shape[0]:
        x = torch.cat([x[:-span] + decay[:-span] * x[span:], x[-span:]])
        decay = torch.cat([decay[:-span] * decay[span:], decay[-span:]])
        span *= 2
    return x


def _require_time_arrays(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    log_ratio: Tensor | None = None,
    **per_step: Tensor | float,
) -> None:
    require_same_shape(
        reward=reward,
        value=value,
        next_value=next_value,
        terminated=terminated,
        truncated=truncated,
        log_ratio=log_ratio,
    )
    require_floating(reward=reward, value=value, next_value=next_value, log_ratio=log_ratio)
    require_boolean(terminated=terminated, truncated=truncated)
    if reward.dim() == 0:
        raise ValueError("reward must lead with time, (T, ...), got a scalar")
    require_broadcast_to(reward.shape, **per_step)
