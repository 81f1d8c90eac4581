"""What the jobs have in common: TRL's trainers with the settings of a job, and what they leave."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from rgpo.errors import RgpoError
from rgpo.language import refuse
from rgpo.language.config import FitsMachine, RecipeConfig
from rgpo.language.sample import Policy, Prompt
from rgpo.language.stages import parsed
from rgpo.language.trainer import RecipeTrainer

LARGE = 500_000_000
"""Parameters that no CPU trains in a day."""


@dataclass
class SupervisedConfig(FitsMachine, SFTConfig):
    """TRL's SFTConfig with defaults that suit the machine."""


def supervised(
    model: Any,
    tokenizer: Any,
    pairs: list[dict[str, Any]],
    folder: Path,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    cpu: bool,
    schedule: str = "cosine",
) -> SFTTrainer:
    """TRL's SFTTrainer on prompt and completion, with the loss on the completion."""
    args = SupervisedConfig(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        logging_steps=5,
        save_steps=max(steps // 4, 1),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=cpu,
        max_length=None,
    )
    dataset = Dataset.from_list(pairs)
    return SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)


def online(config: Any, folder: Path, schedule: str = "constant") -> RecipeConfig:
    """The settings of `RecipeTrainer` for a job; one row of metrics per update."""
    steps = config.epochs * config.minibatches
    batch, rest = divmod(config.batch * config.group, config.minibatches)
    if rest:
        raise RgpoError(
            f"{config.batch} prompts of {config.group} completions cannot be split into "
            f"{config.minibatches} minibatches: change --batch or --minibatches"
        )
    settings = {
        "recipe": config.recipe,
        "recipe_options": parsed(config.recipe_options, "recipe-options"),
        "advantage": config.advantage,
        "beta": config.beta,
        "kl_in": config.kl_in,
        "lag": config.lag,
        "num_generations": config.group,
        "per_device_train_batch_size": batch,
        "steps_per_generation": config.minibatches,
        "num_iterations": config.epochs,
        "max_steps": config.updates * steps,
        "max_completion_length": config.max_tokens,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": schedule,
        "logging_steps": steps,
        "save_steps": config.save_every * steps,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": config.cpu,
        "seed": config.seed,
    }
    settings |= parsed(config.trainer, "trainer")
    try:
        return RecipeConfig(str(folder), **settings)
    except (TypeError, ValueError) as error:
        raise RgpoError(f"these settings cannot be trained with: {error}") from error


def refuse_early(config: Any) -> None:
    """RgpoError for settings that cannot be trained with, before any stage has cost time."""
    args = online(config, Path("unused"))
    refuse.resolve(args)
    refuse.bad_settings(args, None, tools=False)


def refuse_misfit(policy: Policy, prompts: Sequence[Prompt], length: int, *, cpu: bool) -> None:
    """RgpoError for prompts that leave no room in the model's window, and for a missing GPU."""
    name, size = policy.model.config._name_or_path, policy.model.num_parameters()  # noqa: SLF001
    if size > LARGE and not cpu and not torch.cuda.is_available():
        raise RgpoError(
            f"{name!r} has {size / 1e9:.1f} billion parameters and there is no GPU: use a machine "
            "with one, a smaller model, or --cpu True if you have days"
        )
    window = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids) for ids in policy.prompt_ids(prompts))
    if window is not None and longest + length > window:
        raise RgpoError(
            f"the longest prompt has {longest} tokens and answers may have {length}, but the "
            f"window of {name!r} is {window}: leave out long prompts or lower --max-tokens"
        )


def adapters(rank: int) -> LoraConfig | None:
    """LoRA on all linear layers, or None for full fine-tuning."""
    if rank == 0:
        return None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def save_policy(trainer: RecipeTrainer, folder: Path) -> None:
    """The trained policy as one model, adapters merged."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)


def remove_checkpoints(folder: Path) -> None:
    """A finished stage needs none."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
