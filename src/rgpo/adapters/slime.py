"""slime: any recipe as a custom loss. Built to the interface read in its code, not run in it.

    --loss-type custom_loss --custom-loss-function-path rgpo.adapters.slime.loss
    --custom-config-path rgpo.yaml

with `rgpo_recipe: rgpo-dual-detached` and `rgpo_recipe_options: {sharpness: 5}` in rgpo.yaml.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rgpo.adapters.terms import element_terms, token_recipe
from rgpo.errors import RgpoError

Result = tuple[Tensor, dict[str, Tensor]]
Reducer = Callable[[Tensor], Tensor]


def loss(args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Reducer) -> Result:
    """The custom loss: log-probs by the host's own function, then `from_log_probs`."""
    host = _host()
    _, found = host.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        **host.get_rollout_top_p_logprob_kwargs(args, batch),
    )
    return from_log_probs(args, batch, found["log_probs"], sum_of_sample_mean)


def _host() -> Any:
    from slime.backends.megatron_utils import loss as host

    return host


def from_log_probs(
    args: Any, batch: dict[str, Any], log_probs: list[Tensor], sum_of_sample_mean: Reducer
) -> Result:
    """Loss and metrics from the log-probs of every sample's response, (T_i,) each.

    The host sums what it gets over micro-batches and divides by their number of samples (of tokens
    with `calculate_per_token_loss`), so that a mean is given as mean times that number.
    """
    if args.use_kl_loss or args.entropy_coef or args.use_tis or args.use_opsm:
        raise RgpoError(
            "slime's KL loss, entropy bonus, TIS and OPSM are part of its own policy loss, which "
            "rgpo replaces: switch them off, or use the KL penalty of a recipe (kl_coefficient)"
        )
    masks = [mask.bool() for mask in batch["loss_masks"]]
    if any(len(x) != len(mask) for x, mask in zip(log_probs, masks, strict=True)):
        raise RgpoError("slime's context parallelism splits the sequences: use a size of 1")
    behavior = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    behavior = behavior or [x.detach() for x in log_probs]
    terms, diagnostics = element_terms(
        token_recipe(args.rgpo_recipe, getattr(args, "rgpo_recipe_options", None), "slime"),
        *(_padded(x) for x in (log_probs, behavior, batch["advantages"], masks)),
        reference_log_prob=_padded(batch.get("ref_log_probs")),
    )
    rows = [row[: len(x)] for row, x in zip(terms, log_probs, strict=True)]
    total = sum_of_sample_mean(torch.cat(rows))
    tokens = sum(mask.sum().clamp(min=1) for mask in masks)
    count = tokens if args.calculate_per_token_loss else len(masks)
    metrics = {f"rgpo/{name}": number * count for name, number in diagnostics.items()}
    return total, {"loss": total.detach(), "pg_loss": total.detach()} | metrics


def _padded(rows: list[Tensor] | None) -> Tensor | None:
    return pad_sequence(rows, batch_first=True) if rows else None
