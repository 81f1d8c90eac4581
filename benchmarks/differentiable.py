"""Environment steps per second with gradients, and where an update of ReparamPPO spends its time.

Forward and backward through a window of 16 steps with actions as leaves, for every task and number
of environments; then the split of a training update (rollout, back-propagation, policy epochs,
critics) at the default setting. Rounds take turns over the variants, so that a noisy machine
disturbs all of them alike; medians over rounds. Last, the same update of several runs as one
computation, per run. One thread; --device cuda where there is one.

    python benchmarks/differentiable.py [--envs 64 256 1024] [--rounds 7] [--runs 1 5 10]
                                        [--device cpu]
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.tasks import TASKS, make_task
from rgpo.differentiable.train import ReparamTrainer
from rgpo.differentiable.vector import TaskVectorEnv

WINDOW = 16
PARTS = ("seconds_rollout", "seconds_backward", "seconds_actor", "seconds_critic", "seconds")


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    variants = [(name, number) for name in TASKS for number in options.envs]
    rates: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    for _ in range(options.rounds):
        for variant in variants:
            rates[variant].append(with_gradients(*variant, options.device))
    show_rates(console, rates, options.envs)
    trainers = {
        (name, runs): ReparamTrainer(
            [ReparamConfig(env=name, seed=seed, device=options.device) for seed in range(runs)]
        )
        for name in TASKS
        for runs in sorted({1, *options.runs})
    }
    splits: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in trainers}
    for _ in range(options.rounds):
        for key, trainer in trainers.items():
            for _ in range(options.updates):
                splits[key].append(trainer.step()[0])  # type: ignore[arg-type]
    show_splits(console, {name: splits[name, 1] for name in TASKS})
    show_batches(console, splits, options.runs)


def with_gradients(name: str, number: int, device: str) -> float:
    """Environment steps per second, forward and backward through one window."""
    task = make_task(name)
    env = TaskVectorEnv(task, number, device=device)
    actions = [
        torch.zeros(number, task.action_size, device=device, requires_grad=True)
        for _ in range(WINDOW)
    ]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        env.detach()
        total = torch.zeros(number, device=device)
        for action in actions:
            total = total + env.step(action)[1]
        torch.autograd.grad(total.sum(), actions, allow_unused=True)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return WINDOW * number / min(seconds[1:])


def show_rates(
    console: Console, rates: dict[tuple[str, int], list[float]], envs: list[int]
) -> None:
    """Thousands of steps per second: median, and lowest to highest round."""
    table = Table(title="1000 environment steps per second, forward and backward")
    table.add_column("task")
    for number in envs:
        table.add_column(f"{number} environments", justify="right")
    for name in TASKS:
        cells = []
        for number in envs:
            found = [rate / 1000 for rate in rates[name, number]]
            middle = statistics.median(found)
            cells.append(f"{middle:,.0f} ({min(found):,.0f} to {max(found):,.0f})")
        table.add_row(name, *cells)
    console.print(table)


def show_splits(console: Console, splits: dict[str, list[dict[str, float]]]) -> None:
    """Milliseconds of each part of one update, medians; steps per second of the whole."""
    table = Table(title="One update of 32 environments x 16 steps, milliseconds")
    for heading in ("task", "rollout", "back-propagation", "policy", "critics", "all", "steps/s"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name, rows in splits.items():
        parts = [1000 * statistics.median(row[key] for row in rows) for key in PARTS]
        cells = [f"{part:.1f}" for part in parts]
        table.add_row(name, *cells, f"{512 / parts[-1] * 1000:,.0f}")
    console.print(table)


def show_batches(
    console: Console, splits: dict[tuple[str, int], list[dict[str, float]]], runs: list[int]
) -> None:
    """Milliseconds of one update per run, by how many runs are trained together; medians."""
    table = Table(title="One update of 32 environments x 16 steps, milliseconds per run")
    for heading in ("task", *(f"{number} together" for number in runs)):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name in TASKS:
        medians = (statistics.median(row["seconds"] for row in splits[name, n]) for n in runs)
        table.add_row(name, *(f"{1000 * median:.1f}" for median in medians))
    console.print(table)


if __name__ == "__main__":
    main()
