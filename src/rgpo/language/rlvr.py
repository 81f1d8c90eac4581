"""`rgpo rlvr`: a policy learns from rewards that a program verifies.

warm start (without --model)  ->  accuracy before  ->  online RL  ->  accuracy after
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import TrainerCallback

from rgpo.errors import RgpoError
from rgpo.language.characters import character_tokenizer, small_model
from rgpo.language.evaluation import summary
from rgpo.language.fitting import (
    adapters,
    online,
    refuse_early,
    refuse_misfit,
    remove_checkpoints,
    save_policy,
    supervised,
)
from rgpo.language.sample import Policy, load_policy
from rgpo.language.stages import DONE, Job, Watch, cache_folder, cached, parsed
from rgpo.language.trainer import RecipeTrainer
from rgpo.language.verifiable import Task, load_task


@dataclass(frozen=True)
class RlvrConfig:
    """A run of `rgpo rlvr`."""

    recipe: str = "rgpo-gate"
    """Objective by name; `rgpo objectives` lists them."""

    recipe_options: str = ""
    """Its hyper-parameters as JSON, such as '{"sharpness": 4}'."""

    task: str = "spell_backward"
    """Any family of reasoning-gym."""

    task_options: str = ""
    """Settings of the family as JSON, such as '{"max_word_len": 5}'."""

    model: str | None = None
    """Folder or hub name; default: a model of characters, 0.6 million parameters, made here."""

    lora: int = 0
    """Rank of LoRA adapters on all linear layers; 0: full fine-tuning."""

    warm_target: float = 0.3
    """The model of characters learns from right answers until so many of its samples are right."""

    warm_steps: int = 200
    """At most so many supervised steps, 256 answers each."""

    updates: int = 250
    """Generated batches."""

    batch: int = 16
    """Prompts of a generated batch."""

    group: int = 8
    """Completions of a prompt."""

    epochs: int = 1
    """Passes over a generated batch."""

    minibatches: int = 2
    """Optimiser steps of a pass."""

    learning_rate: float = 1e-4
    """Of the policy at the start; it falls linearly to 0."""

    advantage: Literal["group", "leave-one-out", "remax", "critic"] = "group"
    """Baseline of the reward."""

    beta: float = 0.0
    """KL penalty to the policy before RL."""

    kl_in: Literal["loss", "reward"] = "loss"
    """Where it goes; per token in the reward with a critic."""

    lag: int = 0
    """Data are exactly this many updates old."""

    max_tokens: int = 16
    """Length limit of a completion."""

    entries: int = 4000
    """Different entries to train on."""

    held_out: int = 256
    """Different entries to measure accuracy on, before and after."""

    save_every: int = 50
    """Updates between checkpoints."""

    trainer: str = ""
    """Any further setting of TRL's GRPOConfig as JSON, such as '{"temperature": 0.8}'."""

    seed: int = 0
    """Of everything."""

    cpu: bool = False
    """Do not use a GPU."""


def run(config: RlvrConfig, path: Path, watch: Watch) -> dict[str, Any]:
    """Run or continue the job in `path`; the accuracies."""
    refuse_early(config)
    job = Job.open(path, {"job": "rlvr"} | dataclasses.asdict(config), watch)
    with job.finishing():
        task = _task(config)
        held_out, training = task.rows[: config.held_out], task.rows[config.held_out :]
        if len(training) < config.batch:
            raise RgpoError(
                f"{config.task!r} has {len(task.rows)} different entries, {len(training)} without "
                "the held-out ones: lower --held-out, or raise --entries or make the task larger"
            )
        start = config.model
        if start is None:
            start = job.stage("warm", lambda f: _warm(job, config, task, training, f))["at"]
        before = job.stage("before", lambda _: _measured(task, start, held_out, config))
        job.stage("trained", lambda f: _learn(job, config, task, start, training, f))
        trained = str(path / "trained")
        after = job.stage("after", lambda _: _measured(task, trained, held_out, config, start))
        result = {"before": before, "after": after, "held_out": len(held_out)}
        job.run.finish("finished", result=result)
    return result


