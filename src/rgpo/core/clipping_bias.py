"""What clipping takes from the gradient, and the step that is normalised by it (S-PPO, ST-PPO).

The clipping bias C is the part of the unclipped policy gradient that PPO's clip throws away:
that of the elements whose ratio has passed the clip. The gradient of the recipes with
`step="clip-normalized"` is PPO's over the L2 norm of C (arXiv 2511.20718; formula: reviewers'
text and a figure caption, the equation itself was not seen):

    result = policy_loss(recipe, ...)
    bias = clipped_loss(recipe, result, advantage, mask)
    scale = clip_normalizer(gradient_norm(bias, parameters))
    (result.loss * scale).backward()

With Adam a constant factor changes nothing: only the variation of the scale between steps does.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rgpo.core.loss import PolicyLoss
from rgpo.core.objective import safe_ratio
from rgpo.core.recipes import Recipe
from rgpo.core.reduce import Reduction, reduce


def clipped_loss(
    recipe: Recipe,
    result: PolicyLoss,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Scalar whose gradient is minus the clipping bias: the loss r A of clipped elements alone.

    `result`, `advantage` and `mask` are those of `policy_loss` with this recipe, as are
    `reduction` and `denominator`. An element is clipped if its weight is 0 and its advantage not.
    The gradient goes through the ratio at the recipe's level, as that of the loss does.
    """
    if mask is None:
        mask = torch.ones_like(result.weight, dtype=torch.bool)
    lost = clipped_away(result.log_ratio, torch.where(mask, advantage, 0), result.weight)
    default: Reduction = "token-mean" if mask.dim() == 1 else recipe.reduction
    return -reduce(lost, mask, reduction or default, denominator=denominator)


def clipped_away(log_ratio: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """Per element, a term whose gradient is what the clip threw away: r A grad log r, or 0.

    An element is clipped if its weight is 0 and its advantage not. All of one shape.
    """
    clipped = (weight == 0) & (advantage != 0)
    force = safe_ratio(log_ratio.detach()) * advantage.detach()
    return torch.where(clipped, force, 0) * log_ratio


def gradient_norm(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of the gradient of `loss` by all parameters, the graph kept for another pass.

    This is a second backward pass. Sharded parameters need the norm over all shards.
    """
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    squares = [(g.float() ** 2).sum() for g in gradients if g is not None]
    return torch.sqrt(torch.stack(squares).sum())


def clip_normalizer(norm: Tensor, floor: float = 0.1) -> Tensor:
    """1 / max(norm, floor), the factor on the loss.

    The published rule, 1 / norm, divides by zero while nothing is clipped. The floor is ours
    (confidence: inferred). It has to lie below usual norms: with normalised advantages on
    CartPole and Hopper their median was 0.02 to 0.5, so that a floor of 1 would leave PPO.
    """
    if not 0 < floor < float("inf"):
        raise ValueError(f"floor must be positive and finite, got {floor}")
    return 1 / torch.clamp(norm.detach(), min=floor)
