"""`rgpo rlhf`: from preferences to a policy, every stage cached and resumable.

    policy  ->  preferences  ->  reward  ->  trained  ->  evaluation
    (SFT)      (given, or made)  (RewardTrainer)  (RecipeTrainer)  (table, report.html)

Without `--preferences` the experiment is synthetic: pairs of the policy's own answers, labelled by
the gold scorer of `rgpo.language.gold`, so that the true reward of the result is known.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from rgpo.errors import RgpoError
from rgpo.language import embedded, reviews
from rgpo.language.characters import small_model, word_tokenizer
from rgpo.language.evaluation import measured
from rgpo.language.fitting import (
    adapters,
    online,
    refuse_early,
    refuse_misfit,
    remove_checkpoints,
    save_policy,
    supervised,
)
from rgpo.language.gold import Gold
from rgpo.language.labels import make_pairs, read_rows, write_rows
from rgpo.language.preferences import as_prompt, load_pairs, load_prompts
from rgpo.language.reward_model import PreferenceConfig, RewardModel, train_reward_model
from rgpo.language.rewards import with_eos_penalty
from rgpo.language.sample import Policy, Prompt, load_policy
from rgpo.language.stages import Job, Watch
from rgpo.language.trainer import RecipeTrainer

EMBEDDED = ("smollm2", "tiny")
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %} [SEP] {% endif %}{% endfor %}"
)
"""How a reward model without a chat template reads a conversation."""


@dataclass(frozen=True)
class RlhfConfig:
    """A run of `rgpo rlhf`; what is None depends on the model (`PRESETS`)."""

    recipe: str = "rgpo-dual-geometric"
    """Objective by name; `rgpo objectives` lists them. The default: docs/rlhf-study.md."""

    recipe_options: str = ""
    """Its hyper-parameters as JSON, such as '{"sharpness": 4}'."""

    model: str = "smollm2"
    """smollm2 (135 million parameters, embedded), tiny (from scratch), a folder or a hub name."""

    preferences: str | None = None
    """Pairs: JSON lines, Parquet or a hub name; None: made here with the gold scorer."""

    prompts: str | None = None
    """Prompts: the same, or lines of a .txt file; None: those of the preferences."""

    drop_bad_pairs: bool = False
    """Leave out empty, equal and repeated pairs instead of stopping at the first."""

    reward_model: str | None = None
    """Backbone; None: MiniLM for smollm2, else the policy itself."""

    sft_steps: int | None = None
    """Supervised steps on the chosen answers before everything else."""

    pairs: int | None = None
    """Preference pairs that are made, or the most that are used."""

    reward_steps: int | None = None
    """Steps of the reward model, `reward_batch` pairs each."""

    reward_batch: int = 16
    """Pairs of one step."""

    reward_learning_rate: float | None = None
    """Of the reward model."""

    eos_penalty: bool = True
    """Answers that were cut at the length limit have reward -1."""

    lora: int | None = None
    """Rank of LoRA adapters on all linear layers; 0: full fine-tuning."""

    updates: int | None = None
    """Generated batches."""

    batch: int | None = None
    """Prompts of a generated batch."""

    group: int = 4
    """Answers to a prompt."""

    epochs: int = 2
    """Passes over a generated batch."""

    minibatches: int = 2
    """Optimiser steps of a pass."""

    learning_rate: float | None = None
    """Of the policy."""

    advantage: Literal["group", "leave-one-out", "remax", "critic"] = "group"
    """Baseline of the reward; critic starts from the reward model where that reads the same tokens
    from left to right, else from the policy."""

    beta: float = 0.05
    """KL penalty to the policy before RL."""

    kl_in: Literal["loss", "reward"] = "loss"
    """Where it goes."""

    lag: int = 0
    """Data are exactly this many updates old."""

    max_tokens: int | None = None
    """Length limit of an answer."""

    held_out: int = 16
    """Prompts that are kept for the evaluation."""

    samples: int = 8
    """Answers to each of them, before and after."""

    save_every: int = 10
    """Updates between checkpoints."""

    trainer: str = ""
    """Any further setting of TRL's GRPOConfig as JSON."""

    seed: int = 0
    """Of everything."""

    cpu: bool = False
    """Do not use a GPU."""

    def resolved(self) -> "RlhfConfig":
        """With the preset of the model in place of None."""
        preset = PRESETS.get(self.model, PRESETS[""])
        left = {name: value for name, value in preset.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **left)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "sft_steps": 300, "pairs": 2000, "reward_steps": 250, "reward_learning_rate": 1e-3,
        "lora": 0, "updates": 60, "batch": 16, "learning_rate": 1e-4, "max_tokens": 20,
    },
    "smollm2": {
        "sft_steps": 0, "pairs": 256, "reward_steps": 45, "reward_learning_rate": 5e-5,
        "lora": 16, "updates": 12, "batch": 4, "learning_rate": 3e-4, "max_tokens": 24,
    },
    "": {
        "sft_steps": 0, "pairs": 100_000, "reward_steps": 1000, "reward_learning_rate": 1e-5,
        "lora": 0, "updates": 500, "batch": 16, "learning_rate": 1e-6, "max_tokens": 128,
    },
}  # fmt: skip
"""Sizes of the embedded models, chosen for two CPU cores, and of any other."""


