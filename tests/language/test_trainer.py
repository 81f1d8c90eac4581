"""Our objectives in `RecipeTrainer` are TRL's, to float32 rounding: the alarm for every upgrade."""

import pytest
import tiny
from trl import GRPOConfig, GRPOTrainer

from rgpo.language import RecipeConfig, RecipeTrainer

COMMON = {
    "learning_rate": 1e-3,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "num_iterations": 2,
    "steps_per_generation": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "disable_dropout": True,
    "seed": 3,
}
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def train(trainer_class, args, model, **kwargs):
    """The logged rows of one run."""
    trainer = trainer_class(
        model,
        kwargs.pop("reward_funcs", tiny.vowels),
        args,
        tiny.prompts(),
        processing_class=kwargs.pop("processing_class", None) or tiny.tokenizer(),
        **kwargs,
    )
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "grad_norm" in row]


def theirs(folder, model, **options):
    return train(GRPOTrainer, GRPOConfig(str(folder), **COMMON | ON_CPU | options), model)[1]


def ours(folder, model, **options):
    return train(RecipeTrainer, RecipeConfig(str(folder), use_cpu=True, **COMMON | options), model)[
        1
    ]


def assert_equal_rows(expected, found, keys=("loss", "grad_norm", "entropy", "reward")):
    assert len(expected) == len(found) == COMMON["max_steps"]
    for a, b in zip(expected, found, strict=True):
        for key in keys:
            expected_value, found_value = a.get(key, 0.0), b.get(key, 0.0)
            assert found_value == pytest.approx(expected_value, rel=5e-7, abs=1e-7), (
                key,
                a["step"],
            )


PPO = {"recipe": "ppo"}
PARITY = {
    "grpo": ({"loss_type": "grpo"}, PPO | {"reduction": "sequence-mean"}),
    "bnpo": ({"loss_type": "bnpo"}, PPO | {"reduction": "local-token-mean"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, PPO | {"reduction": "sequence-sum"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"recipe": "dapo"}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {"recipe": "cispo"}),
    "sapo": ({"loss_type": "sapo"}, {"recipe": "sapo"}),
}


@pytest.mark.parametrize("name", PARITY)
def test_loss_and_gradient_norm_are_trls(name, tmp_path):
    theirs_options, ours_options = PARITY[name]
    expected = theirs(tmp_path, tiny.policy(), **theirs_options)
    found = ours(tmp_path, tiny.policy(), **ours_options)
    keys = ("loss", "grad_norm", "entropy", "reward")
    if name == "cispo":  # TRL's loss has log pi where ours has log pi / pi_old: a constant more
        keys = ("grad_norm", "entropy", "reward")
    assert_equal_rows(expected, found, keys)
    assert max(row["ratio/ratio_spread"] for row in found) > 0.01
