"""Claim 4: a lower bound on the improvement of the policy, as published and repaired."""

import math

import torch
from torch import Tensor

from rgpo.core.certificate import improvement_bound
from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.objectives.rgpo_raw import RawRGPO
from rgpo.studies.tabular import Problems, solve
from rgpo.studies.verify.finding import Finding, Picture, Row, quantiles
from rgpo.studies.verify.improvement_figures import draw_bounds, draw_gaps, draw_share
from rgpo.studies.verify.steps import ACTIONS, SHARPNESS, STATES, Steps, random_steps

ROUNDING = 1e-10

READ_BOUNDS = (
    "Each point is one random problem and one step of its policy, solved exactly: by how much the "
    "bound promised more (above 0) or less (below) than the return really changed. A point above "
    "0 is a broken promise: none for the repaired bound (left), many for the published form "
    "(right), which forgets that a new policy visits other states. The vertical axis is "
    "logarithmic away from 0."
)
READ_SHARE = (
    "Left: how often the repaired bound can promise an improvement at all, by the size of the "
    "step: small steps in a good direction nearly always, large ones hardly ever. Right: what "
    "part of the true improvement it then vouches for, median."
)
READ_GAPS = (
    "The published proof needs |r - g(r)| to be at most L |r - 1| (Eq. 40). At r = 1 the right "
    "side is 0 for every L, and the raw sigmoid's left side is 1/2. The normalised gate satisfies "
    "it with L = 1, and near 1 even with a third power (dotted, for k = 10)."
)


def check(*, quick: bool) -> Finding:
    """Solve random decision problems and hold the bounds against the true improvement."""
    steps = random_steps(2 if quick else 13, 10)
    example = smallest_counterexample()
    statement = (
        "The paper states that the policy improves approximately monotonically. Its proof, as far "
        "as it is known to us, rests on an inequality that is false at r = 1 and leaves out that a "
        "new policy visits other states. Both are shown here; then the repaired bound: improvement "
        "is at least the gated surrogate, minus what the gate gives up, minus the change of the "
        "state distribution."
    )
    pictures = [
        Picture("What is promised and what is true", READ_BOUNDS, draw_bounds(steps)),
        Picture("How often and how tight", READ_SHARE, draw_share(steps)),
        Picture("Where the published inequality fails", READ_GAPS, draw_gaps()),
    ]
    rows = [_inequality_row(), _repaired_row(steps), _use_row(steps)]
    note = "" if example is None else f"Smallest problem that breaks the published bound: {example}"
    return Finding("improvement", statement, rows, pictures, note)


def smallest_counterexample() -> str | None:
    """The worst case, in words, in which the published bound promises a gain and the return falls.

    With one state the published bound holds (there is no distribution to change). So the smallest
    problems have two states and two actions; searched are all of them that are deterministic and
    pay 1 for one action in one state, with gamma 0.9 and probabilities of a coarse grid.
    """
    following = torch.cartesian_prod(*[torch.arange(2)] * 4).view(-1, 2, 2).repeat(4, 1, 1)
    reward = torch.eye(4, dtype=torch.float64).view(4, 2, 2).repeat_interleave(16, 0)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(reward), 2)
    transition = torch.nn.functional.one_hot(following, 2).double()
    problems, found = Problems(transition, reward, start, 0.9), []
    for p in _pairs(0.1, 0.5):
        old = torch.stack([1 - p, p], -1).expand_as(reward)
        solution = solve(problems, old)
        for q in _pairs(0.4, 0.6, 0.9):
            new = torch.stack([1 - q, q], -1).expand_as(reward)
            bound = improvement_bound(RGPO(), old, new, solution.advantage, solution.visits, 0.9)
            promised = bound.bound + bound.shift
            true = solve(problems, new).performance - solution.performance
            gap = torch.where((promised > ROUNDING) & (true < -ROUNDING), promised - true, 0)
            i = int(gap.argmax())
            if gap[i] > 0:
                told = f"Promised: at least {promised[i]:+.3f}; true: {true[i]:+.3f}."
                words = _words(following[i], reward[i], p, q)
                found.append((float(gap[i]), f"{words} {told}"))
    return max(found)[1] if found else None


