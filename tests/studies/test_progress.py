"""What is shown while a comparison trains."""

import io

from rich.console import Console

from rgpo.studies import progress
from rgpo.studies.progress import ComparisonProgress, StudyProgress


def row(update, value, kl=0.01):
    return {"update": update, "return": value, "kl": kl, "kl_spike": float(kl > 0.04)}


def test_the_table_holds_the_iqm_over_runs_of_each_arm():
    """Of four runs the middle two count; a run is the mean of its last updates."""
    told = io.StringIO()
    labels = [["rgpo", "rgpo", "ppo"], ["rgpo", "rgpo", "ppo"]]
    with ComparisonProgress(Console(file=told, width=100), labels, 10, 64) as shown:
        for update in (1, 2):
            shown(0, update, 10, [row(update, 10 * update), row(update, 1e6), row(update, None)])
            shown(1, update, 10, [row(update, -1e6), row(update, 25), row(update, 7, 0.05)])
        assert shown._arm("rgpo") == ("20.0", "0.0100", "0%")  # of 15 and 25
        assert shown._arm("ppo") == ("7.0", "0.0300", "50%")
    assert "rgpo 20.0  ppo 7.0" in told.getvalue()


def test_what_was_done_before_a_resumption_does_not_count_as_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    told = io.StringIO()
    with ComparisonProgress(Console(file=told, width=100), [["ppo"], ["rgpo"]], 10, 64) as shown:
        for update in range(5, 11):
            for group in (0, 1):
                now[0] += 1
                shown(group, update, 10, [row(update, 1.0)])
    lines = told.getvalue().splitlines()
    assert lines[-3].startswith(" 80%  0:00:08, 0:00:05 left")  # 6 updates in 7 s, 4 to go
    assert lines[-1].startswith("100%  0:00:12  ")


def cell(arm, score, *, task="Hopper-v5", staleness=0, failed=None):
    return {
        "task": task, "arm": arm, "staleness": staleness, "learning_rate": 1e-3,
        "final_return": score, "failed": failed,
    }  # fmt: skip


def test_a_study_tells_its_speed_and_the_highest_iqm_of_the_newest_task(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    told = io.StringIO()
    console = Console(file=told, width=100)
    with StudyProgress(console, "tuning", {"Hopper-v5": 1000, "Ant-v5": 500}) as shown:
        now[0] += 10
        shown(4, 10, [cell("ppo", score) for score in (0.0, 20.0, 30.0, 9e9)])
        now[0] += 10
        shown(6, 10, [cell("trpo", 1.0, task="Ant-v5"), cell("gipo", 26.0, staleness=2)])
        shown(8, 10, [cell("gipo", None, staleness=2), cell("gipo", 5, staleness=2, failed="NaN")])
        console.print(shown._table("Hopper-v5"))
    lines = [" ".join(line.split()) for line in told.getvalue().splitlines()]
    assert "375 steps/s" in lines[-4]  # 7 x 1,000 + 500 in 20 s: what diverged was trained too
    assert lines[-3:] == [
        "Hopper-v5 runs score (IQM)",
        "gipo, age 2, rate 0.001 1 26",
        "ppo, rate 0.001 4 25",
    ]


def test_a_study_of_many_arms_shows_the_highest():
    with StudyProgress(Console(file=io.StringIO()), "tuning") as shown:
        shown(20, 20, [cell(f"arm{i}", float(i)) for i in range(20)])
        assert shown._table("Hopper-v5").row_count == progress.HIGHEST


def test_time_left_is_told_at_the_speed_after_the_first_update(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    told = io.StringIO()
    with ComparisonProgress(Console(file=told, width=100), [["ppo"]], 10, 64) as shown:
        for update in range(1, 11):
            now[0] += 30 if update == 1 else 2  # compilation, then two seconds an update
            shown(0, update, 10, [row(update, 1.0)])
    lines = told.getvalue().splitlines()
    assert lines[2].startswith(" 20%  0:00:32, 0:00:16 left  ")
    assert lines[-1].startswith("100%  0:00:48  ")
    assert f"{640 / 48:,.0f} steps/s" in lines[-1]
