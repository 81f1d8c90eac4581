"""Training the cells of the staleness study on a verifiable language task.

The task is `spell_backward` of reasoning-gym: "abc=" is to be continued by "cba". A small
transformer, warm-started on answers until it is right in a good quarter of its samples, learns from
the reward 1 for a right answer and 0 for any other, with groups of completions per word, from data
that are an exact number of updates old.
"""

import copy
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rgpo.core.advantage import group_normalize, group_relative
from rgpo.core.anchor import ParameterAverage
from rgpo.core.clipping_bias import clip_normalizer, clipped_loss, gradient_norm
from rgpo.core.diagnostics import KL_SPIKE
from rgpo.core.kl import KLPenalty, categorical_kl
from rgpo.core.loss import PolicyLoss, group_loss, policy_loss
from rgpo.core.recipes import Recipe
from rgpo.core.reduce import token_mean
from rgpo.errors import RgpoError
from rgpo.settings import configured, split_arm
from rgpo.studies.jobs import Cell, Result
from rgpo.studies.staleness import Study, make
from rgpo.studies.transformer import Shape, Transformer
from rgpo.studies.tuning import average

TASK = "spell_backward"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, END, EQUALS = 0, 1, 2
LONGEST = 7
"""Letters of a word, 3 to 7; prompts are padded on the left, so that every answer starts alike."""

SHAPE = Shape(vocabulary=3 + len(LETTERS), length=2 * LONGEST + 2)
PROMPTS, GROUP, EPOCHS, MINIBATCHES = 8, 8, 2, 2
UPDATES = 80
MAX_GRAD_NORM = 1.0

REFERENCE_ANCHOR = ("dpo", "ipo")
"""Recipes of groups whose log-ratio is to the reference model, not to the behaviour policy."""


