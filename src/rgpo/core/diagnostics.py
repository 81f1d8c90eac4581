"""One definition of every metric of a policy update, and the sentence that explains it.

`ratio_diagnostics` measures over the last axis and keeps the leading ones: (R, B) -> (R,), so that
many runs are measured in one call, without a value being read back to the host. Metrics describe
the data as they are: nothing is clipped, the exponential only saturates at the largest float.
A metric of no element (an empty mask, no advantage other than 0) is NaN: not measured.
"""

import torch
from torch import Tensor

from rgpo.core.checks import (
    require_boolean,
    require_floating,
    require_same_shape,
    working_dtype,
)
from rgpo.core.kl import k1, k3
from rgpo.core.ratio import raw_ratio, saturate_exponent

KL_SPIKE = 0.04
"""An update whose KL(old || new) exceeds this is a spike (arXiv 2604.14895; value: inferred)."""

QUANTILES = {  # per mille
    "ratio_min": 0,
    "ratio_q001": 1,
    "ratio_q01": 10,
    "ratio_q50": 500,
    "ratio_q99": 990,
    "ratio_q999": 999,
    "ratio_max": 1000,
}
"""Quantiles of the ratio, as samples: q is the smallest ratio with a share q at or below it."""

NO_SPREAD = (
    "the ratio has not left 1, so every clip and gate is inert: with one optimiser step per "
    "rollout all ratio-controlling objectives are REINFORCE; use more epochs or minibatches"
)
"""What to tell the user whose run has no spread (see `has_spread`)."""

GLOSSARY: dict[str, str] = {
    "kl_k1": "Mean of -log r: unbiased estimate of KL(old || new), may be negative.",
    "kl_k3": "Mean of r - 1 - log r: unbiased estimate of KL(old || new), never negative.",
    "ess": "Effective sample size over sample size, (sum r)^2 / (n sum r^2), in (0, 1].",
    "chi2": (
        "Mean of (r - 1)^2: the variance of the ratio, an estimate of the chi-squared divergence "
        "of the new from the old policy."
    ),
    "ratio_min": "Smallest ratio r = new / old probability of the batch.",
    "ratio_q001": "0.1% quantile of the ratio: one sample in a thousand is at or below it.",
    "ratio_q01": "1% quantile of the ratio.",
    "ratio_q50": "Median of the ratio.",
    "ratio_q99": "99% quantile of the ratio.",
    "ratio_q999": "99.9% quantile of the ratio: one sample in a thousand is above it.",
    "ratio_max": "Largest ratio of the batch.",
    "ratio_spread": "Largest |log r|; 0 says that every clip and gate was inert.",
    "tail_index": (
        "Hill estimate of alpha in P(r > t) ~ t^-alpha from the largest 5% of the ratios (at least "
        "10); at 2 or below the variance of importance sampling is infinite."
    ),
    "active_clip_fraction": (
        "Share of samples with advantage A != 0 that exert practically no force, |w| < 0.05 |A|; "
        "for PPO the samples that the clip silences."
    ),
    "gate_acceptance": (
        "Mean over A != 0 of w / (r A) clipped to [0, 1]: the part of the importance-sampling "
        "gradient that is kept."
    ),
    "pull_back_fraction": (
        "Share of samples with A != 0 whose weight is against the advantage, w A < 0."
    ),
    "weight_mean": "Mean of |w| / |A| over A != 0.",
    "nonfinite": (
        "Number of unmasked samples with a NaN or infinite log-ratio, advantage or weight; all "
        "other metrics leave them out."
    ),
    "kl_spike_rate": f"Share of updates whose KL(old || new) is above {KL_SPIKE} or not a number.",
    "explained_variance": (
        "1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for a constant one."
    ),
}
"""Every metric key that this file emits, with its definition."""

SEQUENCE_GLOSSARY: dict[str, str] = {
    "sequence_ess": (
        "Effective sample size of whole sequences over their number, from the exact ratios of the "
        "sequences, the products of their tokens' ratios; `ess` counts tokens."
    ),
}
"""What `rgpo.core.loss.policy_loss` adds where its samples are tokens (B, T)."""


