"""verl: every recipe as `actor_rollout_ref.actor.policy_loss.loss_mode`, found by verl itself.

verl imports `verl_plugin` in every worker, through the entry point `verl.plugins` of this package.
Recipes called rgpo... keep their name, all others are `rgpo:NAME`, since verl has its own sapo,
gspo and cispo. Options of a recipe:

    actor_rollout_ref.actor.policy_loss._target_=rgpo.adapters.verl.GatedPolicyLossConfig
    +actor_rollout_ref.actor.policy_loss.recipe_options.sharpness=5

A policy loss of verl sees no reference log-probs. Recipes that need them run with `ppo_loss` of
this module: `actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=actor_config))`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rgpo.adapters.common import require_version
from rgpo.adapters.terms import element_terms, token_recipe
from rgpo.core import recipes
from rgpo.errors import RgpoError

require_version("verl", "0.9.0", "0.10", "verl")
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import PolicyLossConfig  # noqa: E402
from verl.workers.utils import losses  # noqa: E402

_reference: ContextVar[Tensor | None] = ContextVar("reference log-probs", default=None)


@dataclass
class GatedPolicyLossConfig(PolicyLossConfig):
    """The host's configuration of the policy loss with the options of a recipe."""

    recipe_options: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters that differ from the recipe's defaults."""

    def __post_init__(self) -> None:
        token_recipe(self.loss_mode.removeprefix("rgpo:"), self.recipe_options, "verl")


@contextmanager
def reference(log_prob: Tensor) -> Iterator[None]:
    """Losses that are called within see these (B, T) log-probs of the reference model."""
    token = _reference.set(log_prob)
    try:
        yield
    finally:
        _reference.reset(token)


def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, Any]:
    """The host's own `ppo_loss`, whose policy loss also sees the reference log-probs of `data`."""
    with reference(data.select("ref_log_prob").to_padded_tensor()["ref_log_prob"]):
        return losses.ppo_loss(config, model_output, data, dp_group)


def loss_mode(recipe: str) -> str:
    """The name in verl of a recipe."""
    return recipe if recipe.startswith("rgpo") else f"rgpo:{recipe}"


def register() -> None:
    """Make every recipe known to verl; RgpoError for a name that is taken."""
    for name in recipes.names():
        if loss_mode(name) in core_algos.POLICY_LOSS_REGISTRY:
            raise RgpoError(f"the verl loss {loss_mode(name)!r} is registered twice")
        core_algos.register_policy_loss(loss_mode(name))(_policy_loss(name))


def _policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """The recipe as verl calls it: by keyword, with padded (B, T) tensors."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str,
        config: Any,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        recipe = token_recipe(name, config.policy_loss.get("recipe_options"), "verl")
        mask = response_mask.bool()
        terms, diagnostics = element_terms(
            recipe, log_prob, old_log_prob, advantages, mask, _reference.get()
        )
        if rollout_is_weights is not None:
            terms = terms * rollout_is_weights
        total = core_algos.agg_loss(terms, mask, loss_agg_mode, **config.global_batch_info)
        numbers = torch.stack(list(diagnostics.values())).tolist()  # one transfer to the host
        return total, {f"rgpo/{k}": x for k, x in zip(diagnostics, numbers, strict=True)}

    return loss
