"""Clips around a proximal policy: PPO as a special case, and the losses of the authors."""

import math

import pytest
import torch

from rgpo.core import recipes
from rgpo.core.loss import policy_loss
from rgpo.core.objectives.ppo import PPO
from rgpo.core.objectives.three_policies import DecoupledPPO, ReMix

NAMES = ["decoupled-ppo", "ppo-tis", "ppo-mis", "ppo-ewma", "ppo-ewma-revised", "remix"]


def draw(seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    """log pi, log mu, log pi_prox, A of 400 tokens."""
    generator = torch.Generator().manual_seed(seed)
    log_mu = -torch.rand(400, generator=generator, dtype=torch.float64) * 5
    new, prox, a = (torch.randn(400, generator=generator, dtype=torch.float64) for _ in range(3))
    return log_mu + spread * new, log_mu, log_mu + spread * prox, a


@pytest.mark.parametrize("name", NAMES)
def test_with_the_behaviour_policy_as_anchor_it_is_ppo(name):
    new, old, _, a = draw()
    objective, d = recipes.get(name).objective, new - old
    torch.testing.assert_close(objective.value(d, a, d), PPO().value(d, a))
    torch.testing.assert_close(objective.weight(d, a, d), PPO().weight(d, a))


def naive(name: str, new, old, prox, a):
    """Minus the mean surrogate as the paper or the framework writes it, in probabilities."""
    u, correction = torch.exp(new - prox), torch.exp(prox - old)
    clip = torch.minimum(u * a, u.clamp(0.8, 1.2) * a)
    if name == "decoupled-ppo":
        return -(correction.clamp(max=5) * clip).mean()
    if name in ("ppo-tis", "ppo-ewma-revised"):
        return -(correction.clamp(max=2) * clip).mean()
    if name == "ppo-mis":
        return -torch.where((correction >= 0.5) & (correction <= 2), correction * clip, 0).mean()
    if name == "ppo-ewma":  # as in the authors' code: log mu raised until pi / mu <= 100
        floored = torch.maximum(old, new.detach() - math.log(100))
        log_u = (new - prox).clamp(math.log(0.8), math.log(1.2))
        return torch.maximum(
            -a * torch.exp(new - floored), -a * torch.exp(log_u + prox - floored)
        ).mean()
    r = torch.exp(new - old)
    return -torch.minimum(r * a, r.clamp(correction - 0.2, correction + 0.2) * a).mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_loss_and_gradient_are_those_of_the_authors(name, spread):
    new, old, prox, a = draw(1, spread)
    new.requires_grad_()
    expected = naive(name, new, old, prox, a)
    found = policy_loss(name, new, old, a, proximal_log_prob=prox).loss
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, new)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, new)[0])


def test_an_inactive_guard_leaves_the_plain_ratio():
    new, old, prox, a = draw(2)
    d, u = new - old, torch.exp(new - prox)
    weight = DecoupledPPO(clip_low=2.0, clip_high=1e9, correction_high=1e9).weight(d, a, new - prox)
    torch.testing.assert_close(weight, d.exp() * a)
    clipped = DecoupledPPO(correction_high=1e9).weight(d, a, new - prox)
    inside = torch.where(a > 0, u <= 1.2, u >= 0.8)
    torch.testing.assert_close(clipped, d.exp() * a * inside)


def test_the_guards_differ_only_in_what_they_do_beyond_the_cap():
    new, old, prox, a = draw(3)
    d, anchored = new - old, new - prox
    weights = {
        guard: DecoupledPPO(guard=guard, correction_high=1.5).weight(d, a, anchored)
        for guard in ("truncate", "mask", "total")
    }
    beyond = prox - old > math.log(1.5)
    torch.testing.assert_close(weights["truncate"][~beyond], weights["mask"][~beyond])
    assert torch.count_nonzero(weights["mask"][beyond]) == 0
    assert torch.count_nonzero(weights["truncate"][beyond]) > 0
    assert weights["total"].abs().le(1.5 * a.abs() + 1e-12).all()


def test_bounds_that_exclude_one_are_refused():
    with pytest.raises(ValueError, match="correction_low <= 1"):
        DecoupledPPO(correction_low=1.5)
    with pytest.raises(ValueError, match="unknown guard 'clip'"):
        DecoupledPPO(guard="clip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip must be positive"):
        ReMix(clip=0.0)


def test_remix_leaves_stale_data_unclipped_at_the_start_of_the_update():
    """The policy is the proximal one: every old sample is in the middle of its interval."""
    _, old, prox, a = draw(4, 2.0)
    d = prox - old
    torch.testing.assert_close(ReMix().weight(d, a, torch.zeros_like(d)), d.exp() * a)
    assert torch.count_nonzero(PPO().weight(d, a)) < len(d)


@pytest.mark.parametrize(
    ("name", "alone"), [("rgpo-decoupled", "rgpo-gate"), ("rgpo-decoupled-signed", "rgpo-signed")]
)
def test_a_decoupled_gate_is_the_gate_alone_on_fresh_data_and_bounded_on_any(name, alone):
    new, old, prox, a = draw(spread=4.0)
    objective, gate = recipes.get(name).objective, recipes.get(alone).objective
    torch.testing.assert_close(objective.value(new - old, a, new - old), gate.value(new - old, a))
    torch.testing.assert_close(objective.weight(new - old, a, new - old), gate.weight(new - old, a))
    weight = objective.weight(new - old, a, new - prox)
    assert (weight.abs() <= objective.sup_weight * a.abs() * (1 + 1e-12)).all()
    # the same way of this update counts alike however old the data are, up to the truncation
    u, older = new - prox, torch.log(torch.tensor([1.5, 2.0, 9.0], dtype=torch.float64))
    near = [objective.weight(u + c, a, u) for c in older]
    torch.testing.assert_close(near[0] / 1.5, near[1] / 2)
    torch.testing.assert_close(near[1], near[2])


@pytest.mark.parametrize("wrong", [{"side": "left"}, {"correction_high": 0.5}, {"sharpness": -1.0}])
def test_bad_settings_of_a_decoupled_gate_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        recipes.get("rgpo-decoupled").configure(**wrong)
