"""The improvement bound: exact on solvable problems, step by step, and from samples."""

import math
import re
from pathlib import Path

import pytest
import torch

from rgpo.core import recipes
from rgpo.core.certificate import (
    categorical_tv,
    certify,
    certify_sequences,
    empirical_bernstein,
    gate_value,
    has_gate,
    improvement_bound,
    tv_bound,
)
from rgpo.core.gates import Gate
from rgpo.core.kl import categorical_kl
from rgpo.core.objectives.importance import Importance
from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.objectives.rgpo_dual import DualRGPO
from rgpo.core.objectives.rgpo_raw import RawRGPO
from rgpo.studies.tabular import Problems, random_problems, solve

NAN, INF = float("nan"), float("inf")
close = torch.testing.assert_close


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policies(count: int, states: int, actions: int, seed: int, low: float = -3, high: float = 0.7):
    """Random softmax policies, and others a step of 10^low to 10^high away."""
    draw = generator(seed)
    shape = (count, states, actions)
    logits = 2 * torch.randn(shape, dtype=torch.float64, generator=draw)
    size = 10 ** (low + (high - low) * torch.rand(count, 1, 1, generator=draw).double())
    step = size * torch.randn(shape, dtype=torch.float64, generator=draw)
    return torch.softmax(logits, -1), torch.softmax(logits + step, -1)


def solved(count=400, states=4, actions=3, gamma=0.9, seed=0):
    """Problems, two policies and the exact quantities of both."""
    problems = random_problems(count, states, actions, gamma, generator(seed))
    old, new = policies(count, states, actions, seed + 1)
    return problems, old, new, solve(problems, old), solve(problems, new)


# ---- the steps of the theorem, docs/certificates.md -----------------------------------------


def test_step_1_performance_difference():
    problems, _, new, at_old, at_new = solved()
    gain = at_new.performance - at_old.performance
    lemma = (at_new.visits[..., None] * new * at_old.advantage).sum((1, 2))
    close(gain, lemma / (1 - problems.gamma), rtol=1e-9, atol=1e-11)


def test_step_2_the_visited_states_move_by_no_more_than_the_policy():
    problems, old, new, at_old, at_new = solved()
    moved = (at_new.visits - at_old.visits).abs().sum(1)
    tv = (at_old.visits * (new - old).abs().sum(2) / 2).sum(1)
    limit = 2 * problems.gamma / (1 - problems.gamma) * tv
    assert (moved <= limit * (1 + 1e-9)).all()
    assert (moved / limit).max() > 0.05  # random problems mix; 1 needs a state that is never left


def test_step_3_importance_weights_turn_the_new_actions_into_old_ones():
    _, old, new, at_old, _ = solved()
    close((old * (new / old) * at_old.advantage).sum(2), (new * at_old.advantage).sum(2))
    close((old * at_old.advantage).sum(2), torch.zeros_like(at_old.value), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["sigmoid", "erf", "arctan", "softsign"])
def test_step_4_a_normalised_gate_differs_from_the_ratio_by_less_than_the_ratio_from_1(family):
    d = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    for k in (0.5, 2, 10, 40):
        gap = (d.exp() - Gate(k, family).value(d)).abs()
        away = torch.expm1(d).abs()
        assert (gap <= away * (1 + 1e-12)).all()
        if family == "sigmoid":
            assert (gap <= k**2 * away**3 / 12 * (1 + 1e-9) + 1e-14).all()


def test_step_5_the_bound_holds_and_is_often_positive():
    positive = 0
    for seed in range(5):
        problems, old, new, at_old, at_new = solved(
            400, 2 + seed, 2 + seed % 3, gamma=(0.5, 0.8, 0.9, 0.97, 0.7)[seed], seed=seed
        )
        gain = at_new.performance - at_old.performance
        for k in (2.0, 10.0):
            found = improvement_bound(
                RGPO(k), old, new, at_old.advantage, at_old.visits, problems.gamma
            )
            assert (found.bound <= gain + 1e-9 * (1 + gain.abs())).all()
            positive += int((found.bound > 0).sum())
    assert positive > 500  # of 4,000