@dataclass(frozen=True)
class Base:
    """What online RL starts from: what the first three stages left."""

    start: str
    """Where the policy before RL lies, the reference."""

    reward: Path
    """Folder of the reward model."""

    training: list[Prompt]
    held_out: list[Prompt]

    pairs: int
    """Preference pairs of the reward model."""

    accuracy: float
    """Of the reward model, on pairs that it was not trained on."""

    floor: float | None
    """Of the gold scorer, in nats per token; None where the preferences were given."""

    def judges(self) -> tuple[Policy, RewardModel, Gold | None]:
        """Reference policy, reward model and gold scorer, as `measured` takes them."""
        reference = load_policy(self.start)
        gold = None if self.floor is None else Gold(reference, self.floor)
        return reference, RewardModel.load(self.reward), gold


def run(config: RlhfConfig, path: Path, watch: Watch) -> dict[str, Any]:
    """Run or continue the job in `path`: what was measured before and after."""
    config = config.resolved()
    job = opened(config, path, watch)
    with job.finishing():
        base = prepared(job, config)
        job.stage("trained", lambda f: _learn(job, config, base, f))
        found = job.stage("evaluation", lambda f: _evaluate(path, base, config, f))
        result = {
            "reward_accuracy": base.accuracy,
            "pairs": base.pairs,
            "answers": len(base.held_out) * config.samples,
            "floor": base.floor,
            **{when: found[when] for when in ("before", "after")},
        }
        job.run.finish("finished", result=result)
    return result


def evaluate(config: RlhfConfig, path: Path, samples: int, seed: int) -> dict[str, Any]:
    """Measure the policy of a finished run again, with other answers to the held-out prompts."""
    base = prepared(opened(config, path, lambda *_: None), config)
    policy = load_policy(path / "trained")
    answers = policy.sample(base.held_out * samples, config.max_tokens, seed=seed)
    after, _ = measured(policy, *base.judges(), answers)
    return {"after": after, "answers": len(answers)}


def opened(config: RlhfConfig, path: Path, watch: Watch) -> Job:
    """The job in `path`, new or as it stands; RgpoError for what can be known before any stage."""
    _refuse(config)
    return Job.open(path, {"job": "rlhf"} | dataclasses.asdict(config), watch)


