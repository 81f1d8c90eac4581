"""`rgpo rlhf`: from preferences to a policy, every stage cached and resumable.

    policy  ->  preferences  ->  reward  ->  trained  ->  evaluation
    (SFT)      (given, or made)  (RewardTrainer)  (RecipeTrainer)  (table, report.html)

Without `--preferences` the experiment is synthetic: pairs of the policy's own answers, labelled by
the gold scorer of `rgpo.language.gold`, so that the true reward of the result is known.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from rgpo.errors import RgpoError
from rgpo.language import embedded, reviews
from rgpo.language.characters import small_model, word_tokenizer
from rgpo.language.fitting import (
    adapters,
    online,
    refuse_early,
    remove_checkpoints,
    save_policy,
    supervised,
)
from rgpo.language.gold import Gold
from rgpo.language.preferences import as_prompt, load_pairs, load_prompts
from rgpo.language.reward_model import PreferenceConfig, RewardModel, train_reward_model
from rgpo.language.rewards import with_eos_penalty
from rgpo.language.sample import Policy, Prompt, Sample, load_policy
from rgpo.language.stages import Job, Watch, mean
from rgpo.language.trainer import RecipeTrainer
from rgpo.runs.atomic import json_bytes, write_atomic

EMBEDDED = ("smollm2", "tiny")
CHUNK = 64
"""Pairs that are sampled, labelled and written at a time."""

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %} [SEP] {% endif %}{% endfor %}"
)
"""How a reward model without a chat template reads a conversation."""


@dataclass(frozen=True)
class RlhfConfig:
    """A run of `rgpo rlhf`; what is None depends on the model (`PRESETS`)."""

    recipe: str = "rgpo-dual-product"
    """Objective by name; `rgpo objectives` lists them."""

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


def run(config: RlhfConfig, path: Path, watch: Watch) -> dict[str, Any]:
    """Run or continue the job in `path`: what was measured before and after."""
    config = config.resolved()
    _refuse(config)
    job = Job.open(path, {"job": "rlhf"} | dataclasses.asdict(config), watch)
    with job.finishing():
        chat = _has_template(config)
        given = _given_pairs(config, chat=chat)
        training, held_out = _prompts(config, given, chat=chat)
        start = job.stage("policy", lambda f: _policy(job, config, given, f))["at"]
        pairs = job.stage("preferences", lambda f: _preferences(job, config, start, training, f))
        rows = given or read_rows(path / "preferences" / "pairs.jsonl")
        scored = job.stage("reward", lambda f: _reward(job, config, start, rows, training, f))
        job.stage("trained", lambda f: _learn(job, config, start, training, f))
        found = job.stage("evaluation", lambda f: _evaluate(path, start, held_out, config, f))
        result = {
            "reward_accuracy": scored["accuracy"],
            "pairs": len(rows),
            "answers": len(held_out) * config.samples,
            "floor": pairs.get("floor"),
            **{when: found[when] for when in ("before", "after")},
        }
        job.run.finish("finished", result=result)
    return result


def _refuse(config: RlhfConfig) -> None:
    """RgpoError for what can be known before any stage."""
    if config.model not in EMBEDDED and config.preferences is None:
        raise RgpoError(
            f"--model {config.model} needs --preferences: only the embedded models (smollm2, tiny) "
            "label pairs of their own"
        )
    if config.sft_steps and config.preferences is None and config.model != "tiny":
        raise RgpoError("--sft-steps learns from the chosen answers of --preferences: give them")
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
    """Pairs of the policy's answers in pairs.jsonl, labelled by the gold scorer; made in chunks."""
    if config.preferences is not None:
        return {}
    policy = load_policy(start)
    floor_of = policy.sample(prompts * (-(-256 // len(prompts))), config.max_tokens, seed=17)
    gold = Gold.calibrated(policy, floor_of[:256])
    file, wanted = folder / "pairs.jsonl", config.pairs or 0
    rows, chunk = read_chunks(file)
    while len(rows) < wanted:
        if chunk * CHUNK > 4 * wanted + 4 * CHUNK:
            raise RgpoError(
                f"{chunk * CHUNK} pairs of answers gave {len(rows)} different gold rewards: the "
                "policy says too much of the same"
            )
        asked = [prompts[(chunk * CHUNK + i) % len(prompts)] for i in range(CHUNK)]
        made = _labelled(policy, gold, asked, config, seed=1000 + chunk)
        seen = {repr(row) for row in rows}
        rows += [row for row in made if repr(row) not in seen]
        chunk += 1
        write_atomic(file, b"".join(json_bytes(row, indent=None) for row in rows))
        write_atomic(folder / "chunks.json", json_bytes(chunk))
        job.watch("preferences", min(len(rows) / wanted, 0.99), f"{len(rows)} pairs")
    rows = rows[:wanted]
    write_atomic(file, b"".join(json_bytes(row, indent=None) for row in rows))
    return {"floor": gold.floor}


def _labelled(
    policy: Policy, gold: Gold, asked: list[Prompt], config: RlhfConfig, seed: int
) -> list[dict[str, Any]]:
    """Two answers to each prompt, the one with the higher gold reward first; ties left out."""
    both = [policy.sample(asked, config.max_tokens, seed=seed + 10**6 * k) for k in (0, 1)]
    scores = [gold(samples) for samples in both]
    found: dict[str, dict[str, Any]] = {}
    for first, second, a, b in zip(*both, *scores, strict=True):
        better, worse = (first, second) if a > b else (second, first)
        if a != b and better.text.strip() and worse.text.strip() and better.text != worse.text:
            row = {"prompt": first.prompt, "chosen": _said(better), "rejected": _said(worse)}
            row |= {"chosen_gold": max(a, b), "rejected_gold": min(a, b)}
            found.setdefault(repr(row), row)
    return list(found.values())


def _said(sample: Sample) -> Any:
    """The answer as the prompt is: text or a message."""
    if isinstance(sample.prompt, str):
        return sample.text
    return [{"role": "assistant", "content": sample.text}]


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
    reward.calibrate([s.prompt for s in samples], [_said(s) for s in samples])
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


def _learn(
    job: Job, config: RlhfConfig, start: str, prompts: list[Prompt], folder: Path
) -> dict[str, Any]:
    tokenizer = load_policy(start).tokenizer
    reward = RewardModel.load(job.run.path / "reward")
    score: Any = reward
    if config.eos_penalty:
        score = with_eos_penalty(reward, tokenizer.eos_token_id)
    causal = hasattr(reward.model, "score") and len(reward.tokenizer) == len(tokenizer)
    args = online(config, job.run.checkpoints)
    trainer = RecipeTrainer(
        start,
        score,
        args,
        Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        critic=reward.model if config.advantage == "critic" and causal else None,
        processing_class=tokenizer,
        peft_config=adapters(config.lora or 0),
    )
    job.train(trainer, "trained", ("reward", "kl", "ratio/kl_k3"), log=True)
    save_policy(trainer, folder)
    return {}


def _evaluate(
    path: Path, start: str, prompts: list[Prompt], config: RlhfConfig, folder: Path
) -> dict[str, Any]:
    """Both policies on the held-out prompts; their answers in answers.jsonl."""
    reference, reward = load_policy(start), RewardModel.load(path / "reward")
    made = json.loads((path / "preferences" / "done.json").read_bytes())
    gold = Gold(reference, made["floor"]) if made.get("floor") is not None else None
    found: dict[str, Any] = {}
    answers = []
    for when, at in (("before", start), ("after", str(path / "trained"))):
        policy = load_policy(at)
        samples = policy.sample(prompts * config.samples, config.max_tokens, seed=31)
        found[when], rows = measured(policy, reference, reward, gold, samples)
        answers += [{"policy": when, **row} for row in rows]
    write_atomic(
        folder / "answers.jsonl", b"".join(json_bytes(row, indent=None) for row in answers)
    )
    return found


def measured(
    policy: Policy,
    reference: Policy,
    reward: RewardModel,
    gold: Gold | None,
    samples: list[Sample],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Means over a policy's own answers with standard errors, and the answers one by one.

    KL(policy || reference) is the mean of log pi - log pi_ref summed over an answer's tokens,
    entropy that of -log pi per token.
    """
    own, other = policy.log_probs(samples), reference.log_probs(samples)
    scores = reward([s.prompt for s in samples], [_said(s) for s in samples])
    per_answer: dict[str, list[float]] = {
        "proxy": list(scores),
        "kl": [float((a - b).sum()) for a, b in zip(own, other, strict=True)],
        "length": [float(len(s.ids)) for s in samples],
    }
    if gold is not None:
        per_answer["gold"] = gold(samples)
    summary: dict[str, Any] = {name: _summary(values) for name, values in per_answer.items()}
    summary["entropy"] = mean([float(-row.mean()) for row in own])
    summary["cut"] = mean([float(not s.ended) for s in samples])
    summary["different"] = len({s.text for s in samples}) / len(samples)
    rows = [
        {"prompt": s.prompt, "answer": s.text}
        | {name: values[i] for name, values in per_answer.items()}
        for i, s in enumerate(samples)
    ]
    return summary, rows


def _summary(values: list[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "se": float(tensor.std() / len(values) ** 0.5)}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of JSON lines; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def read_chunks(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The pairs of an interrupted stage, and how many chunks they are of."""
    counter = file.with_name("chunks.json")
    return (read_rows(file), json.loads(counter.read_bytes())) if counter.exists() else ([], 0)
