"""Any recipe in rsl_rl: `"algorithm": {"class_name": "rgpo.adapters.rsl_rl:GatedPPO", ...}`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from rgpo.adapters.common import (
    carrying,
    chosen,
    diagnostics,
    kl_state,
    mean_over_ranks,
    means,
    minibatch_loss,
    needs_kl,
    replaced,
    require_version,
    with_kl_state,
)
from rgpo.core.recipes import Recipe
from rgpo.errors import RgpoError

require_version("rsl-rl-lib", "5.4.2", "5.6", extra="rsl-rl")
from rsl_rl.algorithms import PPO  # noqa: E402
from rsl_rl.storage import RolloutStorage  # noqa: E402


class GatedPPO(PPO):
    """rsl_rl's PPO with a recipe of the core as its policy loss; everything else stays rsl_rl's.

    `recipe` and `recipe_options` stand beside the other settings of `algorithm`; `clip_param` only
    clips values. The KL is the exact one of rsl_rl, over the last epoch of an update; the core's
    diagnostics of that epoch are in the losses that rsl_rl logs, as `rgpo/...`.
    """

    def __init__(
        self,
        *arguments: Any,
        recipe: Recipe | str = "rgpo",
        recipe_options: Mapping[str, float | str | None] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.recipe = chosen(recipe, recipe_options, host="rsl_rl", gives={"kl"}, adapts=False)
        if self.symmetry and needs_kl(self.recipe):
            raise RgpoError(
                f"recipe {self.recipe.name!r} needs the KL of every sample, and rsl_rl has none of "
                "mirrored samples: leave symmetry_cfg out or take a recipe without KL penalty"
            )

    def update(self) -> dict[str, float]:
        """rsl_rl's update, in which the gradient at the log-probs is that of the recipe's loss."""
        present: list[RolloutStorage.Batch] = []
        rows: list[dict[str, float]] = []
        log_prob_of = self.actor.get_output_log_prob

        def kept(generator: Callable[..., Iterator[RolloutStorage.Batch]]) -> Callable[..., Any]:
            def batches(*arguments: int) -> Iterator[RolloutStorage.Batch]:
                for batch in generator(*arguments):
                    present[:] = [batch]
                    yield batch

            return batches

        def get_output_log_prob(actions: Tensor) -> Tensor:
            log_prob, batch = log_prob_of(actions), present[0]
            new, old = self.actor.output_distribution_params, batch.old_distribution_params
            sample = [x.flatten() for x in (log_prob, batch.old_actions_log_prob, batch.advantages)]
            kl = {}
            if needs_kl(self.recipe):
                kl["kl"] = self.actor.get_kl_divergence(old, new).flatten()
                kl["reverse_kl"] = self.actor.get_kl_divergence(new, old).flatten()
            rows.append(diagnostics(self.recipe, *sample, kl.get("kl")))
            return carrying(log_prob, minibatch_loss(self.recipe, *sample, **kl))

        storage = self.storage
        with (
            replaced(storage, mini_batch_generator=kept(storage.mini_batch_generator)),
            replaced(
                storage, recurrent_mini_batch_generator=kept(storage.recurrent_mini_batch_generator)
            ),
            replaced(self.actor, get_output_log_prob=get_output_log_prob),
        ):
            losses = super().update()
        measured = means(rows[-self.num_mini_batches :])
        if self.recipe.kl is not None:
            kl = mean_over_ranks(measured["kl"], self.device)
            self.recipe = replace(self.recipe, kl=self.recipe.kl.adapt(kl))
        return losses | {f"rgpo/{name}": number for name, number in measured.items()}

    def save(self) -> dict:
        """rsl_rl's checkpoint, with the present coefficient of the KL penalty."""
        return super().save() | {"rgpo": kl_state(self.recipe)}

    def load(self, loaded_dict: dict, load_cfg: dict | None, strict: bool) -> bool:
        """Take over what `save` returned."""
        self.recipe = with_kl_state(self.recipe, loaded_dict.get("rgpo", {}))
        return super().load(loaded_dict, load_cfg, strict)
