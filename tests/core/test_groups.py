"""Objectives on the sequences of one prompt, against their losses written out pair by pair."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from rgpo.core.advantage import leave_one_out
from rgpo.core.loss import group_loss, policy_loss
from rgpo.core.objectives.pairs import DPO, IPO, REBEL, BRAIn, PairwisePPO

P, T = 4, 5
PAIRWISE = ["rebel", "dpo", "ipo", "p3o-separate-variant", "p3o-joint-variant"]
ALL = [*PAIRWISE, "brain"]


def batch(k: int, spread: float = 0.3, seed: int = 0) -> dict[str, torch.Tensor]:
    """P prompts with k sequences of T tokens; the last sequence of the last prompt has no token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    anchor = -draw(P * k, T).abs()
    mask = torch.rand(P * k, T, generator=generator) < 0.7
    mask[:, 0], mask[-1] = True, False
    return {
        "log_prob": (anchor + spread * draw(P * k, T)).requires_grad_(),
        "anchor_log_prob": anchor,
        "reference_log_prob": anchor + spread * draw(P * k, T),
        "score": draw(P * k),
        "mask": mask,
    }


def minclip(w, gap):
    return torch.minimum(w * gap, w.clamp(0.8, 1.2) * gap)


def pair(name, d, s):
    """The published objective of one pair, to be maximised."""
    h, gap = d[0] - d[1], s[0] - s[1]
    w = d.exp()
    if name == "rebel":
        return -((h - gap) ** 2)
    if name == "dpo":
        return logsigmoid(0.1 * h * torch.sign(gap))
    if name == "ipo":
        return -((h * torch.sign(gap) - 5) ** 2)
    if name == "p3o-separate-variant":
        first = w[1].detach() * minclip(w[0], gap) / 2
        return first + w[0].detach() * minclip(w[1], -gap) / 2
    z = h.clamp(-0.2, 0.2)
    return (w[0] * w[1]).detach() * torch.minimum(gap * h, gap * z) / 2


def listwise(d, reference, s):
    posterior = torch.softmax(s + (d - reference).detach(), 0)
    return (posterior * torch.log_softmax(d, 0)).sum()


def naive_loss(name, data, k):
    """Sums over tokens, then pairs (or the list) of every prompt, then the mean over prompts."""
    total = 0.0
    for p in range(P):
        d, reference, s = [], [], []
        for i in range(p * k, p * k + k):
            keep = data["mask"][i]
            if not keep.any():
                continue
            new = data["log_prob"][i][keep]
            d.append((new - data["anchor_log_prob"][i][keep]).sum())
            reference.append((new - data["reference_log_prob"][i][keep]).sum())
            s.append(data["score"][i])
        d, reference, s = map(torch.stack, (d, reference, s))
        pairs = [(i, j) for i in range(len(d)) for j in range(i)]
        if name == "brain":
            total = total - listwise(d, reference, s)
        elif pairs:
            terms = [pair(name, d[[i, j]], s[[i, j]]) for i, j in pairs]
            total = total - torch.stack(terms).mean()
    return total / P


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_loss_and_gradient_are_those_written_out(name, k, spread):
    data = batch(k, spread)
    expected = naive_loss(name, data, k)
    options = dict(data)
    if name != "brain":
        options.pop("reference_log_prob")
    found = group_loss(name, **options, group_size=k).loss
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, data["log_prob"])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, data["log_prob"])[0])


def gradient_at_the_anchor(name: str, k: int) -> tuple[torch.Tensor, dict]:
    data = batch(k)
    data["mask"] = torch.ones_like(data["mask"])
    data["log_prob"] = data["anchor_log_prob"].clone().requires_grad_()
    loss = group_loss(name, **data, group_size=k).loss
    return torch.autograd.grad(loss, data["log_prob"])[0], data


@pytest.mark.parametrize("name", ["p3o-separate-variant", "p3o-joint-variant"])
@pytest.mark.parametrize("k", [2, 4])
def test_first_step_of_p3o_is_leave_one_out_reinforce(name, k):
    gradient, data = gradient_at_the_anchor(name, k)
    advantage = leave_one_out(data["score"].view(P, k)).view(-1, 1)
    torch.testing.assert_close(gradient, -advantage.expand(-1, T) / (P * k))


@pytest.mark.parametrize("k", [2, 4])
def test_first_step_of_rebel_is_four_eta_times_that(k):
    gradient, data = gradient_at_the_anchor("rebel", k)
    advantage = leave_one_out(data["score"].view(P, k)).view(-1, 1)
    torch.testing.assert_close(gradient, -4 * advantage.expand(-1, T) / (P * k))


@pytest.mark.parametrize("name", [n for n in ALL if n != "brain"])
def test_a_reward_shift_of_the_prompt_changes_nothing(name):
    data = batch(4)
    data.pop("reference_log_prob")
    shifted = data | {"score": data["score"] + torch.arange(P).repeat_interleave(4)}
    one, other = (group_loss(name, **d, group_size=4).loss for d in (data, shifted))
    torch.testing.assert_close(one, other)


