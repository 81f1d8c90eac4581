"""A policy to sample from and to ask for log-probs, outside of training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgpo.errors import RgpoError

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt."""

    prompt: Prompt
    text: str
    ids: list[int]
    """Tokens of the completion, with its end if it has one."""

    ended: bool

    @property
    def completion(self) -> Any:
        """The answer as the prompt is: a text, or a message."""
        if isinstance(self.prompt, str):
            return self.text
        return [{"role": "assistant", "content": self.text}]


@dataclass
class Policy:
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any
    batch_size: int = 64

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens of each prompt; conversations through the chat template."""
        if prompts and isinstance(prompts[0], str):
            return self.tokenizer(list(prompts), add_special_tokens=True)["input_ids"]
        options = {"add_generation_prompt": True, "return_dict": True}
        return [self.tokenizer.apply_chat_template(p, **options)["input_ids"] for p in prompts]

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], length: int, *, seed: int = 0, greedy: bool = False
    ) -> list[Sample]:
        """One completion per prompt, at temperature 1 or greedy, at most `length` tokens."""
        end, found = self.tokenizer.eos_token_id, []
        torch.manual_seed(seed)
        for chunk in _chunks(prompts, self.batch_size):
            ids, mask = self._padded(self.prompt_ids(chunk))
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=length,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=end,
                **({"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}),
            )
            for prompt, row in zip(chunk, out[:, ids.shape[1] :].tolist(), strict=True):
                ended = end in row
                own = row[: row.index(end) + 1] if ended else row
                text = self.tokenizer.decode(own, skip_special_tokens=True)
                found.append(Sample(prompt, text, own, ended))
        return found

    @torch.no_grad()
    def log_probs(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Log-probs (T,) at temperature 1 of the tokens of each completion."""
        found: list[Tensor] = []
        for chunk in _chunks(samples, self.batch_size):
            prompts = self.prompt_ids([sample.prompt for sample in chunk])
            whole = [p + s.ids for p, s in zip(prompts, chunk, strict=True)]
            ids, mask = self._padded(whole)
            positions = torch.clamp(mask.cumsum(1) - 1, min=0)
            keep = max(len(sample.ids) for sample in chunk) + 1
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep
            ).logits[:, :-1]
            taken = ids[:, -logits.shape[1] :].unsqueeze(-1)
            chosen = logits.float().log_softmax(-1).gather(-1, taken).squeeze(-1)
            found += [row[-len(s.ids) :].cpu() for row, s in zip(chosen, chunk, strict=True)]
        return found

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T), padded on the left."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)


def load_policy(name: str | Path, dtype: torch.dtype | None = None) -> Policy:
    """A policy of the hub or a folder, ready to sample; RgpoError if there is none."""
    name = str(name)
    kind = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RgpoError(
            f"the model {name!r} could not be loaded ({reason}): give a folder that "
            "save_pretrained wrote, or the name of a model that the hub has"
        ) from error
    if tokenizer.eos_token is None:
        raise RgpoError(f"the tokenizer of {name!r} has no end token: completions could not end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Policy(model, tokenizer)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
