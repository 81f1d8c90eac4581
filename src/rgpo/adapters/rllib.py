"""Any recipe in RLlib's PPO: `PPOConfig().training(**rgpo.adapters.rllib.training("rgpo"))`."""

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from rgpo.adapters.common import chosen, mean_over_ranks, require_version
from rgpo.core.loss import policy_loss
from rgpo.core.recipes import Recipe
from rgpo.errors import RgpoError

require_version("ray", "2.60.0", "2.61", extra="rllib")
from ray.rllib.algorithms.ppo import PPOConfig  # noqa: E402
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner  # noqa: E402
from ray.rllib.core.columns import Columns  # noqa: E402
from ray.rllib.core.learner.learner import POLICY_LOSS_KEY  # noqa: E402
from ray.rllib.evaluation.postprocessing import Postprocessing  # noqa: E402

KEY = "rgpo_recipe"
"""Where the recipe is in `learner_config_dict`."""


def training(
    recipe: Recipe | str = "rgpo",
    recipe_options: Mapping[str, float | str | None] | None = None,
    **learner_config: Any,
) -> dict[str, Any]:
    """Arguments of `PPOConfig.training` that put the recipe in the place of PPO's clip.

    The recipe's KL penalty becomes RLlib's own (`use_kl_loss`, `kl_coeff`, `kl_target`), which is
    exact and adapts by RLlib's rule; a recipe without one switches it off. `learner_config` goes
    into the same `learner_config_dict`.
    """
    found = chosen(recipe, recipe_options, host="RLlib", gives={"kl", "log_prob"}, adapts=False)
    settings = {
        "learner_class": GatedPPOTorchLearner,
        "learner_config_dict": {**learner_config, KEY: found},
        "use_kl_loss": found.kl is not None,
    }
    if found.kl is None:
        return settings
    if found.kl.direction == "reverse":
        raise RgpoError(
            f"recipe {found.name!r} cannot run in RLlib, whose penalty is KL(old || new): its "
            "KL(new || old) is in `rgpo train` and Stable-Baselines3"
        )
    return {**settings, "kl_coeff": found.kl.coefficient, "kl_target": found.kl.target}


class GatedPPOTorchLearner(PPOTorchLearner):
    """RLlib's learner with the policy loss of the recipe in `learner_config_dict`.

    Value loss, entropy, KL penalty and metrics are RLlib's; the core's diagnostics of the last
    mini-batch are logged beside them as `rgpo_*`.
    """

    def build(self) -> None:
        """RLlib's, after a look at whether the actions suit the recipe."""
        super().build()
        for module_id, module in self.module._rl_modules.items():  # noqa: SLF001
            recipe = self.config.get_config_for_module(module_id).learner_config_dict[KEY]
            if "log_prob" in recipe.objective.needs and isinstance(module.action_space, spaces.Box):
                raise RgpoError(
                    f"recipe {recipe.name!r} needs the probability of a discrete action "
                    f"(log_prob), and module {module_id!r} has continuous ones"
                )

    def compute_loss_for_module(
        self, *, module_id: str, config: PPOConfig, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """RLlib's loss of a batch without advantages, plus the recipe's of the true one."""
        module = self.module[module_id].unwrapped()
        new = module.get_train_action_dist_cls().from_logits(fwd_out[Columns.ACTION_DIST_INPUTS])
        old = module.get_exploration_action_dist_cls().from_logits(
            batch[Columns.ACTION_DIST_INPUTS]
        )
        log_prob, advantage = new.logp(batch[Columns.ACTIONS]), batch[Postprocessing.ADVANTAGES]
        with torch.no_grad():
            kl = old.kl(new)
        result = policy_loss(
            config.learner_config_dict[KEY],
            log_prob,
            batch[Columns.ACTION_LOGP],
            advantage,
            batch.get(Columns.LOSS_MASK),
            kl=kl,
            reduction="token-mean",
        )
        # its ratio is then exactly 1: no infinity there can meet the 0 of the advantage
        inert = {
            **batch,
            Columns.ACTION_LOGP: log_prob.detach(),
            Postprocessing.ADVANTAGES: torch.zeros_like(advantage),
        }
        rest = super().compute_loss_for_module(
            module_id=module_id, config=config, batch=inert, fwd_out=fwd_out
        )
        logged = {f"rgpo_{name}": number for name, number in result.diagnostics.items()}
        logged[POLICY_LOSS_KEY] = result.loss.detach()
        self.metrics.log_dict(logged, key=module_id, window=1)
        return rest + result.loss

    def _update_module_kl_coeff(self, *, module_id: str, config: PPOConfig, kl_loss: float) -> None:
        """RLlib's rule on the mean over the learners, unless the coefficient is a fixed one.

        RLlib's own learners see the KL of their share of the data, and drift apart.
        """
        penalty = config.learner_config_dict[KEY].kl
        kl_loss = mean_over_ranks(float(kl_loss), self.device)
        if penalty is None or penalty.target is not None:
            super()._update_module_kl_coeff(module_id=module_id, config=config, kl_loss=kl_loss)
