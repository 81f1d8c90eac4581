"""Advantages: values by hand, the recursions in plain loops, and the identities of the papers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgpo.core.advantage import (
    gae,
    group_normalize,
    group_relative,
    leave_one_out,
    normalize,
    optimal_baseline,
    red_drop,
    vtrace,
)

NAN, INF = float("nan"), float("inf")
close = torch.testing.assert_close


def rollout(seed: int = 0, steps: int = 13, envs: int = 3, ends: float = 0.2):
    """Random (T, E) rewards, values, next values and ends; next_value is value[t + 1] inside."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(steps, envs, generator=generator, dtype=torch.float64)

    def flags():
        return torch.rand(steps, envs, generator=generator) < ends / 2

    reward, value, fresh, terminated, truncated = draw(), draw(), draw(), flags(), flags()
    going = ~(terminated | truncated)
    going[-1] = False
    following = torch.cat([value[1:], value[:1]])
    return reward, value, torch.where(going, following, fresh), terminated, truncated


def gae_in_a_loop(reward, value, next_value, terminated, truncated, gamma, lam):
    gamma, lam = (torch.as_tensor(x, dtype=torch.float64).expand_as(reward) for x in (gamma, lam))
    advantage, later = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        alive = 1 - terminated[t].double()
        going = alive * (1 - truncated[t].double())
        delta = reward[t] + gamma[t] * next_value[t] * alive - value[t]
        later = delta + gamma[t] * lam[t] * going * later
        advantage[t] = later
    return advantage


# ---- GAE


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_gae_by_hand():
    """gamma = lam = 1/2, rewards 1 2 3 4, values 10 8 6 4, next 8 6 4 2, truncated at t = 1.

    t=3: 4 + 1 - 4 = 1                         A = 1
    t=2: 3 + 2 - 6 = -1                        A = -1 + 1/4 = -0.75
    t=1: 2 + 3 - 8 = -3, cut, but bootstraps   A = -3
    t=0: 1 + 4 - 10 = -5                       A = -5 - 3/4 = -5.75
    Terminated at t = 1 in place of truncated: delta = 2 - 8 = -6, A_0 = -5 - 1.5 = -6.5.
    """
    args = column(1, 2, 3, 4), column(10, 8, 6, 4), column(8, 6, 4, 2)
    end, no = column(0, 1, 0, 0).bool(), column(0, 0, 0, 0).bool()
    advantage, returns = gae(*args, no, end, 0.5, 0.5)
    assert advantage.tolist() == [-5.75, -3, -0.75, 1]
    assert returns.tolist() == [4.25, 5, 5.25, 5]
    advantage, _ = gae(*args, end, no, 0.5, 0.5)
    assert advantage.tolist() == [-6.5, -6, -0.75, 1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 40),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_is_its_recursion(seed, steps, gamma, lam):
    data = rollout(seed, steps)
    advantage, returns = gae(*data, gamma, lam)
    close(advantage, gae_in_a_loop(*data, gamma, lam), rtol=1e-11, atol=1e-11)
    close(returns, advantage + data[1])


@pytest.mark.parametrize("shape", [(13, 3), (13, 1), (1, 3), (3,), ()])
def test_gae_takes_a_discount_per_step_and_per_run(shape):
    data = rollout(4)
    generator = torch.Generator().manual_seed(1)
    gamma, lam = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    close(gae(*data, gamma, lam)[0], gae_in_a_loop(*data, gamma, lam))


def test_gae_of_lambda_0_is_the_td_error():
    reward, value, next_value, terminated, _ = data = rollout(1)
    td = reward + 0.9 * next_value * ~terminated - value
    close(gae(*data, 0.9, 0.0)[0], td)


def test_gae_of_lambda_1_is_monte_carlo_minus_the_value():
    """Sum of discounted rewards to the end of the episode, plus the bootstrap of a truncation."""
    reward, _, next_value, terminated, truncated = data = rollout(2)
    _, returns = gae(*data, 0.9, 1.0)
    for e in range(reward.shape[1]):
        for t in range(len(reward)):
            total, discount = 0.0, 1.0
            for s in range(t, len(reward)):
                total += discount * float(reward[s, e])
                discount *= 0.9
                if terminated[s, e]:
                    break
                if truncated[s, e] or s == len(reward) - 1:
                    total += discount * float(next_value[s, e])
                    break
            assert float(returns[t, e]) == pytest.approx(total, abs=1e-12)