@dataclass
class Completions:
    """The data of one update: N = PROMPTS * GROUP completions, T tokens each."""

    tokens: Tensor
    """(N, P + T): prompt and completion."""

    mask: Tensor
    """(N, T): up to and including the end."""

    score: Tensor
    """(N,): 1 for a right answer."""

    logits: Tensor
    """(N, T, V): of the behaviour policy."""

    log_prob: Tensor
    """(N, T): of the behaviour policy."""

    def rows(self, index: Tensor) -> "Completions":
        """Some of the completions."""
        return Completions(**{name: tensor[index] for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class LanguageCells:
    """Trains cells of the language task; a `jobs.Train`."""

    folder: Path
    """Where the warm-started model is kept."""

    updates: int = UPDATES
    seconds_per_run: float = 7.0

    @property
    def lengths(self) -> dict[str, int]:
        """Updates of a run."""
        return {TASK: self.updates}

    def refusal(self, task: str, arm: str) -> str | None:
        """Why this arm cannot be trained on this task, None if it can."""
        recipe, what = _recipe(arm), f"recipe {arm!r}"
        if task != TASK:
            return f"the language workload has the task {TASK} alone, not {task}"
        if recipe.data == "expert":
            return f"{what} learns from an expert's samples, a second stream beside other recipes"
        if recipe.step == "natural-gradient":
            return f"{what} takes natural-gradient steps, which the control trainer has"
        if recipe.level == "turn":
            return f"{what} forms its ratio per turn, and the answers of {TASK} have one"
        return None

    def jobs(self, cells: Iterable[Cell]) -> list[list[Cell]]:
        """A few cells a job: they do not share any computation."""
        order = sorted(cells, key=lambda c: (c.staleness, c.arm))
        return [list(cell) for _, cell in groupby(order, key=lambda c: (c.staleness, c.arm))]

    def prepare(self) -> None:
        """Make the warm-started model, once."""
        path = self.folder / "warm.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(warm_start().state_dict(), path)

    def __call__(self, cells: Sequence[Cell]) -> list[Result]:
        """Train one after the other."""
        found = []
        for cell in cells:
            start = time.perf_counter()
            result = Run(self.model(), cell, self.updates).train()
            result["seconds"] = time.perf_counter() - start
            found.append(dataclasses.asdict(cell) | result)
        return found

    def model(self) -> Transformer:
        """A fresh copy of the warm-started model."""
        model = Transformer(SHAPE, 0)
        model.load_state_dict(load_file(self.folder / "warm.safetensors"))
        return model


class Run:
    """One run: sample with the policy of `staleness` updates ago, learn, measure."""

    def __init__(self, model: Transformer, cell: Cell, updates: int) -> None:
        self.model, self.cell, self.updates = model, cell, updates
        self.recipe = _recipe(cell.arm)
        self.penalty: KLPenalty | None = self.recipe.kl
        self.reference = copy.deepcopy(model)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=cell.learning_rate)
        self.past = deque([copy.deepcopy(model)], maxlen=cell.staleness + 1)
        flat = nn.utils.parameters_to_vector(model.parameters())
        self.average = ParameterAverage(flat, self.recipe.anchor_decay)
        self.random = np.random.default_rng([cell.seed, 1])

    def train(self) -> Result:
        """All updates; accuracy before and after, and the means of what was measured."""
        rows: list[dict[str, float]] = []
        failure = None
        for number in range(self.updates):
            row = self._update(number / self.updates)
            if not all(np.isfinite(row[key]) for key in ("kl", "loss")):
                failure = f"update {number + 1} was not finite"
                break
            rows.append(row)
        found: Result = {key: average(rows, key) for key in (rows or [{}])[0]}
        found = {name: None if np.isnan(number) else number for name, number in found.items()}
        right = 0.0 if failure else accuracy(self.model)
        return found | {"final_return": right, "failed": failure}

    def _update(self, progress: float) -> dict[str, float]:
        data = completions(self.past[0], self.random)
        inputs, before = self._inputs(data), self.past[-1]
        measured: list[dict[str, float]] = []
        steps = 0
        for _ in range(EPOCHS):
            groups = torch.from_numpy(self.random.permutation(PROMPTS))
            for chosen in groups.chunk(MINIBATCHES):
                index = (chosen[:, None] * GROUP + torch.arange(GROUP)).flatten()
                sample = {name: tensor[index] for name, tensor in inputs.items()}
                measured.append(self._step(data.rows(index), sample, progress))
                steps += 1
        # a minibatch without any advantage has no weights to measure: its NaN do not count
        row = {name: average(measured, name) for name in measured[0]}
        row |= self._measure(data, before)
        self._adapt(row, (progress * self.updates + 1) / self.updates, steps)
        return row

    def _inputs(self, data: Completions) -> dict[str, Tensor]:
        """Log-probs of further policies and group statistics, where the recipe needs them."""
        needs, found = self.recipe.objective.needs, {}
        if "reference_log_ratio" in needs or self.recipe.name in REFERENCE_ANCHOR:
            found["reference_log_prob"] = _log_prob(_logits(self.reference, data), data)
        if "proximal_log_ratio" in needs:
            anchor = copy.deepcopy(self.model)
            if self.recipe.anchor_decay:
                nn.utils.vector_to_parameters(self.average.average, anchor.parameters())
            found["proximal_log_prob"] = _log_prob(_logits(anchor, data), data)
        if "median_advantage" in needs:
            scores = data.score.view(-1, GROUP)
            above = group_normalize(scores, _groups(scores))
            above = above - above.median(1, keepdim=True).values
            found["median_advantage"] = above.view(-1, 1).expand_as(data.log_prob)
        return found

    def _step(
        self, data: Completions, inputs: dict[str, Tensor], progress: float
    ) -> dict[str, float]:
        """One optimiser step on one minibatch."""
        found = _logits(self.model, data, gradient=True)
        log_prob = _log_prob(found, data)
        kl = categorical_kl(data.logits, found)
        result, loss = self._loss(log_prob, kl, data, inputs)
        if self.penalty is not None:
            if self.penalty.direction == "reverse":
                kl = categorical_kl(found, data.logits)
            loss = loss + self.penalty.weight(progress) * token_mean(kl, data.mask)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return {name: float(x) for name, x in result.diagnostics.items()} | {
            "loss": float(loss.detach()),
            "gradient_norm": float(norm),
        }

    def _loss(
        self, log_prob: Tensor, kl: Tensor, data: Completions, inputs: dict[str, Tensor]
    ) -> tuple[PolicyLoss, Tensor]:
        if self.recipe.objective.scope == "group":
            anchor = data.log_prob
            given = dict(inputs)
            if self.recipe.name in REFERENCE_ANCHOR:
                anchor = given.pop("reference_log_prob")
            result = group_loss(
                self.recipe, log_prob, anchor, data.score, data.mask, group_size=GROUP, **given
            )
            return result, result.loss
        scores = data.score.view(-1, GROUP)
        advantage = group_relative(scores).view(-1, 1).expand_as(log_prob)
        extra: dict[str, Any] = dict(inputs)
        if "kl" in self.recipe.objective.needs:
            extra["kl"] = kl.detach()
        if self.recipe.reduction == "sequence-sum":
            extra["constant"] = float(LONGEST + 1)
        arguments = (self.recipe, log_prob, data.log_prob, advantage, data.mask)
        result = policy_loss(*arguments, **extra)
        if self.recipe.step != "clip-normalized":
            return result, result.loss
        bias = clipped_loss(self.recipe, result, advantage, data.mask)
        norm = gradient_norm(bias, self.model.parameters())
        return result, result.loss * clip_normalizer(norm)

    @torch.no_grad()
    def _measure(self, data: Completions, before: Transformer) -> dict[str, float]:
        found, mask = _logits(self.model, data), data.mask
        kl = float(token_mean(categorical_kl(_logits(before, data), found), mask))
        behavior = float(token_mean(categorical_kl(data.logits, found), mask))
        return {
            "kl": kl,
            "kl_behavior": behavior,
            "kl_spike": float(not kl <= KL_SPIKE),
            "score": float(data.score.mean()),
        }

    def _adapt(self, row: dict[str, float], progress: float, steps: int) -> None:
        """Penalty, objective, learning rate, averages and past policies for the next update."""
        if self.penalty is not None:
            self.penalty = self.penalty.adapt(row["kl_behavior"])
        objective, told = self.recipe.objective, row | {"progress": progress}
        rate = self.cell.learning_rate * objective.learning_rate_scale(told)
        self.optimizer.param_groups[0]["lr"] = rate
        self.recipe = dataclasses.replace(self.recipe, objective=objective.adapt(told))
        present = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        self.average.update(present, steps)
        if 1 - row["active_clip_fraction"] < self.recipe.anchor_reset:
            self.average.reset(present)
        self.past.append(copy.deepcopy(self.model))


def language(
    directory: Path,
    *,
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    steps: int | None = None,
) -> Study:
    """The language workload; by default every recipe that it can train."""
    if tasks and tuple(tasks) != (TASK,):
        raise RgpoError(f"the language workload has one task, {TASK}: leave --tasks out")
    trains = LanguageCells(directory, updates=steps or UPDATES)
    study = make("language", directory, trains, (TASK,), arms)
    trains.prepare()
    return study


@functools.cache
def words() -> tuple[list[str], list[str]]:
    """Words of 3 to 7 letters for training, and 512 others for evaluation; always the same."""
    try:
        import reasoning_gym
    except ImportError:
        raise RgpoError('the language task needs `pip install "rgpo[language]"`') from None
    drawn = reasoning_gym.create_dataset(
        TASK, size=6000, seed=0, min_word_len=3, max_word_len=LONGEST
    )
    found = dict.fromkeys(drawn[i]["metadata"]["word"].lower() for i in range(len(drawn)))
    clean = [w for w in found if set(w) <= set(LETTERS) and 3 <= len(w) <= LONGEST]
    return clean[512:], clean[:512]


def encode(chosen: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Prompts (N, P) and right answers (N, T), padded."""
    prompts = torch.full((len(chosen), LONGEST + 1), PAD)
    answers = torch.full((len(chosen), LONGEST + 1), PAD)
    for i, word in enumerate(chosen):
        letters = torch.tensor([3 + LETTERS.index(c) for c in word])
        prompts[i, LONGEST - len(word) : LONGEST] = letters
        answers[i, : len(word)] = letters.flip(0)
        answers[i, len(word)] = END
    prompts[:, -1] = EQUALS
    return prompts, answers


def warm_start(target: float = 0.25, batch: int = 128, seed: int = 0) -> Transformer:
    """A transformer trained on right answers until it gives them in `target` of its samples."""
    model, random = Transformer(SHAPE, seed), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    training, _ = words()
    for step in range(1000):
        if step % 5 == 0 and accuracy(model, samples=1) >= target:
            break
        prompts, answers = encode(list(random.choice(training, batch)))
        found, _ = model(torch.cat([prompts, answers[:, :-1]], 1))
        predicted = found[:, LONGEST:].flatten(0, 1)
        loss = nn.functional.cross_entropy(predicted, answers.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: Transformer, samples: int = 2, seed: int = 12345) -> float:
    """Share of right answers to the held-out words, sampled at temperature 1."""
    _, held_out = words()
    prompts, answers = encode(held_out)
    prompts, answers = prompts.repeat(samples, 1), answers.repeat(samples, 1)
    noise = _noise(np.random.default_rng(seed), len(prompts))
    return float(_right(model.sample(prompts, LONGEST + 1, noise), answers).mean())


@torch.no_grad()
def completions(model: Transformer, random: np.random.Generator) -> Completions:
    """GROUP completions of each of PROMPTS words by one policy, with their scores."""
    training, _ = words()
    chosen = [word for word in random.choice(training, PROMPTS) for _ in range(GROUP)]
    prompts, answers = encode(chosen)
    sampled = model.sample(prompts, LONGEST + 1, _noise(random, len(prompts)))
    ended = torch.cumsum(sampled == END, 1)
    mask = (ended == 0) | ((ended == 1) & (sampled == END))
    tokens = torch.cat([prompts, sampled], 1)
    data = Completions(tokens, mask, _right(sampled, answers), tokens, tokens)
    data.logits = _logits(model, data)
    data.log_prob = _log_prob(data.logits, data)
    return data


def _right(sampled: Tensor, answers: Tensor) -> Tensor:
    """1 where the tokens up to the end are the answer's, else 0."""
    return ((sampled == answers) | (answers == PAD)).all(1).float()


def _noise(random: np.random.Generator, count: int) -> Tensor:
    drawn = random.random((count, LONGEST + 1, SHAPE.vocabulary), dtype=np.float32)
    return torch.from_numpy(drawn).clamp(1e-9, 1 - 1e-6)


def _logits(model: Transformer, data: Completions, *, gradient: bool = False) -> Tensor:
    """Logits (N, T, V) of the completion's tokens."""
    with torch.set_grad_enabled(gradient):
        found, _ = model(data.tokens[:, :-1])
    return found[:, LONGEST:]


def _log_prob(logits: Tensor, data: Completions) -> Tensor:
    sampled = data.tokens[:, LONGEST + 1 :].unsqueeze(-1)
    return torch.log_softmax(logits, -1).gather(-1, sampled).squeeze(-1)


def _groups(scores: Tensor) -> Tensor:
    return torch.arange(len(scores)).view(-1, 1).expand_as(scores)


def _recipe(arm: str) -> Recipe:
    return configured(*split_arm(arm))
