"""prime-rl: any recipe as a custom loss. Built to the interface read in its code, not run in it.

    [trainer.loss]
    type = "custom"
    import_path = "rgpo.adapters.prime_rl.loss"
    kwargs = { recipe = "rgpo", sharpness = 5.0 }

The host has no old policy: the ratio is trainer over inference, staleness and the mismatch of the
two engines in one. It divides the sum over tokens by the global token count, whatever the recipe's
own reduction.
"""

from typing import Any, NamedTuple

from torch import Tensor

from rgpo.adapters.terms import element_terms, token_recipe


class LossOutputs(NamedTuple):
    """The two fields of the host's class of this name."""

    loss: Tensor
    metrics: dict[str, Tensor]


def loss(inputs: Any, recipe: str = "rgpo", **recipe_options: Any) -> LossOutputs:
    """Sum over the tokens of one packed sequence; `inputs` has the fields of `LossInputs`, (T,)."""
    chosen = token_recipe(recipe, recipe_options, "prime-rl")
    reference = getattr(inputs, "ref_logprobs", None)
    tokens = inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages, inputs.loss_mask
    terms, diagnostics = element_terms(
        chosen,
        *(t.unsqueeze(0) for t in tokens),
        reference_log_prob=None if reference is None else reference.unsqueeze(0),
    )
    weights = getattr(inputs, "loss_weights", None)
    terms = terms if weights is None else terms * weights
    return LossOutputs(terms.sum(), {f"rgpo/{k}": v for k, v in diagnostics.items()})