def test_every_objective_gives_a_valid_bound_whatever_was_optimised():
    problems, old, new, at_old, at_new = solved(100)
    gain = at_new.performance - at_old.performance
    for recipe in recipes.recipes():
        if has_gate(recipe.objective) and not recipe.objective.needs:
            arguments = (old, new, at_old.advantage, at_old.visits, problems.gamma)
            found = improvement_bound(recipe.objective, *arguments)
            assert (found.bound <= gain + 1e-9 * (1 + gain.abs())).all(), recipe.name


# ---- where the published proof fails ---------------------------------------------------------


def test_the_published_gap_is_half_at_r_1_and_the_normalised_one_0():
    zero, one = torch.zeros(1), torch.ones(1)
    assert float((1 - RawRGPO().value(zero, one)).abs()) == 0.5  # Eq. 40 says at most L |r - 1| = 0
    assert float((1 - gate_value(RawRGPO(), zero, one)).abs()) == 0


def test_without_the_shift_of_the_states_the_bound_is_false():
    """Two states: stay in the first or leave for ever, where one of two actions costs 1.

    The old policy leaves, and takes the costly action, with probability 0.1, the new one with 0.2.
    It pays more often AND is there more often; the old policy's states show the first alone.
    """
    move = torch.tensor([[[[1.0, 0], [0, 1]], [[0, 1], [0, 1]]]], dtype=torch.float64)
    reward = torch.tensor([[[0.0, 0], [0, -1]]], dtype=torch.float64)
    problem = Problems(move, reward, torch.tensor([[1.0, 0]], dtype=torch.float64), 0.9)
    old, new = torch.tensor([[[[0.9, 0.1]] * 2], [[[0.8, 0.2]] * 2]], dtype=torch.float64)
    at_old, at_new = solve(problem, old), solve(problem, new)
    found = improvement_bound(RGPO(), old, new, at_old.advantage, at_old.visits, 0.9)
    gain = at_new.performance - at_old.performance
    assert float(gain) == pytest.approx(-0.8120, abs=1e-4)
    assert float(found.surrogate - found.gate) == pytest.approx(-0.7230, abs=1e-4)
    assert float(found.bound) == pytest.approx(-2.5230, abs=1e-4)


def test_the_page_names_tests_that_exist():
    root = Path(__file__).parents[2]
    links = re.findall(
        r"\[`(test_\w+)`\]\(\.\./([^)]+)\)", (root / "docs" / "certificates.md").read_text()
    )
    assert len(links) > 10
    for name, file in links:
        assert f"def {name}(" in (root / file).read_text(), name


# ---- the exact bound -------------------------------------------------------------------------


def test_by_hand():
    """One state, two actions at 1/2, A = +-1, pi = (3/4, 1/4), gamma = 1/2, no gate (g = r).

    E_old[(r - 1) A] = 1/2;  gap 0;  TV = 1/4, eps = |3/4 - 1/4| = 1/2: 2 * 1/2 * 1/4 = 1/4; all
    twice for 1 / (1 - gamma). With the gate of k = 2, g - 1 = tanh(+-1/2) = +-0.46212 for r = 3/2
    and 1/2: surrogate 0.46212, gap 1/2 - 0.46212.
    """
    old = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    new = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    visits = torch.ones(1, dtype=torch.float64)
    plain = improvement_bound(Importance(), old, new, advantage, visits, 0.5)
    parts = (plain.surrogate, plain.gate, plain.shift, plain.interval, plain.bound)
    assert [float(x) for x in parts] == pytest.approx([1, 0, 0.5, 0, 0.5])
    gated = improvement_bound(RGPO(2.0), old, new, advantage, visits, 0.5)
    kept = math.tanh(0.5)
    assert float(gated.surrogate) == pytest.approx(2 * kept)
    assert float(gated.gate) == pytest.approx(2 * (0.5 - kept))
    assert gated.reason == ("",)


def test_a_new_policy_that_rules_actions_out_is_bounded_and_one_that_adds_some_is_not():
    both = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]], dtype=torch.float64)
    one = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]], dtype=torch.float64)
    advantage = torch.zeros(2, 1, 2, dtype=torch.float64)
    found = improvement_bound(RGPO(), both, one, advantage, torch.ones(2, 1).double(), 0.9)
    assert found.bound.tolist() == [0, -INF]
    assert found.reason == ("", "the new policy takes actions the old one never takes")
    assert found.surrogate.isnan().tolist() == [False, True]


