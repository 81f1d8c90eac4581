import math
import re

import numpy as np
import pytest

from chromium import Plots, in_chromium, rendered
from rgpo.errors import RgpoError
from rgpo.runs import figures
from rgpo.runs.report import ObjectiveCurve, write_objectives, write_report
from rgpo.runs.table import read_runs

FIGURES = ["return", "kl", "ratios", "trust", "learning", "seconds"]


def ppo_and_gate() -> dict[str, ObjectiveCurve]:
    r = np.linspace(0.0, 4.0, 201)
    pos, neg = np.minimum(r, 1.2), -np.maximum(r, 0.8)
    lines = (r, pos, np.where(r < 1.2, r, 0), neg, np.where(r > 0.8, -r, 0))
    s = 1 / (1 + np.exp(-10 * (r - 1)))
    gate = (r, s * 0.4, 4 * r * s * (1 - s), -s * 0.4, -4 * r * s * (1 - s))
    return {
        "ppo": ObjectiveCurve(*(line.tolist() for line in lines)),
        "rgpo-gate": ObjectiveCurve(*(line.tolist() for line in gate)),
    }


@in_chromium
def test_it_renders_in_chromium_without_console_errors(comparison, tmp_path):
    path = write_report(
        comparison, tmp_path / "report.html", title="PPO & RGPO", objective_curves=ppo_and_gate()
    )
    dom, console = rendered(path, tmp_path / "chromium")
    assert console == []
    drawn = Plots(dom).drawn
    assert list(drawn) == [f"plot-env0-{name}" for name in FIGURES] + ["plot-objectives"]
    assert all(plot["svg"] > 0 for plot in drawn.values())
    # Three runs and their IQM, for two recipes, in as many panels as have both.
    expected = {"return": 8, "kl": 8, "ratios": 24, "trust": 16, "learning": 24}
    for name, lines in expected.items():
        assert drawn[f"plot-env0-{name}"]["line"] >= lines, name
    assert drawn["plot-env0-seconds"]["bar"] == 8  # four parts, two recipes
    assert drawn["plot-objectives"]["line"] == 8


@in_chromium
def test_the_legend_hides_a_recipe_everywhere(comparison, tmp_path):
    path = write_report(
        comparison, tmp_path / "report.html", title="t", objective_curves=ppo_and_gate()
    )
    probe = """<script>setTimeout(() => {
      document.querySelector('nav button[value="rgpo-gate"]').click();
      const left = [...document.querySelectorAll(".js-plotly-plot")].map(plot =>
        [...new Set(plot.data.filter(t => t.visible !== false && t.meta).map(t => t.meta))]);
      document.body.dataset.left = JSON.stringify(left);
    }, 1000)</script></body>"""
    page = path.read_text()
    path.write_text(page.replace("</body></html>", probe + "</html>"))
    dom, console = rendered(path, tmp_path / "chromium")
    assert console == []
    left = re.search(r'data-left="([^"]*)"', dom)[1].replace("&quot;", '"')
    assert left == '[["ppo"],["ppo"],["ppo"],["ppo"],["ppo"],[],["ppo"]]'


@in_chromium
def test_the_browser_test_sees_errors(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('one'); null.x</script>")
    first, second = rendered(page, tmp_path / "chromium")[1]
    assert '"one"' in first
    assert "TypeError" in second


@in_chromium
def test_odd_runs_render_too(make_run, fake_rows, tmp_path):
    bad = [{"update": 1, "step": 10, "return": None, "kl": math.nan, "ess": None}]
    paths = [
        make_run("</script><b>&\"'", 0, env="<i>", rows=fake_rows("rgpo", 0)),
        make_run("ppo", 0, rows=[]),
        make_run("ppo", 1, rows=bad, status="interrupted", message="Ctrl-C"),
        make_run("old", 0, rows=[{"update": 1, "step": 10, "return": 3.0}], status=None),
    ]
    path = write_report(paths, tmp_path / "report.html", title="<b>odd</b>")
    dom, console = rendered(path, tmp_path / "chromium")
    assert console == []
    drawn = Plots(dom).drawn
    assert len(drawn) == 12
    assert all(plot["svg"] > 0 for plot in drawn.values())
    assert "no recipe here records it" in dom


@in_chromium
def test_certificates_are_drawn_where_they_were_recorded(make_run, fake_rows, tmp_path):
    rows = fake_rows("ppo", 0)
    for row in rows:
        cost = 300.0 + row["update"]
        row |= {"certificate": 1 - cost, "certificate_surrogate": 0.8, "certificate_gate": -0.2}
        row |= {"certificate_shift": cost - 10, "certificate_interval": 10.0, "accepted_step": 1.0}
    path = write_report([make_run("ppo", 0, rows=rows)], tmp_path / "report.html", title="t")
    dom, console = rendered(path, tmp_path / "chromium")
    assert console == []
    assert Plots(dom).drawn["plot-env0-certificate"]["line"] == 12  # six panels, line and band
    assert "What is guaranteed?" in dom


@in_chromium
def test_the_page_of_objectives_alone(tmp_path):
    path = write_objectives(ppo_and_gate(), tmp_path / "deep" / "objectives.html")
    dom, console = rendered(path, tmp_path / "chromium")
    assert console == []
    assert Plots(dom).drawn["plot-objectives"]["line"] == 8


def test_one_file_with_plotly_inlined_once_and_nothing_to_load(comparison, tmp_path):
    path = write_report(comparison, tmp_path / "deep" / "report.html", title="t")
    page = path.read_text()
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", page)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def without_scripts(path):
    return re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.DOTALL)