def _pairs(*probabilities: float) -> Tensor:
    """All probabilities of action 1 in the two states, (N, 2)."""
    grid = torch.tensor(probabilities, dtype=torch.float64)
    return torch.cartesian_prod(grid, grid)


def _words(following: Tensor, reward: Tensor, p: Tensor, q: Tensor) -> str:
    moves = "; ".join(
        f"in {'XY'[s]} action {a} "
        + ("stays" if following[s, a] == s else f"leads to {'YX'[s]}")
        + (f" and pays {reward[s, a]:g}" if reward[s, a] else "")
        for s in (0, 1)
        for a in (0, 1)
    )
    return (
        f"two states, X (first) and Y, two actions, gamma 0.9; {moves}. π_old takes action 1 with "
        f"probability {p[0]:g} in X and {p[1]:g} in Y, π with {q[0]:g} and {q[1]:g}."
    )


def _inequality_row() -> Row:
    """Eq. 40 for the raw sigmoid and for the normalised gate, on ratios up to 1000."""
    d = torch.cat([torch.linspace(-8, math.log(1000), 20001, dtype=torch.float64), torch.zeros(1)])
    one, shift = torch.ones_like(d), torch.expm1(d).abs()
    raw = (d.exp() - RawRGPO(sharpness=10.0).value(d, one)).abs()
    worst = 0.0
    for k in SHARPNESS:
        gap = (d.exp() - RGPO(sharpness=k).value(d, one)).abs()
        limit = torch.minimum(shift, k**2 / 12 * shift**3)
        worst = max(worst, float((gap - limit).max()))
    at_one = float(raw[-1])
    return Row(
        "|r - g(r)| <= min(|r-1|, k²|r-1|³/12) for the normalised gate",
        "ratios up to 1000, k = " + ", ".join(f"{k:g}" for k in SHARPNESS),
        f"exceeded by {max(worst, 0):.0e}. As published, |r - g(r)| <= L|r-1| for the raw sigmoid "
        f"(Eq. 40): {at_one:g} <= L·0 at r = 1, false for every L",
        "1e-10",
        worst <= ROUNDING,
        "fails",
        numbers={"excess": worst, "raw_gap_at_one": at_one},
    )


def _repaired_row(steps: Steps) -> Row:
    allowed = ROUNDING * (1 + steps.true.abs())
    broken = sum(int((bound > steps.true + allowed).sum()) for bound in steps.bound.values())
    counts = {k: int((p > steps.true + allowed).sum()) for k, p in steps.published.items()}
    total = len(steps.true)
    return Row(
        "J(π) - J(π_old) >= surrogate - gate's loss - state shift (repaired)",
        f"{total:,} steps on random decision problems solved exactly: {STATES[0]} to {STATES[-1]} "
        f"states, {ACTIONS[0]} to {ACTIONS[-1]} actions, gamma 0.5 to 0.97, 4 sharpnesses",
        f"broken {broken} times. As published, without the state shift: broken in "
        f"{counts[10.0]:,} of {total:,} (k = 10)",
        "0",
        broken == 0,
        "fails" if any(counts.values()) else "holds",
        numbers={
            "steps": total,
            "broken": broken,
            "broken_as_published": {f"{k:g}": n for k, n in counts.items()},
        },
    )


def _use_row(steps: Steps) -> Row:
    bound = steps.bound[10.0]
    positive = bound > 0
    small = steps.along & (steps.size < 0.03)
    certified = float(positive[small].double().mean())
    tightness = (bound / steps.true)[positive] if positive.any() else torch.zeros(1)
    low, middle, high = quantiles(tightness, 0.25, 0.5, 0.75)
    return Row(
        "small steps along the advantage are certified to improve",
        "the same steps, k = 10; how often the repaired bound is above 0, and how tight it then is",
        f"{certified:.1%} of steps below 0.03; of all {int(positive.sum()):,} of {len(bound):,}; "
        f"then {middle:.0%} of the true improvement (quartiles {low:.0%} to {high:.0%})",
        "90%",
        certified >= 0.9,
        "no claim",
        numbers={
            "certified_small": certified,
            "positive": int(positive.sum()),
            "positive_along": int((positive & steps.along).sum()),
            "steps_along": int(steps.along.sum()),
            "tightness_quartiles": [low, middle, high],
        },
    )
