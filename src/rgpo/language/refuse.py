"""What cannot be trained is refused before anything is trained, in one sentence."""

import importlib.util
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_args

from transformers import PreTrainedModel
from trl import GRPOConfig
from trl.data_utils import is_conversational

from rgpo.core import recipes
from rgpo.core.objective import Objective
from rgpo.core.ratio import Level
from rgpo.core.recipes import Recipe
from rgpo.errors import RgpoError
from rgpo.language.config import Aggregation, Baseline, Place, RecipeConfig

if TYPE_CHECKING:
    from rgpo.language.trainer import RecipeTrainer

FED = ("reference_log_ratio", "proximal_log_ratio", "log_prob", "median_advantage", "mask")
"""Inputs of `rgpo.core.objective.INPUTS` that the trainer can give to a recipe."""

REPLACED = {
    "loss_type": "recipe and reduction",
    "importance_sampling_level": "level",
    "epsilon": "recipe_options",
    "epsilon_high": "recipe_options",
    "delta": "recipe_options (dual_clip of ppo-dual-clip)",
    "sapo_temperature_pos": "recipe_options (tau_positive of sapo)",
    "sapo_temperature_neg": "recipe_options (tau_negative of sapo)",
    "vespo_k_pos": "recipe",
    "vespo_k_neg": "recipe",
    "vespo_lambda_pos": "recipe",
    "vespo_lambda_neg": "recipe",
}
"""Settings of TRL's own objectives, and the setting that stands for each here."""


def resolve(args: RecipeConfig) -> Recipe:
    """The recipe with its options and its level; RgpoError for one that cannot be fed here."""
    choices = {"level": Level, "reduction": Aggregation, "advantage": Baseline, "kl_in": Place}
    for name, kind in choices.items():
        chosen = getattr(args, name)
        if chosen is not None and chosen not in get_args(kind):
            raise RgpoError(f"unknown {name} {chosen!r}: choose from {', '.join(get_args(kind))}")
    try:
        recipe = recipes.get(args.recipe).configure(**(args.recipe_options or {}))
    except ValueError as error:
        raise RgpoError(str(error)) from None
    if args.level is not None:
        recipe = replace(recipe, level=args.level)
    unfit_recipe(recipe, args)
    return recipe


def unfit_recipe(recipe: Recipe, args: RecipeConfig) -> None:
    """RgpoError naming the input or the mechanism that this trainer does not have."""
    objective, name = recipe.objective, recipe.name
    missing = [needed for needed in objective.needs if needed not in FED]
    control, own = "rgpo train can", "a loop of your own can"
    lacks = [
        (missing, f"needs {', '.join(missing)}", control),
        (recipe.step == "natural-gradient", "takes natural-gradient steps", control),
        (recipe.anchor_decay, "needs an average of past policies", control),
        (
            recipe.data == "expert",
            "learns from an expert's samples",
            f"{own} (docs/objectives/pairs.md)",
        ),
        (
            objective.scope == "group",
            "compares the completions of a prompt with each other",
            f"{own} (rgpo.core.loss.group_loss)",
        ),
        (
            type(objective).learning_rate_scale is not Objective.learning_rate_scale,
            "sets the learning rate by itself",
            f"{own} (Objective.learning_rate_scale)",
        ),
    ]
    for lacking, what, elsewhere in lacks:
        if lacking:
            raise RgpoError(
                f"recipe {name!r} {what}, which this trainer cannot and {elsewhere}: choose "
                "another recipe"
            )
    if "median_advantage" in objective.needs and args.advantage == "critic":
        raise RgpoError(f"recipe {name!r} needs the median of a group: use advantage='group'")
    whole = args.gradient_accumulation_steps == 1 and args.world_size == 1
    together = objective.scope == "batch" or recipe.step == "clip-normalized"
    if together and not whole:
        raise RgpoError(
            f"recipe {name!r} looks at all tokens of an optimiser step together: "
            "set gradient_accumulation_steps=1 and use one process"
        )
    if recipe.step == "clip-normalized" and args.reduction == "sequence-sum":
        raise RgpoError(f"recipe {name!r} takes a mean: choose another reduction")
    scaled = args.top_entropy_quantile < 1 or args.off_policy_mask_threshold is not None
    if not objective.homogeneous and (scaled or args.use_vllm):
        raise RgpoError(
            f"recipe {name!r} acts where the advantage is 0, so top_entropy_quantile, "
            "off_policy_mask_threshold and vLLM's correction cannot mask its tokens: leave them out"
        )


