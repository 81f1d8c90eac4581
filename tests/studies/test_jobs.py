"""Cells in worker processes: every one once, resumable after any kill."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from rgpo.errors import RgpoError
from rgpo.studies.jobs import RESULTS, Cell, cell_of, missing, read_results, run_jobs


def cell(seed: int, arm: str = "ppo") -> Cell:
    return Cell("CartPole-v1", arm, 0, seed, 1e-3)


def double(cells):
    return [vars(c) | {"final_return": 2 * c.seed, "pid": os.getpid()} for c in cells]


def fail_on_three(cells):
    if any(c.seed == 3 for c in cells):
        raise RgpoError("no threes")
    return double(cells)


def test_every_cell_is_trained_once_in_other_processes(tmp_path):
    told = []
    jobs = [[cell(0), cell(1)], [cell(2)], [cell(3), cell(4)]]
    run_jobs(jobs, double, tmp_path, workers=2, watch=lambda *event: told.append(event))
    results = read_results(tmp_path)
    assert sorted(r["seed"] for r in results) == [0, 1, 2, 3, 4]
    assert all(r["final_return"] == 2 * r["seed"] for r in results)
    assert os.getpid() not in {r["pid"] for r in results}
    assert told[-1][:2] == (5, 5)
    assert missing([cell(3), cell(7), cell(7)], tmp_path) == [cell(7)]
    assert cell_of(results[0]) in {cell(s) for s in range(5)}


def test_a_failing_job_keeps_what_was_done(tmp_path):
    with pytest.raises(RgpoError, match="no threes"):
        run_jobs([[cell(1)], [cell(3)], [cell(4)]], fail_on_three, tmp_path, workers=1)
    assert [r["seed"] for r in read_results(tmp_path)] == [1]


def fail_on_three_and_wait_for_it(cells):
    failed = Path(os.environ["FAILED"])
    if cells[0].seed == 3:
        failed.touch()
        raise RgpoError("no threes")
    wait_for(failed.exists)
    time.sleep(0.5)
    return double(cells)


def test_a_failing_job_lets_those_beside_it_end(tmp_path, monkeypatch):
    monkeypatch.setenv("FAILED", str(tmp_path / "failed"))
    jobs = [[cell(1)], [cell(3)], [cell(4)]]
    with pytest.raises(RgpoError, match="no threes"):
        run_jobs(jobs, fail_on_three_and_wait_for_it, tmp_path, workers=2)
    assert [r["seed"] for r in read_results(tmp_path)] == [1]


def die_at_three(cells):
    if cells[0].seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return double(cells)


def test_a_killed_worker_is_told_in_a_sentence(tmp_path):
    with pytest.raises(
        RgpoError, match=r"a worker process was killed, .* the same command goes on"
    ):
        run_jobs([[cell(1)], [cell(3)], [cell(4)]], die_at_three, tmp_path, workers=1)
    assert [r["seed"] for r in read_results(tmp_path)] == [1]


def test_a_worker_killed_while_the_parent_is_busy_is_told_too(tmp_path):
    """The pool then refuses the next job, and no future tells of it."""

    def watch(*_):
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        time.sleep(0.5)

    with pytest.raises(RgpoError, match=r"with the runs that are left$"):
        run_jobs([[cell(1)], [cell(2)]], double, tmp_path, workers=1, watch=watch)
    assert [r["seed"] for r in read_results(tmp_path)] == [1]


def test_a_line_that_was_cut_off_is_dropped_and_its_cell_is_missing(tmp_path):
    run_jobs([[cell(0)], [cell(1)]], double, tmp_path, workers=1)
    path = tmp_path / RESULTS
    path.write_text(path.read_text()[:-7])
    assert missing([cell(0), cell(1)], tmp_path) == [cell(1)]
    run_jobs([[cell(1)]], double, tmp_path, workers=1)
    assert [r["seed"] for r in read_results(tmp_path)] == [0, 1]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_cell_counts_once_however_often_it_was_trained(tmp_path):
    run_jobs([[cell(0)], [cell(1)]], double, tmp_path, workers=1)
    path = tmp_path / RESULTS
    path.write_text(2 * path.read_text())
    assert [r["seed"] for r in read_results(tmp_path)] == [0, 1]


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    refused = []

    def watch(*_):
        with pytest.raises(RgpoError, match="another process trains in"):
            run_jobs([[cell(1)]], double, tmp_path, workers=1)
        refused.append(True)

    run_jobs([[cell(0)]], double, tmp_path, workers=1, watch=watch)
    assert refused == [True]
    run_jobs([[cell(1)]], double, tmp_path, workers=1)
    assert [r["seed"] for r in read_results(tmp_path)] == [0, 1]


def test_damage_is_told(tmp_path):
    (tmp_path / RESULTS).write_text("{broken\n{}\n")
    with pytest.raises(RgpoError, match="is damaged"):
        read_results(tmp_path)


def sleep_long(cells):
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    time.sleep(120)
    return double(cells)


def test_workers_end_with_a_parent_that_was_killed(tmp_path, monkeypatch):
    context = multiprocessing.get_context("spawn")
    monkeypatch.setenv("PIDS", str(tmp_path))
    jobs = [[cell(0)]], sleep_long, tmp_path / "out"
    parent = context.Process(target=run_jobs, args=jobs, kwargs={"workers": 1})
    parent.start()
    worker = wait_for(lambda: [p for p in tmp_path.iterdir() if p.name.isdigit()])[0]
    parent.kill()
    parent.join()
    wait_for(lambda: has_ended(worker.name))


def has_ended(pid):
    """Also where nobody reaps orphans, as in a container without an init."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_for(found):
    for _ in range(3000):
        if result := found():
            return result
        time.sleep(0.1)
    raise AssertionError("waited for 300 seconds")
