"""Environment steps per CPU-second: one run, a study of many, and what limits them.

8 environments x 256 steps, 10 epochs, minibatches of 64, two hidden layers of 64, on every side.
Every measurement is a fresh process on one torch thread; imports are not counted, and of single
runs not the first rollouts either (compilation). Variants take turns within a round, so that a
noisy machine disturbs all of them alike, and ratios are taken round by round. CPU-seconds are those
of the process, its threads and its ended children.

    one       one run: rgpo, Stable-Baselines3, a CleanRL-style file, TorchRL
    study     2 recipes x 8 seeds on all cores: rgpo's batched runs, SB3's one after the other
    scaling   1 to 32 runs in one process
    ceiling   the environments alone, random actions; of the fastest the other tables tell the share
    memory    peak memory per run, measured and estimated

Every measurement is a line of --out; a benchmark that was stopped goes on with those that are
missing, and with all of them there it only prints the tables.

    python benchmarks/throughput.py [--only one study] [--rounds 5] [--steps 40960] [--out FILE]

TorchRL is taken from the environment of its contract test: `make .contract/torchrl/ready`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cleanrl_style import ENVS, TIME
from rich.console import Console
from rich.table import Table

BATCH = ENVS * TIME
WARM_UP = 5  # rollouts of a single run
TORCHRL = Path(".contract/torchrl/bin/python")
CHEETAH, HOPPER, CART_POLE = "HalfCheetah-v5", "Hopper-v5", "CartPole-v1"
RGPO: dict[str, dict[str, Any]] = {  # what differs from `rgpo train`
    "rgpo": {},
    "rgpo compiled": {"compile": True},
    "rgpo without EnvPool": {"backend": "gymnasium"},
    "rgpo plain, no EnvPool": {"learner": "plain", "backend": "gymnasium"},
}
ONE = ["sb3", "sb3 + VecNormalize", "cleanrl-style", "torchrl", *RGPO]
RECIPES, SEEDS = ("rgpo", "ppo"), 8
PARTS: dict[str, tuple[tuple[str, ...], list[str]]] = {  # environments and variants
    "one": ((CHEETAH, CART_POLE), ONE),
    "study": ((CHEETAH, HOPPER), ["sb3", "rgpo", "rgpo compiled"]),
    "scaling": ((CHEETAH, HOPPER), [f"{n} runs" for n in (1, 2, 4, 8, 16, 32)]),
    "ceiling": ((CHEETAH, HOPPER, CART_POLE), ["gymnasium", "envpool 8", "envpool 128"]),
    "memory": ((CHEETAH, CART_POLE), [f"{n} runs" for n in (1, 4, 16)]),
}
Result = dict[str, Any]


def main() -> None:
    """Measure what is missing in --out, in turn, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--envs", nargs="+", help="only these environments")
    parser.add_argument("--variants", nargs="+", help="only these variants")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 * BATCH, help="of every run")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput.jsonl"))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.steps, options.worker)))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plan = list(cells(options))
    for number, cell in enumerate(plan):
        if any(same(cell, line) for line in read(options.out)):
            continue
        found = run(cell)
        if found is not None:
            with options.out.open("a") as file:
                file.write(json.dumps(cell | found) + "\n")
        rate = found and found.get("per_cpu_second")
        told = f"{rate:,.0f} steps per CPU-second" if rate else ("skipped", "done")[bool(found)]
        print(f"{number + 1} of {len(plan)}: {name(cell)}: {told}", flush=True)
    measured = read(options.out)
    lines = [line for line in measured if any(same(cell, line) for cell in plan)]
    for part in options.only:
        show(part, lines, ceilings(measured))


def cells(options: argparse.Namespace) -> Iterable[Result]:
    """Everything to measure, round by round: a stop leaves whole rounds."""
    for number in range(options.rounds):
        for part in options.only:
            environments, variants = PARTS[part]
            for env in options.envs or environments:
                for variant in variants:
                    if options.variants is None or variant in options.variants:
                        yield {
                            "part": part,
                            "env": env,
                            "variant": variant,
                            "round": number,
                            "steps": options.steps,
                        }


def same(cell: Result, line: Result) -> bool:
    """Whether the line is this cell's result."""
    return all(line.get(key) == value for key, value in cell.items())


def name(cell: Result) -> str:
    """For people."""
    return f"round {cell['round'] + 1}, {cell['part']}, {cell['env']}, {cell['variant']}"


