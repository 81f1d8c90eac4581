"""TorchRL: any recipe as a loss module for control; `torchrl_llm` has the one for language models.

    from rgpo.adapters.torchrl import GatedPPOLoss
    loss_module = GatedPPOLoss(actor, critic, recipe="rgpo")

Keys, reductions, masks, value estimator, critic loss and entropy bonus are those of the host's
PPOLoss. Keys that begin with `loss_` are to be summed; the core's diagnostics stand beside them.
"""

from typing import Any

import torch
from torch import Tensor

from rgpo.adapters.common import adapted, chosen, require_version
from rgpo.adapters.terms import element_terms

require_version("torchrl", "0.14.1", "0.15", "torchrl")
from tensordict import TensorDictBase  # noqa: E402
from tensordict.nn import dispatch  # noqa: E402
from torchrl.objectives import PPOLoss  # noqa: E402


class Adapting:
    """What a loss module keeps between rollouts: its recipe, the last diagnostics, the progress."""

    progress = 0.0

    def adapt(self, progress: float = 0.0) -> None:
        """Adapt KL penalty and objective to the last call's data; once per rollout, at its end.

        `progress` is the share of training that is done.
        """
        measured = {name: float(x) for name, x in self.diagnostics.items()}
        self.recipe = adapted(self.recipe, measured | {"kl": measured["kl_k3"]}, progress)
        self.progress = progress

    def get_extra_state(self) -> dict[str, Any]:
        """Adapted hyper-parameters, for `state_dict`."""
        return self.recipe.hyper_parameters()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `load_state_dict`."""
        self.recipe = self.recipe.configure(**state)


class GatedPPOLoss(Adapting, PPOLoss):
    """PPOLoss with the objective and the KL penalty of `recipe`; one action is one element.

    `delay_actor=True` gives the proximal policy that some recipes need. A recipe that adapts, if
    only its KL penalty, needs `adapt()` after the last optimiser step on each rollout.
    """

    def __init__(
        self,
        *networks: Any,
        recipe: str = "rgpo",
        recipe_options: dict[str, Any] | None = None,
        delay_actor: bool = False,
        **kwargs: Any,
    ) -> None:
        resolved = chosen(
            recipe,
            recipe_options,
            host="TorchRL's control loss",
            gives=("log_prob", *(["proximal_log_ratio"] if delay_actor else [])),
        )
        super().__init__(*networks, delay_actor=delay_actor, **kwargs)
        self.recipe, self.diagnostics = resolved, {}

    def _maybe_normalize_advantage(self, advantage: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._advantage = super()._maybe_normalize_advantage(advantage, *args, **kwargs)
        return self._advantage

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> tuple[Any, ...]:
        """The host's log-ratios; the objective is computed here, where all it needs is at hand."""
        found = super()._log_weight(tensordict, adv_shape)
        to_proximal, _, _, from_behavior = found
        log_ratio = to_proximal if from_behavior is None else to_proximal + from_behavior
        behavior = torch.zeros_like(log_ratio)
        if "log_prob" in self.recipe.objective.needs:
            behavior = tensordict.get(self.tensor_keys.sample_log_prob).view_as(log_ratio)
        mask = torch.ones_like(log_ratio, dtype=torch.bool)
        for key in self._loss_mask_keys():
            if (valid := tensordict.get(key, None)) is not None:
                mask = mask & self._expand_loss_mask(valid, mask)
        terms, self.diagnostics = element_terms(
            self.recipe,
            (behavior + log_ratio).flatten(),
            behavior.flatten(),
            self._advantage.expand_as(log_ratio).flatten(),
            mask.flatten(),
            proximal_log_prob=(behavior + from_behavior).flatten() if self.delay_actor else None,
            progress=self.progress,
        )
        self._objective = self._reduce_loss(terms.view_as(mask), tensordict).squeeze(-1)
        return found

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The host's losses with this recipe's `loss_objective`, and the core's diagnostics."""
        out = super().forward(tensordict)
        out["loss_objective"], self._objective = self._objective, None
        return out.update(self.diagnostics)
