import pytest
import tiny
import torch
from test_trainer import COMMON, ours, train

from rgpo.errors import RgpoError
from rgpo.language import RecipeConfig, RecipeTrainer
from rgpo.language.lag import Lag

CRITIC = {"advantage": "critic", "recipe": "rgpo", "critic_learning_rate": 3e-3}


def test_every_batch_comes_out_exactly_so_many_updates_later():
    extra = iter(range(-1, -10, -1))
    lag = Lag(3)
    out = [lag.exchange({"made": n}, lambda: {"made": next(extra)})["made"] for n in range(8)]
    assert out == [0, -1, -2, -3, 1, 2, 3, 4]
    assert next(extra) == -4  # nothing but the first update generates more
    assert [Lag(0).exchange({"made": n}, dict)["made"] for n in range(3)] == [0, 1, 2]


def test_a_checkpoint_with_another_lag_is_refused():
    lag = Lag(2)
    lag.restore([{"made": 1}, {"made": 2}])
    assert lag.exchange({"made": 3}, dict)["made"] == 1
    with pytest.raises(RgpoError, match="resume with lag=1"):
        lag.restore([{"made": 1}])


class Stamped(RecipeTrainer):
    """Notes how many optimiser steps ago the data of every optimiser step were generated."""

    ages = ()

    def _batch(self, inputs):
        made = torch.tensor(float(self.state.global_step))
        return super()._batch(inputs) | {"made": made}

    def _compute_loss(self, model, inputs):
        self.ages = (*self.ages, self.state.global_step - int(inputs["made"]))
        return super()._compute_loss(model, inputs)


def test_lag_is_exact_in_training(tmp_path):
    """An update has two optimiser steps here; the first three learn from the initial policy."""
    options = {"num_iterations": 1, "max_steps": 12, "lag": 2, "recipe": "importance"}
    args = RecipeConfig(str(tmp_path), use_cpu=True, **COMMON | options)
    trainer, rows = train(Stamped, args, tiny.policy())
    assert trainer.ages == (0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5)
    assert rows[0]["ratio/ratio_spread"] == pytest.approx(0, abs=1e-5)
    assert all(row["ratio/ratio_spread"] > 1e-4 for row in rows[1:])


def test_lag_needs_no_second_step_to_have_behaviour_log_probs(tmp_path):
    once = {"num_iterations": 1, "steps_per_generation": 1, "lag": 1, "max_steps": 4}
    rows = ours(tmp_path, tiny.policy(), **once)
    assert [row["ratio/ratio_spread"] > 1e-4 for row in rows] == [False, True, True, True]


@pytest.mark.parametrize("interrupted", [4, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(interrupted, tmp_path):
    """With a lag, a critic and an adaptive penalty; between two updates and within one."""
    options = COMMON | CRITIC | {"lag": 2, "max_steps": 10, "num_iterations": 2}
    options |= {
        "save_strategy": "steps",
        "save_steps": interrupted,
        "lr_scheduler_type": "constant",
    }
    straight, expected = train(
        RecipeTrainer, RecipeConfig(str(tmp_path), use_cpu=True, **options), tiny.policy()
    )
    resumed = RecipeTrainer(
        tiny.policy(),
        tiny.vowels,
        RecipeConfig(str(tmp_path), use_cpu=True, **options),
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{interrupted}"))
    found = [row for row in resumed.state.log_history if "grad_norm" in row]
    keys = ("loss", "grad_norm", "critic/value_loss", "reward", "ratio/kl_k3")
    for a, b in zip(expected, found, strict=True):
        assert [a.get(key) for key in keys] == [b.get(key) for key in keys], a["step"]
    for model in ("model", "critic"):
        for a, b in zip(
            getattr(straight, model).parameters(), getattr(resumed, model).parameters(), strict=True
        ):
            assert torch.equal(a, b)
    assert straight.recipe == resumed.recipe
