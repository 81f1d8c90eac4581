"""Everything one control run depends on."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from rgpo.core.diagnostics import NO_SPREAD
from rgpo.core.recipes import Recipe
from rgpo.errors import RgpoError
from rgpo.settings import Settings, configured, parse_options

PER_RUN = ("recipe", "set", "seed", "learning_rate", "target_kl", "max_kl")
"""Fields in which runs that are trained together as one computation may differ."""

IN_ARMS = ("learning_rate", "target_kl", "max_kl")
"""Fields that `set` may give as well as the recipe's own, so that the arms of a comparison can."""

_COUNTS = (
    "steps",
    "num_envs",
    "env_factor",
    "rollout_steps",
    "epochs",
    "minibatch_size",
    "keep",
)
_POSITIVE = ("learning_rate", "max_kl", "checkpoint_every", "target_kl", "value_clip")
_NOT_NEGATIVE = ("seed", "staleness", "eval_episodes", "max_grad_norm", "value_coefficient")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Defaults are the usual ones of PPO on MuJoCo (8 environments x 256 steps, 10 epochs)."""

    env: str = "Hopper-v5"
    """Gymnasium id; "module:Name-v0" imports the module first."""

    recipe: str = "rgpo"
    """Objective by name; `rgpo objectives` lists them."""

    set: tuple[str, ...] = ()
    """Hyper-parameters of the recipe, such as sharpness=4 kl_target=0.02; learning_rate, target_kl
    and max_kl as well, where they win over the fields, so that arms may differ in them."""

    seed: int = 0
    """Seed of initialisation, environments, actions and minibatches."""

    steps: int = 1_000_000
    """Environment steps in total, rounded up to whole rollouts."""

    num_envs: int = 8
    """Environments stepped together."""

    env_factor: int = 1
    """Times as many environments with the inner loop of num_envs: minibatch size, epochs and
    learning rate stay as they are, the number of minibatches grows (arXiv 2603.06009)."""

    rollout_steps: int = 256
    """T: steps of every environment between two updates."""

    epochs: int = 10
    """Passes over a rollout in one update."""

    minibatch_size: int = 64
    """Samples per optimiser step; must divide the samples of a rollout."""

    learning_rate: float = 3e-4
    """Adam's learning rate (epsilon 1e-5) at the start."""

    staleness: int = 0
    """Updates between the policy that acts and the one that learns: every rollout is this many
    updates old (at the start of a run less, then it is that of the first policy)."""

    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate over the run: linear to zero, or constant."""

    gamma: float = 0.99
    """Discount."""

    lam: float = 0.95
    """Lambda of generalised advantage estimation."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""

    value_coefficient: float = 0.5
    """Weight of the value loss, half the mean squared error."""

    value_clip: float | None = None
    """Clip the value's change by this much, as some PPO codes do. None: off."""

    max_grad_norm: float = 0.5
    """Joint gradient-norm clip of actor and critic; 0 switches it off."""

    target_kl: float | None = None
    """Stop an update once a minibatch's KL estimate exceeds 1.5 times this. None: off."""

    normalize_advantages: bool = True
    """Zero mean and unit variance per minibatch."""

    normalize_observations: bool = True
    """Running mean and variance, frozen within a rollout, clipped to +-10; vectors only."""

    normalize_rewards: bool = True
    """Divide rewards by the running deviation of the discounted return, clipped to +-10."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic each."""

    activation: Literal["tanh", "relu"] = "tanh"
    """Non-linearity of the hidden layers."""

    initial_log_std: float = 0.0
    """Start of the log standard deviation (Box actions)."""

    state_dependent_std: bool = False
    """Let the network predict the log standard deviation instead of one parameter per action."""

    squash: bool = False
    """Squash actions through tanh to the bounds instead of clipping them (Box actions)."""

    max_kl: float = 0.01
    """Radius of the KL ball of natural-gradient recipes (trpo)."""

    certified: bool = False
    """Take every update back towards the old policy until its certificate is not negative
    (docs/certificates.md); with the usual gamma that is the null step."""

    backend: Literal["auto", "gymnasium", "vector", "envpool"] = "auto"
    """Who steps the environments: gymnasium one after the other, vector and envpool all at once.
    auto takes EnvPool where it is installed and has the task, else the task's own batch (vector)
    if it has one."""

    learner: Literal["auto", "plain", "fast"] = "auto"
    """plain: autograd, any network. fast: hand-written backward for MLPs. auto: fast if it can."""

    device: str = "cpu"
    """Where the policies learn, such as cuda; environments stay on the CPU, and every rollout is
    transferred once. Acting then costs two transfers per step."""

    compile: bool = False
    """Compile the fast learner with torch.compile: pays beyond about a million steps (the first
    update then takes some 20 s or half a minute, 2 to 5 s once cached)."""

    checkpoint_every: int = 25
    """Updates between checkpoints; the last one is always saved."""

    keep: int = 3
    """Checkpoints kept."""

    eval_episodes: int = 10
    """Episodes with deterministic actions after training; 0 for none."""

    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        for name, value in parse_options(filter(_is_field, self.set)).items():
            if isinstance(value, str) or (value is None and name != "target_kl"):
                raise RgpoError(f"{name} must be a number, got {value}")
            object.__setattr__(self, name, value)  # frozen for everybody else
        infinity = float("inf")
        self._require("at least 1", lambda x: x >= 1, _COUNTS)
        self._require("positive", lambda x: 0 < x < infinity, _POSITIVE)
        self._require("at least 0", lambda x: 0 <= x < infinity, _NOT_NEGATIVE)
        self._require("in [0, 1]", lambda x: 0 <= x <= 1, ("gamma", "lam"))
        if min(self.hidden, default=1) < 1:
            raise RgpoError(f"hidden layers must have at least 1 unit each, got {self.hidden}")
        if self.batch_size % self.minibatch_size:
            raise RgpoError(
                f"minibatch_size {self.minibatch_size} does not divide the "
                f"{self.batch_size} samples of a rollout (num_envs x rollout_steps): "
                f"choose a divisor, such as {_divisor(self.batch_size, self.minibatch_size)}"
            )
        if self.certified and self.gamma == 1:
            raise RgpoError("no certificate exists for gamma 1: choose a smaller gamma")
        if self.certified and self.staleness:
            raise RgpoError(
                "certified updates start from the policy that collected the data: "
                "leave staleness at 0"
            )

    def resolve(self) -> Recipe:
        """The recipe with this run's hyper-parameters; RgpoError for a name that is not there."""
        return configured(self.recipe, tuple(o for o in self.set if not _is_field(o)))

    @property
    def label(self) -> str:
        """What tells this arm of a comparison from another: the recipe and what was set."""
        return " ".join((self.recipe, *self.set))

    @property
    def envs(self) -> int:
        """Environments of one run, E."""
        return self.num_envs * self.env_factor

    @property
    def batch_size(self) -> int:
        """Samples in one rollout, N = E * T."""
        return self.envs * self.rollout_steps

    @property
    def updates(self) -> int:
        """Rollouts, and therefore updates, in the whole run."""
        return -(-self.steps // self.batch_size)

    def warnings(self) -> list[str]:
        """Sentences about combinations that run, but not as their user may think."""
        found = []
        natural = self.resolve().step == "natural-gradient"
        if not natural and self.epochs == 1 and self.minibatch_size == self.batch_size:
            found.append(NO_SPREAD)
        if natural and self.target_kl is not None:
            found.append(f"{self.recipe} takes one step inside max_kl: target_kl changes nothing")
        if self.certified and self.gamma >= 0.9:
            found.append(
                f"at gamma {self.gamma} a certificate is far below 0 and every certified update "
                "the null step: the cost of the shift of states grows with 1 / (1 - gamma)^2"
            )
        if self.certified and self.normalize_observations:
            found.append(
                "the statistics of the observations move the policy between updates, which no "
                "certificate covers: use --normalize-observations False"
            )
        return found + self._scaling_warnings()

    def _scaling_warnings(self) -> list[str]:
        """More environments than usual together with an inner loop that is not the usual one."""
        usual = {f.name: f.default for f in fields(self)}
        names = ("minibatch_size", "epochs", "learning_rate")
        changed = [f"{n} {getattr(self, n):g}" for n in names if getattr(self, n) != usual[n]]
        if self.num_envs <= usual["num_envs"] or not changed:
            return []
        sentence = (
            f"{self.num_envs} environments together with {' and '.join(changed)}: learning "
            "stagnates if the inner loop changes as environments grow (arXiv 2603.06009): if these "
            "were chosen for fewer environments, say --num-envs FEWER --env-factor TIMES"
        )
        return [sentence]


def shared_fields(configs: list[TrainConfig]) -> dict[str, Any]:
    """What runs trained together must agree on; RgpoError naming the first that differs."""
    shared = {f.name: getattr(configs[0], f.name) for f in fields(TrainConfig)}
    for name in PER_RUN:
        shared.pop(name)
    for config in configs[1:]:
        for name, expected in shared.items():
            if getattr(config, name) != expected:
                raise RgpoError(f"runs trained together must share {name}: start them separately")
    return shared


def _is_field(option: str) -> bool:
    return option.partition("=")[0].replace("-", "_") in IN_ARMS


def _divisor(total: int, near: int) -> int:
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - near))
