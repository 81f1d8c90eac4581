"""Dual-ratio RGPO: one gate on the ratios to the previous policy and to the reference model."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rgpo.core.gates import Gate, log_cosh
from rgpo.core.objective import SAFE_LOG_RATIO, Objective, require_positive
from rgpo.core.recipes import Recipe, register

Form = Literal["product", "detached", "geometric"]


@dataclass(frozen=True)
class DualRGPO(Objective):
    """Gate on d = log pi/pi_old and d_ref = log pi/pi_ref; w = dG/dd + dG/dd_ref.

    arXiv 2604.14895 says that RLHF uses such a gate, not which (confidence: inferred,
    docs/theory.md section 7). With s the sigmoid, ghat the normalised gate and what it yields:

    - product:   c s(k (r - 1)) s(k_ref (r_ref - 1)), c = 8/(k + k_ref). Stops rejecting once
      r_ref is large: its weight tends to the single gate's.
    - detached:  ghat(r) sg[sech^2(k_ref d_ref / 2)]. The bump is not differentiated: through it,
      negative advantages would push the policy away from the reference.
    - geometric: ghat at the mixed log-ratio (1 - mix) d + mix d_ref: one gate around the policy
      between the two anchors.
    """

    form: Form = "detached"
    """Which of the three."""

    sharpness: float = 10.0
    """k of the gate on the previous policy (and of the mixed one)."""

    reference_sharpness: float = 1.0
    """k_ref; unused by `geometric`."""

    mix: float = 0.2
    """Share of the reference in the mixed log-ratio; used by `geometric` only."""

    needs: ClassVar[tuple[str, ...]] = ("reference_log_ratio",)

    def __post_init__(self) -> None:
        require_positive(sharpness=self.sharpness, reference_sharpness=self.reference_sharpness)
        if self.form not in ("product", "detached", "geometric"):
            raise ValueError(f"unknown form {self.form!r}: choose product, detached or geometric")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must lie in [0, 1], got {self.mix}")

    def value(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, reference_log_ratio: Tensor
    ) -> Tensor:
        if self.form == "geometric":
            return (
                Gate(self.sharpness).value(self._mixed(log_ratio, reference_log_ratio)) * advantage
            )
        if self.form == "detached":
            gate = Gate(self.sharpness).value(log_ratio)
            return gate * self._bump(reference_log_ratio).detach() * advantage
        scale = 8 / (self.sharpness + self.reference_sharpness)
        joint = _sigmoid(self.sharpness, log_ratio) * _sigmoid(
            self.reference_sharpness, reference_log_ratio
        )
        return (1 + scale * (joint - 0.25)) * advantage

    def weight(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, reference_log_ratio: Tensor
    ) -> Tensor:
        gate = Gate(self.sharpness)
        if self.form == "geometric":
            return gate.weight(self._mixed(log_ratio, reference_log_ratio)) * advantage
        if self.form == "detached":
            return gate.weight(log_ratio) * self._bump(reference_log_ratio) * advantage
        return self._product_weight(log_ratio, reference_log_ratio) * advantage

    def _product_weight(self, log_ratio: Tensor, reference_log_ratio: Tensor) -> Tensor:
        k, k_ref = self.sharpness, self.reference_sharpness
        slope = k / 4 * Gate(k).weight(log_ratio) * _sigmoid(k_ref, reference_log_ratio)
        slope_ref = k_ref / 4 * Gate(k_ref).weight(reference_log_ratio) * _sigmoid(k, log_ratio)
        return 8 / (k + k_ref) * (slope + slope_ref)

    def _mixed(self, log_ratio: Tensor, reference_log_ratio: Tensor) -> Tensor:
        return (1 - self.mix) * log_ratio + self.mix * reference_log_ratio

    def _bump(self, reference_log_ratio: Tensor) -> Tensor:
        return torch.exp(-2 * log_cosh(self.reference_sharpness / 2 * reference_log_ratio))

    @property
    def sup_weight(self) -> float:
        """Closed form, but for `product`: there the maximum over a grid of both ratios."""
        if self.form == "product":
            return _product_supremum(self)
        return Gate(self.sharpness).sup_weight


def _sigmoid(k: float, log_ratio: Tensor) -> Tensor:
    return torch.sigmoid(k * torch.expm1(torch.clamp(log_ratio, max=SAFE_LOG_RATIO)))


@cache
def _product_supremum(objective: DualRGPO) -> float:
    reach = 3 + 12 / min(objective.sharpness, objective.reference_sharpness)
    log_ratio = torch.linspace(1e-3, reach, 2000, dtype=torch.float64).log()
    weight = objective._product_weight(log_ratio[:, None], log_ratio[None, :])  # noqa: SLF001
    return float(weight.max())


register(
    *(
        Recipe(
            f"rgpo-dual-{form}",
            DualRGPO(form=form),
            paper="2604.14895",
            summary=f"gate on previous policy and reference model, {form} form",
            confidence="the two ratios: paper's abstract; the form: inferred",
        )
        for form in ("product", "detached", "geometric")
    )
)
