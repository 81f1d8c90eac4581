"""The seam to any trainer: log-probs in, one loss and one set of diagnostics out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.checks import require_boolean, require_same_shape
from rgpo.core.diagnostics import effective_sample_size, ratio_diagnostics
from rgpo.core.objective import Objective
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

    surrogate: Tensor
    """The terms before the reduction, to be maximised, 0 where masked; in the graph. For hosts
    that aggregate themselves."""

    weight: Tensor
    """w of every element, of the shape of `surrogate`, 0 where masked; detached."""

    diagnostics: dict[str, Tensor]
    """Scalars of `rgpo.core.diagnostics.GLOSSARY`, and of `SEQUENCE_GLOSSARY` for tokens (B, T);
    detached."""


def policy_loss(
    recipe: Recipe | str,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    reference_log_prob: Tensor | None = None,
    proximal_log_prob: Tensor | None = None,
    kl: Tensor | None = None,
    median_advantage: Tensor | None = None,
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

    Recipes that need a further input (`rgpo.core.objective.INPUTS`, `segment_ids` at turn level)
    refuse to run without it: ValueError. So do those that compare the sequences of one prompt:
    they have `group_loss`. Objectives of scope "batch" see all elements of the call as one unit,
    (B,) actions of scope "sequence" are sequences of one token.

    The recipe's KL penalty is the trainer's: exact where the whole distribution is at hand
    (`categorical_kl`, `normal_kl`), else `forward_kl_gradient(result.log_ratio)`.
    """
    if isinstance(recipe, str):
        recipe = get(recipe)
    if recipe.objective.scope == "group":
        raise ValueError(f"recipe {recipe.name!r} compares whole sequences: use group_loss")
    require_same_shape(log_prob=log_prob, advantage=advantage, mask=mask)
    require_boolean(mask=mask)
    if mask is None:
        mask = torch.ones_like(log_prob, dtype=torch.bool)
    own = log_ratio(log_prob, behavior_log_prob, mask)
    ratio = _formed(recipe, own, mask, segment_ids)
    given = {
        "reference_log_ratio": _anchored(recipe, log_prob, reference_log_prob, mask, segment_ids),
        "proximal_log_ratio": _anchored(recipe, log_prob, proximal_log_prob, mask, segment_ids),
        "log_prob": _unmasked(log_prob, mask, ratio),
        "kl": _unmasked(kl, mask, ratio),
        "median_advantage": _unmasked(median_advantage, mask, ratio),
        "mask": mask,
    }
    unit = _unit(recipe.objective, log_prob)
    ratio_in_units = unit(ratio)
    inputs = {name: unit(t) for name, t in _needed(recipe, given).items()}
    advantage = unit(torch.where(mask, advantage.detach(), 0).to(ratio.dtype))
    surrogate, weight = _terms(recipe.objective, ratio_in_units, advantage, mask, inputs)
    default: Reduction = "token-mean" if log_prob.dim() == 1 else recipe.reduction
    loss = -reduce(
        surrogate, mask, reduction or default, denominator=denominator, constant=constant
    )
    diagnostics = _diagnostics(ratio, advantage, weight, mask)
    if log_prob.dim() == 2:
        diagnostics["sequence_ess"] = _sequence_ess(own.detach().sum(1), mask.any(1))
    return PolicyLoss(loss, ratio, surrogate, weight, diagnostics)


