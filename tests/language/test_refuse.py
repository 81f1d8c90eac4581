"""Everything that cannot be trained is told in one sentence before training."""

import pytest
import tiny
from datasets import Dataset
from test_trainer import COMMON
from transformers import HfArgumentParser

from rgpo.core import recipes
from rgpo.errors import RgpoError
from rgpo.language import RecipeConfig, RecipeTrainer, refuse

SETTINGS = {
    "unknown recipe 'pppo'": {"recipe": "pppo"},
    "no hyper-parameter 'epsilon'": {"recipe_options": {"epsilon": 1}},
    "sharpness must be positive": {"recipe_options": {"sharpness": -1}},
    "'trpo' takes natural-gradient steps": {"recipe": "trpo"},
    "loss_type belongs to TRL": {"loss_type": "grpo"},
    "epsilon belongs to TRL": {"epsilon": 0.1},
    "use recipe_options .dual_clip": {"delta": 3.0},
    "use level instead": {"importance_sampling_level": "sequence"},
    "use entropy_coef": {"use_adaptive_entropy": True, "entropy_target": 1.0},
    "unknown level 'word'": {"level": "word"},
    "unknown reduction 'mean'": {"reduction": "mean"},
    "unknown advantage 'gae'": {"advantage": "gae"},
    "'m2po' looks at all tokens": {"recipe": "m2po", "gradient_accumulation_steps": 2},
    "'st-ppo-variant' looks at all tokens": {
        "recipe": "st-ppo-variant",
        "gradient_accumulation_steps": 2,
    },
    "acts where the advantage is 0": {"recipe": "asymre", "top_entropy_quantile": 0.5},
    "lag must be 0 or more": {"lag": -1},
    "set beta": {"kl_in": "reward", "advantage": "critic"},
    "use advantage='critic'": {"kl_in": "reward", "beta": 0.1},
    "advantage='group' only": {
        "advantage": "leave-one-out",
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "value_clip must be": {"value_clip": -0.1},
    "gamma must lie": {"gamma": 1.1},
    "lam must lie": {"lam": -0.1},
}


def build(folder, model=None, dataset=None, tokenizer=None, options=None, **kwargs):
    args = RecipeConfig(str(folder), use_cpu=True, **COMMON | (options or {}))
    return RecipeTrainer(
        model or tiny.policy(),
        tiny.vowels,
        args,
        tiny.prompts() if dataset is None else dataset,
        processing_class=tokenizer or tiny.tokenizer(),
        **kwargs,
    )


@pytest.mark.parametrize("sentence", SETTINGS)
def test_settings_that_are_replaced_unsupported_or_contradictory(sentence, tmp_path):
    with pytest.raises(RgpoError, match=sentence):
        build(tmp_path, options=SETTINGS[sentence])


def test_inputs_that_language_does_not_have_are_named(tmp_path):
    """Every recipe of the core trains or is refused by the name of what is missing."""
    refused = {}
    for recipe in recipes.recipes():
        try:
            refuse.resolve(RecipeConfig(str(tmp_path), use_cpu=True, recipe=recipe.name))
        except RgpoError as error:
            refused[recipe.name] = str(error)
    assert all(repr(name) in sentence for name, sentence in refused.items())
    for recipe in recipes.recipes():
        unfed = set(recipe.objective.needs) - set(refuse.FED)
        if unfed:
            assert any(name in refused[recipe.name] for name in unfed)
    assert {"dpo", "ppo-ewma", "vcpo", "chord-mu"} < refused.keys()
    assert {"ppo", "gspo", "rgpo", "rgpo-dual-product", "sapo"} & refused.keys() == set()


def test_what_nothing_uses_or_cannot_be_sharded(tmp_path):
    with pytest.raises(RgpoError, match="nothing uses"):
        build(tmp_path, critic=tiny.reward_model())
    with pytest.raises(RgpoError, match="tool"):
        build(tmp_path, options={"advantage": "critic"}, rollout_func=print)
    with pytest.raises(RgpoError, match="vLLM, tools"):
        build(tmp_path, options={"advantage": "remax"}, rollout_func=print)


def test_a_reference_that_trl_could_not_load(tmp_path):
    with pytest.raises(RgpoError, match="save_pretrained"):
        build(tmp_path, options={"beta": 0.1})


def test_tokenizers_without_end_or_template(tmp_path):
    endless = tiny.tokenizer()
    endless.eos_token = None
    with pytest.raises(RgpoError, match="end-of-sequence"):
        build(tmp_path, tokenizer=endless)
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": "hi"}]]})
    with pytest.raises(RgpoError, match="no chat template"):
        build(tmp_path, dataset=chat)


def test_prompts_that_leave_no_room(tmp_path):
    prompts = Dataset.from_dict({"prompt": ["ab=", "x" * 57, "c="]})
    with pytest.raises(RgpoError, match=r"prompt 1 has 57 tokens .* window is 64"):
        build(tmp_path, dataset=prompts)
    build(tmp_path, dataset=Dataset.from_dict({"prompt": ["x" * 56] * 8}))
    endless = tiny.prompts().to_iterable_dataset()
    with pytest.raises(RgpoError, match="IterableDataset"):
        build(tmp_path, dataset=endless, options={"lag": 1})
    with pytest.raises(RgpoError, match="needs a column prompt, it has text"):
        build(tmp_path, dataset=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(RgpoError, match="no prompt"):
        build(tmp_path, dataset=Dataset.from_dict({"prompt": []}))


def test_defaults_follow_the_machine(tmp_path):
    cpu = RecipeConfig(str(tmp_path), use_cpu=True)
    assert (cpu.bf16, cpu.activation_checkpointing, cpu.use_vllm) == (False, False, False)
    assert cpu.machine.startswith("cpu: float32, without activation checkpointing")
    chosen = RecipeConfig(str(tmp_path), use_cpu=True, bf16=True, activation_checkpointing=True)
    assert chosen.machine.startswith("cpu: bf16, with activation checkpointing")


def test_the_configuration_parses_from_a_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--recipe_options", '{"sharpness": 4}']
    (args,) = HfArgumentParser(RecipeConfig).parse_args_into_dataclasses(
        [*words, "--level", "sequence", "--lag", "3"]
    )
    assert (args.recipe_options, args.level, args.lag) == ({"sharpness": 4}, "sequence", 3)


def test_what_was_chosen_is_printed(tmp_path, capsys):
    build(tmp_path)
    assert "recipe rgpo-gate on cpu: float32" in capsys.readouterr().out