def _task(config: RlvrConfig) -> Task:
    size = config.entries + config.held_out
    options = parsed(config.task_options, "task-options")
    if config.model is None:
        return load_task(config.task, size, config.seed, None, **options)
    policy = load_policy(config.model)
    chat = policy.tokenizer.chat_template is not None
    task = load_task(config.task, size, config.seed, chat, **options)
    refuse_misfit(policy, [row["prompt"] for row in task.rows], config.max_tokens, cpu=config.cpu)
    return task


def _warm(
    job: Job, config: RlvrConfig, task: Task, rows: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """The model of characters after some supervised steps; kept in the cache as well."""
    settings = (config.warm_target, config.warm_steps, config.entries, config.seed)
    told = repr((config.task, config.task_options, *settings))
    name = f"rlvr-{config.task}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if (cache_folder() / name).exists():
        return {"at": str(cache_folder() / name)}
    tokenizer = character_tokenizer()
    pairs = [{"prompt": row["prompt"], "completion": row["answer"].lower()} for row in rows]
    trainer = supervised(
        small_model(tokenizer, config.seed), tokenizer, pairs, folder, steps=config.warm_steps,
        batch=256, learning_rate=2e-3, seed=config.seed, cpu=config.cpu,
        schedule="constant",
    )  # fmt: skip
    trainer.add_callback(_Enough(config, task, Policy(trainer.model, tokenizer), rows[:128]))
    job.train(trainer, "warm", ("loss",), log=False)

    def keep(place: Path) -> None:
        trainer.model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    at = cached(name, keep)
    remove_checkpoints(folder)
    return {"at": str(at)}


class _Enough(TrainerCallback):
    """Ends the warm start where the policy samples enough right answers.

    Where that is differs between seeds by dozens of steps, in which it learns most.
    """

    def __init__(
        self, config: RlvrConfig, task: Task, policy: Policy, rows: list[dict[str, Any]]
    ) -> None:
        self.config, self.task, self.policy, self.rows = config, task, policy, rows

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        """Measure every fifth step."""
        if state.global_step % 5 == 0:
            self.policy.model.eval()
            prompts = [row["prompt"] for row in self.rows]
            samples = self.policy.sample(prompts, self.config.max_tokens)
            control.should_training_stop |= (
                self.task.accuracy(samples, self.rows) >= self.config.warm_target
            )
            self.policy.model.train()


def _learn(
    job: Job,
    config: RlvrConfig,
    task: Task,
    start: str,
    rows: list[dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    args = online(config, job.run.checkpoints, schedule="linear")
    columns = [{"prompt": row["prompt"], "entry": row["entry"]} for row in rows]
    policy = load_policy(start)
    trainer = RecipeTrainer(
        start,
        task.reward,
        args,
        Dataset.from_list(columns),
        processing_class=policy.tokenizer,
        peft_config=adapters(config.lora),
    )
    job.train(trainer, "trained", ("reward", "ratio/kl_k3", "ratio/ess"), log=True)
    save_policy(trainer, folder)
    return {}


def evaluate(config: RlvrConfig, path: Path, seed: int) -> dict[str, Any]:
    """Measure the policy of a finished run again, with other samples for the held-out entries."""
    task = _task(config)
    start = config.model or json.loads((path / "warm" / DONE).read_bytes())["at"]
    held_out = task.rows[: config.held_out]
    after = _measured(task, str(path / "trained"), held_out, config, start, seed)
    return {"after": after, "held_out": len(held_out)}


def _measured(
    task: Task,
    model: str,
    rows: list[dict[str, Any]],
    config: RlvrConfig,
    start: str | None = None,
    seed: int = 1,
) -> dict[str, Any]:
    """Shares of right answers, and KL(policy || start) per sampled answer."""
    policy, prompts = load_policy(model), [row["prompt"] for row in rows]
    sampled = policy.sample(prompts, config.max_tokens, seed=seed)
    greedy = policy.sample(prompts, config.max_tokens, greedy=True)
    found: dict[str, Any] = {
        "sampled": task.accuracy(sampled, rows),
        "greedy": task.accuracy(greedy, rows),
    }
    if start is not None:
        own, other = policy.log_probs(sampled), load_policy(start).log_probs(sampled)
        found["kl"] = summary([float((a - b).sum()) for a, b in zip(own, other, strict=True)])
    return found