def test_brain_with_two_sequences_and_a_sharp_posterior_is_dpo():
    """q' = p0, temperature -> 0: DPO with beta = 1."""
    d = torch.tensor([[0.3, -0.4], [1.2, 2.0]], dtype=torch.float64, requires_grad=True)
    s, mask = torch.tensor([[1.0, 0.0], [0.2, 0.9]]).double(), torch.ones(2, 2, dtype=torch.bool)
    brain = BRAIn(temperature=1e-3).surrogate(d, s, reference_log_ratio=d, mask=mask).sum()
    dpo = DPO(beta=1.0).surrogate(d, s, mask=mask).sum()
    torch.testing.assert_close(brain, dpo)
    torch.testing.assert_close(torch.autograd.grad(brain, d)[0], torch.autograd.grad(dpo, d)[0])


def test_three_sequences_of_rebel_by_hand():
    """d = (1, 0, 0), s = (1, 0, -1): residuals h - gap are 0, -1 and -1 over three pairs."""
    d = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    s, mask = torch.tensor([1.0, 0.0, -1.0]).double(), torch.ones(3, dtype=torch.bool)
    assert REBEL().value(d, s, mask).sum().item() == pytest.approx(-(0 + 1 + 1) / 3)
    assert REBEL().weight(d, s, mask).tolist() == pytest.approx([2 / 3, 2 / 3, -4 / 3])


def test_a_pair_of_dpo_and_ipo_by_hand():
    d, mask = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    s = torch.tensor([0.0, 1.0], dtype=torch.float64)  # the second one is preferred
    force = 0.5 / (1 + math.exp(-1.5))  # beta s(-beta h) with beta = 0.5, h = -3
    assert DPO(0.5).weight(d, s, mask).tolist() == pytest.approx([-force, force])
    smooth = DPO(0.5, label_smoothing=0.1).weight(d, s, mask)
    assert smooth.tolist() == pytest.approx([-force + 0.05, force - 0.05])
    assert DPO(0.5).weight(d, 0 * s, mask).tolist() == [0, 0]  # a tie
    assert IPO(0.5).weight(d, s, mask).tolist() == pytest.approx([-8, 8])  # 2 (h - 1), h = -3
    at_margin = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert IPO(0.5).weight(at_margin, s, mask).tolist() == [0, 0]


def test_a_pair_of_p3o_by_hand():
    """W = (1.5, 0.9), gap 2: the first ratio is clipped, the second one is not."""
    d = torch.tensor([1.5, 0.9], dtype=torch.float64).log()
    s, mask = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    assert PairwisePPO().weight(d, s, mask).tolist() == pytest.approx([0, -1.35])
    assert PairwisePPO(form="joint").weight(d, s, mask).tolist() == [0, 0]  # log 5/3 > 0.2
    opposite = PairwisePPO(form="joint").weight(d, -s, mask)
    assert opposite.tolist() == pytest.approx([-1.35, 1.35])


@pytest.mark.parametrize("name", ALL)
def test_prompts_add_up_over_micro_batches(name):
    data = batch(2, seed=3)
    whole = group_loss(name, **data, group_size=2).loss
    parts = [
        group_loss(name, **{k: v[i] for k, v in data.items()}, group_size=2, denominator=P).loss
        for i in (slice(0, 2), slice(2, 2 * P))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_masked_tokens_and_a_prompt_of_none_contribute_nothing(name, poison):
    data = batch(2, seed=4)
    data["mask"][:2] = False
    clean = group_loss(name, **data, group_size=2)
    (expected,) = torch.autograd.grad(clean.loss, data["log_prob"])
    assert torch.isfinite(expected).all()
    assert torch.count_nonzero(expected[:2]) == 0
    dirty = dict(data)
    for key in ("log_prob", "anchor_log_prob", "reference_log_prob"):
        dirty[key] = torch.where(data["mask"], data[key].detach(), poison)
    dirty["score"] = torch.where(data["mask"].any(1), data["score"], poison)
    dirty["log_prob"].requires_grad_()
    found = group_loss(name, **dirty, group_size=2)
    assert torch.equal(found.loss, clean.loss)
    assert torch.equal(torch.autograd.grad(found.loss, dirty["log_prob"])[0], expected)


def test_objectives_of_groups_are_refused_elsewhere_and_the_other_way_round():
    data = batch(2)
    with pytest.raises(ValueError, match="use group_loss"):
        policy_loss("dpo", data["log_prob"], data["anchor_log_prob"], data["log_prob"])
    data.pop("reference_log_prob")
    with pytest.raises(ValueError, match="needs reference_log_prob"):
        group_loss("brain", **data, group_size=2)
    with pytest.raises(ValueError, match="use policy_loss"):
        group_loss("ppo", **data, group_size=2)
    with pytest.raises(ValueError, match="label_smoothing"):
        DPO(label_smoothing=0.5)
    with pytest.raises(ValueError, match="unknown form"):
        PairwisePPO(form="both")  # type: ignore[arg-type]
