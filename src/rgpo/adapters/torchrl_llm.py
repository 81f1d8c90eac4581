"""TorchRL for language models: the host's GRPOLoss with any recipe.

    from rgpo.adapters.torchrl_llm import GatedGRPOLoss
    loss_module = GatedGRPOLoss(actor, recipe="rgpo-gate")

Masking strategy, aggregation, entropy bonus and KL terms are the host's.
"""

from typing import Any

import torch
from torch import Tensor

from rgpo.adapters.common import chosen
from rgpo.adapters.terms import GIVES, element_terms
from rgpo.adapters.torchrl import Adapting  # refuses other versions of the host
from rgpo.errors import RgpoError

from tensordict import TensorDict, TensorDictBase  # isort: skip
from torchrl.objectives.llm import GRPOLoss  # isort: skip
from torchrl.objectives.llm.grpo import LLMLossOutput  # isort: skip

AGGREGATIONS = {"token-mean": "token_mean", "sequence-mean": "prompt_mean"}
"""The host's names of the core's reductions."""


class GatedGRPOOutput(LLMLossOutput):
    """The host's output and the core's diagnostics."""

    diagnostics: TensorDict | None = None


class GatedGRPOLoss(Adapting, GRPOLoss):
    """GRPOLoss with the objective, the KL penalty and, by default, the reduction of `recipe`.

    Recipes of two ratios read log-probs of the reference model at the key `ref_log_probs`. A
    recipe that adapts needs `adapt()` after the last optimiser step on each batch of rollouts.
    """

    output_type = GatedGRPOOutput

    def __init__(
        self,
        *network: Any,
        recipe: str = "rgpo",
        recipe_options: dict[str, Any] | None = None,
        aggregation: str | None = None,
        **kwargs: Any,
    ) -> None:
        host = "TorchRL's GRPOLoss"
        resolved = chosen(recipe, recipe_options, host=host, gives=GIVES, sequences=True)
        if "clip_epsilon" in kwargs:
            raise RgpoError("clip_epsilon belongs to TorchRL's own objective: use recipe_options")
        aggregation = aggregation or AGGREGATIONS.get(resolved.reduction)
        super().__init__(*network, aggregation=aggregation, **kwargs)
        self.recipe, self.diagnostics = resolved, {}

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> tuple[Any, ...]:
        found = super()._log_weight(tensordict, adv_shape)
        log_prob = tensordict.get("_cur_log_prob")
        behavior = self._padded(tensordict, self.tensor_keys.sample_log_prob, "left", 0.0)
        reference = self._padded(
            tensordict,
            self.tensor_keys.ref_log_probs,
            self.ref_log_prob_padding_side,
            self.ref_log_prob_padding_value,
        )
        if reference is not None:
            reference = reference.view_as(log_prob)
        self._inputs = log_prob, behavior, found[3], reference
        return found

    @staticmethod
    def _padded(tensordict: TensorDictBase, key: Any, side: str, value: float) -> Tensor | None:
        return tensordict.get(
            key, None, as_padded_tensor=True, padding_side=side, padding_value=value
        )

    def _compute_policy_objective(
        self, log_weight: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor]:
        (log_prob, behavior, mask, reference), self._inputs = self._inputs, None
        advantage = advantage.expand_as(log_weight).squeeze(-1)
        terms, self.diagnostics = element_terms(
            self.recipe, log_prob, behavior, advantage, mask, reference, progress=self.progress
        )
        return terms.unsqueeze(-1), self.diagnostics["active_clip_fraction"]

    def forward(self, tensordict: TensorDictBase) -> GatedGRPOOutput:
        """The host's output with this recipe's `loss_objective`, and the core's diagnostics."""
        out = super().forward(tensordict)
        out.diagnostics = TensorDict(self.diagnostics)
        return out