def test_tables_that_are_none_are_refused():
    old, new = policies(1, 2, 3, 0)
    advantage, visits = torch.zeros_like(old), torch.full((1, 2), 0.5, dtype=torch.float64)
    good = {"old": old, "new": new, "advantage": advantage, "occupancy": visits, "gamma": 0.9}
    improvement_bound(RGPO(), **good)
    bad = [
        {"old": old * 1.01},
        {"new": torch.full_like(new, NAN)},
        {"new": new.float()},
        {"occupancy": torch.tensor([[1.5, -0.5]], dtype=torch.float64)},
        {"occupancy": visits[0]},
        {"advantage": torch.full_like(new, INF)},
        {"advantage": advantage[..., :2]},
        {"gamma": 1.0},
        {"gamma": -0.1},
        {"gamma": NAN},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=r".{20}"):
            improvement_bound(RGPO(), **(good | change))


# ---- the gate of an objective ----------------------------------------------------------------


def test_the_normalised_gate_has_value_and_slope_1_for_both_signs():
    for name in ("rgpo", "rgpo-raw", "sapo", "gipo", "rgpo-log"):
        d = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        gate = gate_value(recipes.get(name).objective, d, torch.tensor([1.0, -1.0]).double())
        (slope,) = torch.autograd.grad(gate.sum(), d)
        if name != "gipo":  # GIPO's value is detached in part
            close(slope, torch.ones_like(slope))
        close(gate.detach(), torch.ones_like(slope))


def test_an_objective_that_is_no_gate_is_refused_by_name_and_the_bound_does_not_need_it():
    assert all(has_gate(recipes.get(name).objective) for name in ("rgpo", "ppo", "sapo", "spo"))
    (without, *_) = [r.objective for r in recipes.recipes() if not has_gate(r.objective)]
    with pytest.raises(ValueError, match=type(without).__name__):
        gate_value(without, torch.zeros(3), torch.ones(3))


# ---- from samples ----------------------------------------------------------------------------


def bandit(n: int, runs: int, seed: int, actions: int = 5):
    """Samples (runs, n) of a random bandit: log-ratio, advantage; and the true gain."""
    old, new = policies(1, 1, actions, seed, low=-0.5, high=0.3)
    draw = generator(seed + 100)
    reward = torch.rand(actions, dtype=torch.float64, generator=draw)
    advantage = reward - (old[0, 0] * reward).sum()
    action = torch.multinomial(old[0, 0].expand(runs, -1), n, replacement=True, generator=draw)
    gain = float((new[0, 0] * advantage).sum())
    return (new / old).log()[0, 0][action], advantage[action], gain, advantage.abs().max()


def test_many_samples_give_what_the_formula_says():
    """E[(m - 1)(A + M)] with m = min(r, 2); its gap to the gain is E[(r - 2)^+ (A + M)]."""
    d, advantage, gain, largest = bandit(1_000_000, 1, 3)
    found = certify(RGPO(), d, advantage, gamma=0.0, max_advantage=largest)
    lost = (torch.clamp(d.exp() - 2, min=0) * (advantage + largest)).mean()
    surrogate = ((RGPO().gate.value(d) - 1) * advantage).mean()
    assert float(found.surrogate) == pytest.approx(float(surrogate))
    assert float(found.bound + found.interval) == pytest.approx(gain - float(lost), abs=3e-3)
    assert 0 < float(found.interval) < 0.01
    assert float(found.shift) == 0


def test_the_bound_is_about_two_policies_and_the_gate_only_splits_it():
    d, advantage, _, _ = bandit(500, 2, 3)
    tv = torch.full_like(d, 0.1)
    found = {
        recipe.name: certify(recipe.objective, d, advantage, gamma=0.5, tv=tv)
        for recipe in recipes.recipes()
        if has_gate(recipe.objective) and not recipe.objective.needs
    }
    for one in found.values():
        close(one.bound, found["rgpo"].bound)
        close(one.surrogate - one.gate, found["rgpo"].surrogate - found["rgpo"].gate)
    far = certify(recipes.get("importance").objective, d * 1e4, advantage, gamma=0.5, tv=tv)
    close(far.bound, certify(RGPO(), d * 1e4, advantage, gamma=0.5, tv=tv).bound)


