"""Gate families in the ratio, normalised to g(1) = 1 and g'(1) = 1.

A family is an odd, increasing, bounded F with F'(0) = 1 and a sharpness k. With b = k / 2,

    g(r) = 1 + F(b (r - 1)) / b,        w(r) = r F'(b (r - 1)).

For the sigmoid family F = tanh and g is exactly the normalised sigmoid gate of RGPO
(arXiv 2604.14895), 1 + (2/k) tanh(k (r - 1) / 2): a smooth clip of half-width 2/k. The families
are those of the gate study of SAPO (arXiv 2602.19345); that paper's temperature convention was not
seen, ours makes the curvature scale b the same for all of them (confidence: inferred).

| family   | F                      | F'              | tail of w |
|----------|------------------------|-----------------|-----------|
| sigmoid  | tanh z                 | sech^2 z        | exponential |
| erf      | (sqrt(pi)/2) erf z     | exp(-z^2)       | Gaussian |
| arctan   | arctan z               | 1 / (1 + z^2)   | 1/r |
| softsign | z / (1 + |z|)          | 1 / (1 + |z|)^2 | 1/r, with a cusp at r = 1 |
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rgpo.core.objective import SAFE_LOG_RATIO, require_positive

Family = Literal["sigmoid", "erf", "arctan", "softsign"]


@dataclass(frozen=True)
class Gate:
    """A normalised gate; raises ValueError for an unknown family or a sharpness that is not > 0."""

    sharpness: float
    """k: the gate saturates (or has lost most of its slope) at |r - 1| of about 2/k."""

    family: Family = "sigmoid"
    """Shape of the gate, see the module."""

    def __post_init__(self) -> None:
        require_positive(sharpness=self.sharpness)
        if self.family not in ("sigmoid", "erf", "arctan", "softsign"):
            raise ValueError(
                f"unknown gate family {self.family!r}: choose sigmoid, erf, arctan or softsign"
            )

    def value(self, log_ratio: Tensor) -> Tensor:
        """g(r), elementwise; same shape and dtype as `log_ratio`."""
        b = self.sharpness / 2
        z = b * torch.expm1(torch.clamp(log_ratio, max=SAFE_LOG_RATIO))
        if self.family == "sigmoid":
            shape = torch.tanh(z)
        elif self.family == "erf":
            shape = math.sqrt(math.pi) / 2 * torch.erf(z)
        elif self.family == "arctan":
            shape = torch.arctan(z)
        else:
            shape = functional.softsign(z)
        return 1 + shape / b

    def weight(self, log_ratio: Tensor) -> Tensor:
        """w(r) = r g'(r), elementwise, through log w so that no 0 * inf can arise."""
        d = torch.clamp(log_ratio, max=SAFE_LOG_RATIO)
        z = self.sharpness / 2 * torch.expm1(d)
        if self.family == "sigmoid":
            return torch.exp(torch.add(d, log_cosh(z), alpha=-2))
        if self.family == "erf":
            return torch.exp(d - z * z)
        if self.family == "arctan":
            return torch.exp(d) / (1 + z * z)
        return torch.exp(d) / (1 + torch.abs(z)) ** 2

    @property
    def sup_weight(self) -> float:
        """sup_r w(r): docs/theory.md section 4 for the sigmoid, calculus for the rest."""
        b = self.sharpness / 2
        if self.family == "sigmoid":
            r = _sigmoid_maximiser(self.sharpness)
            return r - 1 / (self.sharpness**2 * r)
        if self.family == "erf":
            r = (1 + math.sqrt(1 + 2 / b**2)) / 2
            return r * math.exp(-((b * (r - 1)) ** 2))
        if self.family == "arctan":
            r = math.sqrt(1 + 1 / b**2)
            return r / (1 + (b * (r - 1)) ** 2)
        return 1.0 if b >= 0.5 else 1 / (4 * b * (1 - b))


def log_cosh(x: Tensor) -> Tensor:
    """Log cosh x = |x| + softplus(-2|x|) - log 2, without overflow."""
    magnitude = torch.abs(x)
    return magnitude + functional.softplus(-2 * magnitude) - math.log(2)


def _sigmoid_maximiser(k: float) -> float:
    """The r > 1 that solves tanh(k (r - 1) / 2) = 1 / (k r), by bisection.

    At r = 1 the left side is smaller; at r = 1 + 2 (1 + 1/k) / k it is larger.
    """
    low, high = 1.0, 1 + 4 * (1 + 1 / k) / k
    for _ in range(200):
        middle = (low + high) / 2
        if math.tanh(k * (middle - 1) / 2) < 1 / (k * middle):
            low = middle
        else:
            high = middle
    return high
