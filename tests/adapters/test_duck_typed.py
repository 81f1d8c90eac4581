"""Hosts that do not run here: their documented inputs made by hand, against the core."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rgpo.adapters import prime_rl, slime, tinker
from rgpo.core import recipes
from rgpo.core.kl import k3
from rgpo.core.loss import policy_loss
from rgpo.errors import RgpoError

LENGTHS = (5, 3, 7)
NAMES = ["rgpo", "ppo", "gspo", "sapo", "rgpo-dual-detached"]


def samples(seed=0):
    """Three responses as lists of (T_i,) tensors, some tokens masked, ratios far from 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return [scale * torch.randn(n, generator=generator) for n in LENGTHS]

    behavior = [-x.abs() for x in draw()]
    made = {
        "log_prob": [b + x for b, x in zip(behavior, draw(0.8), strict=True)],
        "behavior": behavior,
        "reference": [b + x for b, x in zip(behavior, draw(0.3), strict=True)],
        "advantage": draw(),
        "mask": [torch.rand(n, generator=generator) < 0.7 for n in LENGTHS],
    }
    for mask in made["mask"]:
        mask[0] = True
    return made


def expected(name, made, reduction, **options):
    """Loss and gradient from the core, with the KL penalty written out."""
    recipe = recipes.get(name)
    padded = {k: pad_sequence(v, batch_first=True) for k, v in made.items()}
    log_prob = padded["log_prob"].requires_grad_()
    result = policy_loss(
        recipe,
        log_prob,
        padded["behavior"],
        padded["advantage"],
        padded["mask"],
        reference_log_prob=padded["reference"],
        reduction=reduction,
        **options,
    )
    loss = result.loss
    if recipe.kl is not None:
        kept = padded["mask"]
        count = options.get("denominator", kept.sum())
        d = (log_prob - padded["behavior"])[kept]
        loss = loss + recipe.kl.coefficient * k3(d).sum() / count
    (gradient,) = torch.autograd.grad(loss, log_prob)
    rows = [g[:n] for g, n in zip(gradient, LENGTHS, strict=True)]
    return loss.detach(), torch.cat(rows), result.diagnostics


def leaves(made):
    return [x.clone().requires_grad_() for x in made["log_prob"]]


def poisoned(made):
    """The same with NaN at every masked token and one unmasked token at log-ratio 200."""
    made = dict(made)
    for key in ("log_prob", "behavior", "reference", "advantage"):
        made[key] = [
            torch.where(m, x, torch.nan) for x, m in zip(made[key], made["mask"], strict=True)
        ]
    made["log_prob"][0][0] = made["behavior"][0][0] + 200
    return made


# --- prime-rl -------------------------------------------------------------------------------------


def prime_inputs(made, log_probs, i, **more):
    return SimpleNamespace(
        trainer_logprobs=log_probs[i],
        inference_logprobs=made["behavior"][i],
        ref_logprobs=made["reference"][i],
        advantages=made["advantage"][i],
        loss_mask=made["mask"][i],
        **more,
    )


@pytest.mark.parametrize("name", ["rgpo", "ppo", "sapo", "rgpo-dual-detached"])
def test_prime_rl_sums_of_packed_sequences_over_the_token_count_are_the_token_mean(name):
    made = samples()
    log_probs = leaves(made)
    outputs = [prime_rl.loss(prime_inputs(made, log_probs, i), recipe=name) for i in range(3)]
    loss = sum(o.loss for o in outputs) / sum(int(m.sum()) for m in made["mask"])
    found = torch.cat(torch.autograd.grad(loss, log_probs))
    value, gradient, _ = expected(name, made, "token-mean")
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(found, gradient)
    stacked = torch.stack([o.metrics["rgpo/kl_k3"] for o in outputs])  # as the host does
    assert stacked.shape == (3,)
    assert not stacked.requires_grad


def test_prime_rl_weights_and_hyper_parameters_reach_the_loss():
    made = samples()
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5])
    log_probs = leaves(made)
    plain = prime_rl.loss(prime_inputs(made, log_probs, 0), recipe="ppo").loss
    weighed = prime_rl.loss(prime_inputs(made, log_probs, 0, loss_weights=weights), recipe="ppo")
    (before,) = torch.autograd.grad(plain, log_probs[0])
    (after,) = torch.autograd.grad(weighed.loss, log_probs[0])
    torch.testing.assert_close(after, before * weights)
    wide = prime_rl.loss(prime_inputs(made, log_probs, 0), "ppo", clip_low=0.9, clip_high=9.0)
    assert wide.loss != plain


def test_prime_rl_stays_finite():
    made = poisoned(samples())
    log_probs = leaves(made)
    loss = sum(prime_rl.loss(prime_inputs(made, log_probs, i)).loss for i in range(3))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, log_probs))


# --- slime ----------------------------------------------------------------------------------------