@pytest.mark.parametrize("seed", range(4))
def test_the_confidence_is_kept(seed):
    """1,000 batches; at 80% confidence no more than a fifth may promise too much."""
    d, advantage, gain, largest = bandit(200, 1000, seed)
    found = certify(RGPO(4.0), d, advantage, gamma=0.0, confidence=0.8, max_advantage=largest)
    assert (found.bound > gain).double().mean() < 0.2
    assert found.reason == ("",) * 1000


def test_heavy_tails_break_the_plain_mean_of_the_gap_and_not_the_certificate():
    """Pareto ratios of tail index 1.05 whose rare large ones carry most of the loss.

    A = -1 for the one sample in a thousand with the largest ratios, which hold 72% of the mass of
    the new policy. Most batches of 200 see none of them: the batch mean of |r - g| |A| is tiny.
    """
    alpha, rare, n, runs = 1.05, 1e-3, 200, 2000
    u = torch.rand(runs, n, dtype=torch.float64, generator=generator())
    d = math.log((alpha - 1) / alpha) - torch.log(u) / alpha  # mean of r is 1
    advantage = torch.where(u < rare, -1.0, rare / (1 - rare)).double()
    mass = rare ** (1 - 1 / alpha)  # of the new policy on the rare samples
    gain = -mass + (1 - mass) * rare / (1 - rare)
    assert gain < -0.7

    gate = RGPO().gate.value(d)
    surrogate = (gate - 1) * advantage
    width = 2 * (1.2 - 0.8)
    plain = surrogate.mean(1) - ((d.exp() - gate).abs() * advantage.abs()).mean(1)
    plain = plain - empirical_bernstein(surrogate, width, 0.95)
    assert (plain > gain).double().mean() > 0.7

    found = certify(RGPO(), d, advantage, gamma=0.0, max_advantage=1.0)
    assert (found.bound <= gain).all()


def test_truncating_the_ratio_far_out_costs_less_than_where_the_gate_saturates():
    """Normal log-ratios, KL 0.01, correlated 0.3 with A; 100 batches of 16,384 samples."""
    noise, advantage = torch.randn(2, 100, 16_384, dtype=torch.float64, generator=generator(1))
    advantage = advantage.clamp(-4, 4)
    d = math.sqrt(0.02) * (0.95 * noise + 0.3 * advantage) - 0.01
    near, far = (
        certify(RGPO(), d, advantage, gamma=0.0, max_advantage=4.0, cap=cap).bound.mean()
        for cap in (1.2, 2.0)
    )
    assert float((torch.expm1(d) * advantage).mean()) == pytest.approx(0.0424, abs=5e-4)
    assert float(far) == pytest.approx(0.0212, abs=1e-3)
    assert float(near) == pytest.approx(-0.0068, abs=1e-3)


def test_with_states_the_bound_holds_at_its_confidence():
    """300 problems, states from d_old: the bound may fail in 5% and fails in fewer."""
    problems, old, new, at_old, at_new = solved(300, seed=7)
    draw = generator(5)
    n = 400
    state = torch.multinomial(at_old.visits, n, replacement=True, generator=draw)
    rows = torch.arange(300)[:, None]
    action = torch.multinomial(old[rows, state].flatten(0, 1), 1, generator=draw).view(300, n)
    tv = (new - old).abs().sum(2) / 2
    gain = at_new.performance - at_old.performance
    found = certify(
        RGPO(),
        (new / old).log()[rows, state, action],
        at_old.advantage[rows, state, action],
        tv=tv.gather(1, state),
        gamma=problems.gamma,
        max_advantage=at_old.advantage.abs().amax((1, 2)),
        max_tv=tv.amax(1),
    )
    assert (found.bound > gain).sum() <= 15


