"""What the adapters share, without any host: refusals, versions, gradients, checkpoints."""

from dataclasses import replace

import pytest
import torch

from rgpo.adapters import common
from rgpo.adapters.common import (
    adapted,
    carrying,
    chosen,
    diagnostics,
    kl_state,
    means,
    minibatch_loss,
    replaced,
    require_version,
    with_kl_state,
)
from rgpo.core import recipes
from rgpo.core.kl import KLPenalty, categorical_kl
from rgpo.core.loss import policy_loss
from rgpo.errors import RgpoError


@pytest.mark.parametrize(
    ("found", "fits"),
    [("2.7.1", True), ("2.9.10", True), ("2.10.0.dev3", False), ("2.7.0", False), ("3.0", False)],
)
def test_versions_compare_as_numbers(monkeypatch, found, fits):
    monkeypatch.setattr(common, "version", lambda _: found)
    if fits:
        require_version("host", "2.7.1", "2.10", "extra")
    else:
        with pytest.raises(ImportError, match=r"from 2.7.1 to below 2.10.*rgpo\[extra\]"):
            require_version("host", "2.7.1", "2.10", "extra")


def test_a_missing_host_is_an_import_error_and_one_of_ours():
    with pytest.raises(ImportError, match=r"needs no-such-host, .*rgpo\[extra\]") as caught:
        require_version("no-such-host", "1", "2", "extra")
    assert isinstance(caught.value, RgpoError)


@pytest.mark.parametrize("recipe", recipes.recipes(), ids=lambda r: r.name)
def test_every_recipe_is_taken_or_refused_with_a_reason_and_a_way_out(recipe):
    """What is taken can then be computed from what the host gives."""
    objective = recipe.objective
    fits = (
        set(objective.needs) <= {"kl", "log_prob", "mask"}
        and objective.scope in ("element", "batch")
        and recipe.level == "token"
        and recipe.step == "gradient"
        and recipe.name != "vcpo"  # it sets the learning rate
    )
    if not fits:
        with pytest.raises(RgpoError, match=f"recipe '{recipe.name}' cannot run in Host: it "):
            chosen(recipe, {}, host="Host", gives={"kl", "log_prob"})
        return
    found = chosen(recipe, {}, host="Host", gives={"kl", "log_prob"})
    d = torch.tensor([0.1, -2.0, 200.0], requires_grad=True)
    inputs = {"kl": torch.rand(3), "reverse_kl": torch.rand(3)}
    old, advantage = torch.full((3,), -0.5), torch.tensor([1.0, -1.0, -0.3])
    loss = minibatch_loss(found, old + d, old, advantage, **inputs)
    (gradient,) = torch.autograd.grad(loss, d)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "options", "limits", "told"),
    [
        ("dppo-tv", {}, {"gives": {"kl"}}, "log_prob, which tasks with discrete actions"),
        ("gspo", {}, {}, "one ratio per sequence"),
        ("bapo", {}, {"whole_batch": False}, "all samples of an optimiser step together"),
        ("r2vpo-dual-variant", {}, {"adapts": False}, "changes from update to update"),
        ("dpo", {}, {"sequences": True}, "group_loss"),
        ("trpo", {}, {}, "natural-gradient steps"),
        ("rgqo", {}, {}, "did you mean"),
        ("rgpo", {"sharp": 1.0}, {}, "no hyper-parameter 'sharp'"),
        ("rgpo", {"sharpness": -1.0}, {}, "must be positive"),
    ],
)
def test_refusals_name_the_reason(name, options, limits, told):
    with pytest.raises(RgpoError, match=told):
        chosen(name, options, **{"host": "Host", "gives": {"kl", "log_prob"}} | limits)


def test_the_loss_of_a_minibatch_is_the_cores_plus_the_exact_kl():
    logits, old = torch.randn(2, 6, 3, dtype=torch.float64)
    logits.requires_grad_()
    kl = categorical_kl(old, logits)
    log_prob, behavior = (torch.log_softmax(x, -1)[:, 0] for x in (logits, old))
    advantage = torch.randn(6, dtype=torch.float64)
    for direction in ("forward", "reverse"):
        penalty = KLPenalty(0.7, direction=direction, annealed=True)
        recipe = replace(recipes.get("rgpo"), kl=penalty)
        both = {"kl": kl, "reverse_kl": categorical_kl(logits, old)}
        found = minibatch_loss(recipe, log_prob, behavior, advantage, 0.5, **both)
        used = both["kl" if direction == "forward" else "reverse_kl"]
        wanted = policy_loss(recipe, log_prob, behavior, advantage).loss + 1.4 * used.mean()
        torch.testing.assert_close(found, wanted)
        slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, wanted)]
        torch.testing.assert_close(*slopes)
        numbers = diagnostics(recipe, log_prob, behavior, advantage, kl)
        assert numbers["kl"] == pytest.approx(kl.mean().item())
        assert numbers["kl_coefficient"] == 0.7


def test_a_carried_loss_replaces_the_hosts_gradient_whatever_that_is():
    parameter = torch.tensor([0.3, 1.0], requires_grad=True)
    loss = (parameter**2).sum()
    for host in (lambda x: 5 * x.sum(), lambda x: (torch.exp(x + 200) * 0).sum()):
        carried = carrying(2 * parameter, loss)
        torch.testing.assert_close(carried, 2 * parameter)  # the host sees the true numbers
        (gradient,) = torch.autograd.grad(host(carried), parameter, retain_graph=True)
        torch.testing.assert_close(gradient, 2 * parameter.detach())


def test_replaced_methods_come_back_even_after_an_error():
    module = torch.nn.Linear(1, 1)

    def fail() -> None:
        with replaced(module, forward=lambda x: x + 1):
            assert module(torch.zeros(1)) == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "forward" not in vars(module)
    assert module(torch.zeros(1)) == module.bias


def test_what_was_measured_changes_the_recipe_and_survives_a_checkpoint():
    recipe = recipes.get("rgpo")
    spiked = adapted(recipe, {"kl": 1.0}, progress=0.5)
    assert spiked.kl.coefficient == 2.0
    assert spiked.objective == recipe.objective
    assert with_kl_state(recipe, kl_state(spiked)) == spiked
    plain = recipes.get("ppo")
    assert adapted(plain, {}, progress=0.5) == plain == with_kl_state(plain, kl_state(plain))
    assert means([{"a": 1.0}, {"a": float("nan")}, {"a": 3.0}]) == {"a": 2.0}
