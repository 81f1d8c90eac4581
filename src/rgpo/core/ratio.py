"""Log-ratios between policies, and the level at which they are formed.

d = log pi - log pi_anchor, where the anchor is the behaviour, the proximal or the reference policy.
Every function works in d; r = exp(d) is formed last, by whoever needs it.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rgpo.core.checks import (
    require_boolean,
    require_floating,
    require_integer,
    require_same_shape,
    working_dtype,
)

Level = Literal["token", "turn", "sequence", "sequence-sum", "prefix", "prefix-mean"]
"""Where the ratio is formed, see `at_level`."""


def log_ratio(log_prob: Tensor, anchor_log_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """log_prob - anchor_log_prob, in float32 at least; no gradient reaches the anchor.

    All of one shape (any), the log-probs floating, `mask` boolean (True: counts); ValueError
    otherwise. bfloat16 and float16 are promoted before the subtraction, which would otherwise
    round the ratio. Masked elements are replaced by 0 first, so that inf and NaN there
    contribute exactly nothing to the value (0) and to the gradient (0).
    """
    require_same_shape(log_prob=log_prob, anchor_log_prob=anchor_log_prob, mask=mask)
    require_floating(log_prob=log_prob, anchor_log_prob=anchor_log_prob)
    require_boolean(mask=mask)
    dtype = working_dtype(log_prob, anchor_log_prob)
    anchor = anchor_log_prob.detach()
    if mask is not None:
        log_prob, anchor = torch.where(mask, log_prob, 0), torch.where(mask, anchor, 0)
    return log_prob.to(dtype) - anchor.to(dtype)


def raw_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio) for metrics: unclamped, saturated only just below the largest finite float.

    Objectives use `rgpo.core.objective.safe_ratio`, whose square is finite as well.
    """
    return torch.exp(saturate_exponent(log_ratio))


def saturate_exponent(exponent: Tensor) -> Tensor:
    """`exponent`, no larger than what `exp` can take; the exp is within 0.1% of the largest float.

    Clamping the exponent and not the result keeps 0 * inf = NaN out of the gradient.
    """
    require_floating(exponent=exponent)
    limit = math.log(torch.finfo(exponent.dtype).max) * (1 - 1e-6)
    return torch.clamp(exponent, max=limit)


def at_level(
    log_ratio: Tensor, mask: Tensor, level: Level, segment_ids: Tensor | None = None
) -> Tensor:
    """The log-ratio (B, T) formed at `level` and broadcast back to tokens (B, T); 0 where masked.

    | level        | log-ratio of token t                                            | source |
    |--------------|-----------------------------------------------------------------|--------|
    | token        | d_t                                                             | |
    | turn         | mean of d over the tokens with t's segment id in t's row        | 2511.20718 |
    | sequence     | mean of d over the row (length-normalised)                      | 2507.18071 |
    | sequence-sum | sum of d over the row, the exact sequence ratio                 | |
    | prefix       | sum of d up to and including t, the exact ratio of the prefix   | |
    | prefix-mean  | mean of d up to and including t                                 | 2608.01418 |

    Only tokens with `mask` True enter a sum or a count. The gradient flows through sums and means.
    `segment_ids` (B, T) are any integers, needed by `turn` and read by no other level; a segment
    need not be contiguous. The prefix mean is inferred from the paper's title.
    ValueError for shapes or dtypes other than these, an unknown level, or `turn` without ids.
    """
    require_same_shape(log_ratio=log_ratio, mask=mask, segment_ids=segment_ids)
    require_floating(log_ratio=log_ratio)
    require_boolean(mask=mask)
    if log_ratio.dim() != 2:
        raise ValueError(f"log_ratio must be (B, T), got {tuple(log_ratio.shape)}")
    if level not in get_args(Level):
        raise ValueError(f"unknown level {level!r}: choose from {', '.join(get_args(Level))}")
    if level == "turn" and segment_ids is None:
        raise ValueError("level 'turn' needs segment_ids: give every token the id of its turn")
    d = torch.where(mask, log_ratio, 0).to(working_dtype(log_ratio))
    if level != "token":
        total, count = _sums(d, mask.to(d.dtype), level, segment_ids)
        d = total if level in ("sequence-sum", "prefix") else total / torch.clamp(count, min=1)
    return torch.where(mask, d, 0)


def _sums(
    d: Tensor, ones: Tensor, level: Level, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum of d and number of tokens in the unit of every token, each broadcastable to (B, T)."""
    if segment_ids is not None and level == "turn":
        require_integer(segment_ids=segment_ids)
        index = _segment_ranks(segment_ids)
        total = torch.zeros_like(d).scatter_add(1, index, d)
        count = torch.zeros_like(ones).scatter_add(1, index, ones)
        return total.gather(1, index), count.gather(1, index)
    if level in ("prefix", "prefix-mean"):
        return d.cumsum(1), ones.cumsum(1)
    return d.sum(1, keepdim=True), ones.sum(1, keepdim=True)


def _segment_ranks(segment_ids: Tensor) -> Tensor:
    """Ids (B, T) replaced by their rank among the row's ids, so that they index T slots.

    By sorting: no limit on the ids and no value is read back to the host.
    """
    ordered, order = segment_ids.sort(dim=1)
    is_new = torch.zeros_like(ordered)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(order).scatter(1, order, is_new.cumsum(1))