def bad_settings(args: RecipeConfig, critic: Any, tools: bool) -> None:
    """RgpoError for the first setting that is replaced, unsupported or contradictory."""
    default = {field.name: field.default for field in fields(GRPOConfig)}
    for name, instead in REPLACED.items():
        if getattr(args, name) != default[name]:
            raise RgpoError(f"{name} belongs to TRL's own objectives: use {instead} instead")
    sharded = args.deepspeed is not None or bool(args.fsdp)
    wrong = [
        (args.use_adaptive_entropy, "use_adaptive_entropy is not supported: use entropy_coef"),
        (
            args.use_vllm and importlib.util.find_spec("vllm") is None,
            "use_vllm needs vLLM, which is not installed: `pip install vllm`, or leave it out",
        ),
        (args.lag < 0, f"lag must be 0 or more, got {args.lag}"),
        (args.value_clip < 0, f"value_clip must be 0 (off) or more, got {args.value_clip}"),
        (not 0 <= args.gamma <= 1, f"gamma must lie in [0, 1], got {args.gamma}"),
        (not 0 <= args.lam <= 1, f"lam must lie in [0, 1], got {args.lam}"),
        (
            args.kl_in == "reward" and args.beta == 0,
            "kl_in='reward' without beta penalises nothing: set beta",
        ),
        (
            args.kl_in == "reward" and args.advantage != "critic",
            "kl_in='reward' is per token: use advantage='critic', or kl_in='loss'",
        ),
        (
            critic is not None and args.advantage != "critic",
            "a critic is given that nothing uses: set advantage='critic'",
        ),
        (
            args.advantage == "critic" and tools,
            "advantage='critic' does not know tool results: use another advantage or no tools",
        ),
        (
            args.advantage == "critic" and sharded,
            "the critic is not sharded: use another advantage, or neither DeepSpeed nor FSDP",
        ),
        (
            args.advantage == "remax" and (tools or args.use_vllm),
            "advantage='remax' decodes with transformers: use no vLLM, tools or rollout_func",
        ),
        (
            args.advantage != "group" and args.multi_objective_aggregation != "sum_then_normalize",
            "multi_objective_aggregation is for advantage='group' only: leave it out",
        ),
    ]
    for refused, sentence in wrong:
        if refused:
            raise RgpoError(sentence)


def bad_reference(model: Any, args: RecipeConfig, needed: bool) -> None:
    """RgpoError where TRL could not load, or we not shard, the reference model."""
    full = isinstance(model, PreTrainedModel)
    if args.beta != 0 and full and not model.config._name_or_path:  # noqa: SLF001
        raise RgpoError(
            "beta > 0 makes TRL load the reference model from where the policy was loaded, but "
            "this model was built in memory: save it with save_pretrained and pass the folder"
        )
    if needed and args.beta == 0 and (args.deepspeed is not None or bool(args.fsdp)):
        raise RgpoError(
            "the copy of the reference model is not sharded: with DeepSpeed or FSDP set "
            "beta=1e-9, so that TRL shards the reference"
        )


def bad_tokenizer(tokenizer: Any) -> None:
    """RgpoError unless completions can be padded and end."""
    if tokenizer is not None and tokenizer.eos_token is None:
        raise RgpoError(
            "the tokenizer has no end-of-sequence token, so completions could not end: "
            "set tokenizer.eos_token (and pad_token)"
        )


def bad_prompts(trainer: "RecipeTrainer") -> None:
    """RgpoError for prompts that have no template or leave no room for the completion."""
    dataset, tokenizer = trainer.train_dataset, trainer.processing_class
    if not hasattr(dataset, "__len__"):
        if trainer.args.lag:
            raise RgpoError("a lag draws prompts by number: give a Dataset, not an IterableDataset")
        return
    if trainer.rollout_func is not None or trainer.environment_factories is not None:
        return
    if len(dataset) == 0:
        raise RgpoError("the training set has no prompt")
    if "prompt" not in dataset.column_names:
        raise RgpoError(
            f"the training set needs a column prompt, it has {', '.join(dataset.column_names)}"
        )
    if is_conversational(dataset[0]) and tokenizer.chat_template is None:
        raise RgpoError(
            "the prompts are conversations but the tokenizer has no chat template: set "
            "tokenizer.chat_template or give prompts as text"
        )
    groups = trainer.args.generation_batch_size // trainer.num_generations
    if len(dataset) < groups:
        raise RgpoError(
            f"the training set has {len(dataset)} prompts and every update takes {groups} "
            "different ones: give more prompts or take a smaller batch"
        )
    window = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if window is None or trainer._is_vlm:  # noqa: SLF001
        return
    room = window - trainer.args.max_completion_length
    for start in range(0, len(dataset), 1000):
        prompts = dataset[start : start + 1000]["prompt"]
        for offset, ids in enumerate(trainer._tokenize_prompts(prompts)[0]):  # noqa: SLF001
            if len(ids) > room:
                raise RgpoError(
                    f"prompt {start + offset} has {len(ids)} tokens and completions may have "
                    f"{trainer.args.max_completion_length}, but the model's window is {window}: "
                    "drop long prompts or lower max_completion_length"
                )
