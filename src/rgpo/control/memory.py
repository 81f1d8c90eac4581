"""How much memory runs take, estimated before they start, and how much there is.

Counted are what grows with the runs: parameters and optimiser, the rollout and what is computed
from it, the environments. `benchmarks/throughput.py --only memory` holds the estimate against the
measured peak.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
from torch import Tensor, nn

from rgpo.control.environments import make_environments
from rgpo.control.fast import FastLearner
from rgpo.control.networks import ActorCritic
from rgpo.control.train import Trainer
from rgpo.errors import RgpoError

MATRICES = 8
"""Of the size of the parameters: themselves, gradient, Adam's two moments, past policy, and what
one step needs in between."""

SCALARS = 192
"""Numbers of a sample that are no vectors: rewards, values, ratios, sorted copies, ..."""

SLICE = 1024
"""Samples that the plain learner evaluates at once."""

MUJOCO = 2**20
"""Bytes of one MuJoCo environment: 0.8 to 1.3 MiB measured, with either backend."""

SHARE = 0.8
"""Of the memory that is free, what runs may take: the estimate is not exact."""


@dataclass(frozen=True)
class Footprint:
    """Estimated bytes of a trainer."""

    per_run: int
    """What every further run adds."""
    per_process: int
    """What a process needs once: Python, its packages, activations of the run being learned."""

    def runs(self, budget: float) -> int:
        """How many runs one process can train in `budget` bytes; at least 1."""
        return max(1, int((budget - self.per_process) / self.per_run))


def footprint(trainer: Trainer) -> Footprint:
    """What a trainer like this one takes; its environments are made again to be weighed."""
    run, once = _array_bytes(trainer)
    return Footprint(run + _environment_bytes(trainer), once + resident_bytes())


def require_room(trainer: Trainer) -> None:
    """Raise RgpoError where a single run of this trainer needs more memory than is free."""
    need, free = _array_bytes(trainer)[0], room(trainer)
    if need > free:
        raise RgpoError(
            f"one run needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} are free: take "
            "fewer environments, shorter rollouts or smaller networks "
            "(--num-envs, --rollout-steps, --hidden)"
        )


def _array_bytes(trainer: Trainer) -> tuple[int, int]:
    """Of every run's parameters and rollouts, and of the activations of the run being learned."""
    config, policy = trainer.config, trainer.learner.policies[0]
    shapes, distribution = trainer.environments.observation_shapes, trainer.distribution
    parameters = trainer.learner.parameters_of_runs().shape[1]
    floats = parameters * (MATRICES + config.staleness)
    vector = shapes.get("vector", (0,))[0]
    image = torch.Size(shapes.get("image", (0,))).numel()
    sample = SCALARS + 2 * config.epochs + 5 * vector
    sample += 8 * distribution.parameters + 4 * distribution.action_size
    activations = activation_floats(policy, shapes)
    once = 0
    if isinstance(trainer.learner, FastLearner):
        sample += activations
    else:  # one run and one slice or minibatch after the other
        once = 2 * max(SLICE, config.minibatch_size) * (activations + vector + image)
    run = 4 * (floats + config.batch_size * sample) + 3 * config.batch_size * image
    return run, 4 * once


def activation_floats(policy: ActorCritic, shapes: dict[str, tuple[int, ...]]) -> int:
    """Numbers that all layers give for one observation, found without computing them."""
    found: list[int] = []

    def count(_: nn.Module, __: object, output: Tensor) -> None:
        found.append(output.numel())

    ghost = copy.deepcopy(policy).to("meta")
    for module in ghost.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    kinds = {"vector": torch.float32, "image": torch.uint8}
    ghost({k: torch.empty(1, *s, dtype=kinds[k], device="meta") for k, s in shapes.items()})
    return sum(found)


def room(trainer: Trainer) -> int:
    """Bytes for runs like these: free on the host, which collects, and where they learn."""
    return min(available_bytes(torch.device("cpu")), available_bytes(trainer.device))


def available_bytes(device: torch.device) -> int:
    """Memory that new tensors can take on a GPU, or what the machine and the cgroup's limit allow.

    Where neither can be read, half of what the machine has.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = list(_cgroup_free())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":") for line in lines)
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(limits)


def resident_bytes() -> int:
    """Memory of this process, 300 MB where it cannot be read."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 300 * 2**20
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _environment_bytes(trainer: Trainer) -> int:
    """Growth of this process by one more set of a run's environments; MuJoCo's are known.

    The growth may be too small: they may fit into memory that was freed before.
    """
    env, seeds = trainer.config.env, trainer.environments.seeds[: trainer.envs]
    before = resident_bytes()
    more = make_environments(env, seeds, backend=trainer.config.backend)
    more.reset()
    growth = resident_bytes() - before
    more.close()
    spec = gym.registry.get(env.rpartition(":")[2])
    floor = MUJOCO if spec is not None and "mujoco" in str(spec.entry_point) else 0
    return max(growth, floor * len(seeds))


def _cgroup_free(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """What each control group around this process still allows: version 2, then version 1."""
    for folder, limit, used in _cgroup_folders(root, own):
        try:
            most, now = (folder / limit).read_text().strip(), (folder / used).read_text()
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max" and int(most) < 2**60:  # version 1 writes "unlimited" as a huge number
            idle = int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))
            yield int(most) - int(now) + idle


def _cgroup_folders(root: Path, own: Path) -> Iterator[tuple[Path, str, str]]:
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers == "":
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            yield (folder, *names)
            if folder == top:
                break
