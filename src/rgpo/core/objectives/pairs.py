"""Objectives on the sequences of one prompt, compared pair by pair or as a list.

The last axis holds a prompt's K sequences, d is the log-ratio of the whole sequence (token sum) and
`advantage` its score s. With h_ij = d_i - d_j and K = 2 these are the published formulas; for more
sequences the objective is the mean over the prompt's pairs. One sequence alone exerts no force.
See `rgpo.core.loss.group_loss`.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from rgpo.core.objective import Objective, Scope, require_positive, safe_ratio
from rgpo.core.objectives.ppo import PPO
from rgpo.core.recipes import Recipe, register


def differences(x: Tensor) -> Tensor:
    """Every x_i - x_j: (..., K) -> (..., K, K)."""
    return x.unsqueeze(-1) - x.unsqueeze(-2)


def pair_shares(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (n (n - 1)) for ordered pairs of the n counted sequences, else 0: (..., K, K)."""
    count = mask.sum(-1)[..., None, None].to(dtype)
    others = ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    paired = mask.unsqueeze(-1) & mask.unsqueeze(-2) & others
    return paired.to(dtype) / torch.clamp(count * (count - 1), min=1)


class Pairwise(Objective):
    """J_i = sum_j f(h_ij, s_i - s_j) / (n (n - 1)) with f the same for both orders of a pair."""

    needs: ClassVar[tuple[str, ...]] = ("mask",)
    scope: ClassVar[Scope] = "group"
    homogeneous: ClassVar[bool] = False

    @abstractmethod
    def pair_value(self, difference: Tensor, gap: Tensor) -> Tensor:
        """Compute f of the difference of log-ratios and the gap of scores."""

    @abstractmethod
    def pair_slope(self, difference: Tensor, gap: Tensor) -> Tensor:
        """Derivative of f by the difference."""

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        f = self.pair_value(differences(log_ratio), differences(advantage))
        return (pair_shares(mask, f.dtype) * f).sum(-1)

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        slope = self.pair_slope(differences(log_ratio), differences(advantage))
        return 2 * (pair_shares(mask, slope.dtype) * slope).sum(-1)

    @property
    def unit_slope(self) -> bool:  # noqa: D102
        return False


@dataclass(frozen=True)
class REBEL(Pairwise):
    """f = -(h_ij - eta (s_i - s_j))^2: regression of relative rewards (arXiv 2404.16767).

    eta has the unit of 1 / reward. The first step's gradient is 2 eta (s_i - s_j) grad h_ij, that
    of pairwise policy gradient.
    """

    eta: float = 1.0
    """Gap of log-ratios per gap of rewards."""

    def __post_init__(self) -> None:
        require_positive(eta=self.eta)

    def pair_value(self, difference: Tensor, gap: Tensor) -> Tensor:  # noqa: D102
        return -((difference - self.eta * gap) ** 2)

    def pair_slope(self, difference: Tensor, gap: Tensor) -> Tensor:  # noqa: D102
        return -2 * (difference - self.eta * gap)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


@dataclass(frozen=True)
class DPO(Pairwise):
    """f = log s(beta h) with h that of the preferred over the other one (arXiv 2305.18290).

    d is the log-ratio to the reference model. The score only ranks; ties exert no force.
    w of the preferred one is beta s(-beta h), never more than beta.
    """

    beta: float = 0.1
    """Inverse temperature: how far the policy may go for a preference."""

    label_smoothing: float = 0.0
    """Share of preferences that are assumed to be the wrong way round."""

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")

    def pair_value(self, difference: Tensor, gap: Tensor) -> Tensor:  # noqa: D102
        margin = self.beta * torch.sign(gap) * difference
        right, wrong = functional.logsigmoid(margin), functional.logsigmoid(-margin)
        f = (1 - self.label_smoothing) * right + self.label_smoothing * wrong
        return torch.where(gap == 0, 0, f)

    def pair_slope(self, difference: Tensor, gap: Tensor) -> Tensor:  # noqa: D102
        margin = self.beta * torch.sign(gap) * difference
        return self.beta * torch.sign(gap) * (torch.sigmoid(-margin) - self.label_smoothing)

    @property
    def sup_weight(self) -> float:
        """Of a pair; in a larger group every sequence weighs less."""
        return self.beta * (1 - self.label_smoothing)


@dataclass(frozen=True)
class IPO(Pairwise):
    """f = -(h - 1 / (2 beta))^2, h that of the preferred over the other (arXiv 2310.12036, Eq. 17).

    As DPO, but regressing to a finite margin. Sums over tokens; some libraries take means, where
    beta is another one.
    """

    beta: float = 0.1
    """The margin of log-ratios is 1 / (2 beta)."""

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)

    def pair_value(self, difference: Tensor, gap: Tensor) -> Tensor:  # noqa: D102
        excess = torch.sign(gap) * difference - 1 / (2 * self.beta)
        return torch.where(gap == 0, 0, -(excess**2))

    def pair_slope(self, difference: Tensor, gap: Tensor) -> Tensor:  # noqa: D102
        excess = torch.sign(gap) * difference - 1 / (2 * self.beta)
        return -2 * torch.sign(gap) * excess

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