def test_a_policy_fitted_to_the_samples_needs_others_to_be_certified():
    """1,000 one-step states, 4 actions, rewards that are noise alone: the gain is exactly 0.

    A table fitted to 2,000 samples learns their noise, and is certified for it on these samples
    far more often than in 5% of 100 trials; on as many fresh samples never.
    """
    draw, lead = generator(6), (100, 2000)
    state, fresh = torch.randint(1000, (2, *lead), generator=draw)
    action, other = torch.randint(4, (2, *lead), generator=draw)
    noise, fresh_noise = 2 * torch.rand(2, *lead, dtype=torch.float64, generator=draw) - 1
    rows = torch.arange(100)[:, None]
    logits = torch.zeros(100, 1000, 4, dtype=torch.float64)
    for _ in range(50):
        logits.requires_grad_()
        d = torch.log_softmax(logits, -1)[rows, state, action] + math.log(4)
        loss = -RGPO().surrogate(d, noise).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.15 * gradient).detach()
    ratio = torch.log_softmax(logits, -1) + math.log(4)
    some = {"gamma": 0.0, "max_advantage": 1.0}
    same = certify(RGPO(), ratio[rows, state, action], noise, **some)
    second = certify(RGPO(), ratio[rows, fresh, other], fresh_noise, **some)
    assert (same.bound > 0).double().mean() > 0.2
    assert not (second.bound > 0).any()


def test_the_parts_add_up_and_the_shift_is_the_formula():
    d, advantage, _, _ = bandit(500, 3, 1)
    tv = 0.2 + 0.1 * torch.rand(3, 500, dtype=torch.float64, generator=generator())
    found = certify(RGPO(), d, advantage, tv=tv, gamma=0.9)
    close(found.bound, found.surrogate - found.gate - found.shift - found.interval)
    largest = advantage.abs().amax(1)
    price = 2 * 0.9 / 0.1 * largest * 2 * tv.amax(1)
    close(found.shift, price * tv.mean(1) / 0.1)
    none = certify(RGPO(), d, advantage, tv=torch.zeros_like(tv), gamma=0.9)
    assert none.shift.tolist() == [0, 0, 0]


def test_more_confidence_and_fewer_samples_widen_the_interval():
    d, advantage, _, _ = bandit(1000, 1, 2)
    some = {"gamma": 0.0, "max_advantage": 1.0}
    widths = [
        float(certify(RGPO(), d[:, :n], advantage[:, :n], confidence=c, **some).interval)
        for n, c in ((1000, 0.5), (1000, 0.95), (250, 0.95))
    ]
    assert widths == sorted(widths)


def test_masked_elements_contribute_exactly_nothing():
    d, advantage, _, _ = bandit(300, 2, 4)
    tv = torch.full_like(d, 0.1)
    mask = torch.rand(2, 300, generator=generator()) < 0.6
    for garbage in (NAN, INF, -INF):
        dirty = [torch.where(mask, x, garbage) for x in (d, advantage, tv)]
        found = certify(RGPO(), dirty[0], dirty[1], mask, tv=dirty[2], gamma=0.5)
        for run in range(2):
            kept = [x[run, mask[run]] for x in (d, advantage, tv)]
            alone = certify(RGPO(), kept[0], kept[1], tv=kept[2], gamma=0.5)
            for name in ("surrogate", "gate", "shift", "interval", "bound"):
                close(getattr(found, name)[run], getattr(alone, name))


def test_objectives_that_treat_the_signs_differently_use_the_gate_of_the_sign():
    sapo = recipes.get("sapo").objective
    d = torch.tensor([0.3, 0.3], dtype=torch.float64)
    found = gate_value(sapo, d, torch.tensor([2.0, -2.0]).double())
    expected = [Gate(t).value(d[:1]) for t in (sapo.tau_positive, sapo.tau_negative)]
    close(found, torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_dtype_is_computed_in_float64(dtype):
    d, advantage, _, _ = bandit(300, 1, 4)
    d, advantage = d.to(dtype), advantage.to(dtype)
    found = certify(RGPO(), d, advantage, gamma=0.0)
    close(found.bound, certify(RGPO(), d.double(), advantage.double(), gamma=0.0).bound)
    assert found.bound.dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-8, 1.0, 100.0, 1e4])
def test_extreme_ratios_give_a_finite_bound(scale):
    d = scale * torch.linspace(-1, 1, 101)
    found = certify(RGPO(), d, torch.cos(d), tv=torch.ones(101), gamma=0.99)
    assert math.isfinite(float(found.bound))


# ---- sequences -------------------------------------------------------------------------------