def slime_inputs(made, name, **options):
    args = SimpleNamespace(
        rgpo_recipe=name,
        use_kl_loss=False,
        entropy_coef=0.0,
        use_tis=False,
        use_opsm=False,
        use_rollout_logprobs=False,
        calculate_per_token_loss=False,
    )
    vars(args).update(options)
    batch = {
        "log_probs": made["behavior"],
        "rollout_log_probs": [x - 0.1 for x in made["behavior"]],
        "ref_log_probs": made["reference"],
        "advantages": made["advantage"],
        "loss_masks": [m.int() for m in made["mask"]],
        "response_lengths": list(LENGTHS),
    }

    def sum_of_sample_mean(x):
        parts = zip(x.split(LENGTHS), batch["loss_masks"], strict=True)
        if args.calculate_per_token_loss:
            return sum((part * mask).sum() for part, mask in parts)
        return sum((part * mask).sum() / mask.sum() for part, mask in parts)

    return args, batch, sum_of_sample_mean


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_token", [False, True])
def test_slime_is_the_sum_of_sample_means_or_of_tokens(name, per_token):
    made = samples(1)
    if recipes.get(name).kl is not None and not per_token:
        pytest.skip("the reference below writes the penalty out for sums over tokens only")
    log_probs = leaves(made)
    args, batch, reducer = slime_inputs(made, name, calculate_per_token_loss=per_token)
    loss, metrics = slime.from_log_probs(args, batch, log_probs, reducer)
    found = torch.cat(torch.autograd.grad(loss, log_probs))
    reduction = "token-mean" if per_token else "sequence-mean"
    value, gradient, diagnostics = expected(name, made, reduction, denominator=1.0)
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(found, gradient)
    count = sum(int(m.sum()) for m in made["mask"]) if per_token else 3
    torch.testing.assert_close(metrics["rgpo/kl_k1"] / count, diagnostics["kl_k1"])


def test_slime_takes_log_probs_from_the_host_and_the_rollout_engine(monkeypatch):
    """The glue around the host's own function, which needs Megatron and is not run here."""
    made = samples(2)
    log_probs = leaves(made)
    asked = {}

    def get_log_probs_and_entropy(logits, **given):
        asked.update(given, logits=logits)
        return None, {"log_probs": log_probs}

    host = SimpleNamespace(
        get_log_probs_and_entropy=get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs=lambda _args, _batch: {"top_p_token_ids": None},
    )
    monkeypatch.setattr(slime, "_host", lambda: host)
    args, batch, reducer = slime_inputs(made, "ppo", use_rollout_logprobs=True)
    batch |= {"unconcat_tokens": [1], "total_lengths": [2]}
    loss, _ = slime.loss(args, batch, torch.zeros(1), reducer)
    shifted = made | {"behavior": batch["rollout_log_probs"]}
    torch.testing.assert_close(
        loss.detach(), expected("ppo", shifted, "sequence-mean", denominator=1.0)[0]
    )
    assert asked["response_lengths"] == list(LENGTHS)
    assert asked["total_lengths"] == [2]


def test_slime_refuses_what_its_own_loss_would_do():
    made = samples()
    args, batch, reducer = slime_inputs(made, "ppo", use_kl_loss=True)
    with pytest.raises(RgpoError, match="switch them off"):
        slime.from_log_probs(args, batch, leaves(made), reducer)
    args, batch, reducer = slime_inputs(made, "ppo")
    batch["loss_masks"] = [m[:-1] for m in batch["loss_masks"]]
    with pytest.raises(RgpoError, match="context parallelism"):
        slime.from_log_probs(args, batch, leaves(made), reducer)


def test_slime_stays_finite():
    made = poisoned(samples())
    args, batch, reducer = slime_inputs(made, "rgpo")
    log_probs = leaves(made)
    loss, _ = slime.from_log_probs(args, batch, log_probs, reducer)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, log_probs))


# --- Tinker ---------------------------------------------------------------------------------------


class TensorData(SimpleNamespace):
    """As the client's class of this name: a list that becomes a tensor."""

    def to_torch(self):
        return torch.tensor(self.data)


def tinker_data(made, *names):
    fields = {
        "logprobs": "behavior",
        "advantages": "advantage",
        "mask": "mask",
        "reference_logprobs": "reference",
    }
    return [
        SimpleNamespace(
            loss_fn_inputs={
                k: TensorData(data=made[v][i].tolist()) for k, v in fields.items() if k in names
            }
        )
        for i in range(3)
    ]


ALL = ("logprobs", "advantages", "mask", "reference_logprobs")


@pytest.mark.parametrize("name", NAMES)
def test_tinker_loss_and_weights(name):
    made = samples(3)
    log_probs = leaves(made)
    reduction = None if recipes.get(name).kl is None else "token-mean"
    function = tinker.custom_loss(name)
    loss, metrics = function(tinker_data(made, *ALL), log_probs)
    value, gradient, diagnostics = expected(name, made, reduction)
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(torch.cat(torch.autograd.grad(loss, log_probs)), gradient)
    assert metrics["rgpo/kl_k3"] == pytest.approx(float(diagnostics["kl_k3"]))
    weights, _ = tinker.token_weights(function, tinker_data(made, *ALL), made["log_prob"])
    torch.testing.assert_close(torch.cat(weights), -gradient)


def test_tinker_names_what_is_missing():
    made = samples()
    with pytest.raises(RgpoError, match="advantages"):
        tinker.custom_loss("ppo")(tinker_data(made, "logprobs"), leaves(made))
    with pytest.raises(RgpoError, match="reference"):
        tinker.custom_loss("rgpo-dual-detached")(
            tinker_data(made, "logprobs", "advantages"), leaves(made)
        )


def test_tinker_without_mask_counts_every_token():
    made = samples()
    full = made | {"mask": [torch.ones(n, dtype=torch.bool) for n in LENGTHS]}
    loss, _ = tinker.custom_loss("ppo")(tinker_data(made, "logprobs", "advantages"), leaves(made))
    torch.testing.assert_close(loss.detach(), expected("ppo", full, "token-mean")[0])
