"""TRL 1.16: its losses on one batch far from the policy, what differs, and a short run.

That whole runs equal TRL's, step for step, is in tests/language/test_trainer.py, beside the
trainer, which is the adapter.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from trl import GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "language"))
import tiny

from rgpo.adapters.trl import RecipeConfig, RecipeTrainer
from rgpo.core import recipes
from rgpo.errors import RgpoError

COMMON = {
    "use_cpu": True,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "num_iterations": 2,
    "steps_per_generation": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}
SEQUENCE = {"importance_sampling_level": "sequence"}


@pytest.fixture
def build(tmp_path):
    """A trainer, and a generated batch with log-ratios of standard deviation `spread`."""

    def built(recipe, spread=0.5, **options):
        args = RecipeConfig(str(tmp_path), recipe=recipe, **COMMON | options)
        trainer = RecipeTrainer(
            tiny.policy(), tiny.vowels, args, tiny.prompts(), processing_class=tiny.tokenizer()
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 2
        batch = trainer._batch([trainer.train_dataset[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)])
        now = trainer._log_prob_now(batch)
        generator = torch.Generator().manual_seed(0)
        batch["old_per_token_logps"] = now - spread * torch.randn(now.shape, generator=generator)
        batch["ref_per_token_logps"] = now.clone()
        batch["advantages"] = torch.randn(len(now), generator=generator)
        batch["completion_mask"][0, -3:] = 0  # a completion that ended
        batch["num_items_in_batch"] = batch["completion_mask"].sum()
        return trainer, batch

    return built


def run(method, trainer, batch, **attributes):
    """Loss and gradient by this `_compute_loss`, with TRL's own settings where it needs them."""
    for name, value in attributes.items():
        setattr(trainer.args if hasattr(trainer.args, name) else trainer, name, value)
        setattr(trainer, name, value)
    trainer.model.zero_grad()
    loss = method(trainer, trainer.model, batch)
    loss.backward()
    gradient = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradient)


def ours(trainer, batch):
    return run(RecipeTrainer._compute_loss, trainer, batch)


def theirs(trainer, batch, **attributes):
    return run(GRPOTrainer._compute_loss, trainer, batch, **attributes)


PARITY = {
    "grpo": ("ppo", {"reduction": "sequence-mean"}, {"loss_type": "grpo"}),
    "bnpo": ("ppo", {"reduction": "local-token-mean"}, {"loss_type": "bnpo"}),
    "dr_grpo": ("ppo", {"reduction": "sequence-sum"}, {"loss_type": "dr_grpo"}),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        "gspo",
        {},
        SEQUENCE | {"loss_type": "grpo", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "sapo": ("sapo", {}, {"loss_type": "sapo"}),
}


@pytest.mark.parametrize("spread", [0.2, 1.5])
@pytest.mark.parametrize("name", PARITY)
def test_value_and_gradient(name, spread, build):
    recipe, options, attributes = PARITY[name]
    trainer, batch = build(recipe, spread, **options)
    found = ours(trainer, batch)
    expected = theirs(trainer, batch, **attributes)
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6 * expected[1].norm())
    assert expected[1].norm() > 1e-3


def test_cispo_has_their_gradient_at_equal_caps_and_not_by_default(build):
    """TRL's `epsilon_high` is the cap itself: its default, 0.2, scales most tokens by 0.2."""
    trainer, batch = build("cispo", 0.5)
    expected = theirs(trainer, batch, loss_type="cispo", epsilon_high=5.0)
    found = ours(trainer, batch)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    default = theirs(trainer, batch, loss_type="cispo", epsilon_high=0.2)
    assert 0.1 < float(default[1].norm() / expected[1].norm()) < 0.3


def test_vespo_has_their_gradient(build):
    trainer, batch = build("vespo", 0.3)
    expected = theirs(trainer, batch, loss_type="vespo")
    torch.testing.assert_close(ours(trainer, batch)[1], expected[1], rtol=1e-4, atol=1e-6)


def test_luspo_is_theirs_up_to_the_mean_length(build):
    """TRL divides the sum over tokens by sequences, the recipe by tokens."""
    trainer, batch = build("luspo", 0.3, reduction="sequence-sum")
    expected = theirs(trainer, batch, **SEQUENCE | {"loss_type": "luspo"})
    clip = recipes.get("luspo").hyper_parameters()
    expected = theirs(trainer, batch, epsilon_low=clip["clip_low"], epsilon_high=clip["clip_high"])
    found = ours(trainer, batch)
    length = COMMON["max_completion_length"]
    assert length * found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(length * found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_clip_fractions_are_not_the_same_number(build):
    """Theirs: clipped on A's side, over all tokens. Ours: no force, over tokens with A != 0."""
    trainer, batch = build("ppo", 0.5)
    batch["advantages"][:4] = 0
    theirs(trainer, batch, loss_type="grpo")
    region = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
    ours(trainer, batch)
    (row,) = trainer._measured[-1:]
    assert row["active_clip_fraction"] == pytest.approx(2 * region, rel=0.2)


@pytest.mark.parametrize("recipe", ["rgpo", "ppo", "sapo", "cispo", "gspo", "rgpo-dual-detached"])
def test_extreme_tokens(recipe, build):
    trainer, batch = build(recipe)
    extreme(batch)
    loss, gradient = ours(trainer, batch)
    assert math.isfinite(loss)
    assert gradient.isfinite().all()


def extreme(batch):
    """One unmasked and one masked token at log-ratio 200, A < 0."""
    batch["old_per_token_logps"][1, 0] -= 200
    batch["old_per_token_logps"][0, -1] -= 200
    batch["advantages"][:] = -1


@pytest.mark.parametrize("loss_type", ["grpo", "sapo"])
def test_extreme_tokens_in_their_own_losses(loss_type, build):
    trainer, batch = build("ppo")
    extreme(batch)
    _, gradient = theirs(trainer, batch, loss_type=loss_type)
    assert not gradient.isfinite().all()


def test_a_short_run_improves(tmp_path):
    options = COMMON | {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
    args = RecipeConfig(str(tmp_path), recipe="rgpo", **options | {"num_generations": 8})
    trainer = RecipeTrainer(
        tiny.policy(), tiny.vowels, args, tiny.prompts(), processing_class=tiny.tokenizer()
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert sum(rewards[-4:]) / 4 > rewards[0] + 0.2
    assert max(row.get("ratio/ratio_spread", 0) for row in trainer.state.log_history) > 0.01


def test_refusals(tmp_path):
    for recipe, word in (("trpo", "natural-gradient"), ("rgppo", "did you mean")):
        args = RecipeConfig(str(tmp_path), recipe=recipe, use_cpu=True)
        with pytest.raises(RgpoError, match=word):
            RecipeTrainer(tiny.policy(), tiny.vowels, args, tiny.prompts())