def prepared(job: Job, config: RlhfConfig) -> Base:
    """The stages before RL: policy, preferences, reward model."""
    path, chat = job.run.path, _has_template(config)
    given = _given_pairs(config, chat=chat)
    training, held_out = _prompts(config, given, chat=chat)
    if config.model not in EMBEDDED:
        policy, length = load_policy(config.model), config.max_tokens or 1
        refuse_misfit(policy, training + held_out, length, cpu=config.cpu)
    start = job.stage("policy", lambda f: _policy(job, config, given, f))["at"]
    pairs = job.stage("preferences", lambda f: _preferences(job, config, start, training, f))
    rows = given or read_rows(path / "preferences" / "pairs.jsonl")
    scored = job.stage("reward", lambda f: _reward(job, config, start, rows, training, f))
    return Base(
        start,
        path / "reward",
        training,
        held_out,
        len(rows),
        scored["accuracy"],
        pairs.get("floor"),
    )


def _refuse(config: RlhfConfig) -> None:
    """RgpoError for what can be known before any stage."""
    if config.model not in EMBEDDED and config.preferences is None:
        raise RgpoError(
            f"--model {config.model} needs --preferences: only the embedded models (smollm2, tiny) "
            "label pairs of their own"
        )
    if config.sft_steps and config.preferences is None and config.model != "tiny":
        raise RgpoError("--sft-steps learns from the chosen answers of --preferences: give them")
    if config.reward_model is not None:
        load_reward_tokenizer(config.reward_model)
    refuse_early(config)


def _given_pairs(config: RlhfConfig, *, chat: bool) -> list[dict[str, Any]] | None:
    if config.preferences is None:
        return None
    pairs = load_pairs(config.preferences, chat=chat, drop=config.drop_bad_pairs)
    return pairs[: config.pairs]


def _has_template(config: RlhfConfig) -> bool:
    if config.model == "tiny":
        return False
    name = embedded.smollm2() if config.model == "smollm2" else config.model
    try:
        return AutoTokenizer.from_pretrained(name).chat_template is not None
    except (OSError, ValueError):
        load_policy(name)  # says what is wrong with it
        raise


def _prompts(
    config: RlhfConfig, given: list[dict[str, Any]] | None, *, chat: bool
) -> tuple[list[Prompt], list[Prompt]]:
    """To train on, and to evaluate on; in one fixed order, no prompt twice."""
    if config.prompts is not None:
        found = load_prompts(config.prompts, chat=chat)
    elif given is not None:
        found = list({repr(row["prompt"]): row["prompt"] for row in given}.values())
    else:
        texts = reviews.questions() if config.model == "tiny" else embedded.requests()
        found = [as_prompt(text, chat=chat) for text in texts]
    if len(found) < config.held_out + (config.batch or 1):
        raise RgpoError(
            f"{len(found)} different prompts are too few for --held-out {config.held_out} and "
            f"--batch {config.batch}: give more prompts or lower these"
        )
    return found[config.held_out :], found[: config.held_out]


def _policy(
    job: Job, config: RlhfConfig, given: list[dict[str, Any]] | None, folder: Path
) -> dict[str, Any]:
    """Where the policy before RL lies; supervised here if it is tiny or was asked for."""
    if not config.sft_steps:
        return {"at": str(embedded.smollm2() if config.model == "smollm2" else config.model)}
    if config.model == "tiny":
        tokenizer = word_tokenizer(reviews.vocabulary())
        model = small_model(tokenizer, config.seed, hidden_size=96, num_hidden_layers=2,
                            intermediate_size=192, max_position_embeddings=64)  # fmt: skip
        rows, batch, rate = reviews.conversations(6000, config.seed), 64, 2e-3
    else:
        policy = load_policy(config.model, torch.float32)
        model, tokenizer, batch, rate = policy.model, policy.tokenizer, 16, 1e-5
        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in given or ()]
    trainer = supervised(
        model, tokenizer, rows, folder, steps=config.sft_steps, batch=batch, learning_rate=rate,
        seed=config.seed, cpu=config.cpu,
    )  # fmt: skip
    job.train(trainer, "policy", ("loss",), log=False)
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    remove_checkpoints(folder)
    return {"at": str(folder)}