def read(path: Path) -> list[Result]:
    """Whole lines so far; one that a kill cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("}\n")]


def run(cell: Result) -> Result | None:
    """One measurement in fresh processes; None where the library is not there."""
    if cell["variant"] == "torchrl" and not TORCHRL.exists():
        return None
    if cell["part"] != "study":
        return collect([start(cell)])[0]
    cores = os.cpu_count() or 1
    began = time.perf_counter()
    found = collect([start(cell, (index, cores)) for index in range(cores)])
    steps = sum(one["counted"] for one in found)
    cpu, wall = sum(one["cpu"] for one in found), max(one["wall"] for one in found)
    whole = time.perf_counter() - began
    return {
        "per_cpu_second": steps / cpu,
        "per_second": steps / wall,
        "per_second_with_imports": steps / whole,
    }


def start(cell: Result, worker: tuple[int, int] | None = None) -> subprocess.Popen[str]:
    """The process of one measurement, or of one worker's share of it."""
    python = str(TORCHRL.absolute()) if cell["variant"] == "torchrl" else sys.executable
    command = [python, __file__, "--measure", cell["part"], cell["env"], cell["variant"]]
    command += ["--steps", str(cell["steps"])]
    command += ["--worker", *map(str, worker)] if worker else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def collect(processes: list[subprocess.Popen[str]]) -> list[Result]:
    """What they printed last."""
    results = []
    for process in processes:
        out, err = process.communicate()
        if process.returncode:
            sys.exit(f"{' '.join(map(str, process.args))} failed:\n{err}")
        results.append(json.loads(out.splitlines()[-1]))
    return results


# ---- in the process that measures ---------------------------------------------------------


def measure(part: str, env: str, variant: str, steps: int, worker: list[int] | None) -> Result:
    """What `run` wants to know, in this process."""
    import torch

    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())
    if part == "one":
        return one_run(env, variant, steps)
    if part == "study":
        return study_worker(env, variant, steps, *worker)
    if part == "ceiling":
        return ceiling(env, variant, steps)
    runs = int(variant.split(maxsplit=1)[0])
    return scaling(env, runs, steps) if part == "scaling" else memory_per_run(env, runs)


