"""Claim 6: a bounded weight is not a trust region; what holds a policy is a force back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rgpo.studies.verify.drift import Form, forms, path, random_problem
from rgpo.studies.verify.finding import Finding, Picture, Row, generator, normal, quantiles
from rgpo.studies.verify.trust_figures import draw_forces, draw_paths

KICK = 1.0
"""Standard deviation of the parameters' displacement in the second experiment."""

READ_FORCES = (
    "How strongly a sample pulls on its own log-probability, by its ratio, for A = 1 and A = -1: "
    "above 0 it is made more probable, below 0 less. Grey marks the side where the policy has "
    "moved against the advantage. There the gate lets go (weight 0): nothing brings such a sample "
    "back. PPO's clip and the outward-only gate keep their weight there. On the other side all "
    "of them only stop pushing. Only a KL penalty, and the pull-back form, turn the sign around."
)
READ_PATHS = (
    "Left: many epochs of Adam on one batch, starting at the old policy. Right: the same, but the "
    "policy has first been displaced at random, as momentum or other samples would. Lines are "
    "medians over independent problems, shades quartiles; KL is exact, over all contexts."
)


def check(*, quick: bool) -> Finding:
    """Follow each form from the old policy and from a displaced one."""
    runs, epochs = (16, 100) if quick else (32, 200)
    problem = random_problem(runs, 0)
    kick = KICK * normal(*problem.parameters.shape, source=generator(1))
    compared = forms()
    free = {name: path(form, problem, epochs) for name, form in compared.items()}
    back = {name: path(form, problem, epochs, kick) for name, form in compared.items()}
    statement = (
        "Bounding what a sample may contribute does not bound how far the policy goes. A sample "
        "that the gate rejects exerts no force, in particular none back, while the other samples, "
        "which share its parameters, push on. PPO's clip has a force back on the side where the "
        "policy moved against the advantage; a KL penalty has one everywhere. That is why this "
        "library's default, rgpo, adds a KL penalty to the gate."
    )
    pictures = [
        Picture("Weight against ratio", READ_FORCES, draw_forces(compared)),
        Picture("Distance from the old policy", READ_PATHS, draw_paths(free, back)),
    ]
    rows = [_drift_row(free, runs, epochs), _return_row(back, runs, epochs), _force_row(compared)]
    return Finding("trust", statement, rows, pictures)


def _drift_row(free: Mapping[str, Tensor], runs: int, epochs: int) -> Row:
    end = {name: quantiles(kl[-1], 0.25, 0.5, 0.75) for name, kl in free.items()}
    farther = float((free["two-sided gate"][-1] > free["PPO's clip"][-1]).double().mean())
    held = end["gate + KL penalty"][1]
    order = sorted(end, key=lambda name: -end[name][1])
    return Row(
        "bounded weights are not a trust region: the gate drifts farther than PPO, a KL penalty "
        "holds it",
        f"{epochs} epochs on one batch, {runs} small bandits with shared parameters; exact KL",
        "KL " + ", ".join(f"{end[name][1]:.2g} {name}" for name in order),
        "gate farther than PPO in 90% of problems; with KL penalty a tenth of the gate's",
        farther >= 0.9 and held <= end["two-sided gate"][1] / 10,
        "no claim",
        numbers={"kl_quartiles": end, "gate_farther_than_ppo": farther},
    )


def _return_row(back: Mapping[str, Tensor], runs: int, epochs: int) -> Row:
    """Which forms undo a displacement."""
    left = {name: float((kl[-1] / kl[0]).median()) for name, kl in back.items()}
    order = sorted(left, key=lambda name: -left[name])
    going = ("no clip", "two-sided gate", "two-sided rejection")
    return Row(
        "a displaced policy comes back only under a force back: not under a two-sided gate",
        f"the same from a random displacement (KL {quantiles(back['no clip'][0], 0.5)[0]:.2g}), "
        f"{runs} bandits, {epochs} epochs",
        "KL over that at the start: " + ", ".join(f"{left[name]:.2g} {name}" for name in order),
        "above 1 for no clip and two-sided forms, below 1 for the others",
        all((left[name] > 1) == (name in going) for name in left),
        "no claim",
        numbers={"kl_over_start": left},
    )


def side_forces(form: Form) -> dict[str, float]:
    """The mean of w A over both signs of A, half a nat outside (`out`) and inside (`back`).

    `out`: the ratio moved where A pushes it; below 0 the sample is pulled back. `back`: it moved
    against A; above 0 the sample is pushed back to r = 1.
    """
    found = {}
    for name, side in (("out", 1.0), ("back", -1.0)):
        advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
        found[name] = float((form.force(0.5 * side * advantage, advantage) * advantage).mean())
    return found


def _force_row(compared: Mapping[str, Form]) -> Row:
    forces = {name: side_forces(form) for name, form in compared.items()}

    def told(side: str, low: float, high: float) -> str:
        chosen = [name for name, force in forces.items() if low < force[side] <= high]
        return ", ".join(chosen) or "none"

    infinity = float("inf")
    return Row(
        "on the side where a sample went too far, clips and gates only stop pushing",
        "force on a sample half a nat away from r = 1, from the weight in closed form",
        f"pull back: {told('out', -infinity, -0.1)}. Stop: {told('out', -0.1, 0.1)}. Push on: "
        f"{told('out', 0.1, infinity)}. After moving against A, led back by: "
        f"{told('back', 0.1, infinity)}",
        "gate: none on either side",
        abs(forces["two-sided gate"]["out"]) < 0.1
        and abs(forces["two-sided gate"]["back"]) < 0.1
        and forces["PPO's clip"]["back"] > 0.1
        and forces["gate + KL penalty"]["out"] < -0.1,
        "no claim",
        numbers=forces,
    )
