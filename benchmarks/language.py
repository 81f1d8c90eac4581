"""One training step of RecipeTrainer against one of TRL's GRPOTrainer, on the same batch.

Forward, loss, backward of a Llama with 12 million parameters, 8 completions of 128 tokens, a
vocabulary of 8,192, float32, one torch thread. Time: the two take turns in one process, ratios are
taken round by round. Peak memory: each in a process of its own, VmHWM.

    python benchmarks/language.py [--rounds 20] [--recipes ppo rgpo-gate]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOTrainer

from rgpo.language import RecipeConfig, RecipeTrainer

ROWS, PROMPT, COMPLETION, VOCABULARY = 8, 16, 128, 8192
SIZE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}


def build(recipe: str) -> tuple[RecipeTrainer, dict[str, torch.Tensor]]:
    """A trainer that can compute both losses, and a batch whose ratios are not 1."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **SIZE))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, "w0"))
    special = {"pad_token": "w0", "eos_token": "w1"}
    args = RecipeConfig(
        tempfile.mkdtemp(),
        recipe=recipe,
        reduction="sequence-mean",
        per_device_train_batch_size=ROWS,
        max_completion_length=COMPLETION,
        num_iterations=2,
        disable_tqdm=True,
    )
    trainer = RecipeTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        Dataset.from_dict({"prompt": ["w2"] * ROWS}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **special),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.loss_type = "grpo"
    batch = {
        "prompt_ids": torch.randint(2, VOCABULARY, (ROWS, PROMPT)),
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(2, VOCABULARY, (ROWS, COMPLETION)),
        "completion_mask": torch.ones(ROWS, COMPLETION, dtype=torch.long),
        "advantages": torch.randn(ROWS),
        "num_items_in_batch": torch.tensor(ROWS * COMPLETION),
    }
    with torch.no_grad():
        now = trainer._forward(trainer.model, batch)[0]  # noqa: SLF001
    batch["old_per_token_logps"] = now + 0.1 * torch.randn(now.shape)
    return trainer, batch


def step(loss_of: type[GRPOTrainer], trainer: RecipeTrainer, batch: dict) -> float:
    """CPU-seconds of one step with the loss of that class."""
    trainer.model.zero_grad()
    start = time.process_time()
    loss_of._compute_loss(trainer, trainer.model, batch).backward()  # noqa: SLF001
    return time.process_time() - start


def main() -> None:
    """Measure every recipe against TRL's grpo and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--recipes", nargs="+", default=["ppo", "rgpo-gate"])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.measure:
        trainer, batch = build(options.recipes[0])
        for _ in range(3):
            step(RecipeTrainer if options.measure == "ours" else GRPOTrainer, trainer, batch)
        print(peak_megabytes())
        return
    table = Table("recipe", "seconds", "TRL's", "time ratio (quartiles)", "MB", "TRL's", "ratio")
    for recipe in options.recipes:
        table.add_row(recipe, *measured(recipe, options.rounds))
    Console(width=110).print(table)


def measured(recipe: str, rounds: int) -> list[str]:
    """Median times, their ratio, and peak memories of one recipe."""
    trainer, batch = build(recipe)
    pairs = [[step(c, trainer, batch) for c in (RecipeTrainer, GRPOTrainer)] for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs[2:], strict=True))
    low, middle, high = statistics.quantiles([a / b for a, b in pairs[2:]], n=4)
    own, trl = (in_own_process(recipe, which) for which in ("ours", "theirs"))
    ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return [f"{ours:.3f}", f"{theirs:.3f}", ratio, f"{own:.0f}", f"{trl:.0f}", f"{own / trl:.3f}"]


def in_own_process(recipe: str, which: str) -> float:
    """Peak memory in MB of three steps in a fresh process."""
    command = [sys.executable, __file__, "--recipes", recipe, "--measure", which]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def peak_megabytes() -> float:
    """VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