def test_gae_of_a_concatenation():
    """Cut at an end of an episode the parts are independent; elsewhere the later part stands.

    And A of the first part gains (gamma lam)^(cut - t) A_cut where no episode ended in between.
    """
    cut, data = 5, rollout(3, ends=0.0)
    whole = gae(*data, 0.9, 0.8)[0]
    head, tail = (
        gae(*(x[part] for x in data), 0.9, 0.8)[0] for part in (slice(cut), slice(cut, None))
    )
    close(whole[cut:], tail)
    powers = (0.72 ** (cut - torch.arange(cut, dtype=torch.float64))).unsqueeze(1)
    close(whole[:cut], head + powers * tail[0])
    for end in (3, 4):  # terminated, truncated
        ended = [x.clone() for x in data]
        ended[end][cut - 1] = True
        parts = [gae(*(x[p] for x in ended), 0.9, 0.8)[0] for p in (slice(cut), slice(cut, None))]
        close(gae(*ended, 0.9, 0.8)[0], torch.cat(parts))


def test_gae_ignores_what_stands_behind_a_termination():
    data = list(rollout(5))
    clean = gae(*data, 0.9, 0.8)
    data[2] = torch.where(data[3], NAN, data[2])
    for found, expected in zip(gae(*data, 0.9, 0.8), clean, strict=True):
        assert torch.equal(found, expected)


def test_gae_of_low_precision_is_computed_in_float32():
    data = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in rollout(6, ends=0.3)]
    advantage, _ = gae(*data, 0.99, 0.95)
    assert advantage.dtype == torch.float32
    close(advantage, gae(*(x.float() if x.is_floating_point() else x for x in data), 0.99, 0.95)[0])


# ---- V-trace


def vtrace_in_a_loop(
    d, reward, value, next_value, terminated, truncated, gamma, lam, rho_bar, c_bar
):
    """The recursion of the paper's remark 1, on vs itself."""
    r = d.exp()
    rho, c = r.clamp(max=rho_bar), lam * r.clamp(max=c_bar)
    targets, advantages = torch.zeros_like(reward), torch.zeros_like(reward)
    for e in range(reward.shape[1]):
        for t in reversed(range(len(reward))):
            bootstrap = 0.0 if terminated[t, e] else next_value[t, e]
            ends = terminated[t, e] or truncated[t, e] or t == len(reward) - 1
            following = bootstrap if ends else targets[t + 1, e]
            delta = rho[t, e] * (reward[t, e] + gamma * bootstrap - value[t, e])
            targets[t, e] = value[t, e] + delta
            if not ends:
                targets[t, e] += gamma * c[t, e] * (following - value[t + 1, e])
            advantages[t, e] = rho[t, e] * (reward[t, e] + gamma * following - value[t, e])
    return targets, advantages


