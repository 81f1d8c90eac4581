"""The whole of `rgpo rlvr` on small models: it learns, continues where it was, and refuses."""

import json
import resource
import shutil

import pytest
import tiny  # noqa: F401  (offline)

from rgpo import cli
from rgpo.errors import RgpoError
from rgpo.language import rlvr
from rgpo.language.rlvr import RlvrConfig
from rgpo.language.sample import load_policy
from rgpo.language.stages import newest_checkpoint
from rgpo.language.verifiable import COMPACT, EASY, load_task

SMALL = {
    "task": "count_bits",
    "warm_steps": 24,
    "updates": 4,
    "batch": 2,
    "group": 4,
    "epochs": 2,
    "minibatches": 2,
    "save_every": 1,
    "entries": 60,
    "held_out": 16,
    "max_tokens": 5,
    "cpu": True,
}
OPTIONS = [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One cache for all tests, so that the warm start is made once."""
    monkeypatch.setenv("RGPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def quiet(*_):
    """Watch nothing."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from the beginning to the end."""
    path = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RGPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return path, rlvr.run(RlvrConfig(**SMALL), path, quiet)


def rows_of(path):
    """What was measured, without times."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "step_time")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_a_run_measures_every_update_and_ends_with_its_accuracies(whole):
    path, result = whole
    rows = rows_of(path)
    assert [row["update"] for row in rows] == [4, 8, 12, 16]
    assert all(0 <= row["reward"] <= 1 and row["ratio/kl_k3"] >= 0 for row in rows)
    assert any(0 < row["reward"] < 1 for row in rows)  # else there is nothing to learn from
    assert {0 <= result[when][kind] <= 1 for when in ("before", "after")
            for kind in ("sampled", "greedy")} == {True}  # fmt: skip
    status = json.loads((path / "status.json").read_text())
    assert status["status"] == "finished"
    assert status["result"] == result
    assert load_policy(path / "trained").sample(["abc="], 3)[0].text is not None


def test_the_warm_start_ends_at_its_target(tmp_path, monkeypatch):
    monkeypatch.setenv("RGPO_CACHE", str(tmp_path / "cache"))
    told = []

    def watch(stage, fraction, _):
        told.append(fraction)
        if stage == "before":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rlvr.run(RlvrConfig(**SMALL | {"warm_target": 0.0}), tmp_path / "run", watch)
    assert max(fraction for fraction in told if fraction < 1) == 5 / 24


def test_an_interrupted_run_continues_to_the_same_numbers(whole, tmp_path):
    path = tmp_path / "run"

    def stop(stage, fraction, _):
        if stage == "trained" and fraction >= 0.6:  # within the third update
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rlvr.run(RlvrConfig(**SMALL), path, stop)
    assert json.loads((path / "status.json").read_text())["status"] == "interrupted"
    newest = newest_checkpoint(path / "checkpoints")
    assert newest.name == "checkpoint-8"
    (newest.parent / "checkpoint-12").mkdir()  # the save that a kill cut short
    told = []
    rlvr.run(RlvrConfig(**SMALL), path, lambda stage, *_: told.append(stage))
    assert "before" not in told  # a finished stage is not made again
    assert rows_of(path) == rows_of(whole[0])
    expected = load_policy(whole[0] / "trained").model.state_dict()
    found = load_policy(path / "trained").model.state_dict()
    assert all((found[name] == tensor).all() for name, tensor in expected.items())


def test_a_finished_run_is_only_read_again_and_another_configuration_refused(whole):
    path, result = whole
    before = (path / "metrics.jsonl").read_bytes()
    assert rlvr.run(RlvrConfig(**SMALL), path, quiet) == result
    assert (path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(RgpoError, match="another seed"):
        rlvr.run(RlvrConfig(**SMALL | {"seed": 1}), path, quiet)


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(whole, tmp_path):
    path = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(stage, fraction, _):
        if stage == "trained" and fraction >= 0.3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(RgpoError, match="free some space"):
            rlvr.run(RlvrConfig(**SMALL), path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_checkpoint(path / "checkpoints").name == "checkpoint-4"
    rlvr.run(RlvrConfig(**SMALL), path, quiet)
    assert rows_of(path) == rows_of(whole[0])


def test_the_command_line_runs_resumes_and_shows_the_table(whole, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(whole[0], path)
    shutil.rmtree(path / "after")
    with pytest.raises(SystemExit) as ended:
        cli.main(["resume", str(path)])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "count_bits, 16 held-out entries" in out
    assert f"{whole[1]['after']['greedy']:.1%}" in out


def test_the_report_shows_a_run_and_a_folder_of_them(whole, tmp_path, capsys):
    unfinished = tmp_path / "runs" / "new-seed0"
    shutil.copytree(whole[0], tmp_path / "runs" / "old-seed0")
    shutil.copytree(whole[0], unfinished)
    (unfinished / "status.json").unlink()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "all.html")])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    result = whole[1]
    told = f"{result['before']['greedy']:.1%} → {result['after']['greedy']:.1%}"
    assert told in out
    assert f"{result['after']['kl']['mean']:.2f} ±" in out
    (row,) = [line for line in out.splitlines() if "new-seed0" in line]
    assert row.split() == ["new-seed0", "-", "-", "-", "unfinished"]
    page = (tmp_path / "all.html").read_text()
    assert told in page
    assert 'id="plot-training0"' in page


def test_a_finished_run_is_measured_again_with_other_samples(whole, tmp_path, capsys):
    for seed in ("1", "7"):  # 1 is the run's own
        with pytest.raises(SystemExit) as ended:
            cli.main(["eval", str(whole[0]), "--seed", seed])
        assert ended.value.code == 0
    first, second = capsys.readouterr().out.split("count_bits, 16 held-out entries")[1:]
    kl = whole[1]["after"]["kl"]
    assert f"{kl['mean']:.2f} ± {kl['se']:.2f} nats" in first
    assert first != second
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "trained")
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", str(tmp_path / "run")])
    assert ended.value.code == 1
    assert "has no trained policy yet: `rgpo resume" in capsys.readouterr().err


def test_language_and_control_runs_are_not_compared(whole, tmp_path, capsys):
    control = tmp_path / "control"
    control.mkdir()
    for name in ("config.json", "versions.json"):
        (control / name).write_text("{}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(whole[0]), str(control)])
    assert ended.value.code == 1
    assert "report on them apart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--task", "spell_sideways"], "has no task 'spell_sideways': near it are spell_backward"),
        (["--task-options", '{"letters": 3}'], "correct --task-options"),
        (["--task-options", "letters"], "--task-options takes a JSON object"),
        (["--recipe", "rppo"], "rppo"),
        (["--model", "no/such-model"], "could not be loaded"),
        (["--minibatches", "3"], "cannot be split into 3 minibatches"),
        (["--trainer", '{"colour": 1}'], "colour"),
        (["--trainer", '{"epsilon": 0.1}'], "use recipe_options instead"),
        (["--held-out", "500", "--entries", "1"], "1 without the held-out ones"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, options, sentence):
    with pytest.raises(SystemExit) as ended:
        cli.main(["rlvr", *OPTIONS, "--out", str(tmp_path / "run"), *options])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_options_come_from_a_file_and_the_command_line_wins(tmp_path):
    from rgpo.studies.language_command import with_file

    file = tmp_path / "run.yaml"
    file.write_text("recipe: ppo\nmax_tokens: 5\nmodel:\n")
    found = with_file(["rlvr", "--config", str(file), "--recipe", "grpo"])
    assert found == ["rlvr", "--recipe", "ppo", "--max-tokens", "5", "--recipe", "grpo"]


@pytest.mark.parametrize("family", sorted(COMPACT))
def test_right_answers_to_compact_prompts_score_one(family):
    task = load_task(family, 40, 0, None)
    assert family in EASY or family == "simple_equations"
    for row in task.rows[:10]:
        assert task.score(row["answer"], row["entry"]) == 1
        assert task.score("", row["entry"]) < 1
        assert len(row["prompt"]) < 64


def test_an_instructed_model_gets_the_question_and_answers_in_tags():
    task = load_task("chain_sum", 40, 0, chat=True)
    system, user = task.rows[0]["prompt"]
    assert "<answer>" in system["content"]
    assert "arithmetic problem" in user["content"]
    row = task.rows[0]
    said = [[{"role": "assistant", "content": f"so <answer>{row['answer']}</answer>"}]]
    assert task.reward(completions=said, entry=[row["entry"]]) == [1.0]
