"""TorchRL 0.14: parity with its losses for control and language models, and short runs in it."""

import os
import re
from pathlib import Path

os.environ["RL_WARNINGS"] = "False"

import pytest
import torch
from common import token_batch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from tokenizers import Tokenizer, models
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, StepCounter, TransformedEnv
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives import ClipPPOLoss, PPOLoss
from torchrl.objectives.llm import DAPO, CISPOLoss, GRPOLoss
from torchrl.objectives.value import GAE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rgpo.adapters.torchrl import GatedPPOLoss
from rgpo.adapters.torchrl_llm import GatedGRPOLoss
from rgpo.core import recipes
from rgpo.core.loss import policy_loss
from rgpo.errors import RgpoError

N = 40
B, T, PROMPT = 6, 12, 4


# --- control --------------------------------------------------------------------------------------


def networks(observations=4, actions=3, width=16, seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(observations, width), nn.Tanh(), nn.Linear(width, actions))
    actor = ProbabilisticActor(
        TensorDictModule(body, ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    value = nn.Sequential(nn.Linear(observations, width), nn.Tanh(), nn.Linear(width, 1))
    return actor, ValueOperator(value, in_keys=["observation"])


def steps(actor, spread=1.5, seed=0):
    """A minibatch of which a fifth is masked, log-ratios of this standard deviation."""
    torch.manual_seed(seed)
    data = TensorDict({"observation": torch.randn(N, 4)}, [N])
    with torch.no_grad():
        data = actor(data)
    drawn = token_batch(N, seed=seed, spread=spread)
    data["action_log_prob"] -= drawn.log_prob.detach() - drawn.behavior_log_prob
    data["advantage"] = drawn.advantage.unsqueeze(-1)
    data["value_target"] = torch.randn(N, 1)
    data["collector", "mask"] = drawn.mask.unsqueeze(-1)
    return data


def gradients(loss_module, out):
    total = sum(x.sum() for key, x in out.items() if key.startswith("loss_"))
    parameters = [p for p in loss_module.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [g for g in found if g is not None]


def assert_same(ours, host, data, rtol=1e-6):
    """All losses and the gradient of their sum."""
    found, expected = ours(data.clone()), host(data.clone())
    for key in expected.keys():  # noqa: SIM118
        if key.startswith("loss_"):
            torch.testing.assert_close(found[key], expected[key], rtol=rtol, atol=1e-6)
    pairs = zip(gradients(ours, found), gradients(host, expected), strict=True)
    for ours_gradient, host_gradient in pairs:
        torch.testing.assert_close(ours_gradient, host_gradient, rtol=1e-5, atol=1e-6)
    return found, expected


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("spread", [0.3, 1.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_ppo_is_their_clip_loss(reduction, spread, normalize):
    actor, critic = networks()
    options = {"reduction": reduction, "normalize_advantage": normalize}
    host = ClipPPOLoss(actor, critic, **options)
    assert_same(GatedPPOLoss(actor, critic, recipe="ppo", **options), host, steps(actor, spread))


def test_importance_sampling_is_their_base_loss():
    actor, critic = networks()
    ours = GatedPPOLoss(actor, critic, recipe="importance")
    assert_same(ours, PPOLoss(actor, critic), steps(actor))


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_decoupled_ppo_is_their_clip_loss_with_a_delayed_actor(clip):
    """The clip acts on the ratio to the proximal policy, the weight is that to the behaviour."""
    actor, critic = networks()
    options = {"clip_low": clip, "clip_high": clip}
    ours = GatedPPOLoss(
        actor, critic, recipe="decoupled-ppo", recipe_options=options, delay_actor=True
    )
    host = ClipPPOLoss(actor, critic, clip_epsilon=clip, delay_actor=True)
    torch.manual_seed(5)
    noise = [0.3 * torch.randn_like(p) for p in actor.parameters()]
    data = steps(actor, 0.5)
    with torch.no_grad():  # targets are copies: moving the actor leaves them behind
        for parameter, step in zip(actor.parameters(), noise, strict=True):
            parameter.add_(step)
    found, _ = assert_same(ours, host, data)
    assert found["ratio_spread"] > 0.1


def test_metrics_that_differ():
    """Theirs: |r - 1| > eps whatever the sign of A and the mask, and k1. Ours: force, mask, k3."""
    actor, critic = networks()
    data = steps(actor)
    found = GatedPPOLoss(actor, critic, recipe="ppo")(data.clone())
    host = ClipPPOLoss(actor, critic)(data.clone())
    assert host["clip_fraction"] > found["active_clip_fraction"] + 0.2
    torch.testing.assert_close(found["kl_approx"], host["kl_approx"])  # of all steps, masked too
    assert (found["kl_k1"] - host["kl_approx"]).abs() > 0.01
    everything = data.clone().exclude(("collector", "mask"))
    unmasked = GatedPPOLoss(actor, critic, recipe="ppo")(everything.clone())
    torch.testing.assert_close(unmasked["kl_k1"], host["kl_approx"])
    torch.testing.assert_close(unmasked["ess"], host["ESS"], rtol=1e-5, atol=1e-6)


def control_recipes():
    for name in recipes.names():
        try:
            GatedPPOLoss(*networks(), recipe=name, delay_actor=True)
        except RgpoError:
            continue
        yield name


@pytest.mark.parametrize("recipe", list(control_recipes()))
def test_every_recipe_stays_finite_at_log_ratio_200(recipe):
    actor, critic = networks()
    ours = GatedPPOLoss(actor, critic, recipe=recipe, delay_actor=True)
    out = ours(extreme(actor))
    assert out["loss_objective"].isfinite()
    assert all(g.isfinite().all() for g in gradients(ours, out))


def extreme(actor):
    """One masked and one unmasked step at log-ratio 200, against the policy that acts now."""
    data = steps(actor, 0.3)
    data["collector", "mask"][:2] = torch.tensor([[True], [False]])
    data["advantage"][:2] = -1
    data["action_log_prob"][:2] -= 200
    return data


def test_where_their_own_loss_does_not():
    actor, critic = networks()
    host = ClipPPOLoss(actor, critic)
    assert not all(g.isfinite().all() for g in gradients(host, host(extreme(actor))))


def test_their_conventions():
    """Keys can be set, calls dispatched, `loss_` keys summed; a value estimator may fill in."""
    actor, critic = networks()
    ours = GatedPPOLoss(actor, critic, recipe="rgpo")
    ours.set_keys(advantage="gain")
    data = steps(actor).rename_key_("advantage", "gain")
    out = ours(data)
    assert ours.out_keys[:1] == ["loss_objective"]
    assert {"ess", "gate_acceptance", "loss_critic", "loss_entropy"} <= set(out.keys())
    assert not out["ess"].requires_grad
    rollout = {
        "next": TensorDict(
            {
                "observation": torch.randn(N, 4),
                "reward": torch.ones(N, 1),
                "done": torch.zeros(N, 1, dtype=torch.bool),
                "terminated": torch.zeros(N, 1, dtype=torch.bool),
            },
            [N],
        )
    }
    fresh = steps(actor).exclude("advantage", "value_target").update(rollout)
    assert GatedPPOLoss(actor, critic)(fresh)["loss_objective"].isfinite()


def test_adapting_and_saving():
    actor, critic = networks()
    ours = GatedPPOLoss(actor, critic, recipe="rgpo")
    ours(steps(actor, 1.0))
    before = ours.recipe.kl.coefficient
    ours.adapt()
    assert ours.recipe.kl.coefficient == 2 * before
    copy = GatedPPOLoss(*networks(), recipe="rgpo")
    copy.load_state_dict(ours.state_dict())
    assert copy.recipe == ours.recipe


def test_refusals():
    actor, critic = networks()
    for recipe, word in (
        ("gspo", "per sequence"),
        ("decoupled-ppo", "proximal_log_ratio"),
        ("rgpo-dual-detached", "reference_log_ratio"),
        ("trpo", "natural-gradient"),
        ("rgppo", "did you mean"),
    ):
        with pytest.raises(RgpoError, match=word):
            GatedPPOLoss(actor, critic, recipe=recipe)


def train(make_loss, frames=2048, seed=0):
    """CartPole in TorchRL's own collector; mean episode length per rollout, and the parameters."""
    actor, critic = networks(4, 2, 64, seed)
    env = TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=True), StepCounter())
    env.set_seed(seed)
    torch.manual_seed(seed)
    collector = Collector(env, actor, frames_per_batch=1024, total_frames=frames)
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    loss_module = make_loss(actor, critic)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=3e-3)
    lengths = []
    for data in collector:
        with torch.no_grad():
            advantage(data)
        ended = data["next", "done"].squeeze(-1)
        lengths.append(float(data["next", "step_count"].squeeze(-1)[ended].float().mean()))
        for _ in range(6):
            for rows in torch.randperm(len(data)).split(256):
                out = loss_module(data[rows])
                total = sum(x for key, x in out.items() if key.startswith("loss_"))
                optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(loss_module.parameters(), 0.5)
                optimizer.step()
    collector.shutdown()
    return lengths, [p.detach().clone() for p in actor.parameters()]


def test_the_script_of_the_page_learns_cartpole(capsys):
    """The first code block of docs/adapters/torchrl.md, as a reader would paste it."""
    page = Path(__file__).parents[2] / "docs" / "adapters" / "torchrl.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)[0]
    exec(compile(code, "torchrl.md", "exec"), {"__name__": "example"})  # noqa: S102
    lengths = [float(x) for x in re.findall(r"length +([\d.]+)", capsys.readouterr().out)]
    assert len(lengths) == 6
    assert lengths[-1] > 3 * lengths[0]


def test_ppo_reproduces_their_own_run_step_for_step():
    host, expected = train(ClipPPOLoss)
    ours, found = train(lambda *nets: GatedPPOLoss(*nets, recipe="ppo"))
    assert ours == host
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- language models ------------------------------------------------------------------------------


def language_model(seed=0):
    """A random Llama of 16 tokens and its tokenizer."""
    torch.manual_seed(seed)
    vocabulary = {f"t{i}": i for i in range(14)} | {"<pad>": 14, "<eos>": 15}
    words = models.WordLevel(vocabulary, unk_token="t0")  # noqa: S106
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=14,
        eos_token_id=15,
        bos_token_id=0,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def wrapped(model, tokenizer, *, generate):
    options = {"generate_kwargs": {"max_new_tokens": 8, "do_sample": True}} if generate else {}
    return TransformersWrapper(
        model,
        tokenizer=tokenizer,
        input_mode="tokens",
        generate=generate,
        pad_output=True,
        return_log_probs=True,
        **options,
    )


def scored(actor, tokens, attention):
    """Tokens with the log-probs of the actor as it is."""
    data = TensorDict(
        {
            "tokens": TensorDict({"full": tokens, "prompt": tokens[:, :PROMPT]}, [len(tokens)]),
            "masks": TensorDict({"all_attention_mask": attention}, [len(tokens)]),
        },
        [len(tokens)],
    )
    with torch.no_grad():
        log_prob = actor(data.copy())["log_probs", "full"]
    data["log_probs"] = TensorDict({"full": log_prob}, [len(tokens)])
    return data


def responses(actor, spread=1.0, seed=0, *, per_sequence=False):
    """Prompts and responses of unequal length, log-ratios of this standard deviation."""
    torch.manual_seed(seed)
    attention = torch.arange(T) < torch.tensor([12, 7, 10, 5, 12, 8])[:, None]
    data = scored(actor, torch.randint(0, 14, (B, T)), attention)
    data["log_probs", "full"] = data["log_probs", "full"] + spread * torch.randn(B, T)
    shape = (B, 1, 1) if per_sequence else (B, T, 1)
    data["advantage"] = torch.randn(shape).expand(B, T, 1)
    return data


def model_gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), model.parameters())])


