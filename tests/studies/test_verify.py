"""`rgpo verify`: what it writes, and that every claim can fail."""

import json
import re

import pytest
import torch

from chromium import Plots, in_chromium, rendered
from rgpo import cli
from rgpo.core import recipes
from rgpo.core.gates import Gate
from rgpo.core.objectives.ppo import PPO
from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.objectives.sapo import SAPO
from rgpo.studies.verify import (
    bias,
    cost,
    drift,
    finding,
    improvement,
    pareto,
    run,
    steps,
    trust,
    unification,
    variance,
)
from rgpo.studies.verify.bandits import random_bandits

NAMES = ["unification", "variance", "bias", "improvement", "cost", "trust"]


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", *map(str, arguments)])
    return ended.value.code


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """One reduced run through the command line: exit status and directory."""
    directory = tmp_path_factory.mktemp("verify")
    return call("--quick", "--out", directory), directory


def test_it_passes_and_writes_json(verified):
    status, directory = verified
    record = json.loads((directory / "verify.json").read_text(), parse_constant=pytest.fail)
    assert status == 0
    assert (record["holds"], record["quick"]) == (True, True)
    assert [claim["name"] for claim in record["claims"]] == NAMES
    for number, claim in enumerate(record["claims"], start=1):
        assert set(claim) == {"number", "name", "statement", "holds", "note", "rows"}
        assert (claim["number"], claim["holds"]) == (number, True)
        for row in claim["rows"]:
            texts = {"claim", "tested", "measured", "bound"}
            assert set(row) == texts | {"holds", "published", "numbers"}
            assert all(row[text] for text in texts)
            assert row["numbers"]
    published = [row["published"] for claim in record["claims"] for row in claim["rows"]]
    assert published.count("fails") == 2
    assert "Promised: at least +0.031; true: -1.608" in record["claims"][3]["note"]


def test_the_page_is_one_file_that_tells_all(verified):
    page = (verified[1] / "verify.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", page)
    words = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    record = json.loads((verified[1] / "verify.json").read_text())
    rows = sum(len(claim["rows"]) for claim in record["claims"])
    assert f"All {rows} hold." in words
    assert words.count('class="holds">holds') >= rows
    for number, name in enumerate(NAMES, start=1):
        assert f"<h2>{number} {name.capitalize()}</h2>" in words


@in_chromium
def test_the_page_renders(verified, tmp_path):
    dom, console = rendered(verified[1] / "verify.html", tmp_path / "chromium")
    assert console == []
    drawn = Plots(dom).drawn
    assert len(drawn) == 10
    assert {name.split("-")[1] for name in drawn} == set(NAMES)
    assert all(plot["svg"] > 0 for plot in drawn.values())
    assert drawn["plot-trust-0"]["line"] == 14 + 7  # seven forms, two signs of A, and the legend
    assert drawn["plot-trust-1"]["line"] >= 14 + 7


def test_the_table_says_what_fails_and_the_exit_status_too(monkeypatch, tmp_path, capsys):
    honest = Gate.weight
    monkeypatch.setattr(Gate, "weight", lambda gate, d: 1.001 * honest(gate, d))
    monkeypatch.setattr(run, "CHECKS", (unification,))
    assert call("--quick", "--out", tmp_path / "deep" / "er") == 1
    out = capsys.readouterr().out
    assert "FAILS" in out
    assert "failed: unification" in out
    record = json.loads((tmp_path / "deep" / "er" / "verify.json").read_text())
    assert record["holds"] is False
    assert record["claims"][0]["rows"][0]["numbers"]["largest_relative_difference"] > 1e-4
    assert "1 of 1 fail." in (tmp_path / "deep" / "er" / "verify.html").read_text()


