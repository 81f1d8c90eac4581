"""The seam to any trainer: log-probs in, one loss and one set of diagnostics out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.checks import require_boolean, require_same_shape
from rgpo.core.diagnostics import ratio_diagnostics
from rgpo.core.ratio import at_level, log_ratio
from rgpo.core.recipes import Recipe, get
from rgpo.core.reduce import Reduction, reduce


@dataclass(frozen=True)
class PolicyLoss:
    """What `policy_loss` returns."""

    loss: Tensor
    """Scalar to minimise: minus the reduced surrogate, without the KL penalty."""

    log_ratio: Tensor
    """Log-ratio to the behaviour policy at the recipe's level, 0 where masked; in the graph."""

    diagnostics: dict[str, Tensor]
    """Scalars of `rgpo.core.diagnostics.GLOSSARY`, detached."""


def policy_loss(
    recipe: Recipe | str,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    reference_log_prob: Tensor | None = None,
    segment_ids: Tensor | None = None,
    reduction: Reduction | None = None,
    denominator: float | Tensor | None = None,
    constant: float | None = None,
) -> PolicyLoss:
    """The policy loss of any recipe, in any training loop.

    `log_prob` (with gradient), `behavior_log_prob` and `advantage` are (B,) actions or (B, T)
    tokens of one shape; `mask` boolean, True where an element counts. What masked elements hold,
    inf and NaN included, contributes exactly nothing to value, gradient and diagnostics.
    `reduction` overrides the recipe's (single actions: always their mean); `denominator` is the
    global count where the batch is split over micro-batches or ranks (`rgpo.core.reduce`).
    Recipes that need the reference model refuse to run without `reference_log_prob`, those at
    turn level without `segment_ids`: ValueError.

    The recipe's KL penalty is the trainer's: exact where the whole distribution is at hand
    (`categorical_kl`, `normal_kl`), else `forward_kl_gradient(result.log_ratio)`.
    """
    if isinstance(recipe, str):
        recipe = get(recipe)
    require_same_shape(log_prob=log_prob, advantage=advantage, mask=mask)
    require_boolean(mask=mask)
    if mask is None:
        mask = torch.ones_like(log_prob, dtype=torch.bool)
    ratio = _formed(recipe, log_ratio(log_prob, behavior_log_prob, mask), mask, segment_ids)
    advantage = torch.where(mask, advantage.detach(), 0).to(ratio.dtype)
    inputs = {}
    if "reference_log_ratio" in recipe.objective.needs:
        if reference_log_prob is None:
            raise ValueError(f"recipe {recipe.name!r} needs reference_log_prob")
        reference = log_ratio(log_prob, reference_log_prob, mask)
        inputs["reference_log_ratio"] = _formed(recipe, reference, mask, segment_ids)
    surrogate = recipe.objective.surrogate(ratio, advantage, **inputs)
    default: Reduction = "token-mean" if log_prob.dim() == 1 else recipe.reduction
    loss = -reduce(
        surrogate, mask, reduction or default, denominator=denominator, constant=constant
    )
    with torch.no_grad():
        weight = recipe.objective.weight(ratio, advantage, **inputs)
        diagnostics = ratio_diagnostics(
            ratio.detach().flatten(), advantage.flatten(), weight.flatten(), mask.flatten()
        )
    return PolicyLoss(loss, ratio, diagnostics)


def _formed(recipe: Recipe, log_ratio: Tensor, mask: Tensor, segment_ids: Tensor | None) -> Tensor:
    if recipe.level == "token":
        return log_ratio
    return at_level(log_ratio, mask, recipe.level, segment_ids)