def test_an_answer_is_one_action():
    draw = generator()
    d = 0.1 * torch.randn(64, 12, generator=draw)
    advantage = torch.randn(64, generator=draw)
    mask = torch.rand(64, 12, generator=draw) < 0.7
    mask[5] = False
    dirty = torch.where(mask, d, NAN)
    found = certify_sequences(RGPO(), dirty, advantage, mask, max_advantage=5.0)
    keep = [i for i in range(64) if i != 5]
    totals = torch.where(mask, d, 0).double().sum(1)[keep]
    alone = certify(RGPO(), totals, advantage[keep], gamma=0.0, max_advantage=5.0)
    close(found.bound, alone.bound)
    assert found.bound.shape == ()
    assert float(found.shift) == 0


def test_the_reference_anchored_update_keeps_its_confidence():
    """Sequences of 4 tokens with i.i.d. categorical policies; the gain is known exactly."""
    draw = generator(2)
    logits = torch.randn(3, 6, dtype=torch.float64, generator=draw)
    old, new, reference = torch.log_softmax(logits * torch.tensor([[1.0]]), -1)
    new = torch.log_softmax(old + 0.2 * new, -1)
    score = torch.rand(6, dtype=torch.float64, generator=draw)
    gain = float(4 * ((new.exp() - old.exp()) * score).sum())
    centre, mask = float(4 * (old.exp() * score).sum()), torch.ones(400, 4, dtype=torch.bool)
    failures = 0
    for form in ("product", "detached", "geometric"):
        for _ in range(100):
            token = torch.multinomial(
                old.exp().expand(400, -1), 4, replacement=True, generator=draw
            )
            found = certify_sequences(
                DualRGPO(form=form),
                (new - old)[token],
                score[token].sum(1) - centre,
                mask,
                confidence=0.9,
                max_advantage=4.0,
                reference_log_ratio=(new - reference)[token],
            )
            assert found.reason == ("",)
            failures += float(found.bound) > gain
    assert failures <= 30


def test_a_token_form_is_refused_where_sequences_are_meant():
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        certify_sequences(RGPO(), torch.zeros(4), torch.zeros(4), torch.ones(4, dtype=torch.bool))


# ---- bad input -------------------------------------------------------------------------------

GOOD = {"log_ratio": torch.tensor([0.1, -0.1, 0.2]), "advantage": torch.tensor([1.0, -1.0, 0.5])}


@pytest.mark.parametrize(
    "change",
    [
        {"gamma": 1.0},
        {"gamma": -0.01},
        {"gamma": NAN},
        {"gamma": 0.9},  # without tv
        {"confidence": 0.0},
        {"confidence": 1.0},
        {"confidence": NAN},
        {"log_ratio": torch.zeros(0), "advantage": torch.zeros(0)},
        {"log_ratio": torch.zeros(()), "advantage": torch.zeros(())},
        {"log_ratio": torch.zeros(4)},
        {"log_ratio": torch.zeros(3, dtype=torch.int64)},
        {"mask": torch.ones(3)},
        {"tv": torch.zeros(2), "gamma": 0.9},
        {"max_advantage": -1.0},
        {"max_advantage": INF},
        {"tv": torch.zeros(3), "max_tv": NAN},
        {"cap": 0.9},
        {"cap": INF},
    ],
)
def test_a_call_that_makes_no_sense_is_refused(change):
    arguments = {"objective": RGPO(), "gamma": 0.0} | GOOD
    assert math.isfinite(float(certify(**arguments).bound))
    with pytest.raises(ValueError, match=r".{20}"):
        certify(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"log_ratio": torch.tensor([0.1, NAN, 0.2])}, "not finite"),
        ({"log_ratio": torch.tensor([0.1, INF, 0.2])}, "not finite"),
        ({"log_ratio": torch.tensor([0.1, -INF, 0.2])}, "not finite"),
        ({"advantage": torch.tensor([0.1, NAN, 0.2])}, "not finite"),
        ({"advantage": torch.tensor([0.1, INF, 0.2])}, "not finite"),
        ({"advantage": torch.zeros(3)}, "every advantage is 0"),
        ({"mask": torch.zeros(3, dtype=torch.bool)}, "fewer than two"),
        ({"mask": torch.tensor([True, False, False])}, "fewer than two"),
        ({"tv": torch.tensor([0.1, NAN, 0.2])}, "not finite"),
        ({"tv": torch.tensor([0.1, INF, 0.2])}, "not finite"),
        ({"tv": torch.tensor([0.1, -0.1, 0.2])}, r"outside \[0, 1\]"),
        ({"tv": torch.tensor([0.1, 1.1, 0.2])}, r"outside \[0, 1\]"),
        ({"max_advantage": 0.5}, "larger than max_advantage"),
        ({"tv": torch.tensor([0.1, 0.3, 0.2]), "max_tv": 0.2}, "larger than max_tv"),
    ],
)
def test_data_that_prove_nothing_give_minus_infinity_and_say_why(change, reason):
    arguments = {"objective": RGPO(), "gamma": 0.5, "tv": torch.full((3,), 0.1)} | GOOD
    good, bad = certify(**arguments), certify(**(arguments | change))
    assert float(bad.bound) == -INF
    assert re.search(reason, bad.reason[0])
    for name in ("surrogate", "gate", "shift", "interval"):
        assert math.isnan(float(getattr(bad, name)))
    assert good.reason == ("",)