def test_the_words_around_the_figures(comparison, make_run, fake_rows, tmp_path):
    comparison.append(
        make_run("ppo", 7, rows=fake_rows("ppo", 7, 5), status="failed", message="reward is NaN")
    )
    rows = fake_rows("ppo", 8)
    rows[3]["kl"] = math.nan
    comparison.append(make_run("ppo", 8, rows=rows))
    path = write_report(comparison, tmp_path / "r.html", title="A & B", command="rgpo compare x")
    page = without_scripts(path)
    assert "<h1>A &amp; B</h1>" in page
    assert "Compares ppo and rgpo-gate on Hopper-v5: 8 runs in total, of up to 81,920" in page
    assert "<pre>rgpo compare x</pre>" in page
    assert "<td>seed</td><td>0, 1, 2, 7, 8</td>" in page
    assert "<td>objective.k</td><td>10.0</td>" in page
    assert "<td>numpy</td>" in page
    assert f"{comparison[-2]}: failed (reward is NaN)" in page
    assert f"{comparison[-1]}: NaN or infinite kl" in page
    assert "4 of 5" in page
    headings = re.findall(r"<h[23]>(.*?)</h", page)
    assert headings == [
        "Hopper-v5",
        "Final table",
        "Learning curves",
        "KL per update",
        "Ratio quantiles",
        "Is the data still trusted?",
        "Policy and critic",
        "Time",
        "How this was made",
        "Command",
        "Configurations",
        "Runs to look at",
    ]


def test_without_a_command_those_of_the_runs_are_shown(comparison, tmp_path):
    page = without_scripts(write_report(comparison, tmp_path / "r.html", title="t"))
    assert page.count("<pre>") == 1
    assert "Every run finished" in page


def test_without_runs_it_says_so(tmp_path):
    with pytest.raises(RgpoError, match="no runs to report on"):
        write_report([], tmp_path / "r.html", title="t")


def test_align_interpolates_inside_a_run_only(make_run):
    def rows(values):
        return [{"update": i, "step": 10 * i, "return": v} for i, v in enumerate(values, 1)]

    records = read_runs(
        [
            make_run("ppo", 0, rows=rows([None, 1.0, None, None, 4.0])),
            make_run("ppo", 1, rows=rows([5.0, None, 7.0])),
        ]
    )
    steps, matrix = figures.align(records, "return")
    assert steps.tolist() == [10, 20, 30, 40, 50]
    nan = math.nan
    np.testing.assert_equal(matrix, [[nan, 1, 2, 3, 4], [5, 6, 7, nan, nan]])


def test_align_keeps_the_worst_of_a_long_run(make_run):
    rows = [{"update": i, "step": 10 * i, "kl": 0.01} for i in range(1, 1001)]
    rows[500]["kl"] = 2.0
    records = read_runs([make_run("ppo", 0, rows=rows)])
    steps, matrix = figures.align(records, "kl", max, points=100)
    assert len(steps) == 100
    assert steps[-1] == 10_000
    assert matrix.max() == 2.0
    assert (matrix == 2.0).sum() == 1
    assert figures.align(records, "kl", points=100)[1].max() == pytest.approx(0.209)


def test_one_colour_per_recipe_however_many():
    names = [str(i) for i in range(20)]
    color = figures.colors([*names, *names])
    assert len(set(color.values())) == 20
    assert all(re.fullmatch("#[0-9a-fA-F]{6}", value) for value in color.values())
    assert figures.colors(["a", "b"])["a"] == figures.colors(["a", "c"])["a"]