class Clock:
    """CPU and wall time since it was started."""

    def __init__(self) -> None:
        self.cpu, self.wall = cpu_seconds(), time.perf_counter()

    def rates(self, steps: int) -> Result:
        """Steps per CPU-second and per second, and what they are made of."""
        cpu, wall = cpu_seconds() - self.cpu, time.perf_counter() - self.wall
        return {
            "per_cpu_second": steps / cpu,
            "per_second": steps / wall,
            "counted": steps,
            "cpu": cpu,
            "wall": wall,
        }


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def one_run(env: str, variant: str, steps: int) -> Result:
    """One run after its warm-up."""
    rollouts, clocks = WARM_UP + steps // BATCH, []

    def tick(done: int) -> None:
        if done in (WARM_UP, rollouts):
            clocks.append(Clock() if done == WARM_UP else clocks[0].rates(steps // BATCH * BATCH))

    if variant in RGPO:
        parts = train_rgpo(env, rollouts, tick, **RGPO[variant])
        return clocks[1] | parts
    baseline(variant)(env, rollouts, tick)
    return clocks[1]


def baseline(variant: str) -> Callable[..., None]:
    """Another library's training."""
    from functools import partial

    import baselines
    import cleanrl_style

    return {
        "sb3": baselines.train_sb3,
        "sb3 + VecNormalize": partial(baselines.train_sb3, normalize=True),
        "cleanrl-style": cleanrl_style.train,
        "torchrl": baselines.train_torchrl,
    }[variant]


def train_rgpo(
    env: str, rollouts: int, tick: Callable[[int], None], **changes: Any
) -> dict[str, float]:
    """The trainer of `rgpo train`, with its defaults; microseconds per step of its parts."""
    from rgpo.control.config import TrainConfig
    from rgpo.control.train import Trainer

    trainer, rows = Trainer([TrainConfig(env=env, **changes)]), []
    for number in range(rollouts):
        tick(number)
        rows += trainer.step()
    tick(rollouts)
    counted = rows[WARM_UP:]
    return {
        k: 1e6 * sum(r[f"seconds_{k}"] for r in counted) / (len(counted) * BATCH)
        for k in ("act", "step", "learn")
    }


def study_worker(env: str, variant: str, steps: int, index: int, workers: int) -> Result:
    """This worker's share of RECIPES x SEEDS from the first step to the last, creation included."""
    mine = [(recipe, seed) for recipe in RECIPES for seed in range(SEEDS)][index::workers]
    rollouts = max(1, steps // BATCH)
    if variant == "sb3":
        import baselines

        clock = Clock()
        for _ in mine:
            baselines.train_sb3(env, rollouts, lambda _: None)
        return clock.rates(len(mine) * rollouts * BATCH)
    from rgpo.control.config import TrainConfig
    from rgpo.control.train import Trainer

    clock = Clock()
    trainer = Trainer(
        [TrainConfig(env=env, recipe=recipe, seed=s, **RGPO[variant]) for recipe, s in mine]
    )
    for _ in range(rollouts):
        trainer.step()
    return clock.rates(len(mine) * rollouts * BATCH)


def scaling(env: str, runs: int, steps: int) -> Result:
    """Several runs in this process, the total of their steps being as near to `steps` as can be."""
    from rgpo.control.config import TrainConfig
    from rgpo.control.train import Trainer

    trainer = Trainer([TrainConfig(env=env, seed=seed) for seed in range(runs)])
    trainer.step()
    rollouts, clock, rows = max(2, steps // (BATCH * runs)), Clock(), []
    for _ in range(rollouts):
        rows += trainer.step()
    parts = {k: sum(r[f"seconds_{k}"] for r in rows) for k in ("act", "step", "learn")}
    counted = rollouts * runs * BATCH
    return clock.rates(counted) | {k: 1e6 * seconds / counted for k, seconds in parts.items()}


def ceiling(env: str, variant: str, steps: int) -> Result:
    """Stepping alone with actions that were drawn before."""
    import numpy as np

    from rgpo.control.environments import make_environments

    backend, _, count = variant.partition(" ")
    environments = make_environments(env, list(range(int(count or ENVS))), backend=backend)
    environments.reset()
    space, number = environments.action_space, environments.num_envs
    space.seed(0)
    actions = np.stack([[space.sample() for _ in range(number)] for _ in range(64)])
    for t in range(64):
        environments.step_all(actions[t])
    calls, clock = max(64, steps // number), Clock()
    for t in range(calls):
        environments.step_all(actions[t % 64])
    return clock.rates(calls * number)


def memory_per_run(env: str, runs: int) -> Result:
    """Growth of the peak by `runs` runs of two updates, after a small one has loaded everything."""
    from rgpo.control import memory
    from rgpo.control.config import TrainConfig
    from rgpo.control.train import Trainer

    Trainer([TrainConfig(env=env, num_envs=1, rollout_steps=64)]).step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = Trainer([TrainConfig(env=env, seed=seed) for seed in range(runs)])
    for _ in range(2):
        trainer.step()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    estimate = memory.footprint(trainer).per_run
    return {
        "mib_per_run": growth / runs / 2**10,
        "mib_estimated": estimate / 2**20,
        "mib_process": before / 2**10,
    }


# ---- tables -------------------------------------------------------------------------------


def ceilings(lines: list[Result]) -> dict[str, float]:
    """For every environment the median of the fastest way to step it alone."""
    rates: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if line["part"] == "ceiling":
            rates.setdefault((line["env"], line["variant"]), []).append(line["per_cpu_second"])
    fastest: dict[str, float] = {}
    for (env, _), found in rates.items():
        fastest[env] = max(statistics.median(found), fastest.get(env, 0))
    return fastest


def show(part: str, lines: list[Result], fastest: dict[str, float]) -> None:
    """One table per environment, a row per variant."""
    mine = [line for line in lines if line["part"] == part]
    for env in dict.fromkeys(line["env"] for line in mine):
        rows: dict[str, list[Result]] = {}
        for line in mine:
            if line["env"] == env:
                rows.setdefault(line["variant"], []).append(line)
        table = Table(title=f"{part}: {env} (median \\[lowest, highest])", title_justify="left")
        table.add_column("")
        columns = MEMORY if part == "memory" else RATES
        rated = [] if part == "memory" else ["ratio to the first", "share of the ceiling"]
        first = {line["round"]: line for line in next(iter(rows.values()))}
        for heading in (*columns, *rated):
            table.add_column(heading, justify="right")
        for variant, own in rows.items():
            texts = [tell(own, *how) for how in columns.values()]
            if rated:
                pairs = [(x, first[x["round"]]) for x in own if x["round"] in first]
                ratios = [a["per_cpu_second"] / b["per_cpu_second"] for a, b in pairs]
                rate = statistics.median(x["per_cpu_second"] for x in own)
                share = f"{rate / fastest[env]:.0%}" if env in fastest else "-"
                texts += [spread(ratios, ".2f"), share]
            table.add_row(variant, *texts)
        Console(width=140).print(table)


RATES = {
    "per CPU-second": (("per_cpu_second",), ",.0f"),
    "per second": (("per_second",), ",.0f"),
    "act / step / learn, us": (("act", "step", "learn"), ".0f"),
}
MEMORY = {
    "MiB per run": (("mib_per_run",), ".1f"),
    "estimated": (("mib_estimated",), ".1f"),
    "process before": (("mib_process",), ".0f"),
}


def tell(rows: list[Result], keys: tuple[str, ...], style: str) -> str:
    """One number with its spread, or the medians of several; a dash where nothing was measured."""
    if not all(key in row for row in rows for key in keys):
        return "-"
    if len(keys) == 1:
        return spread([row[keys[0]] for row in rows], style)
    return " / ".join(f"{statistics.median(row[key] for row in rows):{style}}" for key in keys)


def spread(numbers: list[float], style: str) -> str:
    """Median [lowest, highest]."""
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    return f"{statistics.median(numbers):{style}} [{low:{style}}, {high:{style}}]"


if __name__ == "__main__":
    main()
