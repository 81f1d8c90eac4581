"""Our objectives in `RecipeTrainer` are TRL's, to float32 rounding: the alarm for every upgrade."""

import copy
import logging
import math

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer

from rgpo.core import recipes
from rgpo.language import RecipeConfig, RecipeTrainer
from rgpo.language.advantages import above_median
from rgpo.language.trainer import _tokens

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


def test_gradient_accumulation_is_trls(tmp_path):
    batches = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
    expected = theirs(tmp_path, tiny.policy(), **batches)
    assert_equal_rows(expected, ours(tmp_path, tiny.policy(), recipe="ppo", **batches))


def test_cispo_differs_from_trls_by_a_constant(tmp_path):
    """TRL's value is c A log pi, ours c A log(pi / pi_old): the gradient is the same."""

    class WithConstant(RecipeTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            log_prob = self._forward(model, inputs)[0].detach()
            old, mask = inputs["old_per_token_logps"], inputs["completion_mask"].bool()
            coefficient = (log_prob - old).exp().clamp(max=5) * inputs["advantages"][:, None]
            tokens = inputs["num_items_in_batch"] / self.args.steps_per_generation
            return loss - (coefficient * old)[mask].sum() / tokens

    expected = theirs(tmp_path, tiny.policy(), loss_type="cispo", epsilon_high=5.0)
    args = RecipeConfig(str(tmp_path), use_cpu=True, recipe="cispo", **COMMON)
    found = train(WithConstant, args, tiny.policy())[1]
    assert_equal_rows(expected, found, ("loss", "grad_norm"))


def batch_with_spread(trainer):
    """A generated batch whose behaviour and reference log-probs are some way off the policy's."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer._batch([trainer.train_dataset[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)])
    now = trainer._log_prob_now(batch)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(now.shape, generator=generator) for _ in range(3)]
    batch["old_per_token_logps"] = now + 0.3 * noise[0]
    batch["ref_per_token_logps"] = now + 0.3 * noise[1]
    batch["sampling_per_token_logps"] = now + 0.3 * noise[2]
    return batch


def loss_and_gradient(method, trainer, batch):
    trainer.model.zero_grad()
    loss = method(trainer, trainer.model, batch)
    loss.backward()
    gradient = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradient)


SEQUENCE = {"importance_sampling_level": "sequence"}
KEPT = {  # our configuration, attributes of TRL's trainer, further keys of the batch
    "sequence level": ({"level": "sequence"}, SEQUENCE, ()),
    "beta in the loss": ({"beta": 0.1}, {}, ()),
    "beta, sequence level": ({"beta": 0.1, "level": "sequence"}, SEQUENCE, ()),
    "beta, uncorrected": ({"beta": 0.1, "use_bias_correction_kl": False}, {}, ()),
    "entropy bonus": ({"entropy_coef": 0.05}, {}, ()),
    "top entropy": ({"top_entropy_quantile": 0.5, "entropy_coef": 0.05}, {}, ()),
    "off-policy mask": ({"off_policy_mask_threshold": 0.02}, {}, ()),
    "tool mask": ({"beta": 0.1, "entropy_coef": 0.05}, {}, ("tool_mask",)),
    "vLLM correction": ({}, {"use_vllm": True}, ("importance_sampling_ratio",)),
    "truncated completions": ({"mask_truncated_completions": True}, {}, ()),
    "two-sided clip": (
        {"recipe": "ppo-dual-clip", "recipe_options": {"dual_clip": 1.3}},
        {"delta": 1.3},
        (),
    ),
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_trl_does_to_its_loss_is_kept(kept, tmp_path):
    options, attributes, keys = KEPT[kept]
    options = {"recipe": "ppo", "reduction": "sequence-mean"} | options
    model = tiny.policy(tmp_path / "model")
    args = RecipeConfig(str(tmp_path), use_cpu=True, **COMMON | options)
    trainer = RecipeTrainer(model, tiny.vowels, args, tiny.prompts())
    batch = batch_with_spread(trainer)
    generator = torch.Generator().manual_seed(1)
    shape = batch["completion_ids"].shape
    extra = {
        "tool_mask": torch.randint(2, shape, generator=generator),
        "importance_sampling_ratio": torch.rand(shape, generator=generator),
    }
    batch |= {key: extra[key] for key in keys}
    found = loss_and_gradient(RecipeTrainer._compute_loss, trainer, batch)
    trainer.loss_type = "grpo"
    for name, value in attributes.items():
        setattr(trainer.args if name == "delta" else trainer, name, value)
    expected = loss_and_gradient(GRPOTrainer._compute_loss, trainer, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert expected[1].norm() > 0.01


def test_auxiliary_loss_of_experts_is_kept(tmp_path):
    args = RecipeConfig(str(tmp_path), use_cpu=True, recipe="ppo", **COMMON)
    trainer = RecipeTrainer(tiny.mixture(tmp_path / "model"), tiny.vowels, args, tiny.prompts())
    batch = batch_with_spread(trainer)
    found = loss_and_gradient(RecipeTrainer._compute_loss, trainer, batch)
    expected = loss_and_gradient(GRPOTrainer._compute_loss, trainer, batch)
    assert trainer._metrics["train"]["aux_loss"][0] > 0
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


def test_turns_start_after_results_of_tools(tmp_path):
    """At turn level two turns of one completion have ratios of their own."""
    args = RecipeConfig(str(tmp_path), use_cpu=True, recipe="ppo", level="turn", **COMMON)
    trainer = RecipeTrainer(
        tiny.policy(), tiny.vowels, args, tiny.prompts(), processing_class=tiny.tokenizer()
    )
    batch = batch_with_spread(trainer)
    width = batch["completion_ids"].shape[1]
    batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"] = torch.tensor([1, 1, 0, 0] + [1] * (width - 4)).expand(8, width)
    batch["old_per_token_logps"] = trainer._log_prob_now(batch)
    batch["old_per_token_logps"][:, :2] -= torch.tensor([0.1, 0.3])
    trainer._compute_loss(trainer.model, batch)
    assert trainer._metrics["train"]["ratio/ratio_max"] == pytest.approx([math.exp(0.2)], rel=1e-5)
    assert trainer._metrics["train"]["ratio/ratio_min"] == pytest.approx([1.0], rel=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_dual_ratio_has_its_reference_without_beta(adapter, tmp_path):
    """A frozen copy, or the policy without its adapter; both are the policy that came in."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    model = tiny.policy()
    before = copy.deepcopy(model)
    args = RecipeConfig(str(tmp_path), use_cpu=True, recipe="rgpo-dual-product", **COMMON)
    trainer, rows = train(RecipeTrainer, args, model, peft_config=lora)
    assert (trainer.ref_model is None) == adapter
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-4
    batch = trainer._batch([trainer.train_dataset[0]] * 4)
    ids, attention = _tokens(batch)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = before(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    expected = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(
        batch["ref_per_token_logps"][mask], expected[mask], rtol=1e-4, atol=1e-4
    )


def test_an_adapter_that_was_trained_before_is_its_own_reference(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny.policy(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    args = RecipeConfig(str(tmp_path), use_cpu=True, recipe="rgpo-dual-product", **COMMON)
    trainer, rows = train(RecipeTrainer, args, model)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-4
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == trainable


def test_one_update_per_generation_is_told(tmp_path, caplog):
    once = {"num_iterations": 1, "steps_per_generation": 1, "max_steps": 3}
    library = logging.getLogger("transformers")
    library.propagate = True
    try:
        ours(tmp_path, tiny.policy(), **once)
        assert caplog.text.count("inert") == 1
        caplog.clear()
        ours(tmp_path, tiny.policy(), **once | {"num_iterations": 2})
        assert "inert" not in caplog.text
    finally:
        library.propagate = False


def test_adaptive_penalty_of_a_recipe_adapts(tmp_path):
    """By the KL of the last pass over every batch, four optimiser steps long."""
    rows = ours(tmp_path, tiny.policy(), recipe="rgpo", max_steps=9)
    found = [row["ratio/kl_coefficient"] for row in rows if "ratio/kl_coefficient" in row]
    penalty, expected = recipes.get("rgpo").kl, []
    for last in (3, 7):
        penalty = penalty.adapt((rows[last - 1]["ratio/kl_k3"] + rows[last]["ratio/kl_k3"]) / 2)
        expected.append(penalty.coefficient)
    assert found == expected
    assert found[0] != 1


def test_steps_normalised_by_the_clipping_bias(tmp_path):
    """S-PPO's loss is over the norm of what the clip took, here by automatic differentiation."""
    args = RecipeConfig(str(tmp_path), use_cpu=True, recipe="s-ppo-variant", **COMMON)
    trainer = RecipeTrainer(
        tiny.policy(), tiny.vowels, args, tiny.prompts(), processing_class=tiny.tokenizer()
    )
    batch = batch_with_spread(trainer)
    trainer.current_gradient_accumulation_steps = 1
    log_prob = trainer._forward(trainer.model, batch)[0]
    mask, advantage = batch["completion_mask"].bool(), batch["advantages"].unsqueeze(1)
    ratio = (log_prob - batch["old_per_token_logps"]).exp()
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    counts = mask.sum(1)
    bias = (((ratio * advantage) * (clipped & mask)).sum(1) / counts).mean()
    gradient = torch.autograd.grad(bias, list(trainer.model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    plain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    expected = -((plain * mask).sum(1) / counts).mean() / norm
    assert norm > 0.1
    found = trainer._compute_loss(trainer.model, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def test_medians_of_groups():
    rewards = torch.tensor([1.0, 2.0, 6.0, torch.nan, 0.0, 0.0, 0.0, 4.0])
    assert above_median(rewards, 4).tolist() == pytest.approx([-1, 0, 4, 0, 0, 0, 0, 4])


def test_leave_one_out_and_unscored_completions(tmp_path):
    rewards = iter([[1.0, 2.0, 6.0, None, 0.0, 0.0, 0.0, 4.0]])
    args = RecipeConfig(str(tmp_path), use_cpu=True, advantage="leave-one-out", **COMMON)
    trainer = RecipeTrainer(
        tiny.policy(),
        lambda **_: next(rewards),
        args,
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    trainer.model.train()
    batch = trainer._batch([trainer.train_dataset[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)])
    third = 4 / 3
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, 0, -third, -third, -third, 4]
    assert batch["advantages"].tolist() == pytest.approx(expected)


def test_remax_subtracts_the_reward_of_the_greedy_completion(tmp_path):
    seen = []

    def lengths(completions, log_metric, log_extra, **_):
        seen.append(completions)
        log_metric("calls", 1.0)
        log_extra("length", [len(text) for text in completions])
        return [float(sum(map(ord, text))) for text in completions]

    args = RecipeConfig(str(tmp_path), use_cpu=True, advantage="remax", **COMMON)
    trainer = RecipeTrainer(
        tiny.policy(), lengths, args, tiny.prompts(), processing_class=tiny.tokenizer()
    )
    trainer.model.train()
    rows = [trainer.train_dataset[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)]
    first, second = trainer._batch(rows), trainer._batch(rows)
    sampled, greedy, again, greedy_again = seen
    assert len(greedy) == 2
    assert greedy == greedy_again
    assert sampled != again
    value = {text: float(sum(map(ord, text))) for texts in seen for text in texts}
    for batch, texts in ((first, sampled), (second, again)):
        expected = [value[text] - value[greedy[i // 4]] for i, text in enumerate(texts)]
        assert batch["advantages"].tolist() == pytest.approx(expected)
    assert trainer._metrics["train"]["calls"] == [1.0, 1.0]
    assert list(trainer._logs["extra"]["length"]) == [len(text) for text in again]
    assert trainer.generation_config.do_sample
