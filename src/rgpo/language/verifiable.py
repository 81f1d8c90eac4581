"""Tasks of reasoning-gym: entries without end, answers that are checked exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rgpo.errors import RgpoError
from rgpo.language.sample import Prompt, Sample

COMPACT: dict[str, Callable[[dict[str, Any]], str]] = {
    "spell_backward": lambda m: m["word"].lower(),
    "chain_sum": lambda m: m["expression"].replace(" ", ""),
    "products": lambda m: m["expression"].replace(" ", ""),
    "count_bits": lambda m: str(m["number"]),
    "gcd": lambda m: ",".join(map(str, m["numbers"])),
    "letter_counting": lambda m: f"{m['target_letter']}:{' '.join(m['span'])}",
    "simple_equations": lambda m: m["equation"].replace(" ", ""),
}
"""What a model of characters needs to see, from an entry's metadata; "=" follows."""

EASY: dict[str, dict[str, Any]] = {
    "spell_backward": {"min_word_len": 3, "max_word_len": 8},
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "products": {"max_digits": 2},
    "count_bits": {"max_n": 1023},
    "gcd": {"max_value": 100},
    "letter_counting": {"min_words": 2, "max_words": 4},
}
"""Settings within reach of a model of 0.6 million parameters."""


@dataclass
class Task:
    """One family of reasoning-gym, as prompts and a reward."""

    family: str
    gym: Any
    """The data set; its `score_answer` is the verifier."""

    rows: list[dict[str, Any]]
    """prompt, answer, and `entry`, the number that the verifier finds the entry by."""

    def score(self, answer: str, entry: int) -> float:
        """1 for a right answer, 0 for any other.

        Without the partial credit of some families: spell_backward gives 0.8 for the right letters
        and whatever follows them, and a policy that learnt from it stopped ending its answers.
        """
        return float(self.gym.score_answer(_given(answer), self.gym[entry]) >= 1)

    def reward(self, completions: Sequence[Any], entry: Sequence[int], **_: Any) -> list[float]:
        """A reward for `RecipeTrainer`."""
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [self.score(text, i) for text, i in zip(texts, entry, strict=True)]

    def accuracy(self, samples: Sequence[Sample], rows: Sequence[dict[str, Any]]) -> float:
        """Share of right answers, one sample per row."""
        scores = [self.score(s.text, row["entry"]) for s, row in zip(samples, rows, strict=True)]
        return sum(scores) / len(scores)


def load_task(family: str, size: int, seed: int, chat: bool | None, **options: Any) -> Task:
    """`size` different entries of a family.

    `chat` None: short prompts for a model of characters, with easy settings; True: conversations
    for an instructed model; False: the question as text. RgpoError for an unknown family, a
    setting that it does not have, or fewer different entries than asked for.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        near = ", ".join(sorted(name for name in DATASETS if name[:3] == family[:3]))
        told = f"near it are {near}" if near else "docs/language.md lists some"
        raise RgpoError(f"reasoning-gym has no task {family!r}: {told}")
    options = (EASY.get(family, {}) if chat is None else {}) | options
    try:
        gym = reasoning_gym.create_dataset(family, size=3 * size, seed=seed, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise RgpoError(
            f"the task {family!r} does not take {options} ({error}): correct --task-options"
        ) from error
    found: dict[str, dict[str, Any]] = {}
    for i in range(3 * size):
        entry = gym[i]
        prompt = _prompt(family, entry, chat)
        found.setdefault(str(prompt), {"prompt": prompt, "answer": entry["answer"], "entry": i})
        if len(found) == size:
            break
    if len(found) < min(size, 32):
        raise RgpoError(f"{family!r} gave {len(found)} different entries only: make it harder")
    return Task(family, gym, list(found.values()))


def _prompt(family: str, entry: dict[str, Any], chat: bool | None) -> Prompt:
    question = entry["question"]
    if chat is None:
        known = COMPACT.get(family)
        return (question if known is None else known(entry["metadata"])) + "="
    if not chat:
        return f"{question}\n"
    from reasoning_gym.utils import SYSTEM_PROMPTS

    system = {"role": "system", "content": SYSTEM_PROMPTS["default"]}
    return [system, {"role": "user", "content": question}]


def _given(text: str) -> str:
    """What stands in the last <answer> tags, else all of the text."""
    from reasoning_gym.utils import extract_answer

    tagged = extract_answer(text)
    return text.strip() if tagged is None else tagged
