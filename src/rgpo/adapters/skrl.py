"""Any recipe in skrl: `GatedPPO(recipe="rgpo", models=..., memory=..., cfg=PPO_CFG(...), ...)`."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from gymnasium import spaces
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

require_version("skrl", "2.1.0", "2.2", extra="skrl")
from skrl.agents.torch.ppo import PPO  # noqa: E402


class GatedPPO(PPO):
    """skrl's PPO with a recipe of the core as its policy loss; everything else stays skrl's.

    `recipe` is a name or a `Recipe`, `recipe_options` its hyper-parameters. `ratio_clip` is then
    without effect. The KL is exact, over the last epoch of an update; the core's diagnostics of
    that epoch are tracked as `RGPO / ...`.
    """

    def __init__(
        self,
        *,
        recipe: Recipe | str = "rgpo",
        recipe_options: Mapping[str, float | str | None] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        discrete = not isinstance(self.action_space, spaces.Box)
        gives = {"kl", "log_prob"} if discrete else {"kl"}
        self.recipe = chosen(recipe, recipe_options, host="skrl", gives=gives, adapts=False)
        if isinstance(self.action_space, spaces.MultiDiscrete) and needs_kl(self.recipe):
            raise RgpoError(
                f"recipe {self.recipe.name!r} needs the exact KL, which skrl's models of several "
                "discrete actions do not give: take a recipe without KL penalty"
            )
        self.behavior = copy.deepcopy(self.policy)
        self.checkpoint_modules["rgpo"] = self

    def update(self, *, timestep: int, timesteps: int) -> None:
        """The update of skrl, with the gradient of the recipe's loss at the log-probs."""
        present: dict[str, Tensor] = {}
        rows: list[dict[str, float]] = []
        draw, evaluate, behavior = self.memory.sample, self.policy.act, self.behavior
        behavior.load_state_dict(self.policy.state_dict())

        def sample(*, names: list[str], **how: Any) -> Any:
            for tensors in draw(names=names, **how):
                present.update(zip(names, tensors, strict=True))
                yield tensors

        def act(inputs: dict[str, Any], *, role: str = "") -> tuple[Tensor, dict[str, Any]]:
            output, extra = evaluate(inputs, role=role)
            if "taken_actions" not in inputs:
                return output, extra
            batch = (extra["log_prob"], present["log_prob"], present["advantages"])
            flat = [x.flatten() for x in batch]
            kl = {}
            if needs_kl(self.recipe):
                with torch.no_grad():
                    behavior.act(inputs, role=role)
                old, new = (m.distribution(role=role) for m in (behavior, self.policy))
                kl = {"kl": _kl(old, new), "reverse_kl": _kl(new, old)}
            rows.append(diagnostics(self.recipe, *flat, kl.get("kl")))
            loss = minibatch_loss(self.recipe, *flat, timestep / timesteps, **kl)
            # skrl multiplies its total loss by the scale of mixed precision, 1 without it
            extra["log_prob"] = carrying(extra["log_prob"], loss * self.scaler.get_scale())
            return output, extra

        with replaced(self.memory, sample=sample), replaced(self.policy, act=act):
            super().update(timestep=timestep, timesteps=timesteps)
        measured = means(rows[-self.cfg.mini_batches :])
        for name, number in measured.items():
            self.track_data(f"RGPO / {name}", number)
        if self.recipe.kl is not None:
            kl = mean_over_ranks(measured["kl"], self.device)
            self.recipe = replace(self.recipe, kl=self.recipe.kl.adapt(kl))

    def state_dict(self) -> dict[str, float]:
        """What checkpoints hold besides skrl's modules: the present coefficient of the penalty."""
        return kl_state(self.recipe)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` returned."""
        self.recipe = with_kl_state(self.recipe, state)


def _kl(p: torch.distributions.Distribution, q: torch.distributions.Distribution) -> Tensor:
    """Exact KL(p || q), (B,), summed over independent dimensions of the action."""
    kl = torch.distributions.kl_divergence(p, q)
    return kl if kl.dim() == 1 else kl.sum(1)
