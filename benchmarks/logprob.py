"""Memory and time of the chosen log-prob and the entropy, against log_softmax and gather.

2,048 tokens, a vocabulary of 32,000, float32, forward and backward of both outputs, one torch
thread. Peak memory: every variant in a process of its own, VmHWM after minus VmRSS before, with
the gradients. Time: the variants take turns in one process; ratios are taken round by round.

About three quarters of the baseline's time goes into fresh pages for its tensors of 250 MB. Where
the C library keeps its pages only the products are left to compare, four here against three:
MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000 shows it.

    python benchmarks/logprob.py [--rounds 5] [--threads 1]
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rgpo.core.logprob import chosen_log_prob_and_entropy

TOKENS, VOCABULARY = 2048, 32_000
HIDDEN = (64, 256)
CHUNKS = (64, 128, 256)


def log_softmax_and_gather(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The usual way: all logits at once, under autograd."""
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    log_prob = log_p.gather(1, target[:, None])[:, 0]
    return log_prob, -(torch.exp(log_p) * log_p).sum(-1)


BASELINE = "log_softmax, gather"
VARIANTS = {BASELINE: log_softmax_and_gather} | {
    f"chunks of {chunk}": partial(chosen_log_prob_and_entropy, chunk=chunk) for chunk in CHUNKS
}


def main() -> None:
    """Measure every variant at every hidden size and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, default=HIDDEN[0], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(peak_memory(options.measure, options.hidden))
        return
    for hidden in HIDDEN:
        megabytes = {n: peak_in_own_process(n, hidden, options.threads) for n in VARIANTS}
        show(hidden, megabytes, seconds(hidden, options.rounds))


def inputs(tokens: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and head, to differentiate, with logits of unit variance; and targets."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator)
    head = torch.randn(vocabulary, hidden, generator=generator).div_(hidden**0.5)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return states.requires_grad_(), head.requires_grad_(), target


def step(name: str, states: Tensor, head: Tensor, target: Tensor) -> None:
    """Forward and backward of both outputs."""
    states.grad = head.grad = None
    log_prob, entropy = VARIANTS[name](states, head, target)
    (log_prob + 0.01 * entropy).sum().backward()


def peak_memory(name: str, hidden: int) -> float:
    """MiB at the peak of one step above what the process held before it."""
    step(name, *inputs(8, 16, hidden))  # libraries, thread pools
    data = inputs(TOKENS, VOCABULARY, hidden)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = status("VmRSS")
    step(name, *data)
    return (status("VmHWM") - before) / 1024


def status(key: str) -> int:
    """A memory figure of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_in_own_process(name: str, hidden: int, threads: int) -> float:
    """`peak_memory` in a fresh interpreter."""
    options = ["--measure", name, "--hidden", str(hidden), "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return float(done.stdout)


def seconds(hidden: int, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of every variant, one number a round, after a round that is not counted."""
    data = inputs(TOKENS, VOCABULARY, hidden)
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):
        for name, times in taken.items():
            start = time.perf_counter()
            step(name, *data)
            if number:
                times.append(time.perf_counter() - start)
    return taken


def show(hidden: int, megabytes: dict[str, float], taken: dict[str, list[float]]) -> None:
    """One table: medians, spread (smallest and largest) and ratios to the baseline."""
    title = f"{TOKENS} tokens x {VOCABULARY} words, hidden size {hidden}, forward + backward"
    table = Table("variant", "peak MiB", "ratio", "ms (range)", "ratio (range)", title=title)
    for name, times in taken.items():
        ratios = [own / other for own, other in zip(times, taken[BASELINE], strict=True)]
        table.add_row(
            name,
            f"{megabytes[name]:.0f}",
            f"{megabytes[name] / megabytes[BASELINE]:.3f}",
            spread([1000 * x for x in times], 0),
            spread(ratios, 2),
        )
    Console().print(table)


def spread(numbers: list[float], digits: int) -> str:
    """Median (smallest-largest)."""
    middle, low, high = statistics.median(numbers), min(numbers), max(numbers)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
