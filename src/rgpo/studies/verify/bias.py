"""Claim 3: what a bounded weight costs is bias, and the bias is bounded and controlled."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rgpo.core.objective import Objective
from rgpo.core.objectives.rgpo import RGPO
from rgpo.studies.verify.bandits import Bandits, random_bandits
from rgpo.studies.verify.bias_figures import draw_bias, draw_front
from rgpo.studies.verify.finding import Finding, Picture, Row, element_objectives

SHARPNESS = (1.0, 2.0, 4.0, 10.0, 20.0)

STEPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Standard deviation of the change of each logit."""

ACTIONS = (2, 3, 5, 10)

ROUNDING = 1e-13
"""Biases below it are sums that cancel."""

READ_BIAS = (
    "Median error of the gradient, relative to the true gradient, against the distance that the "
    "policy has moved (median KL). Left: RGPO's gate for several sharpnesses, its bounds dotted. "
    "Right: every objective with a bounded weight (names on hover), by the power p of the row "
    "above: how fast its bias vanishes as the policies come together. Importance sampling has none."
)
READ_FRONT = (
    "Every objective scaled so that its mean gradient is as long as the true one; medians over the "
    "problems, names on hover. Down: less bias. Left: less noise. Nothing is best in both. The "
    "line is RGPO's gate: k trades one for the other. Problems on which a clip rejects everything "
    "are left out. Ratios here are modest: with heavy tails (claim 2) importance sampling leaves "
    "the picture to the right."
)


def check(*, quick: bool) -> Finding:
    """Compute biases as finite sums and hold them against their bounds."""
    count = 100 if quick else 500
    problems = {s: [random_bandits(count, a, s, a) for a in ACTIONS] for s in STEPS}
    gates = {f"k = {k:g}": RGPO(sharpness=k) for k in SHARPNESS}
    arms = element_objectives(bounded=True)
    statement = (
        "A weight that is not r itself makes the gradient point elsewhere than the true one. By "
        "how much can be computed: it vanishes as the policies come together, for RGPO's gate with "
        "the square of their distance. A sharper gate (larger k) means more bias and less variance."
    )
    contacts = {name: contact(objective) for name, objective in arms.items()}
    powers = {name: power for name, (power, _) in contacts.items()}
    figure = draw_bias(gates, arms, powers, problems, gate_bound)
    front = draw_front(problems[0.3], problems[1.0])
    pictures = [
        Picture("Bias against distance", READ_BIAS, figure),
        Picture("Bias and variance at matched step size", READ_FRONT, front),
    ]
    rows = [_gate_row(gates, problems), _objectives_row(arms, contacts, problems)]
    return Finding("bias", statement, rows, pictures)


def gate_bound(gate: RGPO, b: Bandits) -> Tensor:
    """The smaller of (k^2/4) E[r (r-1)^2 |psi|] and E[r |psi|]: docs/theory.md section 5; (M,)."""
    r = b.ratio
    near = gate.sharpness**2 / 4 * b.mean(r * (r - 1) ** 2 * b.size)
    return torch.minimum(near, b.mean(r * b.size))


def contact(objective: Objective) -> tuple[int, float]:
    """Power p in (2, 1, 0) and C with |r - w/A| <= C |r - 1|^p max(r, 1), for |log r| up to 12.

    p is the largest power for which C does not blow up at r = 1. C is a maximum over 200,000
    ratios and both signs of A, plus 1% for what lies between them.
    """
    side = torch.logspace(-6, math.log10(12), 100_000, dtype=torch.float64)
    d = torch.cat([-side, side]).repeat(2)
    advantage = torch.ones_like(d)
    advantage[len(d) // 2 :] = -1
    r, shift = d.exp(), torch.expm1(d).abs()
    gap = (r - objective.weight(d, advantage) / advantage).abs() / torch.clamp(r, min=1)
    gap = torch.where(gap > 1e-15, gap, 0)
    for power in (2, 1):
        relative = gap / shift**power
        near, far = relative[d.abs() < 1e-5].max(), relative[d.abs() >= 1e-5].max()
        if near <= 2 * far:
            return power, 1.01 * float(torch.maximum(near, far))
    return 0, 1.01 * float(gap.max())


def _largest_share(
    objective: Objective,
    problems: Mapping[float, list[Bandits]],
    bound: Callable[[Bandits], Tensor],
) -> float:
    shares = [
        ((b.bias(objective) - ROUNDING) / bound(b)).max() for own in problems.values() for b in own
    ]
    return float(torch.stack(shares).max())


def _power(objective: Objective, problems: Mapping[float, list[Bandits]]) -> float:
    """Of the distance, with which the bias vanishes: between the second and third smallest."""
    low, high = STEPS[1:3]
    near, far = (
        float(torch.cat([b.bias(objective) for b in problems[s]]).median()) for s in (low, high)
    )
    return math.log(far / near) / math.log(high / low)


def _gate_row(gates: Mapping[str, RGPO], problems: Mapping[float, list[Bandits]]) -> Row:
    shares = {
        name: _largest_share(gate, problems, lambda b, gate=gate: gate_bound(gate, b))
        for name, gate in gates.items()
    }
    powers = {name: _power(gate, problems) for name, gate in gates.items()}
    count = sum(len(b.kl) for own in problems.values() for b in own)
    span = f"{min(powers.values()):.2f} to {max(powers.values()):.2f}"
    return Row(
        "RGPO's bias is at most (k²/4) E[r(r-1)²|ψ|] and at most E[r|ψ|]",
        f"exact sums, {count:,} random finite problems, k = {SHARPNESS[0]:g} to {SHARPNESS[-1]:g}",
        f"at most {max(shares.values()):.2f} of the bound; vanishes with distance to the power "
        f"{span}",
        "1; power 2",
        max(shares.values()) <= 1 and all(abs(power - 2) < 0.2 for power in powers.values()),
        numbers={"share_of_bound": shares, "power": powers, "problems": count},
    )


def _objectives_row(
    arms: Mapping[str, Objective],
    contacts: Mapping[str, tuple[int, float]],
    problems: Mapping[float, list[Bandits]],
) -> Row:
    shares = {}
    for name, objective in arms.items():
        power, constant = contacts[name]

        def bound(b: Bandits, power: int = power, constant: float = constant) -> Tensor:
            shift = (b.ratio - 1).abs() ** power * torch.clamp(b.ratio, min=1)
            return constant * b.mean(shift * b.size)

        shares[name] = _largest_share(objective, problems, bound)
    told = ", ".join(
        f"{sum(p == power for p, _ in contacts.values())} with p = {power}" for power in (2, 1, 0)
    )
    return Row(
        "every bounded objective: bias at most C E[|r-1|^p max(r,1)|ψ|]",
        "the same problems; p and C read off the curve of each weight",
        f"at most {max(shares.values()):.2f} of the bound; of {len(arms)} objectives {told}",
        "1",
        max(shares.values()) <= 1,
        "no claim",
        numbers={
            name: {"share_of_bound": shares[name], "power": power, "constant": constant}
            for name, (power, constant) in contacts.items()
        },
    )
