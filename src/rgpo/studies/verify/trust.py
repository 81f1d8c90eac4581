"""Claim 6: a bounded weight is not a trust region; what holds a policy is a force back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core import recipes
from rgpo.core.kl import categorical_kl
from rgpo.core.objective import Objective, safe_ratio
from rgpo.studies.verify.finding import Finding, Picture, Row, generator, normal, quantiles
from rgpo.studies.verify.trust_figures import draw_forces, draw_paths

CONTEXTS, ACTIONS, FEATURES, SAMPLES = 16, 5, 6, 128
"""Fewer features than contexts: changing the policy in one context changes it in others."""

LEARNING_RATE = 0.03

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


@dataclass(frozen=True)
class HardRejection(Objective):
    """w = r A for |r - 1| <= epsilon, else 0, whatever the sign of A: the gate's sharp limit."""

    epsilon: float = 0.2
    """Half-width."""

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return torch.clamp(safe_ratio(log_ratio), 1 - self.epsilon, 1 + self.epsilon) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        return torch.where((ratio - 1).abs() <= self.epsilon, ratio, 0) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return 1 + self.epsilon


@dataclass(frozen=True)
class Form:
    """A way to hold the policy: an objective, and the coefficient of an exact KL penalty."""

    objective: Objective
    """The weight of a sample."""

    kl: float = 0.0
    """Of KL(old || new)."""

    def force(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """The weight and the penalty's pull on a sample of the old policy, -kl (r - 1)."""
        return self.objective.weight(log_ratio, advantage) - self.kl * torch.expm1(log_ratio)


def forms() -> dict[str, Form]:
    """What is compared."""
    own = {
        "no clip": "importance",
        "two-sided gate": "rgpo-gate",
        "outward-only gate": "rgpo-signed",
        "PPO's clip": "ppo",
        "gate with pull-back": "rgpo-pullback",
    }
    found = {label: Form(recipes.get(name).objective) for label, name in own.items()}
    found["two-sided rejection"] = Form(HardRejection())
    found["gate + KL penalty"] = Form(recipes.get("rgpo").objective, kl=1.0)
    return found


@dataclass(frozen=True)
class Problem:
    """R contextual bandits with one batch of samples each; softmax policies of linear logits."""

    features: Tensor
    """(R, C, F)."""

    parameters: Tensor
    """(R, F, A): of the policy that collected the batch."""

    chosen: Tensor
    """(R, N): flat index of context and action of each sample."""

    advantage: Tensor
    """(R, N): noisy, of mean 0 and variance 1 over the batch."""


def random_problem(runs: int, seed: int) -> Problem:
    """Standard normal features, parameters and advantages; noise of the same size on the latter."""
    source = generator(seed)
    features = normal(runs, CONTEXTS, FEATURES, source=source) / FEATURES**0.5
    parameters = normal(runs, FEATURES, ACTIONS, source=source)
    probability = torch.softmax(features @ parameters, -1)
    context = torch.randint(CONTEXTS, (runs, SAMPLES), generator=source)
    own = probability.gather(1, context[..., None].expand(-1, -1, ACTIONS))
    action = torch.multinomial(own.flatten(0, 1), 1, generator=source).view(runs, SAMPLES)
    chosen = context * ACTIONS + action
    true = normal(runs, CONTEXTS, ACTIONS, source=source)
    true = true - (probability * true).sum(-1, keepdim=True)
    seen = true.flatten(1).gather(1, chosen) + normal(runs, SAMPLES, source=source)
    seen = seen - seen.mean(-1, keepdim=True)
    return Problem(features, parameters, chosen, seen / seen.std(-1, keepdim=True))


def path(form: Form, problem: Problem, epochs: int, displaced: Tensor | float = 0.0) -> Tensor:
    """Exact KL(old || new), (epochs + 1, R), of full-batch Adam from the displaced policy."""
    old = problem.features @ problem.parameters
    start = torch.log_softmax(old, -1).flatten(1).gather(1, problem.chosen)
    parameters = (problem.parameters + displaced).clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=LEARNING_RATE)
    history = []
    for epoch in range(epochs + 1):
        logits = problem.features @ parameters
        kl = categorical_kl(old, logits).mean(-1)
        history.append(kl.detach())
        if epoch == epochs:
            break
        log_ratio = torch.log_softmax(logits, -1).flatten(1).gather(1, problem.chosen) - start
        surrogate = form.objective.surrogate(log_ratio, problem.advantage).mean(-1)
        # a sum over runs: each has its own parameters, and Adam treats elements alone
        (gradient,) = torch.autograd.grad((form.kl * kl - surrogate).sum(), parameters)
        parameters.grad = gradient
        optimizer.step()
    return torch.stack(history)


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
