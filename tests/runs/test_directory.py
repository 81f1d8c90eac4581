import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rgpo.errors import RgpoError
from rgpo.runs import directory
from rgpo.runs.directory import Run

CONFIG = {"recipe": "rgpo", "env": "Hopper-v5", "seed": 3, "folder": Path("/x"), "rate": 1 / 3}


def reject_constant(name):
    raise AssertionError(f"{name} is not strict JSON")


def strict_lines(path):
    text = path.read_text()
    return [json.loads(line, parse_constant=reject_constant) for line in text.splitlines()]


def row(update, **more):
    return {"update": update, "step": 100 * update, **more}


def test_create_and_open(tmp_path):
    path = tmp_path / "a" / "run"
    run = Run.create(path, CONFIG)
    assert run.config == {**CONFIG, "folder": "/x"}
    assert Run.open(path).config == run.config
    assert run.checkpoints.is_dir()
    assert run.metrics() == []
    assert run.status["status"] == "unfinished"
    versions = json.loads((path / "versions.json").read_text())
    assert versions["python"] == sys.version.split()[0]
    assert versions["numpy"] == np.__version__
    assert versions["command"]
    assert versions["cpus"] >= 1
    assert {"torch", "gymnasium", "mujoco", "envpool", "rgpo", "platform"} <= versions.keys()


def test_git_revision_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "src" / "rgpo" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    monkeypatch.setattr(directory.rgpo, "__file__", str(package))
    assert directory._git() is None
    git("init")
    git("add", "src")
    git("commit", "-m", "a")
    assert directory._git() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    package.write_text("changed = True")
    assert directory._git() == {"revision": git("rev-parse", "HEAD"), "dirty": True}


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", CONFIG)
    with pytest.raises(RgpoError, match=r"not empty: resume it with `rgpo resume .*` or choose"):
        Run.create(tmp_path / "empty", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(RgpoError, match="not empty"):
        Run.create(tmp_path / "file", CONFIG)
    with pytest.raises(RgpoError, match=r"Could not make the run directory .*Not a directory"):
        Run.create(tmp_path / "file" / "run", CONFIG)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RgpoError, match="is no run directory"):
        Run.open(tmp_path)
    with pytest.raises(RgpoError, match="is no run directory"):
        Run.open(tmp_path / "none")
    run = Run.create(tmp_path / "run", CONFIG)
    (run.path / "config.json").write_text("[1")
    with pytest.raises(RgpoError, match=r"config\.json is damaged"):
        Run.open(run.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trackers": ["mlflow"]}, "no tracker 'mlflow': choose from tensorboard, wandb, trackio"),
        ({"config": {"optimiser": {"rate": math.inf}}}, r"setting optimiser\.rate is not finite"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, message):
    arguments = {"config": CONFIG, **changes}
    with pytest.raises(RgpoError, match=message):
        Run.create(tmp_path / "run", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_names_the_pip_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # also where it is installed
    with pytest.raises(RgpoError, match=f"pip install {name}"):
        Run.create(tmp_path / "run", CONFIG, trackers=("tensorboard", name))
    assert not list(tmp_path.iterdir())


def test_rows_are_strict_json_and_come_back_exactly(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, trackers=())
    run.log(row(1, kl=1 / 3, ess=np.float32(0.5), episodes=np.int64(2), **{"return": None}))
    run.log(row(2, kl=math.nan, ratio_max=np.float32(math.inf), ess=1))
    rows = strict_lines(tmp_path / "run" / "metrics.jsonl")  # flushed: the run is still open
    assert rows == run.metrics() == Run.open(run.path).metrics()
    assert rows[0] == row(1, kl=1 / 3, ess=0.5, episodes=2, **{"return": None})
    assert rows[1] == row(2, kl=None, ratio_max=None, ess=1, not_finite=["kl", "ratio_max"])
    with pytest.raises(ValueError, match="needs its update"):
        run.log({"kl": 1.0})


def test_a_half_written_last_line_is_ignored_and_repaired(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, trackers=())
    run.log(row(1))
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 2, "st')
    again = Run.open(run.path)
    assert again.metrics() == [row(1)]
    again.log(row(2))
    assert again.metrics() == strict_lines(run.path / "metrics.jsonl") == [row(1), row(2)]


def test_a_damaged_line_is_named(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, trackers=())
    for update in (1, 2, 3):
        run.log(row(update))
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"update": 2', b'"update: 2'))
    with pytest.raises(RgpoError, match=r"Line 2 of .*metrics\.jsonl is damaged"):
        run.metrics()


def test_truncate_after_and_resume(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, trackers=("tensorboard",))
    for update in (1, 2, 3):
        run.log(row(update, kl=float(update)))
    run.finish("interrupted", "Ctrl-C")
    assert run.status["status"] == "interrupted"

    again = Run.open(run.path)
    again.truncate_after(1)
    assert again.status["status"] == "interrupted"
    again.log(row(2, kl=20.0))
    assert again.status["status"] == "unfinished"
    again.finish("finished", result={"return": 3.5, "worst": [math.nan]})
    assert [r["kl"] for r in Run.open(run.path).metrics()] == [1.0, 20.0]
    status = Run.open(run.path).status
    assert (status["status"], status["result"]) == ("finished", {"return": 3.5, "worst": [None]})

    events = EventAccumulator(str(run.path / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [(100, 1.0), (200, 20.0)]


FULL_DISK = """
import resource, sys
from pathlib import Path
from rgpo.errors import RgpoError
from rgpo.runs.directory import Run
run = Run.open(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    for update in range(1, 1000):
        run.log({"update": update, "kl": 1 / 3})
except RgpoError as error:
    print(error)
"""


def test_a_full_disk_leaves_whole_rows(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, trackers=())
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, run.path], capture_output=True, text=True
    )
    assert done.stdout.startswith(f"Could not write {run.path}/metrics.jsonl (File too large)")
    assert done.stderr == ""
    rows = strict_lines(run.path / "metrics.jsonl")
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert [r["update"] for r in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 30


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = Run.create(tmp_path / "run", CONFIG, trackers=("wandb",))
    for update in (1, 2):
        run.log(row(update, kl=0.1 * update, ratio_max=math.inf))
    run.finish("finished")
    assert list((run.path / "wandb").glob(f"offline-run-*/run-{run.versions['identity']}.wandb"))


def test_trackio_local(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    run = Run.create(tmp_path / "run", CONFIG, trackers=("trackio",))
    run.log(row(1, kl=0.25))
    run.finish("finished")
    stored = trackio.Api().runs("rgpo")
    assert [r.name for r in stored] == [f"run-{run.versions['identity']}"]
