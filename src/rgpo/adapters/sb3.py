"""Any recipe in Stable-Baselines3: `GatedPPO("MlpPolicy", env, recipe="rgpo").learn(...)`."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from rgpo.adapters.common import (
    adapted,
    carrying,
    chosen,
    diagnostics,
    minibatch_loss,
    needs_kl,
    replaced,
    require_version,
)
from rgpo.core.recipes import Recipe
from rgpo.errors import RgpoError

require_version("stable_baselines3", "2.7.1", "2.10", extra="sb3")
from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.distributions import Distribution, kl_divergence  # noqa: E402
from stable_baselines3.common.type_aliases import RolloutBufferSamples  # noqa: E402


class GatedPPO(PPO):
    """SB3's PPO with a recipe of the core as its policy loss; everything else stays SB3's.

    `recipe` is a name or a `Recipe`, `recipe_options` its hyper-parameters; all other arguments are
    those of SB3's PPO but `clip_range`. The recipe's KL penalty is exact and adapts after every
    update; the core's diagnostics, measured then on the whole rollout, are logged under `rgpo/`.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        recipe: Recipe | str = "rgpo",
        recipe_options: Mapping[str, float | str | None] | None = None,
        **settings: Any,
    ) -> None:
        if "clip_range" in settings:
            raise RgpoError("clip_range belongs to SB3's own objective: use recipe_options")
        super().__init__(policy, env, **settings)
        discrete = not isinstance(getattr(self, "action_space", None), spaces.Box)
        gives = {"kl", "log_prob"} if discrete else {"kl"}
        self.recipe = chosen(recipe, recipe_options, host="Stable-Baselines3", gives=gives)

    def train(self) -> None:
        """SB3's update, in which the gradient at the log-probs is that of the recipe's loss."""
        # the action distribution may hold a graph (gSDE), which cannot be copied deeply
        shared = self.policy.action_dist
        behavior = copy.deepcopy(self.policy, {id(shared): copy.copy(shared)})
        get, evaluate = self.rollout_buffer.get, self.policy.evaluate_actions
        progress = 1 - self._current_progress_remaining
        present: list[RolloutBufferSamples] = []

        def get_and_keep(batch_size: int | None) -> Iterator[RolloutBufferSamples]:
            for sample in get(batch_size):
                present[:] = [sample]
                yield sample

        def evaluate_actions(observations: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            values, log_prob, entropy = evaluate(observations, actions)
            sample, new = present[0], self.policy.action_dist
            advantage, kl = sample.advantages, {}
            if self.normalize_advantage and len(advantage) > 1:
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            if needs_kl(self.recipe):
                with torch.no_grad():
                    old = behavior.get_distribution(observations)
                kl = {"kl": _kl(old, new), "reverse_kl": _kl(new, old)}
            loss = minibatch_loss(
                self.recipe, log_prob, sample.old_log_prob, advantage, progress, **kl
            )
            # without a closed form SB3 estimates the entropy by the log-probs of this call
            return values, carrying(log_prob, loss), -log_prob if entropy is None else entropy

        with (
            replaced(self.rollout_buffer, get=get_and_keep),
            replaced(self.policy, evaluate_actions=evaluate_actions),
        ):
            super().train()
        measured = self._measure(behavior)
        for name, number in measured.items():
            self.logger.record(f"rgpo/{name}", number)
        self.recipe = adapted(self.recipe, measured, progress)

    def _measure(self, behavior: Any) -> dict[str, float]:
        """The core's diagnostics of the whole update: the new policy against `behavior`."""
        buffer, parts = self.rollout_buffer, []
        self.policy.set_training_mode(False)
        for index in torch.arange(buffer.buffer_size * buffer.n_envs).split(1024):
            # not `get`, which would draw from the generator that shuffles the minibatches
            sample = buffer._get_samples(index.numpy())  # noqa: SLF001
            with torch.no_grad():
                discrete = isinstance(self.action_space, spaces.Discrete)
                actions = sample.actions.long().flatten() if discrete else sample.actions
                _, log_prob, _ = self.policy.evaluate_actions(sample.observations, actions)
                kl = _kl(behavior.get_distribution(sample.observations), self.policy.action_dist)
            parts.append((log_prob, sample.old_log_prob, sample.advantages, kl))
        log_prob, old, advantage, kl = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        return diagnostics(self.recipe, log_prob, old, advantage, kl)


def _kl(p: Distribution, q: Distribution) -> Tensor:
    """Exact KL(p || q), (B,), summed over independent dimensions of the action."""
    kl = kl_divergence(p, q)
    return kl if kl.dim() == 1 else kl.sum(1)
