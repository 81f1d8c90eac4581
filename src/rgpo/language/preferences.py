"""Preference pairs and prompts from files and the hub, in the form that a policy reads.

Understood: JSON lines (also gzipped), Parquet, folders of them, names of the hub. Pairs have
`chosen` and `rejected`, with a `prompt` or, as Anthropic/hh-rlhf has it, whole dialogues in which
the last answer is the one that was judged.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from rgpo.errors import RgpoError
from rgpo.language.reward_model import check_pairs, is_empty
from rgpo.language.sample import Prompt

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
KINDS = {".jsonl": "json", ".json": "json", ".gz": "json", ".parquet": "parquet"}


def load_pairs(source: str, *, chat: bool, drop: bool) -> list[dict[str, Any]]:
    """Rows of prompt, chosen, rejected: texts, or messages for a model with a chat template.

    RgpoError for the first pair that is empty, repeated or has equal texts, unless `drop`.
    """
    rows = []
    for i, row in enumerate(read(source)):
        if "chosen" not in row or "rejected" not in row:
            names = ", ".join(row)
            raise RgpoError(f"preferences need columns chosen and rejected, {source} has {names}")
        rows.append(_pair(row, i, chat=chat))
    if drop:
        rows = _without_bad(rows)
    if not rows:
        raise RgpoError(f"{source} has no preference pair")
    check_pairs(Dataset.from_list(rows))
    return rows


def load_prompts(source: str, *, chat: bool) -> list[Prompt]:
    """Different prompts, in their order: of a column `prompt`, or lines of a .txt file."""
    if source.endswith(".txt"):
        rows: Sequence[dict[str, Any]] = [{"prompt": line} for line in _lines(source) if line]
    else:
        rows = read(source)
    found: dict[str, Prompt] = {}
    for row in rows:
        if "prompt" not in row:
            raise RgpoError(f"prompts need a column prompt, {source} has {', '.join(row)}")
        prompt = as_prompt(row["prompt"], chat=chat)
        found.setdefault(repr(prompt), prompt)
    if not found:
        raise RgpoError(f"{source} has no prompt")
    return list(found.values())


def read(source: str) -> Dataset:
    """The train split of whatever the source is."""
    path = Path(source)
    if path.is_file() and path.suffix not in KINDS:
        raise RgpoError(f"{source} is neither JSON lines nor Parquet: give one of them")
    try:
        if path.is_file():
            return load_dataset(KINDS[path.suffix], data_files=str(path), split="train")
        loaded = load_dataset(source)
    except Exception as error:  # the reader and the hub raise dozens of kinds
        reason = str(error).strip().splitlines()[:1]
        raise RgpoError(
            f"could not read {source!r} ({''.join(reason)}): give a file of JSON lines or Parquet, "
            "or a data set that the hub has"
        ) from error
    return loaded["train"] if isinstance(loaded, DatasetDict) else loaded


def as_prompt(prompt: Any, *, chat: bool) -> Prompt:
    """A text for a model without chat template, messages for one with."""
    if not isinstance(prompt, str):
        if not chat:
            raise RgpoError(
                "the prompts are conversations but the model's tokenizer has no chat template: "
                "give prompts as text, or another model"
            )
        return list(prompt)
    if not chat:
        return prompt
    return _turns(prompt) if HUMAN in prompt else [{"role": "user", "content": prompt}]


def _pair(row: dict[str, Any], i: int, *, chat: bool) -> dict[str, Any]:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None and isinstance(chosen, str):
        prompt, chosen, rejected = _dialogue(chosen, rejected, i)
    elif prompt is None:
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    prompt = as_prompt(prompt, chat=chat)
    if chat and isinstance(chosen, str):
        chosen, rejected = (
            [{"role": "assistant", "content": text.strip()}] if text.strip() else []
            for text in (chosen, rejected or "")
        )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _dialogue(chosen: str, rejected: str, i: int) -> tuple[str, str, str]:
    """Prompt and both answers of a pair of dialogues that part at their last answer."""
    place = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    if ASSISTANT not in chosen:
        raise RgpoError(
            f"preference pair {i} has neither a prompt nor the turns of hh-rlhf "
            f"({ASSISTANT.strip()!r}): add a column prompt"
        )
    other = (rejected or "").rfind(ASSISTANT) + len(ASSISTANT)
    return chosen[:place], chosen[place:], (rejected or "")[other:]


def _turns(text: str) -> list[dict[str, str]]:
    """Messages of hh-rlhf's text; the open turn of the assistant at its end is left out."""
    found = []
    for part in text.split(HUMAN)[1:]:
        said, *answers = part.split(ASSISTANT)
        found.append({"role": "user", "content": said.strip()})
        found += [{"role": "assistant", "content": a.strip()} for a in answers if a.strip()]
    return found


def _without_bad(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without pairs that are empty, equal or repeated."""
    good: dict[str, dict[str, Any]] = {}
    for row in rows:
        empty = is_empty(row["chosen"]) or is_empty(row["rejected"])
        if not empty and row["chosen"] != row["rejected"]:
            good.setdefault(repr(row), row)
    return list(good.values())


def _lines(source: str) -> list[str]:
    try:
        return Path(source).read_text().splitlines()
    except OSError as error:
        raise RgpoError(f"could not read {source} ({error.strerror})") from None
