"""What is shown while a comparison trains."""

import io

from rich.console import Console

from rgpo.studies import progress
from rgpo.studies.progress import ComparisonProgress


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