def _preferences(
    job: Job, config: RlhfConfig, start: str, prompts: list[Prompt], folder: Path
) -> dict[str, Any]:
    """Pairs of the policy's answers in pairs.jsonl, unless pairs were given."""
    if config.preferences is not None:
        return {}

    def tell(fraction: float, note: str) -> None:
        job.watch("preferences", fraction, note)

    file, policy = folder / "pairs.jsonl", load_policy(start)
    floor = make_pairs(policy, prompts, config.pairs or 0, config.max_tokens or 1, file, tell)
    return {"floor": floor}


def _reward(
    job: Job,
    config: RlhfConfig,
    start: str,
    rows: list[dict[str, Any]],
    prompts: list[Prompt],
    folder: Path,
) -> dict[str, Any]:
    """Train, validate, calibrate and save the reward model."""
    default = str(embedded.minilm()) if config.model == "smollm2" else start
    name = config.reward_model or default
    tokenizer = load_reward_tokenizer(name)
    args = PreferenceConfig(
        str(folder),
        max_steps=config.reward_steps,
        per_device_train_batch_size=config.reward_batch,
        learning_rate=config.reward_learning_rate,
        logging_steps=5,
        save_steps=max((config.reward_steps or 0) // 4, 1),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        use_cpu=config.cpu,
    )
    reward = train_reward_model(
        name,
        tokenizer,
        Dataset.from_list(rows),
        args,
        lambda trainer: job.train(trainer, "reward", ("loss", "accuracy"), log=False),
    )
    samples = load_policy(start).sample(prompts[:128], config.max_tokens, seed=23)
    reward.calibrate([s.prompt for s in samples], [s.completion for s in samples])
    reward.save(folder)
    remove_checkpoints(folder)
    return {"accuracy": reward.model.config.validation_accuracy, "backbone": name}


def load_reward_tokenizer(name: str) -> Any:
    """The backbone's tokenizer, with a template for conversations if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RgpoError(f"the reward model {name!r} could not be loaded ({reason})") from error
    if tokenizer.chat_template is None:
        start, end = tokenizer.cls_token, tokenizer.sep_token
        tokenizer.chat_template = TEMPLATE if start is None else f"{start}{TEMPLATE}{end}"
    return tokenizer


def learner(config: RlhfConfig, base: Base, folder: Path) -> RecipeTrainer:
    """The trainer of the stage of online RL, with its checkpoints in `folder`."""
    tokenizer = load_policy(base.start).tokenizer
    reward = RewardModel.load(base.reward)
    score: Any = reward
    if config.eos_penalty:
        score = with_eos_penalty(reward, tokenizer.eos_token_id)
    causal = hasattr(reward.model, "score") and len(reward.tokenizer) == len(tokenizer)
    return RecipeTrainer(
        base.start,
        score,
        online(config, folder),
        Dataset.from_list([{"prompt": prompt} for prompt in base.training]),
        critic=reward.model if config.advantage == "critic" and causal else None,
        processing_class=tokenizer,
        peft_config=adapters(config.lora or 0),
    )


def _learn(job: Job, config: RlhfConfig, base: Base, folder: Path) -> dict[str, Any]:
    trainer = learner(config, base, job.run.checkpoints)
    job.train(trainer, "trained", ("reward", "kl", "ratio/kl_k3"), log=True)
    save_policy(trainer, folder)
    return {}


def _evaluate(path: Path, base: Base, config: RlhfConfig, folder: Path) -> dict[str, Any]:
    """Both policies on the held-out prompts; their answers in answers.jsonl."""
    reference, reward, gold = base.judges()
    found: dict[str, Any] = {}
    answers = []
    for when, at in (("before", base.start), ("after", str(path / "trained"))):
        policy = load_policy(at)
        samples = policy.sample(base.held_out * config.samples, config.max_tokens, seed=31)
        found[when], rows = measured(policy, reference, reward, gold, samples)
        answers += [{"policy": when, **row} for row in rows]
    write_rows(folder / "answers.jsonl", answers)
    return found