def ratio_diagnostics(
    log_ratio: Tensor, advantage: Tensor, weight: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """All metrics of one batch: (..., B) inputs of one shape -> {key of GLOSSARY: (...)}.

    `weight` is the objective's w, `mask` boolean. Elements that are masked or not finite are left
    out of every metric but `nonfinite`. Results are detached, float32 at least.
    """
    require_same_shape(log_ratio=log_ratio, advantage=advantage, weight=weight, mask=mask)
    require_floating(log_ratio=log_ratio, advantage=advantage, weight=weight)
    require_boolean(mask=mask)
    if log_ratio.dim() == 0 or log_ratio.shape[-1] == 0:
        raise ValueError(f"log_ratio must be (..., B) with B > 0, got {tuple(log_ratio.shape)}")
    with torch.no_grad():
        dtype = working_dtype(log_ratio, advantage, weight)
        finite = torch.isfinite(log_ratio) & torch.isfinite(advantage) & torch.isfinite(weight)
        keep = finite if mask is None else finite & mask
        unmasked = finite.shape[-1] if mask is None else mask.sum(-1)
        d = torch.where(keep, log_ratio, 0).to(dtype)
        n = keep.sum(-1)
        metrics = _ratio_metrics(d, keep, n)
        metrics |= _force_metrics(d, advantage.to(dtype), weight.to(dtype), keep)
        metrics["nonfinite"] = (unmasked - n).to(dtype)
        return metrics


def has_spread(ratio_spread: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Whether the ratio left 1 at all; where not, show NO_SPREAD. Boolean, same shape.

    The tolerance is that of float32 log-probs computed twice.
    """
    return ratio_spread > tolerance


def kl_spike_rate(kl: Tensor, threshold: float = KL_SPIKE) -> Tensor:
    """Share of updates, the last axis, whose KL is above `threshold` or NaN: (..., U) -> (...)."""
    require_floating(kl=kl)
    return (~(kl <= threshold)).to(working_dtype(kl)).mean(-1)


def effective_sample_size(log_weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """(sum W)^2 / (n sum W^2) over the last axis and where `mask` is True: (..., B) -> (...).

    In (0, 1], NaN for no element. For sequences pass the sums of their log-ratios.
    """
    keep = torch.ones_like(log_weight, dtype=torch.bool) if mask is None else mask
    # relative to the largest weight no exponential overflows and one of them is 1
    top = torch.where(keep, log_weight, -torch.inf).amax(-1, keepdim=True)
    relative = torch.where(keep, torch.exp(log_weight - top), 0)
    ess = relative.sum(-1) ** 2 / (keep.sum(-1) * (relative**2).sum(-1))
    return torch.clamp(ess, max=1)


def explained_variance(value: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - Var(returns - value) / Var(returns) over the last axis: (..., B) -> (...).

    Masked elements are left out. NaN where the returns do not vary.
    """
    require_same_shape(value=value, returns=returns, mask=mask)
    require_floating(value=value, returns=returns)
    require_boolean(mask=mask)
    with torch.no_grad():
        keep = torch.ones_like(returns, dtype=torch.bool) if mask is None else mask
        dtype = working_dtype(value, returns)
        value = torch.where(keep, value, 0).to(dtype)
        returns = torch.where(keep, returns, 0).to(dtype)
        unexplained = _squared_deviation(returns - value, keep)
        total = _squared_deviation(returns, keep)
        return torch.where(total > 0, 1 - unexplained / total, torch.nan)


def _squared_deviation(x: Tensor, keep: Tensor) -> Tensor:
    mean = x.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True)
    return (torch.where(keep, x - mean, 0) ** 2).sum(-1)


def _ratio_metrics(d: Tensor, keep: Tensor, n: Tensor) -> dict[str, Tensor]:
    """Metrics of the log-ratio d (..., B) alone; d is 0 where not kept, n kept elements."""
    ordered = torch.where(keep, d, torch.inf).sort(-1).values
    wanted = torch.tensor(list(QUANTILES.values()), device=d.device)
    quantiles = _order_statistics(ordered, n, wanted)
    share = 1 / n.unsqueeze(-1)  # before the sum: the mean of saturated numbers is finite
    largest = torch.finfo(d.dtype).max
    return {
        "kl_k1": (k1(d) * share).sum(-1),
        "kl_k3": torch.clamp((k3(d) * share).sum(-1), max=largest),
        "ess": effective_sample_size(d, keep),
        "chi2": torch.clamp((_squared_excess(d) * share).sum(-1), max=largest),
        **dict(zip(QUANTILES, raw_ratio(quantiles).unbind(-1), strict=True)),
        "ratio_spread": torch.where(n > 0, torch.abs(d).amax(-1), torch.nan),
        "tail_index": _tail_index(d, ordered, keep, n),
    }


def _squared_excess(d: Tensor) -> Tensor:
    """(r - 1)^2, saturated like `raw_ratio`; 0 where d is 0."""
    return torch.exp(saturate_exponent(2 * torch.log(torch.abs(torch.expm1(d)))))


def _order_statistics(ordered: Tensor, n: Tensor, per_mille: Tensor) -> Tensor:
    """Of n sorted numbers the one of rank ceil(q n), at least 1, for every q; NaN for n = 0.

    In integers: 0.001 * 1000 is above 1 in float32, and its ceiling would be 2.
    """
    rank = (n.unsqueeze(-1) * per_mille + 999) // 1000
    found = ordered.gather(-1, torch.clamp(rank - 1, min=0))
    return torch.where(n.unsqueeze(-1) > 0, found, torch.nan)


def _tail_index(d: Tensor, ordered: Tensor, keep: Tensor, n: Tensor) -> Tensor:
    """Hill: k / sum of log(r / threshold) over the k largest, the threshold being the next one.

    k = max(10, ceil(n / 20)); NaN without a threshold (n <= k), infinite without spread.
    """
    k = torch.clamp((n + 19) // 20, min=10)
    index = torch.clamp(n - k - 1, min=0).unsqueeze(-1)
    excess = torch.clamp(d - ordered.gather(-1, index), min=0)
    total = torch.where(keep, excess, 0).sum(-1)
    return torch.where(n > k, k / total, torch.nan)


def _force_metrics(d: Tensor, advantage: Tensor, weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Metrics of the weight against the advantage, over kept elements with advantage != 0."""
    counted = keep & (advantage != 0)
    n = counted.sum(-1).to(d.dtype)
    size = torch.abs(torch.where(counted, weight, 0)) / torch.abs(
        torch.where(counted, advantage, 1)
    )
    against = (weight > 0) != (advantage > 0)
    # in logarithms: r A overflows or underflows where w / (r A) does not
    kept_part = torch.exp(torch.clamp(torch.log(size) - d, max=0))
    kept_part = torch.where(counted & ~against, kept_part, 0)
    return {
        "active_clip_fraction": (counted & (size < 0.05)).sum(-1) / n,
        "gate_acceptance": kept_part.sum(-1) / n,
        "pull_back_fraction": (counted & against & (weight != 0)).sum(-1) / n,
        "weight_mean": size.sum(-1) / n,
    }
