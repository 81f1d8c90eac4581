"""RGPO: the differentiable rejection gate on the ratio (arXiv 2604.14895)."""

from dataclasses import dataclass

from torch import Tensor

from rgpo.core.gates import Family, Gate
from rgpo.core.kl import KLPenalty
from rgpo.core.objective import Objective
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class RGPO(Objective):
    """J = g(r) A with a normalised gate, w = r g'(r) A (arXiv 2604.14895, abstract).

    The default gate is the affine normalisation of the sigmoid, g = 1 + (2/k) tanh(k (r - 1)/2).
    The paper's raw sigmoid has slope k/4 at r = 1 and breaks the inequality its improvement proof
    rests on; it is `RawRGPO`. Neither the paper's k nor its gate's exact argument could be read:
    both are inferred.
    """

    sharpness: float = 10.0
    """k = 2/eps: k = 10 is a smooth clip of half-width 0.2."""

    family: Family = "sigmoid"
    """Shape of the gate (arXiv 2602.19345)."""

    def __post_init__(self) -> None:
        _ = self.gate

    @property
    def gate(self) -> Gate:
        """The gate itself, a function of the log-ratio alone."""
        return Gate(self.sharpness, self.family)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return self.gate.value(log_ratio) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return self.gate.weight(log_ratio) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return self.gate.sup_weight


INFERRED = "gate: paper's abstract; its argument and k: inferred"
STUDY = "family: summaries of the paper; temperature convention: inferred"

register(
    Recipe(
        "rgpo",
        RGPO(),
        paper="2604.14895",
        summary="the gate with an adaptive KL penalty: the library's default",
        kl=KLPenalty(1.0, target=0.01),
        confidence=INFERRED + "; KL schedule: that of 1707.06347",
    ),
    Recipe(
        "rgpo-gate",
        RGPO(),
        paper="2604.14895",
        summary="the normalised sigmoid gate alone, two-sided and blind to the sign of A",
        confidence=INFERRED,
    ),
    Recipe(
        "rgpo-erf",
        RGPO(family="erf"),
        paper="2602.19345",
        summary="Gaussian-tailed gate of the gate study",
        confidence=STUDY,
    ),
    Recipe(
        "rgpo-arctan",
        RGPO(family="arctan"),
        paper="2602.19345",
        summary="polynomial-tailed gate of the gate study",
        confidence=STUDY,
    ),
    Recipe(
        "rgpo-softsign",
        RGPO(family="softsign"),
        paper="2602.19345",
        summary="polynomial-tailed gate with a cusp at r = 1",
        confidence=STUDY,
    ),
)