@dataclass(frozen=True)
class PairwisePPO(Objective):
    """P3O: pairwise policy gradient with sequence ratios W and PPO's clip (arXiv 2310.00212).

    Per pair, with the gap g = s_1 - s_2, z = log W_1 - log W_2:

    - separate (V1): sg[W_2] minclip(W_1, g) / 2 + sg[W_1] minclip(W_2, -g) / 2
    - joint (V2):    sg[W_1 W_2] min(g z, g clip(z, -clip, clip)) / 2

    Invariant to a reward shift of the prompt. At W = 1 both are leave-one-out REINFORCE. The blog
    has the gradient; the algebra of the clips is our reconstruction (confidence: inferred).
    """

    form: Literal["separate", "joint"] = "separate"
    """Which of the two clips."""

    clip: float = 0.2
    """Half-width of the clip of W, or of z."""

    needs: ClassVar[tuple[str, ...]] = ("mask",)
    scope: ClassVar[Scope] = "group"

    def __post_init__(self) -> None:
        require_positive(clip=self.clip)
        if self.form not in ("separate", "joint"):
            raise ValueError(f"unknown form {self.form!r}: choose separate or joint")

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        gap = differences(advantage)
        if self.form == "separate":
            clipped = PPO(self.clip, self.clip).value(log_ratio.unsqueeze(-1), gap)
            f = safe_ratio(log_ratio.detach()).unsqueeze(-2) * clipped
        else:
            z = differences(log_ratio)
            lower = torch.minimum(gap * z, gap * torch.clamp(z, -self.clip, self.clip))
            f = self._product(log_ratio.detach()) * lower / 2
        return (pair_shares(mask, f.dtype) * f).sum(-1)

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        gap = differences(advantage)
        if self.form == "separate":
            clipped = PPO(self.clip, self.clip).weight(log_ratio.unsqueeze(-1), gap)
            slope = safe_ratio(log_ratio).unsqueeze(-2) * clipped
        else:
            z = differences(log_ratio)
            inside = torch.where(gap > 0, z <= self.clip, z >= -self.clip)
            slope = self._product(log_ratio) * gap * inside
        return (pair_shares(mask, slope.dtype) * slope).sum(-1)

    def _product(self, log_ratio: Tensor) -> Tensor:
        return safe_ratio(log_ratio.unsqueeze(-1) + log_ratio.unsqueeze(-2))

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")

    @property
    def unit_slope(self) -> bool:
        """The weight is a score's distance from the others, not the score."""
        return False


@dataclass(frozen=True)
class BRAIn(Objective):
    """J = sum_i sg[alpha_i] log gamma_i, w_i = alpha_i - gamma_i (arXiv 2402.02479).

    alpha = softmax(s / temperature + log p0 - log q'), gamma = softmax(log q - log q') over the
    prompt's sequences: the posterior of good ones and the policy's share, p0 the reference model
    and q' the sampling policy. Sums over tokens: for long sequences both concentrate on one.
    With q' = p0, two sequences and temperature -> 0 it is DPO with beta = 1.
    """

    temperature: float = 1.0
    """Reward per nat of the posterior."""

    needs: ClassVar[tuple[str, ...]] = ("reference_log_ratio", "mask")
    scope: ClassVar[Scope] = "group"
    homogeneous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)

    def value(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, reference_log_ratio: Tensor, mask: Tensor
    ) -> Tensor:
        posterior = self._posterior(log_ratio, advantage, reference_log_ratio, mask).detach()
        return posterior * torch.log_softmax(self._counted(log_ratio, mask), -1)

    def weight(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, reference_log_ratio: Tensor, mask: Tensor
    ) -> Tensor:
        share = torch.softmax(self._counted(log_ratio, mask), -1)
        return self._posterior(log_ratio, advantage, reference_log_ratio, mask) - share

    def _posterior(
        self, log_ratio: Tensor, advantage: Tensor, reference_log_ratio: Tensor, mask: Tensor
    ) -> Tensor:
        logits = advantage / self.temperature + log_ratio - reference_log_ratio
        return torch.softmax(self._counted(logits, mask), -1)

    def _counted(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Masked sequences at the lowest finite number, so that a group of none stays finite."""
        return torch.where(mask, logits, torch.finfo(logits.dtype).min)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return 1.0

    @property
    def unit_slope(self) -> bool:  # noqa: D102
        return False


_P3O = "gradient: authors' blog; clips and their width: inferred"

register(
    Recipe(
        "rebel",
        REBEL(),
        paper="2404.16767",
        summary="regression of reward gaps on log-ratio gaps; anchor: the sampling policy",
        confidence="formula and eta 1 (TL;DR): authors' code",
    ),
    Recipe(
        "dpo",
        DPO(),
        paper="2305.18290",
        summary="log-sigmoid of the preferred sequence's margin; anchor: the reference model",
    ),
    Recipe(
        "ipo",
        IPO(),
        paper="2310.12036",
        summary="squared distance to a finite margin; anchor: the reference model",
    ),
    Recipe(
        "p3o-separate-variant",
        PairwisePPO(),
        paper="2310.00212",
        summary="pairwise policy gradient, each ratio clipped; anchor: the sampling policy",
        confidence=_P3O,
    ),
    Recipe(
        "p3o-joint-variant",
        PairwisePPO(form="joint"),
        paper="2310.00212",
        summary="pairwise policy gradient, the pair clipped as one; anchor: the sampling policy",
        confidence=_P3O,
    ),
    Recipe(
        "brain",
        BRAIn(),
        paper="2402.02479",
        summary="cross-entropy to the posterior over a prompt's samples; anchor: their policy",
        confidence="posterior and DPO limit: paper; algebra: derived; temperature 1: inferred",
    ),
)
