"""verl 0.9: parity with its losses, its aggregation, its configuration and its `ppo_loss`."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from hydra import compose, initialize_config_module

verl = pytest.importorskip("verl")

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils import losses  # noqa: E402

FOUND = set(core_algos.POLICY_LOSS_REGISTRY)

from rgpo.adapters import verl as adapter  # noqa: E402
from rgpo.adapters.terms import token_recipe  # noqa: E402
from rgpo.core import recipes  # noqa: E402
from rgpo.core.loss import policy_loss  # noqa: E402
from rgpo.errors import RgpoError  # noqa: E402

B, T = 5, 7
AGGREGATIONS = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]


def batch(seed=0, spread=1.5, *, per_sequence=False):
    """What verl hands to a loss; log-ratios of this standard deviation, a third of it masked."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(B, T, generator=generator)

    old = -draw().abs() - 0.1
    advantages = draw()
    return {
        "old_log_prob": old,
        "log_prob": old + spread * draw(),
        "advantages": advantages[:, :1].expand(B, T) if per_sequence else advantages,
        "response_mask": torch.rand(B, T, generator=generator) < 0.7,
    }


def configured(mode, recipe_options=None, **actor):
    ours = {} if recipe_options is None else {"recipe_options": recipe_options}
    kind = adapter.GatedPolicyLossConfig if ours else PolicyLossConfig
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=4,
        policy_loss=kind(loss_mode=mode, **ours),
        **actor,
    )


def run(mode, data, aggregation="token-mean", recipe_options=None, weights=None, **actor):
    """Loss, gradient and metrics of one of verl's registered losses."""
    information = actor.pop("information", {})
    config = configured(mode, recipe_options, **actor)
    config.global_batch_info.update(information)
    log_prob = data["log_prob"].clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(mode)(
        **data | {"log_prob": log_prob},
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=weights,
    )
    return loss.detach(), torch.autograd.grad(loss, log_prob)[0], metrics


def assert_equal(found, expected, *, value=True):
    if value:
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=3e-7)


# --- registration ---------------------------------------------------------------------------------


def test_an_installed_package_is_enough():
    """Nothing in this process has called `register` but verl, by the entry point."""
    assert {adapter.loss_mode(name) for name in recipes.names()} <= FOUND


def test_it_is_enough_in_ray_workers():
    @ray.remote
    def modes():
        import verl  # noqa: F401
        from verl.trainer.ppo import core_algos

        return set(core_algos.POLICY_LOSS_REGISTRY)

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        assert {adapter.loss_mode(name) for name in recipes.names()} <= ray.get(modes.remote())
    finally:
        ray.shutdown()


def test_verls_own_losses_keep_their_names():
    for name in ("vanilla", "sapo", "gspo", "cispo"):
        owner = core_algos.get_policy_loss_fn(name).__module__
        assert owner == "verl.trainer.ppo.core_algos"


def test_a_second_registration_is_refused():
    with pytest.raises(RgpoError, match="twice"):
        adapter.register()