def test_a_file_is_no_directory(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert call("--quick", "--out", tmp_path / "file") == 1
    err = capsys.readouterr().err
    assert err.startswith("rgpo: ")
    assert "choose another --out" in err
    assert "Traceback" not in err


# ---- every row can fail -------------------------------------------------------------------


def holds(check):
    return [row.holds for row in check.check(quick=True).rows]


def test_variance_fails_for_a_wrong_supremum(monkeypatch):
    monkeypatch.setattr(variance, "TAILS", (1.2,))
    monkeypatch.setattr(Gate, "sup_weight", property(lambda _: 0.9))
    assert holds(variance) == [True, False, True]


def test_variance_fails_for_ratios_whose_tail_is_lighter(monkeypatch):
    honest = pareto.pareto_log_ratios
    monkeypatch.setattr(variance, "TAILS", (1.2,))
    monkeypatch.setattr(pareto, "pareto_log_ratios", lambda a, *rest: honest(a + 2, *rest))
    assert holds(variance) == [False, True, False]


def test_bias_fails_for_a_weight_that_is_not_the_gates(monkeypatch):
    honest = Gate.weight
    monkeypatch.setattr(Gate, "weight", lambda gate, d: 1.1 * honest(gate, d))
    assert holds(bias)[0] is False


def test_bias_fails_for_a_weight_that_its_curve_does_not_show(monkeypatch):
    """The bound is read off at |A| = 1; a weight that depends on |A| otherwise breaks it."""
    honest = SAPO.weight
    monkeypatch.setattr(SAPO, "weight", lambda o, d, a: honest(o, d, a) * a.abs())
    assert holds(bias) == [True, False]


def test_improvement_fails_without_the_state_shift(monkeypatch):
    honest = steps.improvement_bound

    def as_published(*arguments):
        found = honest(*arguments)
        return type(found)(**vars(found) | {"bound": found.bound + found.shift})

    monkeypatch.setattr(steps, "improvement_bound", as_published)
    assert holds(improvement)[:2] == [True, False]


def test_the_counterexample_by_hand():
    """From X on, the return is gamma (1 - p) / (1 - gamma p) q / (1 - gamma)."""

    def performance(p, q):
        return 0.9 * (1 - p) / (1 - 0.9 * p) * q / (1 - 0.9)

    told = improvement.smallest_counterexample()
    assert "in X action 0 leads to Y; in X action 1 stays" in told
    assert "in Y action 0 stays; in Y action 1 stays and pays 1" in told
    assert "0.1 in X and 0.5 in Y, π with 0.9 and 0.6" in told
    assert f"true: {performance(0.9, 0.6) - performance(0.1, 0.5):+.3f}" in told


def test_improvement_fails_for_a_gate_that_is_not_normalised(monkeypatch):
    honest = Gate.value
    monkeypatch.setattr(Gate, "value", lambda gate, d: honest(gate, d) - 0.5)
    assert holds(improvement) == [False, True, False]


def test_cost_fails_for_a_gate_that_is_dear(monkeypatch):
    honest = Gate.weight

    def dear(gate, d):
        for _ in range(100):
            weight = honest(gate, d)
        return weight

    monkeypatch.setattr(Gate, "weight", dear)
    assert holds(cost) == [False]


def test_trust_fails_if_the_gate_were_a_clip(monkeypatch):
    monkeypatch.setattr(RGPO, "weight", lambda _, d, a: PPO().weight(d, a))
    assert holds(trust) == [False, False, False]


# ---- the numbers --------------------------------------------------------------------------


def test_the_quoted_variances_are_reproduced():
    """docs/theory.md section 9: tail index 1.2, importance sampling 40 and 67, gates 0.03, 0.06."""
    arms = pareto.RGPO_ARMS
    moments, weights = pareto.measure(1.2, 10**6, arms, 1)
    for size, quoted in ((10**3, 40), (10**5, 67)):
        first, second = moments[size]
        batches = second - first**2
        assert batches.min() < quoted < batches.max()
    spread = [second - first**2 for first, second, _ in weights.values()]
    assert [round(v, 2) for v in spread] == [0.03, 0.06]


def test_pareto_ratios_have_mean_one_and_their_tail():
    source = torch.Generator().manual_seed(0)
    ratio = torch.cat(list(pareto.pareto_log_ratios(3.0, 10**6, source))).exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01)
    assert float((ratio > 2).double().mean()) == pytest.approx((2 / 3 / 2) ** 3, rel=0.02)


def test_the_interval_of_hills_estimate_is_exact():
    """1,000 samples of 200 ratios: a 99.9% interval of 10 excesses misses once or so."""
    missed = sum(
        not low <= 1.5 <= high
        for _, low, high in (pareto.hill(1.5, 200, seed) for seed in range(1000))
    )
    assert missed <= 6


def test_gradients_of_bandits_are_those_of_autograd():
    (b,) = [random_bandits(3, 4, 0.5, seed=0)]
    logits = (b.old * b.ratio).log().requires_grad_()
    ratio = torch.softmax(logits, -1) / b.old
    surrogate = b.mean(ratio * b.advantage)
    (gradient,) = torch.autograd.grad(surrogate.sum(), logits)
    torch.testing.assert_close(b.true_gradient, gradient)
    assert b.bias(recipes.get("importance").objective).max() < 1e-14


def test_power_and_constant_of_known_weights():
    for k in (1.0, 4.0, 10.0):
        power, constant = bias.contact(RGPO(sharpness=k))
        assert power == 2
        assert constant == pytest.approx(1.01 * k**2 / 4, rel=1e-2)
    assert bias.contact(recipes.get("reinforce").objective) == (1, pytest.approx(1.01, rel=1e-3))
    assert bias.contact(recipes.get("rgpo-softsign").objective)[0] == 1
    assert bias.contact(recipes.get("importance").objective) == (2, 0.0)
    assert bias.contact(RGPO(sharpness=5714.0))[0] == 2


def test_objectives_are_chosen_by_what_they_are():
    bounded = finding.element_objectives(bounded=True)
    everything = finding.element_objectives(bounded=False)
    assert set(bounded.values()) < set(everything.values())
    names = {name for names in everything for name in names.split(", ")}
    for recipe in recipes.recipes():
        o = recipe.objective
        fits = o.scope == "element" and not o.needs and o.homogeneous
        assert (recipe.name in names) == fits
    assert "rgpo, rgpo-gate" in bounded


def test_forces_at_half_a_nat():
    forces = {name: trust.side_forces(form) for name, form in drift.forms().items()}
    r = torch.tensor([0.5, -0.5], dtype=torch.float64).exp()
    assert forces["no clip"]["back"] == pytest.approx(float(r.mean()))
    assert forces["PPO's clip"] == {"out": 0.0, "back": pytest.approx(float(r.mean()))}
    assert forces["two-sided rejection"] == {"out": 0.0, "back": 0.0}


def test_rejection_obeys_the_law_of_objectives():
    d = torch.linspace(-1, 1, 200, dtype=torch.float64, requires_grad=True)
    o, a = drift.HardRejection(), torch.full_like(d, -0.7).detach()
    (slope,) = torch.autograd.grad(o.value(d, a).sum(), d)
    torch.testing.assert_close(slope, o.weight(d, a).detach())


def test_the_path_of_trust_is_adam_on_the_surrogate():
    """One run alone equals the same run among others, and starts at KL 0."""
    problem = drift.random_problem(2, 0)
    alone = drift.Problem(**{name: x[:1] for name, x in vars(problem).items()})
    form = drift.forms()["gate + KL penalty"]
    both = drift.path(form, problem, 5)
    torch.testing.assert_close(both[:, :1], drift.path(form, alone, 5))
    assert both[0].abs().max() < 1e-14
    assert (both[-1] > 0).all()
