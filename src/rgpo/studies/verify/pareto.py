"""Ratios with Pareto tails, and what weights make of them."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from scipy.stats import gamma
from torch import Tensor

from rgpo.core.diagnostics import ratio_diagnostics
from rgpo.core.objective import Objective
from rgpo.core.objectives.rgpo import RGPO
from rgpo.studies.verify.finding import generator

CHUNK = 100_000

RGPO_ARMS = {"RGPO, k = 10": RGPO(sharpness=10.0), "RGPO, k = 4": RGPO(sharpness=4.0)}
"""They see all ratios. The others see the first tenth: bounded moments settle early."""

HILL_CONFIDENCE = 0.999
"""Of each interval; six of them then all hold with 99.4%."""

Moments = dict[int, tuple[Tensor, Tensor]]
"""Of r: first and second moment of every batch (N,), by the size of the batches."""


class Weight(NamedTuple):
    """Of |w| over all ratios it has seen."""

    mean: float
    second: float
    largest: float


class Estimate(NamedTuple):
    """Of a tail index, with its interval."""

    value: float
    low: float
    high: float


def pareto_log_ratios(alpha: float, samples: int, source: torch.Generator) -> Iterator[Tensor]:
    """Log of Pareto ratios with mean 1, r = (1 - 1/alpha) u^(-1/alpha), float64, in chunks."""
    low = math.log1p(-1 / alpha)
    for begin in range(0, samples, CHUNK):
        size = min(CHUNK, samples - begin)
        uniform = torch.rand(size, dtype=torch.float64, generator=source)
        yield low - torch.log1p(-uniform) / alpha


def measure(
    alpha: float, samples: int, arms: Mapping[str, Objective], seed: int
) -> tuple[Moments, dict[str, Weight]]:
    """First and second moment of r in batches of each size; mean, second moment, max of |w|."""
    source = generator(seed)
    first, second = [], []
    sums = {name: [0.0, 0.0, 0.0, 0.0] for name in arms}
    for log_ratio in pareto_log_ratios(alpha, samples, source):
        ratio = log_ratio.exp().view(-1, 1000)
        first.append(ratio.sum(-1))
        second.append((ratio**2).sum(-1))
        d = log_ratio.float()
        sign = torch.randint(2, d.shape, generator=source).float() * 2 - 1
        early = len(first) * CHUNK <= samples // 10
        for name in arms if early else RGPO_ARMS:
            weight, total = arms[name].weight(d, sign).abs(), sums[name]
            total[0] += len(weight)
            total[1] += float(weight.sum())
            total[2] += float((weight**2).sum())
            total[3] = max(total[3], float(weight.max()))
    sizes = [10**e for e in range(3, int(math.log10(samples)) + 1)]
    parts = torch.cat(first), torch.cat(second)
    batches = {n: [p.view(-1, n // 1000).sum(-1) / n for p in parts] for n in sizes}
    moments = {n: (mean, second) for n, (mean, second) in batches.items()}
    return moments, {name: Weight(a / n, b / n, c) for name, (n, a, b, c) in sums.items()}


def hill(alpha: float, samples: int, seed: int) -> Estimate:
    """The library's estimate from the largest 5% and its exact interval for a Pareto tail."""
    log_ratio = torch.cat(list(pareto_log_ratios(alpha, samples, generator(100 + seed))))
    one = torch.ones_like(log_ratio)
    estimate = float(ratio_diagnostics(log_ratio, one, one)["tail_index"])
    k = math.ceil(samples / 20)
    tail = (1 - HILL_CONFIDENCE) / 2
    low, high = (estimate * float(gamma.ppf(q, k)) / k for q in (tail, 1 - tail))
    return Estimate(estimate, low, high)
