"""The command line: what it answers, what it refuses and how, and a whole comparison."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from rgpo import cli
from rgpo.control.config import TrainConfig
from rgpo.core import recipes
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.directory import Run

OPTIONS_OF_TINY = (
    "--env CartPole-v1 --num-envs 2 --rollout-steps 32 --minibatch-size 32 --epochs 2 "
    "--steps 256 --eval-episodes 0 --track --backend gymnasium"
)
TINY = OPTIONS_OF_TINY.split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
OPTIONS = {
    "train": ["--env", "--recipe", "--set", "--target-kl", "--out", "Gymnasium id"],
    "compare": ["--recipes", "--seeds", "--workers", "rgpo:sharpness=4,learning_rate=1e-3"],
    "resume": ["PATH"],
    "eval": ["PATH", "--episodes", "--video"],
    "report": ["PATH", "--out"],
    "objectives": ["{list,plot}", "--names", "--out"],
    "verify": ["--out", "--quick", "verify.html"],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in a folder of its own, on a terminal as wide as the sentences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def rgpo(capsys):
    """Call the command line in this process: exit status, stdout, stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def start(*arguments):
    command = [sys.executable, "-m", "rgpo.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# ---- answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", OPTIONS)
def test_help_tells_the_options(rgpo, command):
    status, out, err = rgpo(command, "--help")
    assert status == 0
    assert err == ""
    for option in OPTIONS[command]:
        assert option in out
    assert command in rgpo("--help")[1]


def test_objectives_lists_every_recipe(rgpo):
    status, out, err = rgpo("objectives")
    assert (status, err) == (0, "")
    for recipe in recipes.recipes():
        assert f" {recipe.name} " in out
        assert recipe.paper.split(",")[0] in out


def test_the_list_of_objectives_reads_on_a_narrow_terminal(rgpo, monkeypatch):
    monkeypatch.setattr(cli, "console", cli.Console(width=80))
    lines = rgpo("objectives")[1].splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 8 * len(recipes.names())
    for recipe in recipes.recipes():
        (row,) = [line for line in lines if f" {recipe.name} " in line[:28]]
        assert recipe.summary[:20] in row


def test_objectives_says_where_the_formula_of_a_chosen_recipe_is_from(rgpo):
    _, out, _ = rgpo("objectives", "--names", "ppo-mis", "bapo")
    words = " ".join(out.replace("│", " ").split())
    for name in ("ppo-mis", "bapo"):
        assert f"source: {recipes.get(name).confidence}" in words
    assert "needs the whole batch" in words


def test_objectives_plot_writes_the_file(rgpo, tmp_path):
    path = tmp_path / "curves.html"
    status, out, err = rgpo("objectives", "plot", "--names", "rgpo", "ppo", "--out", path)
    assert (status, err) == (0, "")
    assert "curves of 2 recipes" in out
    assert path.read_text().startswith("<!")


def test_train_eval_and_report(rgpo, tmp_path):
    status, out, err = rgpo("train", *TINY, "--set", "sharpness=4", "--out", "run")
    assert (status, err) == (0, "")
    assert "training return" in out
    run = Run.open(tmp_path / "run")
    assert run.config["hyper_parameters"]["sharpness"] == 4
    assert len(run.metrics()) == 4
    status, out, err = rgpo("eval", "run", "--episodes", 2)
    assert (status, err) == (0, "")
    assert "over 2 episodes" in out
    status, out, err = rgpo("report", "run", "--out", "r.html")
    assert (status, err) == (0, "")
    assert "rgpo sharpness=4" in out
    assert "rgpo sharpness=4" in (tmp_path / "r.html").read_text()


def test_the_default_directory_is_named_after_the_run(rgpo, tmp_path):
    assert rgpo("train", *TINY, "--set", "sharpness=4", "--seed", 3)[0] == 0
    assert (tmp_path / "runs" / "CartPole-v1-rgpo-sharpness-4-seed3" / "config.json").exists()


# ---- refusals -----------------------------------------------------------------------------