@pytest.mark.parametrize("aggregation", ["token_mean", "prompt_mean", "none"])
@pytest.mark.parametrize("spread", [0.3, 1.5])
@pytest.mark.parametrize(
    ("recipe", "kind", "options"),
    [("ppo", GRPOLoss, {}), ("dapo", DAPO, {"clip_epsilon": (0.2, 0.28)})],
)
def test_grpo_and_dapo(aggregation, spread, recipe, kind, options):
    model, tokenizer = language_model()
    actor = wrapped(model, tokenizer, generate=False)
    data = responses(actor, spread)
    host = kind(actor, aggregation=aggregation, entropy_bonus=False, **options)(data)
    ours = GatedGRPOLoss(actor, recipe=recipe, aggregation=aggregation, entropy_bonus=False)(data)
    torch.testing.assert_close(ours.loss_objective, host.loss_objective, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        model_gradient(model, ours.loss_objective),
        model_gradient(model, host.loss_objective),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(ours.kl_approx, host.kl_approx)
    assert host.clip_fraction != ours.clip_fraction  # theirs counts masked tokens and both sides


def weights(kind, spread=0.6, **options):
    """The ratio, and minus the gradient by log pi over A, of every token of a loss."""
    model, tokenizer = language_model()
    actor = wrapped(model, tokenizer, generate=False)
    data = responses(actor, spread)
    data["advantage"] = torch.ones(B, T, 1)
    loss_module = kind(actor, aggregation="none", entropy_bonus=False, **options)
    captured = {}
    original = loss_module._get_cur_log_prob

    def with_leaf(tensordict):
        log_prob, distribution, composite = original(tensordict)
        captured["leaf"] = log_prob.detach().requires_grad_()
        return captured["leaf"], distribution, composite

    loss_module._get_cur_log_prob = with_leaf
    (gradient,) = torch.autograd.grad(loss_module(data).loss_objective.sum(), captured["leaf"])
    ratio = (captured["leaf"].detach() - data["log_probs", "full"]).exp()
    counted = data["masks", "all_attention_mask"].clone()
    counted[:, :PROMPT] = False
    return ratio[counted], -gradient[counted]


def test_their_cispo_has_no_gradient_outside_the_clip():
    """CISPO's weight is clip(r); theirs differentiates the clip, so that it vanishes there."""
    ratio, theirs = weights(CISPOLoss)
    _, ours = weights(GatedGRPOLoss, recipe="cispo", recipe_options={"low": 0.8, "high": 1.2})
    inside = (ratio >= 0.8) & (ratio <= 1.2)
    torch.testing.assert_close(ours, ratio.clamp(0.8, 1.2))
    torch.testing.assert_close(theirs[inside], ours[inside])
    assert theirs[~inside].count_nonzero() == 0
    assert 0.5 < float((~inside).float().mean()) < 0.9
    assert ours[~inside].abs().min() >= 0.8


def test_sequence_ratios_see_the_mask():
    """The recipe gspo against the core, on the response tokens alone."""
    model, tokenizer = language_model()
    actor = wrapped(model, tokenizer, generate=False)
    data = responses(actor, 0.3, per_sequence=True)
    loss_module = GatedGRPOLoss(actor, recipe="gspo", entropy_bonus=False)
    out = loss_module(data)
    assert loss_module.aggregation == "prompt_mean"
    mask = data["masks", "all_attention_mask"].clone()
    mask[:, :PROMPT] = False
    with torch.no_grad():
        now = actor(data.copy())["log_probs", "full"]
    before = data["log_probs", "full"]
    expected = policy_loss("gspo", now, before, data["advantage"].squeeze(-1), mask)
    torch.testing.assert_close(out.loss_objective.squeeze(), expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.diagnostics["ess"], expected.diagnostics["ess"])


def test_dual_ratio_recipes_read_the_reference():
    model, tokenizer = language_model()
    actor = wrapped(model, tokenizer, generate=False)
    data = responses(actor, 0.3)
    loss_module = GatedGRPOLoss(actor, recipe="rgpo-dual-detached", entropy_bonus=False)
    with pytest.raises(RgpoError, match="reference model"):
        loss_module(data)
    reference = data["log_probs", "full"] + torch.randn(B, T)
    data["next"] = TensorDict({"ref_log_probs": {"full": reference.unsqueeze(-1)}}, [B])
    out = loss_module(data)
    single = GatedGRPOLoss(actor, recipe="rgpo-gate", entropy_bonus=False)(data)
    assert (out.loss_objective - single.loss_objective).abs() > 1e-3


def test_language_models_stay_finite_where_theirs_does_not():
    model, tokenizer = language_model()
    actor = wrapped(model, tokenizer, generate=False)
    data = responses(actor, 0.3)
    data["log_probs", "full"][0, PROMPT] -= 200  # counted
    data["log_probs", "full"][3, T - 1] -= 200  # padding
    data["advantage"] = -torch.ones(B, T, 1)
    for recipe in ("rgpo", "ppo", "gspo", "cispo"):
        out = GatedGRPOLoss(actor, recipe=recipe, entropy_bonus=False)(data)
        assert model_gradient(model, out.loss_objective).isfinite().all()
    host = GRPOLoss(actor, entropy_bonus=False)(data)
    assert not model_gradient(model, host.loss_objective).isfinite().all()


def test_inert_settings_are_refused():
    with pytest.raises(RgpoError, match="clip_epsilon"):
        GatedGRPOLoss(recipe="ppo", clip_epsilon=0.3)


def test_a_language_model_improves():
    """Share of one token in sampled responses, two epochs on every group of 32."""
    model, tokenizer = language_model()
    sampler = wrapped(model, tokenizer, generate=True)
    actor = wrapped(model, tokenizer, generate=False)
    loss_module = GatedGRPOLoss(actor, recipe="rgpo-gate", entropy_bonus=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(1)
    prompts = torch.randint(0, 14, (1, PROMPT)).expand(32, PROMPT)
    rewards = []
    for _ in range(12):
        with torch.no_grad():
            asked = TensorDict({"tokens": TensorDict({"prompt": prompts}, [32])}, [32])
            drawn = sampler(asked)
        tokens, attention = drawn["tokens", "full"], drawn["masks", "all_attention_mask"]
        share = (tokens[:, PROMPT:] == 3).float().mean(1)
        rewards.append(float(share.mean()))
        data = scored(actor, tokens, attention)
        advantage = (share - share.mean()) / (share.std() + 1e-6)
        data["advantage"] = advantage[:, None, None].expand(32, tokens.shape[1], 1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_module(data).loss_objective.backward()
            optimizer.step()
    assert loss_module.diagnostics["ratio_spread"] > 0.01
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])
