"""Tinker and trainers like it: the model is remote, one sends data and a loss of the log-probs.

    future = training_client.forward_backward_custom(data, custom_loss("rgpo"))

Read from the documentation and the client of 0.38, not run against the service. Every datum's
`loss_fn_inputs` hold the sampler's `logprobs` and the `advantages`, and may hold a `mask` and
`reference_logprobs`; tensors (T,) or what has `to_torch`. A service that only takes weights u of
its own loss -sum u log pi gets them from `token_weights`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rgpo.adapters.terms import element_terms, token_recipe
from rgpo.core.reduce import Reduction, reduce
from rgpo.errors import RgpoError

Loss = Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]


def custom_loss(
    recipe: str = "rgpo", *, reduction: Reduction | None = None, **recipe_options: Any
) -> Loss:
    """The recipe as `loss(data, logprobs) -> (loss, metrics)`, reduced over the data of one call.

    `reduction` overrides the recipe's.
    """
    chosen = token_recipe(recipe, recipe_options, "a remote trainer", whole_batch=True)

    def loss(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        log_prob = pad_sequence(list(logprobs), batch_first=True)
        lengths = pad_sequence([torch.ones(len(x)) for x in logprobs], batch_first=True)
        mask = _field(data, "mask")
        behavior, advantage = _field(data, "logprobs"), _field(data, "advantages")
        if behavior is None or advantage is None:
            raise RgpoError("every datum needs loss_fn_inputs['logprobs'] and ['advantages']")
        kept = lengths.bool() if mask is None else mask.bool()
        terms, diagnostics = element_terms(
            chosen,
            log_prob,
            behavior,
            advantage,
            kept,
            reference_log_prob=_field(data, "reference_logprobs"),
        )
        total = reduce(terms, kept, reduction or chosen.reduction)
        return total, {f"rgpo/{name}": float(x) for name, x in diagnostics.items()}

    return loss


def token_weights(
    loss: Loss, data: Sequence[Any], logprobs: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, float]]:
    """Weights u (T,) per datum such that -sum u log pi has the gradient of `loss`, and metrics."""
    leaves = [x.detach().clone().requires_grad_() for x in logprobs]
    total, metrics = loss(data, leaves)
    return [-g for g in torch.autograd.grad(total, leaves)], metrics


def _field(data: Sequence[Any], name: str) -> Tensor | None:
    """That input of every datum, padded to (B, T); None unless all have it."""
    found = [datum.loss_fn_inputs.get(name) for datum in data]
    if any(x is None for x in found):
        return None
    tensors = [x.to_torch() if hasattr(x, "to_torch") else torch.as_tensor(x) for x in found]
    return pad_sequence(tensors, batch_first=True)
