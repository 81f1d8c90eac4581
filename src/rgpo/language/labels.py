"""Preference pairs of a policy's own answers, labelled by the gold scorer; made in chunks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rgpo.errors import RgpoError
from rgpo.language.gold import Gold
from rgpo.language.sample import Policy, Prompt
from rgpo.runs.atomic import json_bytes, write_atomic

CHUNK = 64
"""Pairs that are sampled, labelled and written at a time."""


def make_pairs(
    policy: Policy,
    prompts: Sequence[Prompt],
    wanted: int,
    length: int,
    file: Path,
    tell: Callable[[float, str], None],
) -> float:
    """Write `wanted` pairs to `file`, from where it stands; the floor of the gold scorer.

    Answers have at most `length` tokens; `tell` gets the done fraction and what is worth seeing.
    RgpoError for a policy whose answers hardly differ in their gold reward.
    """
    floor_of = policy.sample([*prompts] * (-(-256 // len(prompts))), length, seed=17)
    gold = Gold.calibrated(policy, floor_of[:256])
    rows, chunk = _read_chunks(file)
    while len(rows) < wanted:
        if chunk * CHUNK > 4 * wanted + 4 * CHUNK:
            raise RgpoError(
                f"{chunk * CHUNK} pairs of answers gave {len(rows)} different gold rewards: the "
                "policy says too much of the same"
            )
        asked = [prompts[(chunk * CHUNK + i) % len(prompts)] for i in range(CHUNK)]
        made = _labelled(policy, gold, asked, length, seed=1000 + chunk)
        seen = {repr(row) for row in rows}
        rows += [row for row in made if repr(row) not in seen]
        chunk += 1
        write_rows(file, rows)
        write_atomic(file.with_name("chunks.json"), json_bytes(chunk))
        tell(min(len(rows) / wanted, 0.99), f"{len(rows)} pairs")
    write_rows(file, rows[:wanted])
    return gold.floor


def _labelled(
    policy: Policy, gold: Gold, asked: list[Prompt], length: int, seed: int
) -> list[dict[str, Any]]:
    """Two answers to each prompt, the one with the higher gold reward first; ties left out."""
    both = [policy.sample(asked, length, seed=seed + 10**6 * k) for k in (0, 1)]
    scores = [gold(samples) for samples in both]
    found: dict[str, dict[str, Any]] = {}
    for first, second, a, b in zip(*both, *scores, strict=True):
        better, worse = (first, second) if a > b else (second, first)
        if a != b and better.text.strip() and worse.text.strip() and better.text != worse.text:
            row = {"prompt": first.prompt, "chosen": better.completion}
            row |= {"rejected": worse.completion}
            row |= {"chosen_gold": max(a, b), "rejected_gold": min(a, b)}
            found.setdefault(repr(row), row)
    return list(found.values())


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of JSON lines; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON line per row."""
    write_atomic(file, b"".join(json_bytes(row, indent=None) for row in rows))


def _read_chunks(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The pairs of an interrupted stage, and how many chunks they are of."""
    counter = file.with_name("chunks.json")
    return (read_rows(file), json.loads(counter.read_bytes())) if counter.exists() else ([], 0)
