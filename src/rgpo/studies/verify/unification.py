"""Claim 1: one function, the weight, gives the gradient of every algorithm of the family."""

from collections.abc import Callable

import plotly.graph_objects as go
import torch
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Normal as TorchNormal

from rgpo.control.distributions import Categorical, Distribution, Normal
from rgpo.core.loss import policy_loss
from rgpo.core.recipes import Recipe, get
from rgpo.runs.figures import colors, styled
from rgpo.studies.verify.finding import Finding, Picture, Row, generator, normal

TOLERANCE = 1e-10
"""Largest relative difference of two gradients in float64."""

SAMPLES, FEATURES, ACTIONS = 64, 5, 4

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss of log-prob, behaviour log-prob and advantage, as its paper writes it."""


def reinforce(log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:  # noqa: ARG001
    """Williams 1992."""
    return -(log_prob * advantage).mean()


def trpo(log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """TRPO, arXiv 1502.05477, Eq. 14: the surrogate that its KL ball constrains."""
    return -((log_prob - old).exp() * advantage).mean()


def ppo(log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """PPO, arXiv 1707.06347, Eq. 7, with epsilon 0.2."""
    ratio = (log_prob - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def rgpo(log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """RGPO, arXiv 2604.14895: the raw sigmoid gate with sharpness 10."""
    return -(torch.sigmoid(10 * ((log_prob - old).exp() - 1)) * advantage).mean()


def smooth_clip(log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The same gate normalised, g = 1 + 0.2 tanh((r - 1) / 0.2): docs/theory.md section 3."""
    return -((1 + 0.2 * torch.tanh(((log_prob - old).exp() - 1) / 0.2)) * advantage).mean()


def sapo(log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """SAPO, arXiv 2511.20347: a temperature for each sign of the advantage."""
    tau = 1.0 + 0.05 * (advantage <= 0).to(advantage.dtype)
    return -(4 / tau * torch.sigmoid(tau * ((log_prob - old).exp() - 1)) * advantage).mean()


ALGORITHMS: dict[str, tuple[Recipe, Loss]] = {
    "REINFORCE": (get("reinforce"), reinforce),
    "TRPO's surrogate": (get("trpo"), trpo),
    "PPO": (get("ppo"), ppo),
    "RGPO, raw gate": (get("rgpo-raw").configure(sharpness=10.0), rgpo),
    "RGPO, normalised": (get("rgpo"), smooth_clip),
    "SAPO": (get("sapo"), sapo),
}


def check(*, quick: bool) -> Finding:
    """Compare the gradients on random policies of both kinds."""
    draws = 10 if quick else 50
    errors = {
        kind: {
            name: [_error(kind, *pair, seed) for seed in range(draws)] for name, pair in _items()
        }
        for kind in ("categorical", "Gaussian")
    }
    worst = max(e for by_name in errors.values() for found in by_name.values() for e in found)
    row = Row(
        "one core gives the gradients of REINFORCE, TRPO's surrogate, PPO, RGPO and SAPO",
        f"against losses written out and differentiated by autograd, {draws} random categorical "
        f"and {draws} Gaussian policies each, float64",
        f"largest relative difference {worst:.1e}",
        f"{TOLERANCE:.0e}",
        worst <= TOLERANCE,
        numbers={"largest_relative_difference": worst, "policies": 2 * draws},
    )
    statement = (
        "RGPO is said to contain TRPO, PPO and REINFORCE. What they share is a function, the "
        "weight w(r) of a sample whose probability has changed by the ratio r: with it one core "
        "computes all their gradients. It is one weight each, not one gate for all: PPO's weight "
        "depends on the sign of the advantage too, so no gate g(r) alone is PPO, and of TRPO it is "
        "the surrogate, not the step."
    )
    read = (
        "Each point is one random policy: how much the core's gradient differs from that of the "
        "loss as its paper writes it. All must stay below the dashed line; 1e-16 is rounding."
    )
    return Finding(
        "unification", statement, [row], [Picture("Same gradients", read, _draw(errors))]
    )


def _items() -> list[tuple[str, tuple[Recipe, Loss]]]:
    return list(ALGORITHMS.items())


def _error(kind: str, recipe: Recipe, loss: Loss, seed: int) -> float:
    """Largest difference of the two gradients over the largest gradient, for one random policy."""
    source = generator(seed)
    x, theta = normal(SAMPLES, FEATURES, source=source), normal(FEATURES, ACTIONS, source=source)
    advantage, log_std = normal(SAMPLES, source=source), 0.3 * normal(ACTIONS, source=source)
    moved = theta + 0.3 * normal(FEATURES, ACTIONS, source=source)
    with torch.no_grad():
        action = _policy(kind, x @ theta, log_std, None, source)[1]
        old = _policy(kind, x @ theta, log_std, action, source)[0]
    gradients = []
    for independent in (False, True):
        leaves = [moved.clone().requires_grad_(), log_std.clone().requires_grad_()]
        parameters = leaves if kind == "Gaussian" else leaves[:1]
        if independent:
            log_prob = _log_prob_by_torch(kind, x @ leaves[0], leaves[1], action)
            total = loss(log_prob, old, advantage)
        else:
            log_prob = _policy(kind, x @ leaves[0], leaves[1], action, source)[0]
            total = policy_loss(recipe, log_prob, old, advantage).loss
        found = torch.autograd.grad(total, parameters)
        gradients.append(torch.cat([g.flatten() for g in found]))
    ours, theirs = gradients
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _policy(
    kind: str, output: Tensor, log_std: Tensor, action: Tensor | None, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Log-prob of `action` by the library's own distributions; None samples one."""
    if kind == "Gaussian":
        bounds = (1.0,) * ACTIONS
        head: Distribution = Normal(bounds, bounds, (ACTIONS,), "float64")
        parameters = torch.cat([output, log_std.expand_as(output)], -1)
        noise = normal(*output.shape, source=source)
    else:
        head = Categorical((ACTIONS,), (0,), (), "int64")
        parameters = output
        noise = torch.rand(len(output), 1, dtype=torch.float64, generator=source)
    if action is None:
        action = head.sample(parameters, noise)
    return head.log_prob(parameters, action), action


def _log_prob_by_torch(kind: str, output: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    if kind == "Gaussian":
        return TorchNormal(output, log_std.exp()).log_prob(action).sum(-1)
    return TorchCategorical(logits=output).log_prob(action[:, 0])


def _draw(errors: dict[str, dict[str, list[float]]]) -> go.Figure:
    color = colors(list(errors))
    figure = go.Figure(
        [
            go.Box(
                name=f"{kind} policies",
                x=[name for name, found in by_name.items() for _ in found],
                y=[max(e, 1e-18) for found in by_name.values() for e in found],
                boxpoints="all",
                pointpos=0,
                line={"width": 1},
                marker={"color": color[kind], "size": 3, "opacity": 0.6},
            )
            for kind, by_name in errors.items()
        ]
    )
    figure.add_hline(y=TOLERANCE, line={"dash": "dash", "width": 1.5})
    figure.update_yaxes(type="log", title_text="relative difference", exponentformat="power")
    figure.update_layout(boxmode="group")
    styled(figure, height=360, hovermode="closest")
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.15})
