"""From per-token terms to one number, with denominators that the caller may fix.

A mean over a micro-batch or over the data of one rank has a denominator of its own, so a sum of
such means is another objective than the mean over the whole batch. Pass the GLOBAL count as
`denominator` and the parts add up to the whole exactly: sum over micro-batches, all-reduce with
sum over ranks. Where the host averages over W ranks instead, pass the global count / W.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from rgpo.core.checks import (
    require_boolean,
    require_floating,
    require_same_shape,
    working_dtype,
)

Reduction = Literal["token-mean", "sequence-mean", "sequence-sum"]
"""How per-token terms become one number, see the functions of the same names."""


def token_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Sum of x over the elements with `mask` True, over `denominator` (DAPO, arXiv 2503.14476).

    `x` and the boolean `mask` have one shape, any. `denominator` is the global number of
    unmasked elements; None: that of `mask`. Nothing unmasked gives exactly 0.
    """
    x = _masked(x, mask)
    return _over(x.sum(), mask.sum() if denominator is None else denominator)


def sequence_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Mean over sequences of the mean over tokens (GRPO, arXiv 2402.03300; GSPO).

    `x` and the boolean `mask` are (B, T). `denominator` is the global number of sequences; None:
    B. A sequence without unmasked token contributes 0 and is counted.
    """
    _require_sequences(x)
    x = _masked(x, mask)
    per_sequence = x.sum(1) / torch.clamp(mask.sum(1), min=1)
    return _over(per_sequence.sum(), x.shape[0] if denominator is None else denominator)


def sequence_sum(
    x: Tensor, mask: Tensor, constant: float, denominator: Tensor | float | None = None
) -> Tensor:
    """Mean over sequences of the token sum over a constant (Dr. GRPO, arXiv 2503.20783).

    `x` and the boolean `mask` are (B, T). `constant` > 0 is the same for every sequence, such as
    the longest allowed response, so that long responses are not discounted. `denominator` is the
    global number of sequences; None: B.
    """
    _require_sequences(x)
    x = _masked(x, mask)
    if not 0 < constant < float("inf"):
        raise ValueError(f"constant must be positive and finite, got {constant}")
    return _over(x.sum() / constant, x.shape[0] if denominator is None else denominator)


def reduce(
    x: Tensor,
    mask: Tensor,
    reduction: Reduction,
    *,
    denominator: Tensor | float | None = None,
    constant: float | None = None,
) -> Tensor:
    """The reduction of that name; ValueError unless `constant` is given exactly where it is used.

    float32 at least. Masked elements may hold inf or NaN: they contribute exactly nothing to the
    value and to the gradient.
    """
    if reduction not in get_args(Reduction):
        known = ", ".join(get_args(Reduction))
        raise ValueError(f"unknown reduction {reduction!r}: choose from {known}")
    if (constant is None) == (reduction == "sequence-sum"):
        raise ValueError(
            "constant is what 'sequence-sum' divides by: give it there, and only there"
        )
    if constant is not None:
        return sequence_sum(x, mask, constant, denominator)
    if reduction == "sequence-mean":
        return sequence_mean(x, mask, denominator)
    return token_mean(x, mask, denominator)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    require_same_shape(x=x, mask=mask)
    require_floating(x=x)
    require_boolean(mask=mask)
    return torch.where(mask, x, 0).to(working_dtype(x))


def _require_sequences(x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(
            f"a reduction over sequences needs x of shape (B, T), got {tuple(x.shape)}"
        )


def _over(total: Tensor, denominator: Tensor | float) -> Tensor:
    """Total / denominator, and total (which is then an empty sum, 0) where the denominator is 0."""
    if isinstance(denominator, Tensor):
        return total / torch.where(denominator == 0, 1, denominator)
    if not 0 <= denominator < float("inf"):
        raise ValueError(f"denominator must be a finite count, got {denominator}")
    return total / (denominator or 1)