def test_vtrace_by_hand():
    """Two steps, gamma = 1/2, ratios 2 (clipped to 1) and 1/2, values 4 2, next 2 8, rewards 1 3.

    t=1: delta = 1/2 (3 + 4 - 2) = 2.5      vs = 4.5     A = 1/2 (3 + 4 - 2) = 2.5
    t=0: delta = 1 + 1 - 4 = -2             vs = 4 - 2 + 1/2 * 1 * (4.5 - 2) = 3.25
                                            A = 1 + 1/2 * 4.5 - 4 = -0.75
    """
    no = column(0, 0).bool()
    args = column(2, 0.5).log(), column(1, 3), column(4, 2), column(2, 8)
    vs, advantage = vtrace(*args, no, no, 0.5)
    assert vs.tolist() == pytest.approx([3.25, 4.5])
    assert advantage.tolist() == pytest.approx([-0.75, 2.5])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 20),
    lam=st.floats(0, 1),
    bars=st.tuples(st.floats(0.3, 3), st.floats(0.3, 1.2)),
)
def test_vtrace_is_its_recursion(seed, steps, lam, bars):
    data = rollout(seed, steps)
    d = torch.randn(steps, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = vtrace(d, *data, 0.9, lam, rho_bar=bars[0], c_bar=bars[1])
    for x, y in zip(found, vtrace_in_a_loop(d, *data, 0.9, lam, *bars), strict=True):
        close(x, y, rtol=1e-10, atol=1e-10)


def test_vtrace_on_policy_is_the_return_of_lambda_1():
    data = rollout(7)
    advantage, returns = gae(*data, 0.9, 1.0)
    vs, pg = vtrace(torch.zeros_like(data[0]), *data, 0.9)
    close(vs, returns)
    close(pg, advantage)
    close(vtrace(torch.zeros_like(data[0]), *data, 0.9, 0.7)[0], gae(*data, 0.9, 0.7)[1])


def test_vtrace_of_a_concatenation_of_episodes():
    cut, data = 5, [x.clone() for x in rollout(8)]
    data[4][cut - 1] = True
    data.insert(0, torch.randn(13, 3, generator=torch.Generator().manual_seed(0)).double())
    whole = vtrace(*data, 0.9)
    head, tail = (vtrace(*(x[p] for x in data), 0.9) for p in (slice(cut), slice(cut, None)))
    for i in (0, 1):
        close(whole[i], torch.cat([head[i], tail[i]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vtrace_is_finite_at_the_extremes(dtype):
    data = [x.to(dtype) if x.is_floating_point() else x for x in rollout(9)]
    d = torch.full_like(data[0], 1e4)
    d[::2] *= -1
    for found in vtrace(d, *data, 0.99):
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()


# ---- groups


def test_group_relative_by_hand():
    """Rewards 0 0 3 3 have mean 1.5 and unbiased variance 4 * 2.25 / 3 = 3."""
    reward = torch.tensor([[0.0, 0, 3, 3], [7, 7, 7, 7]], dtype=torch.float64)
    scaled = 1.5 / (3**0.5 + 1e-6)
    expected = torch.tensor([[-scaled, -scaled, scaled, scaled], [0, 0, 0, 0]]).double()
    close(group_relative(reward), expected)
    assert group_relative(reward, scale=False).tolist() == [[-1.5, -1.5, 1.5, 1.5], [0] * 4]


def test_leave_one_out_by_hand():
    """Of 1 2 6 the others have means 4, 3.5 and 1.5."""
    assert leave_one_out(torch.tensor([[1.0, 2, 6]])).tolist() == [[-3, -1.5, 4.5]]


@pytest.mark.parametrize("function", [group_relative, leave_one_out])
def test_group_ids_in_any_order_equal_rows(function):
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    ids = torch.tensor([90, -2, 7, 3]).unsqueeze(1).expand(4, 5)
    order = torch.randperm(20, generator=generator)
    expected = function(reward).flatten()[order]
    close(function(reward.flatten()[order], ids.flatten()[order]), expected)


@pytest.mark.parametrize("number", [0.1, 1e-3, -123.456, 1e6])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(number):
    """In float32 the mean of equal numbers may be off by a bit; divided by a tiny std it shows."""
    reward = torch.full((3, 7), number)
    zeros = torch.zeros(3, 7)
    assert torch.equal(group_relative(reward), zeros)
    assert torch.equal(leave_one_out(reward), zeros)
    assert torch.equal(normalize(reward), zeros)
    assert torch.equal(group_relative(reward[:, :1]), zeros[:, :1])
    assert torch.equal(leave_one_out(reward[:, :1]), zeros[:, :1])
    assert torch.equal(normalize(reward[0, 0]), zeros[0, 0])
    partly = torch.arange(7).expand(3, 7) < 5
    assert torch.equal(normalize(reward, partly), zeros)
    assert torch.equal(group_normalize(reward, torch.zeros(3, 7).long(), partly), zeros)


def test_group_normalize_is_normalize_within_each_group():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, generator=generator, dtype=torch.float64)
    group = torch.randint(-2, 3, (30,), generator=generator)
    mask = torch.rand(30, generator=generator) < 0.7
    found = group_normalize(x, group, mask, eps=1e-8)
    assert not found[~mask].any()
    for g in group.unique():
        member = (group == g) & mask
        close(found[member], normalize(x[member]))


# ---- batch normalisation


def test_normalize_by_hand():
    """1 2 3 (9 masked): mean 2, unbiased variance 1."""
    x = torch.tensor([1.0, 2, 3, 9], dtype=torch.float64)
    found = normalize(x, torch.tensor([True, True, True, False]), eps=0.0)
    assert found.tolist() == [-1, 0, 1, 0]


def test_normalize_against_torch_for_all_and_per_run():
    x = 3 + 5 * torch.randn(4, 6, 7, dtype=torch.float64)
    close(normalize(x), (x - x.mean()) / (x.std() + 1e-8))
    per_run = normalize(x, dim=(1, 2))
    for run in range(4):
        close(per_run[run], normalize(x[run]))
    close(normalize(x, dim=-1)[1, 2], normalize(x[1, 2]))


def test_normalize_keeps_its_digits_under_a_large_offset():
    x = torch.randn(2048)
    close(normalize(x + 2.0**16), normalize((x + 2.0**16) - 2.0**16), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [normalize, group_normalize])
def test_masked_inf_and_nan_contribute_exactly_nothing(function):
    x = torch.randn(5, 6, dtype=torch.float64)
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    more = () if function is normalize else (torch.arange(30).view(5, 6) % 3,)
    dirty = torch.where(mask, x, torch.tensor([NAN, INF, -INF, NAN, INF, -INF]).double())
    found = function(dirty, *more, mask=mask)
    assert torch.equal(found, function(torch.where(mask, x, 0), *more, mask=mask))
    assert not found[~mask].any()
    assert not function(dirty, *more, mask=mask & False).any()


def test_wrong_use_is_refused_by_name():
    reward, value, next_value, terminated, truncated = rollout()
    ends = terminated, truncated
    with pytest.raises(ValueError, match=r"same shape, got reward \(13, 3\), value \(3,\)"):
        gae(reward, value[0], next_value, *ends, 0.9, 0.9)
    with pytest.raises(ValueError, match="truncated must be boolean"):
        gae(reward, value, next_value, terminated, truncated.long(), 0.9, 0.9)
    with pytest.raises(ValueError, match="gamma must be a number or broadcast"):
        gae(reward, value, next_value, *ends, torch.ones(13), 0.9)
    with pytest.raises(ValueError, match="must lead with time"):
        gae(*(x[0, 0] for x in (reward, value, next_value, *ends)), 0.9, 0.9)
    with pytest.raises(ValueError, match="log_ratio"):
        vtrace(reward[:2], reward, value, next_value, *ends, 0.9)
    with pytest.raises(ValueError, match="rho_bar and c_bar must be positive"):
        vtrace(reward, reward, value, next_value, *ends, 0.9, rho_bar=0.0)
    with pytest.raises(ValueError, match=r"\(B, K\) or come with group ids"):
        group_relative(reward[0])
    with pytest.raises(ValueError, match="group must be an integer"):
        leave_one_out(reward, reward)
    with pytest.raises(ValueError, match="mask must be boolean"):
        normalize(reward, reward)
    with pytest.raises(ValueError, match="x must be a floating"):
        group_normalize(ends[0].long(), ends[0].long())


def test_inference_mode_and_no_host_read():
    data = rollout()
    with torch.inference_mode():
        for x in (*gae(*data, 0.9, 0.9), *vtrace(data[0], *data, 0.9), group_relative(data[0])):
            assert torch.isfinite(x).all()
    meta = [x.to("meta") for x in data]
    found = (*gae(*meta, 0.9, 0.9), *vtrace(meta[0], *meta, 0.9), normalize(meta[0], meta[3]))
    assert {x.device.type for x in found} == {"meta"}


def test_optimal_baseline_minimises_the_second_moment():
    generator = torch.Generator().manual_seed(5)
    reward, norm, log_weight = (
        torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    found = optimal_baseline(reward, norm**2, log_weight)

    def moment(b):
        return (torch.exp(2 * log_weight) * norm**2 * (reward - b) ** 2).sum(-1, keepdim=True)

    for step in (1e-3, -1e-3):
        assert (moment(found + step) > moment(found)).all()
    torch.testing.assert_close(optimal_baseline(reward, norm**2, log_weight + 1e4), found)
    equal = optimal_baseline(reward, torch.ones_like(norm), torch.zeros_like(norm))
    torch.testing.assert_close(equal, reward.mean(-1, keepdim=True))
    none = optimal_baseline(reward, torch.zeros_like(norm), log_weight)
    torch.testing.assert_close(none, reward.mean(-1, keepdim=True))


def test_red_drop_keeps_as_many_bad_samples_as_others():
    """Mean 1/4: one good, three bad of which one stays; then mean 1/2 over the two."""
    reward = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
    advantage, kept = red_drop(reward, generator=torch.Generator().manual_seed(0))
    assert kept.sum(1).tolist() == [2, 4, 4]
    assert kept[0, 0]
    assert sorted(advantage[0].tolist()) == [-0.5, 0, 0, 0.5]
    assert advantage[1].tolist() == [0.25, 0.25, -0.75, 0.25]
    assert advantage[2].tolist() == [0, 0, 0, 0]
    scaled, again = red_drop(reward, scale=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, kept)
    assert float(scaled[0, 0]) == pytest.approx(0.5**0.5, rel=1e-5)


def test_red_drop_drops_at_random_within_each_group():
    group = torch.tensor([7, 3, 7, 7, 3, 7, 7])
    reward = torch.tensor([1.0, 0, 0, 0, 1, 0, 0])
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([red_drop(reward, group, generator=generator)[1] for _ in range(400)])
    assert kept[:, [0, 1, 4]].all()
    assert (kept[:, [2, 3, 5, 6]].sum(1) == 1).all()
    share = kept[:, [2, 3, 5, 6]].double().mean(0)
    assert ((share - 0.25).abs() < 0.08).all()