def group_loss(
    recipe: Recipe | str,
    log_prob: Tensor,
    anchor_log_prob: Tensor,
    score: Tensor,
    mask: Tensor,
    *,
    group_size: int,
    reference_log_prob: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    """The loss of recipes that compare the K = `group_size` sequences of one prompt.

    `log_prob` (with gradient) and `anchor_log_prob` are (P K, T) tokens, the K sequences of a
    prompt in adjacent rows, `mask` boolean (P K, T). `score` (P K,) holds the rewards or, for
    preferences, any numbers that rank the preferred sequence first. The anchor is the policy that
    the recipe compares with: the behaviour policy for REBEL, pairwise P3O and BRAIn, the reference
    model for DPO and IPO (the recipe's summary says so). The ratio is that of the whole sequence.
    `denominator` is the global number of prompts. ValueError for shapes other than these.
    """
    if isinstance(recipe, str):
        recipe = get(recipe)
    if recipe.objective.scope != "group":
        raise ValueError(f"recipe {recipe.name!r} weighs tokens, not sequences: use policy_loss")
    require_boolean(mask=mask)
    if log_prob.dim() != 2 or score.shape != log_prob.shape[:1] or len(score) % group_size:
        raise ValueError(
            "group_loss needs log_prob (P K, T) and score (P K,), got "
            f"{tuple(log_prob.shape)} and {tuple(score.shape)} with K = {group_size}"
        )
    ratio = log_ratio(log_prob, anchor_log_prob, mask).sum(1).view(-1, group_size)
    reference = _anchored(recipe, log_prob, reference_log_prob, mask, None)
    if reference is not None:
        reference = torch.where(mask, reference, 0).sum(1).view_as(ratio)
    counted = mask.any(1).view_as(ratio)
    inputs = _needed(recipe, {"reference_log_ratio": reference, "mask": counted})
    score = torch.where(counted, score.detach().view_as(ratio), 0).to(ratio.dtype)
    surrogate, weight = _terms(recipe.objective, ratio, score, counted, inputs)
    prompts = float(len(ratio)) if denominator is None else denominator
    loss = -reduce(surrogate, counted, "token-mean", denominator=prompts)
    diagnostics = _diagnostics(ratio, score, weight, counted)
    return PolicyLoss(loss, ratio, surrogate, weight, diagnostics)


def _terms(
    objective: Objective,
    ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    inputs: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Surrogate and weight of every element, in the mask's shape and 0 where masked."""
    surrogate = objective.surrogate(ratio, advantage, **inputs).view_as(mask)
    with torch.no_grad():
        weight = objective.weight(ratio, advantage, **inputs).view_as(mask)
    return torch.where(mask, surrogate, 0), torch.where(mask, weight, 0)


def _diagnostics(
    ratio: Tensor, advantage: Tensor, weight: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    flat = (t.detach().flatten() for t in (ratio, advantage, weight, mask))
    return ratio_diagnostics(*flat)


def _sequence_ess(log_ratio: Tensor, counted: Tensor) -> Tensor:
    return effective_sample_size(log_ratio, counted & torch.isfinite(log_ratio))


def _needed(recipe: Recipe, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The inputs that the objective asks for; ValueError with the argument that is missing."""
    found = {}
    for name in recipe.objective.needs:
        tensor = given.get(name)
        if tensor is None:
            argument = name.replace("_log_ratio", "_log_prob")
            raise ValueError(f"recipe {recipe.name!r} needs {argument}")
        found[name] = tensor
    return found


def _unit(objective: Objective, log_prob: Tensor) -> Callable[[Tensor], Tensor]:
    """What puts tensors of log_prob's shape into units along the last axis."""
    if objective.scope == "batch":
        return torch.flatten
    if objective.scope == "sequence" and log_prob.dim() == 1:
        return lambda tensor: tensor.unsqueeze(-1)
    return lambda tensor: tensor


def _anchored(
    recipe: Recipe,
    log_prob: Tensor,
    anchor: Tensor | None,
    mask: Tensor,
    segment_ids: Tensor | None,
) -> Tensor | None:
    if anchor is None:
        return None
    return _formed(recipe, log_ratio(log_prob, anchor, mask), mask, segment_ids)


def _unmasked(tensor: Tensor | None, mask: Tensor, like: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    require_same_shape(input=tensor, mask=mask)
    return torch.where(mask, tensor.detach(), 0).to(like.dtype)


def _formed(recipe: Recipe, log_ratio: Tensor, mask: Tensor, segment_ids: Tensor | None) -> Tensor:
    if recipe.level == "token":
        return log_ratio
    return at_level(log_ratio, mask, recipe.level, segment_ids)