def test_one_bad_run_leaves_its_neighbours_alone():
    d, advantage, _, _ = bandit(100, 3, 0)
    broken = d.clone()
    broken[1, 7] = NAN
    found, clean = (certify(RGPO(), x, advantage, gamma=0.0) for x in (broken, d))
    assert [bool(r) for r in found.reason] == [False, True, False]
    close(found.bound[[0, 2]], clean.bound[[0, 2]])


# ---- the tools -------------------------------------------------------------------------------


def test_empirical_bernstein_by_hand():
    """Maurer and Pontil's numbers for x = 0, 1, 1, 0 of [0, 1] at 90%: V = 1/3, L = log 20."""
    x = torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)
    expected = math.sqrt(2 / 3 * math.log(20) / 4) + 7 * math.log(20) / 9
    assert float(empirical_bernstein(x, 1.0, 0.9)) == pytest.approx(expected)
    masked = torch.tensor([0.0, 1, 1, 0, NAN]).double()
    keep = torch.tensor([True] * 4 + [False])
    assert float(empirical_bernstein(masked, 1.0, 0.9, keep)) == pytest.approx(expected)
    assert float(empirical_bernstein(5 * x - 2, 5.0, 0.9)) == pytest.approx(5 * expected)


def test_empirical_bernstein_covers_a_rare_event():
    x = (torch.rand(20_000, 50, generator=generator()) < 0.02).double()
    upper = x.mean(1) + empirical_bernstein(x, 1.0, 0.9)
    assert (upper < 0.02).double().mean() < 0.1


def test_total_variation_of_categoricals_and_its_bound():
    logits = 2 * torch.randn(2, 500, 4, dtype=torch.float64, generator=generator())
    tv = categorical_tv(*logits)
    p, q = torch.softmax(logits, -1)
    events = torch.tensor([[float(i >> a & 1) for a in range(4)] for i in range(16)]).double()
    close(tv, ((p - q) @ events.T).abs().amax(-1))  # the definition: over all events
    for pair in (logits, logits.flip(0)):
        assert (tv <= tv_bound(categorical_kl(*pair)) + 1e-12).all()
    disjoint = torch.tensor([[0.0, -INF], [-INF, 0.0]])
    assert float(categorical_tv(*disjoint)) == 1
    assert float(tv_bound(categorical_kl(*disjoint))) == 1


def test_the_bound_from_the_kl_holds_for_normals():
    """TV of N(0, 1) and N(mu, s^2) by integration, on both sides of where the two bounds cross."""
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    old = torch.distributions.Normal(0.0, 1.0)
    crossed = set()
    for mu, s in ((0.1, 1.0), (1.0, 0.5), (0.0, 3.0), (3.0, 1.0), (6.0, 2.0)):
        new = torch.distributions.Normal(mu, s)
        tv = torch.trapezoid((old.log_prob(x).exp() - new.log_prob(x).exp()).abs(), x) / 2
        kl = torch.distributions.kl_divergence(old, new).double()
        bound = float(tv_bound(kl))
        crossed.add(bound < math.sqrt(float(kl) / 2) - 1e-9)
        assert float(tv) <= bound <= 1
    assert crossed == {True, False}
