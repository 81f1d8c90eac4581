"""What adapters with a seam for a loss share: log-probs in, one loss term per element out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rgpo.adapters.common import chosen
from rgpo.core.kl import forward_kl_gradient, reverse_kl_gradient
from rgpo.core.loss import policy_loss
from rgpo.core.ratio import log_ratio
from rgpo.core.recipes import Recipe
from rgpo.errors import RgpoError

GIVES = ("reference_log_ratio", "log_prob")
"""Inputs of `rgpo.core.objective.INPUTS` that a language trainer with a reference model has."""


def token_recipe(
    recipe: str, options: Mapping[str, Any] | None, host: str, *, whole_batch: bool = False
) -> Recipe:
    """The recipe for a language trainer that calls a function and keeps no state for it."""
    return chosen(
        recipe,
        options,
        host=host,
        gives=GIVES,
        whole_batch=whole_batch,
        sequences=True,
        adapts=False,
    )


def element_terms(
    recipe: Recipe,
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    reference_log_prob: Tensor | None = None,
    proximal_log_prob: Tensor | None = None,
    progress: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss terms of (B, T) tokens or (B,) actions, 0 where masked, and the diagnostics.

    The recipe's KL penalty is in them, estimated from the samples; `progress` is the share of
    training that is done. A turn is a run of unmasked tokens, since tool results are masked.
    """
    if reference_log_prob is None and "reference_log_ratio" in recipe.objective.needs:
        raise RgpoError(
            f"recipe {recipe.name!r} needs log-probs of the reference model, and this batch has "
            "none: docs/adapters tells for every host how to have them computed"
        )
    result = policy_loss(
        recipe,
        log_prob,
        behavior_log_prob,
        advantage,
        mask,
        reference_log_prob=reference_log_prob,
        proximal_log_prob=proximal_log_prob,
        segment_ids=turns(mask) if recipe.level == "turn" else None,
    )
    if recipe.kl is None:
        return -result.surrogate, result.diagnostics
    gradient = forward_kl_gradient if recipe.kl.direction == "forward" else reverse_kl_gradient
    kl = gradient(log_ratio(log_prob, behavior_log_prob, mask))
    penalty = recipe.kl.weight(progress) * torch.where(mask, kl, 0)
    return penalty - result.surrogate, result.diagnostics


def turns(mask: Tensor) -> Tensor:
    """Number of the run of unmasked tokens that a token belongs to, or follows: (B, T)."""
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    return starts.cumsum(1)