REFUSED = {
    "environment": (["train", "--env", "CartPol-v1"], "CartPole-v1"),
    "recipe": (["train", *TINY, "--recipe", "rgpp"], "did you mean rgpo"),
    "sequence recipe": (["train", *TINY, "--recipe", "gspo"], "sequence"),
    "second ratio": (["train", *TINY, "--recipe", "rgpo-dual-product"], "reference_log_ratio"),
    "hyper-parameter": (["train", *TINY, "--set", "sharpnes=4"], "sharpness"),
    "malformed set": (["train", *TINY, "--set", "sharpness"], "name=value"),
    "no number": (["train", *TINY, "--set", "sharpness=wide"], "must be a number"),
    "minibatch": (["train", *TINY, "--minibatch-size", "48"], "such as 32"),
    "seed": (["train", *TINY, "--seed", "-1"], "seed must be at least 0"),
    "evaluation": (["train", *TINY, "--eval-episodes", "-1"], "eval_episodes"),
    "hidden": (["train", *TINY, "--hidden", "0"], "at least 1 unit"),
    "target": (["train", *TINY, "--target-kl", "0"], "target_kl must be positive"),
    "discount": (["train", *TINY, "--gamma", "nan"], "gamma"),
    "full directory": (["train", *TINY, "--out", "full"], "not empty"),
    "report": (["report", "full"], "no run"),
    "eval": (["eval", "full"], "no run"),
    "resume": (["resume", "full"], "no run"),
    "nothing": (["resume", "nowhere"], "no run"),
    "episodes": (["eval", "full", "--episodes", "0"], "episodes must be at least 1"),
    "verify": (["verify", "--out", "full/file"], "choose another --out"),
    "names": (["objectives", "--names", "foo"], "unknown recipe 'foo'"),
    "compare recipe": (["compare", *TINY, "--recipes", "rgpo", "ppp"], "ppp"),
    "compare level": (["compare", *TINY, "--recipes", "rgpo", "gspo"], "gspo"),
    "compare setting": (["compare", *TINY, "--recipes", "rgpo:k=4"], "sharpness"),
    "compare twice": (["compare", *TINY, "--recipes", "ppo", "ppo"], "once"),
    "compare seeds": (["compare", *TINY, "--seeds", "0"], "seeds"),
    "compare full": (["compare", *TINY, "--out", "full"], "not an empty directory"),
    "compare file": (["compare", *TINY, "--out", "full/file"], "not an empty directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_sentence_and_writes_nothing(rgpo, tmp_path, case):
    arguments, words = REFUSED[case]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    status, _, err = rgpo(*arguments)
    assert status == 1
    assert words in err
    assert err.startswith("rgpo: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full"]


@pytest.mark.parametrize("arguments", [["train", "--bogus", "1"], ["train", "--seed", "x"], ["go"]])
def test_what_cannot_be_parsed_exits_with_2(rgpo, arguments):
    status, _, err = rgpo(*arguments)
    assert status == 2
    assert arguments[-1] in err or arguments[-2] in err
    assert "Traceback" not in err


def test_a_diverged_run_is_told_in_one_sentence(rgpo):
    arguments = ["train", *TINY, "--learning-rate", "1e30", "--out", "run"]
    status, out, err = rgpo(*arguments)
    assert status == 1
    assert err.startswith("rgpo: update 1 (step 64) had a non-finite gradient or KL")
    assert "no checkpoint was saved yet" in err
    assert err.count("\n") == 1
    assert "non-finite" not in out


def test_debug_gives_the_traceback():
    status, _, err = end(start("train", "--env", "CartPol-v1", "--debug"))
    assert status == 1
    assert "Traceback" in err
    assert "RgpoError" in err


@pytest.mark.parametrize("arguments", [["train", "--help"], ["objectives", "list"]])
def test_nobody_reading_is_no_error(arguments):
    nobody, out = os.pipe()
    os.close(nobody)
    command = [sys.executable, "-m", "rgpo.cli", *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=subprocess.PIPE)
    os.close(out)
    assert end(process) == (1, None, b"")


def test_an_inert_objective_is_told():
    one_step = ["--epochs", 1, "--minibatch-size", 64, "--out", "run"]
    status, _, err = end(start("train", *TINY, *one_step))
    assert status == 0
    assert err.startswith("rgpo: the ratio has not left 1, so every clip and gate is inert")
    assert err.count("\n") == 1


# ---- comparisons --------------------------------------------------------------------------

ARMS = ["--recipes", "rgpo", "ppo:clip_low=0.1", "--seeds", "2", "--workers", "2"]
NAMES = ["rgpo-seed0", "rgpo-seed1", "ppo-clip_low0.1-seed0", "ppo-clip_low0.1-seed1"]


def statuses(directory):
    return [Run.open(directory / name).status["status"] for name in NAMES]


def test_compare_writes_table_and_report(tmp_path):
    directory = tmp_path / "study"
    status, out, err = end(start("compare", *TINY, *ARMS, "--out", directory))
    assert (status, err) == (0, "")
    assert statuses(directory) == ["finished"] * 4
    assert "ppo clip_low=0.1" in out
    assert "interval" in out
    text = (directory / "report.html").read_text()
    assert "rgpo against ppo clip_low=0.1" in text
    assert out.index("rgpo  ", out.index("interval")) < out.index("ppo clip", out.index("interval"))
    for name in NAMES:
        assert len(Run.open(directory / name).metrics()) == 4


def test_what_went_wrong_in_a_comparison_is_told_after_its_table_and_report(tmp_path):
    """A device that computes nothing: the workers die of errors that nobody foresaw."""
    directory = tmp_path / "study"
    status, out, err = end(start("compare", *TINY, *ARMS, "--device", "meta", "--out", directory))
    assert status == 1
    assert "ppo clip_low=0.1" in out
    assert (directory / "report.html").exists()
    assert "Traceback" in err
    assert "a worker died with exit code 1: resume the comparison to go on" in err
    assert statuses(directory) == ["unfinished"] * 4


def test_every_error_of_a_comparison_is_told_once_and_whole(tmp_path, monkeypatch, capsys):
    base = TrainConfig(env="CartPole-v1", track=(), backend="gymnasium")
    planned = cli.comparison.plan(base, ["ppo"], 1, tmp_path / "study")
    (config,) = planned.configs
    message = "EnvPool [of this run] stopped"
    document = dataclasses.asdict(config) | {"label": config.label}
    Run.create(planned.path(config), document, trackers=()).finish("failed", message)
    found = [(["failed"], [message]), (["unfinished"], []), (["failed"], ["died", message])]
    monkeypatch.setattr(cli.comparison, "run", lambda *_: found.pop(0))
    assert cli._run_comparison(planned) == 1
    assert capsys.readouterr().out.count(f"failed ppo seed 0: {message}") == 1
    assert cli._run_comparison(planned) == 130
    assert "continues it" in capsys.readouterr().out
    with pytest.raises(RgpoError, match=r"^died$"):
        cli._run_comparison(planned)
    assert message in capsys.readouterr().out


CRASHING = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
class Crashing(CartPoleEnv):
    steps = 0
    def step(self, action):
        self.steps += 1
        if self.steps > 50 and self.np_random_seed % 2:
            raise RuntimeError("the wheel [left] came off")
        return super().step(action)
gymnasium.register("Crashing-v0", entry_point=Crashing, max_episode_steps=500)
"""


def test_crashing_environments_fail_their_runs_and_the_others_finish(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    options = [*TINY, "--env", "crashing:Crashing-v0", "--num-envs", "1", "--rollout-steps", "64"]
    arms = ["--recipes", "ppo", "--seeds", "6", "--workers", "2"]
    status, out, err = end(start("compare", *options, *arms, "--out", tmp_path / "study"))
    ended = [Run.open(tmp_path / "study" / f"ppo-seed{seed}").status["status"] for seed in range(6)]
    assert set(ended) == {"finished", "failed"}
    assert (status, err) == (1, "")
    assert out.count("failed ppo seed") == ended.count("failed")
    assert out.count("the wheel [left] came off") == ended.count("failed")
    assert (tmp_path / "study" / "report.html").exists()


def wait_for_updates(process, directory, updates):
    """Until every run has logged so many updates, or the process ended too early."""
    deadline = time.monotonic() + 300
    files = [directory / name / "metrics.jsonl" for name in NAMES]
    while not all(f.exists() and f.read_bytes().count(b"\n") >= updates for f in files):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupted_comparison(directory, send, updates):
    """A comparison of so many updates that `send` stopped: every run saved what it had."""
    process = start("compare", *TINY, "--steps", 64 * updates, *ARMS, "--out", directory)
    wait_for_updates(process, directory, 2)
    send(process.pid)
    status, out, err = end(process)
    assert (status, err) == (130, "")
    assert f"rgpo resume {directory}" in out
    assert statuses(directory) == ["interrupted"] * 4
    for name in NAMES:
        run = Run.open(directory / name)
        done = run.metrics()[-1]["update"]
        assert 2 <= done < updates
        assert checkpoint.newest(run.checkpoints)[0].update == done


def test_a_terminated_comparison_saves(tmp_path):
    """`kill` and containers tell the parent alone."""
    interrupted_comparison(tmp_path / "study", lambda pid: os.kill(pid, signal.SIGTERM), 3000)


def test_a_comparison_after_ctrl_c_is_resumed(tmp_path):
    """A terminal tells the whole process group."""
    directory = tmp_path / "study"
    interrupted_comparison(directory, lambda pid: os.killpg(pid, signal.SIGINT), 300)
    status, _, err = end(start("resume", directory))
    assert (status, err) == (0, "")
    assert statuses(directory) == ["finished"] * 4
    for name in NAMES:
        rows = Run.open(directory / name).metrics()
        assert [row["update"] for row in rows] == list(range(1, 301))


def test_workers_stop_when_their_parent_is_killed(tmp_path):
    """Alone they would write into the directories that a resumed comparison writes into."""
    directory = tmp_path / "study"
    process = start("compare", *TINY, "--steps", 64 * 100_000, *ARMS, "--out", directory)
    wait_for_updates(process, directory, 2)
    process.kill()
    end(process)
    deadline = time.monotonic() + 300
    while statuses(directory) != ["interrupted"] * 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
