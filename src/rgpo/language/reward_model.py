"""Reward models from pairs of preferred and rejected texts, by TRL's RewardTrainer.

P(a preferred to b) = s(score(a) - score(b)) (Bradley and Terry). Only differences are learnt: the
offset is then chosen so that the reference policy's completions have mean 0 (arXiv 2403.17031,
detail 8), and stays with the model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from rgpo.errors import RgpoError
from rgpo.language.config import FitsMachine

SIGNIFICANT = 1.645
"""One-sided 95% quantile of the normal distribution: accuracy must exceed chance by so many
standard errors."""


@dataclass
class PreferenceConfig(FitsMachine, RewardConfig):
    """TRL's RewardConfig with defaults that suit the machine, and a share to validate on."""

    validation_share: float = 0.1
    """Share of the pairs that is not trained on."""


class RewardModel:
    """A sequence classifier with one label as a reward function, minus its offset."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 32) -> None:
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = prepared(tokenizer)
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.batch_size = batch_size
        self.__name__ = "reward_model"

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote."""
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def save(self, folder: str | Path) -> None:
        """Model, tokenizer and offset as transformers does."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def offset(self) -> float:
        """Mean score of the reference policy, kept in the model's configuration."""
        return getattr(self.model.config, "reward_offset", 0.0)

    def calibrate(self, prompts: Sequence[Any], completions: Sequence[Any]) -> float:
        """Choose the offset so that these, the reference policy's own, have mean 0; return it."""
        self.model.config.reward_offset = 0.0
        scores = self(prompts, completions)
        self.model.config.reward_offset = sum(scores) / len(scores)
        return self.offset

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """One score per completion: texts as RewardTrainer sees them, with their end token.

        What is longer than the model's window loses its beginning.
        """
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        ids = [self._ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        if window is not None:
            ids = [row[-window:] for row in ids]
        scores: list[float] = []
        for start in range(0, len(ids), self.batch_size):
            part = ids[start : start + self.batch_size]
            inputs = self.tokenizer.pad(
                {"input_ids": part}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            with torch.no_grad():
                logits = self.model(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                ).logits
            scores += (logits[:, 0].float() - self.offset).tolist()
        return scores

    def _ids(self, prompt: Any, completion: Any) -> list[int]:
        if not isinstance(completion, str):
            messages = [*prompt, *completion]
            return self.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        text = prompt + completion
        end = "" if text.endswith(self.tokenizer.eos_token) else self.tokenizer.eos_token
        return self.tokenizer(text + end)["input_ids"]


def prepared(tokenizer: Any) -> Any:
    """The tokenizer with an end and a padding token; encoders have their separator as the end."""
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token is None:
        raise RgpoError("the reward model's tokenizer has no end token: set tokenizer.eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_pairs(pairs: Dataset) -> None:
    """RgpoError for the first pair that cannot be learnt from: empty, equal or repeated texts."""
    missing = {"chosen", "rejected"} - set(pairs.column_names)
    if missing:
        raise RgpoError(
            f"preferences need a column {min(missing)}, they have {', '.join(pairs.column_names)}"
        )
    if len(pairs) < 2:
        raise RgpoError(f"{len(pairs)} preference pairs are too few to train and to validate on")
    seen: dict[str, int] = {}
    for i, pair in enumerate(pairs):
        prompt, chosen, rejected = pair.get("prompt", ""), pair["chosen"], pair["rejected"]
        if is_empty(chosen) or is_empty(rejected):
            raise RgpoError(f"preference pair {i} has an empty text: remove it")
        if chosen == rejected:
            raise RgpoError(f"preference pair {i} has equal texts ({chosen!r}): remove it")
        first = seen.setdefault(repr((prompt, chosen, rejected)), i)
        if first != i:
            raise RgpoError(f"preference pair {i} repeats pair {first}: remove one of them")


def is_empty(text: Any) -> bool:
    """Whether a text, or the last of some messages, says nothing."""
    said = text if isinstance(text, str) or not text else text[-1]["content"]
    return not (said and said.strip())


def train_reward_model(
    model: Any,
    tokenizer: Any,
    pairs: Dataset,
    args: PreferenceConfig,
    train: Callable[[RewardTrainer], Any] = RewardTrainer.train,
) -> RewardModel:
    """Train on pairs (columns chosen, rejected and perhaps prompt, text or messages) and validate.

    `model` is a classifier with one label, or the path of any model, which gets a new head. The
    accuracy on `validation_share` of the pairs is printed and kept in the model's configuration;
    RgpoError where it is not above chance. `train` runs the trainer, perhaps from a checkpoint.
    """
    check_pairs(pairs)
    parts = pairs.train_test_split(test_size=args.validation_share, seed=args.seed)
    tokenizer = prepared(tokenizer)
    window = _window(model)
    args.max_length = min(args.max_length or window, window)
    trainer = RewardTrainer(
        model=model, args=args, train_dataset=parts["train"], processing_class=tokenizer
    )
    if len(trainer.train_dataset) == 0:
        raise RgpoError(
            f"every preference pair is longer than {args.max_length} tokens, what the reward model "
            "reads: give shorter texts or another reward model"
        )
    train(trainer)
    reward = RewardModel(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
    unseen = parts["test"]
    share = accuracy(reward, unseen)
    reward.model.config.validation_accuracy = share
    print(f"reward model: {share:.1%} of {len(unseen)} unseen pairs ranked correctly")
    if share - SIGNIFICANT * math.sqrt(0.25 / len(unseen)) <= 0.5:
        raise RgpoError(
            f"the reward model ranks {share:.1%} of {len(unseen)} unseen pairs correctly, which "
            "chance does too: give more or cleaner pairs, or train longer"
        )
    return reward


def _window(model: Any) -> int:
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9


def accuracy(reward: RewardModel, pairs: Dataset) -> float:
    """Share of pairs whose chosen text has the higher score; a tie counts as half."""
    first = pairs[0]["chosen"]
    prompts = pairs["prompt"] if "prompt" in pairs.column_names else [type(first)()] * len(pairs)
    chosen = torch.tensor(reward(prompts, pairs["chosen"]))
    rejected = torch.tensor(reward(prompts, pairs["rejected"]))
    return float((chosen > rejected).float().mean() + (chosen == rejected).float().mean() / 2)