def test_a_registration_that_fails_says_so_although_verl_swallows_it():
    code = (
        "import importlib.metadata as m; real = m.version;"
        "m.version = lambda name: '0.5.0' if name == 'verl' else real(name);"
        "import verl; from verl.trainer.ppo import core_algos;"
        "core_algos.get_policy_loss_fn('rgpo')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "rgpo: no recipe is registered with verl" in done.stderr
    assert "0.5.0" in done.stderr


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("spread", [0.3, 1.5, 40.0])
@pytest.mark.parametrize("clip_high", [0.2, 0.28])
def test_ppo_is_verls_vanilla_which_clips_twice(aggregation, spread, clip_high):
    data = batch(1, spread)
    expected = run("vanilla", data, aggregation, clip_ratio_high=clip_high)
    found = run("rgpo:ppo-dual-clip", data, aggregation, {"clip_high": clip_high})
    assert_equal(found, expected)


@pytest.mark.parametrize("spread", [0.3, 1.5, 40.0])
def test_sapo(spread):
    """verl's aggregates per sequence whatever it is told."""
    data = batch(2, spread)
    found = run("rgpo:sapo", data, "seq-mean-token-mean")
    assert_equal(found, run("sapo", data, "token-mean"))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("spread", [0.3, 1.5, 15.0])
def test_cispo_has_verls_gradient(aggregation, spread):
    """verl's coefficient lies in [0.8, 1.2], ours in [0, 5]: with equal bounds the gradients agree.

    The values differ by a constant: verl multiplies by log pi, we by the log-ratio.
    """
    data = batch(3, spread)
    found = run("rgpo:cispo", data, aggregation, {"low": 0.8, "high": 1.2})
    assert_equal(found, run("cispo", data, aggregation), value=False)
    defaults = run("rgpo:cispo", data, aggregation)
    assert not torch.allclose(defaults[1], found[1], rtol=0.1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_gspo_with_one_advantage_a_sequence(aggregation, spread):
    data = batch(4, spread, per_sequence=True)
    expected = run("gspo", data, aggregation, clip_ratio_low=3e-4, clip_ratio_high=4e-4)
    assert_equal(run("rgpo:gspo", data, aggregation), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gspo_token_with_any_advantages(aggregation):
    """verl's gspo stops the gradient of the sequence ratio: that is the recipe gspo-token."""
    data = batch(4, 0.3)
    expected = run("gspo", data, aggregation, clip_ratio_low=3e-4, clip_ratio_high=4e-4)
    assert_equal(run("rgpo:gspo-token", data, aggregation), expected)


def test_gspo_differs_where_advantages_differ_within_a_sequence():
    """verl gives every token its own advantage, we give it the sequence's share of all of them.

    Ours is the derivative of the loss that is reported; verl's stops the gradient of the ratio.
    """
    data = batch(4, 0.3)
    clip = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
    expected = run("gspo", data, "seq-mean-token-mean", **clip)
    found = run("rgpo:gspo", data, "seq-mean-token-mean")
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() > 0.01


def test_gspo_differs_beyond_log_ratio_10_where_verl_clamps():
    data = batch(4, 0.0, per_sequence=True)
    data["response_mask"][:] = True
    data["log_prob"] = data["old_log_prob"] + 12
    data["advantages"] = -torch.ones(B, T)
    expected = run("gspo", data, clip_ratio_low=3e-4, clip_ratio_high=4e-4)
    found = run("rgpo:gspo", data)
    assert float(expected[0]) == pytest.approx(torch.tensor(10.0).exp().item())
    assert float(found[0]) == pytest.approx(torch.tensor(12.0).exp().item())
    assert expected[1].abs().max() == 0


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("spread", [0.3, 1.5, 15.0])
def test_dppo_has_verls_gradient_at_verls_cap(divergence, spread):
    """verl's code falls back to a cap of 20, but ActorConfig sets clip_ratio_c = 3 for everyone."""
    data = batch(10, spread)
    expected = run(f"dppo_{divergence}", data)
    options = {"delta_low": 0.2, "delta_high": 0.2}
    found = run(f"rgpo:dppo-{divergence}", data, recipe_options=options | {"cap": 3.0})
    assert_equal(found, expected, value=False)
    wide = run(f"dppo_{divergence}", data, clip_ratio_c=20.0)
    assert_equal(run(f"rgpo:dppo-{divergence}", data, recipe_options=options), wide, value=False)


def test_dppo_caps_that_differ():
    data = batch(10, 1.5)
    expected = run("dppo_tv", data)
    options = {"delta_low": 0.2, "delta_high": 0.2}
    found = run("rgpo:dppo-tv", data, recipe_options=options)  # our default cap is 20
    assert (found[1].abs() > 1.5 * expected[1].abs() + 1e-6).any()


def test_dro_has_verls_gradient():
    data = batch(11)
    config = PolicyLossConfig(loss_mode="dro", dro_beta=0.1)
    actor = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4}
    log_prob = data["log_prob"].clone().requires_grad_()
    loss, _ = core_algos.get_policy_loss_fn("dro")(
        **data | {"log_prob": log_prob}, config=ActorConfig(**actor, policy_loss=config)
    )
    (expected,) = torch.autograd.grad(loss, log_prob)
    found = run("rgpo:dro", data, recipe_options={"beta": 0.1})[1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=3e-7)


def test_gmpo_is_verls_geo_mean():
    """On full responses; verl reduces by the mean over sequences whatever it is told."""
    data = batch(12, 0.5, per_sequence=True)
    data["response_mask"][:] = True
    expected = run("geo_mean", data, clip_ratio_low=0.4, clip_ratio_high=0.4)
    assert_equal(run("rgpo:gmpo", data, "seq-mean-token-mean"), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_global_batch(aggregation):
    """Two micro-batches with verl's global counts; its own loss and ours, whole and in parts."""
    data = batch(5)
    counts = {
        "dp_size": 1,
        "batch_num_tokens": int(data["response_mask"].sum()),
        "global_batch_size": int(data["response_mask"].any(1).sum()),
    }
    whole = run("rgpo:ppo", data, aggregation, information=counts)
    parts = [
        run("rgpo:ppo", {k: v[rows] for k, v in data.items()}, aggregation, information=counts)
        for rows in (slice(0, 2), slice(2, B))
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])


def test_rollout_correction_weights_multiply_every_token():
    data = batch(6)
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(0))
    expected = run("vanilla", data, weights=weights)
    assert_equal(run("rgpo:ppo-dual-clip", data, weights=weights), expected)


# --- diagnostics ----------------------------------------------------------------------------------


def test_definitions_of_metrics_that_agree_and_that_do_not():
    """verl: k1 with the log-ratio clamped at 20, clip fraction over all tokens.

    Ours counts tokens without force among those with an advantage other than 0.
    """
    data = batch(7)
    data["advantages"][0] = 0
    host, ours = run("vanilla", data)[2], run("rgpo:ppo-dual-clip", data)[2]
    assert ours["rgpo/kl_k1"] == pytest.approx(host["actor/ppo_kl"], rel=1e-5)
    clipped = host["actor/pg_clipfrac"] + host["actor/pg_clipfrac_lower"]
    assert ours["rgpo/active_clip_fraction"] > clipped
    assert all(isinstance(v, float) for v in ours.values())
    far = batch(7, 40.0)
    gap = run("rgpo:ppo", far)[2]["rgpo/kl_k1"] - run("vanilla", far)[2]["actor/ppo_kl"]
    assert abs(gap) > 1


# --- non-finite safety ----------------------------------------------------------------------------


def feedable(name):
    try:
        token_recipe(name, {}, "verl")
    except RgpoError:
        return False
    return True


@pytest.mark.parametrize("mode", [adapter.loss_mode(n) for n in recipes.names() if feedable(n)])
def test_one_masked_and_one_unmasked_extreme_token(mode):
    data = batch(8)
    data["response_mask"][0, :2] = torch.tensor([True, False])
    data["advantages"][0, :2] = -1
    data["log_prob"][0, :2] = data["old_log_prob"][0, :2] + 200
    with adapter.reference(data["old_log_prob"]):
        loss, gradient, _ = run(mode, data)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    data["log_prob"][0, 1] = torch.nan
    with adapter.reference(data["old_log_prob"]):
        again, gradient, _ = run(mode, data)
    assert again == loss
    assert gradient.isfinite().all()


def test_where_verls_own_losses_do_not_stay_finite():
    """Pinned: kl_cov has no clamp; a masked NaN reaches the gradient of cispo and dppo."""
    data = batch(8)
    data["response_mask"][0, :2] = torch.tensor([True, False])
    data["advantages"][0, :2] = -1
    data["log_prob"][0, :2] = data["old_log_prob"][0, :2] + 200
    assert not run("kl_cov", data)[1].isfinite().all()
    data["log_prob"][0, 1] = torch.nan
    for mode in ("cispo", "dppo_tv", "dppo_kl"):
        assert not run(mode, data)[1].isfinite().all()


# --- configuration, the whole ppo_loss and a short run --------------------------------------------


def test_recipe_options_through_verls_configuration():
    """The overrides of docs/adapters/verl.md on verl's own configuration, built as in a worker."""
    loss = "actor_rollout_ref.actor.policy_loss"
    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = compose(
            "ppo_trainer",
            overrides=[
                f"{loss}.loss_mode=rgpo",
                f"{loss}._target_=rgpo.adapters.verl.GatedPolicyLossConfig",
                f"+{loss}.recipe_options.sharpness=2",
                f"+{loss}.recipe_options.kl_coefficient=0",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
                "actor_rollout_ref.rollout.n=4",
            ],
        )
    built = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
    data = batch(9)
    log_prob = data["log_prob"].clone().requires_grad_()
    function = core_algos.get_policy_loss_fn("rgpo")
    loss, _ = function(**data | {"log_prob": log_prob}, loss_agg_mode="token-mean", config=built)
    expected = run("rgpo-gate", data, recipe_options={"sharpness": 2.0})[0]
    torch.testing.assert_close(loss.detach(), expected)
    with pytest.raises(RgpoError, match="no hyper-parameter"):
        adapter.GatedPolicyLossConfig(loss_mode="rgpo", recipe_options={"sharpnes": 2.0})
    with pytest.raises(RgpoError, match="did you mean"):
        adapter.GatedPolicyLossConfig(loss_mode="rgpo:sap0")


def test_recipes_that_verl_cannot_feed():
    for name, word in (("decoupled-ppo", "proximal_log_ratio"), ("trpo", "natural-gradient")):
        with pytest.raises(RgpoError, match=word):
            run(f"rgpo:{name}", batch())
        with pytest.raises(RgpoError, match=word):
            adapter.GatedPolicyLossConfig(loss_mode=f"rgpo:{name}")
    with pytest.raises(RgpoError, match="reference model"):
        run("rgpo-dual-detached", batch())


PROMPTS, RESPONSES = (2, 1, 4), (3, 5, 2)


def jagged(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def engine_output(log_probs):
    """A model's log-probs of packed sequences, shifted left by one, as verl's engines give them."""
    zero = torch.zeros(1)
    rows = [
        torch.cat([zero.expand(p - 1), x, zero]) for p, x in zip(PROMPTS, log_probs, strict=True)
    ]
    return {"log_probs": torch.cat(rows)}


def engine_data(**rows):
    """The batch of verl's `ppo_loss`: jagged responses, and the counts of the global batch."""
    mask = rows["response_mask"]
    tensors = {k: jagged(v) for k, v in rows.items()}
    tensors["prompts"] = jagged(torch.ones(n, dtype=torch.long) for n in PROMPTS)
    tensors["responses"] = jagged(torch.ones(n, dtype=torch.long) for n in RESPONSES)
    counts = {
        "dp_size": 1,
        "batch_num_tokens": sum(int(m.sum()) for m in mask),
        "global_batch_size": len(mask),
    }
    return tu.get_tensordict(tensors, non_tensor_dict=counts)


def test_dual_ratio_recipes_run_in_a_whole_ppo_loss():
    """The replacement for `set_loss_fn`, against the core; verl's own ppo_loss is refused."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale=1.0):
        return [scale * torch.randn(n, generator=generator) for n in RESPONSES]

    old = draw()
    log_probs = [(x + y).requires_grad_() for x, y in zip(old, draw(0.5), strict=True)]
    reference, advantages = draw(), draw()
    mask = [torch.ones(n, dtype=torch.bool) for n in RESPONSES]
    data = engine_data(
        old_log_probs=old, ref_log_prob=reference, advantages=advantages, response_mask=mask
    )
    config = configured("rgpo-dual-detached", {"reference_sharpness": 2.0})
    loss_fn = partial(adapter.ppo_loss, config=config)  # as in set_loss_fn
    loss, metrics = loss_fn(model_output=engine_output(log_probs), data=data)
    found = torch.cat(torch.autograd.grad(loss, log_probs))

    flat = torch.cat(log_probs).detach().requires_grad_()
    expected = policy_loss(
        recipes.get("rgpo-dual-detached").configure(reference_sharpness=2.0),
        flat,
        torch.cat(old),
        torch.cat(advantages),
        reference_log_prob=torch.cat(reference),
    )
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(found, torch.autograd.grad(expected.loss, flat)[0])
    assert metrics["rgpo/ess"].aggregate() == pytest.approx(float(expected.diagnostics["ess"]))
    with pytest.raises(RgpoError, match="reference model"):
        losses.ppo_loss(config, engine_output(log_probs), data)


def of_tokens(table, tokens):
    return [table[: len(t)].gather(1, t[:, None])[:, 0] for t in tokens]


def train(mode, updates=15, seed=0, **options):
    """Rewards of a policy of independent tokens, trained by verl's `ppo_loss`, two epochs each."""
    torch.manual_seed(seed)
    logits = torch.zeros(max(RESPONSES), 6, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    config, returns = configured(mode, **options), []
    for _ in range(updates):
        table = torch.log_softmax(logits.detach(), -1)
        tokens = [torch.distributions.Categorical(logits=table[:n]).sample() for n in RESPONSES]
        rewards = torch.stack([(t == 2).float().mean() for t in tokens])
        advantages = rewards - rewards.mean() + 0.5 * (rewards - 1 / 6)
        returns.append(float(rewards.mean()))
        data = engine_data(
            old_log_probs=of_tokens(table, tokens),
            advantages=[a.expand(n) for a, n in zip(advantages, RESPONSES, strict=True)],
            response_mask=[torch.ones(n, dtype=torch.bool) for n in RESPONSES],
        )
        for _ in range(2):
            table = torch.log_softmax(logits, -1)
            now = of_tokens(table, tokens)
            loss, _ = losses.ppo_loss(config, engine_output(now), data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return returns, logits.detach()


def test_verls_own_worker_and_engine_train():
    """TrainingWorker with FSDP2, verl's configuration and packing: 20 updates of `rgpo`, 2 of dual.

    A random character model learns to write vowels; the dual recipe runs by `set_loss_fn`.
    """
    script = Path(__file__).parent / "verl_on_cpu.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[17:20]) > 3 * sum(rewards[:3])
    assert all(0.01 < row["spread"] < 5 for row in rows)
    assert all(0 < norm < 100 for row in rows for norm in row["norm"])


def test_ppo_reproduces_verls_own_run_step_for_step():
    (host, expected), (ours, found) = train("vanilla"), train("rgpo:ppo-dual-clip")
    assert host == ours
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
