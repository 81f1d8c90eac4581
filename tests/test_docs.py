"""The documentation says what the code does."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from rgpo.cli import COMMANDS
from rgpo.control.config import TrainConfig
from rgpo.control.glossary import GLOSSARY, markdown
from rgpo.control.train import Trainer
from rgpo.core import recipes
from rgpo.studies import catalogue

ROOT = Path(__file__).parent.parent


def test_the_glossary_defines_exactly_the_rows_of_a_run():
    config = TrainConfig(env="CartPole-v1", num_envs=2, rollout_steps=32, minibatch_size=32)
    (row,) = Trainer([config]).step()
    assert set(row) == set(GLOSSARY)


def test_the_metrics_page_holds_the_glossary():
    assert markdown() in (ROOT / "docs" / "metrics.md").read_text()


def test_the_example_of_a_new_objective_runs_and_obeys_the_law():
    """The code block of docs/add-an-objective.md, as a reader would paste it."""
    import torch

    page = (ROOT / "docs" / "add-an-objective.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(code.splitlines()) <= 60
    names: dict = {"__name__": "example"}
    exec(compile(code, "add-an-objective.md", "exec"), names)  # noqa: S102
    try:
        objective = recipes.get("ldpo").objective
    finally:
        recipes._REGISTRY.pop("ldpo")
    d = torch.linspace(-3, 3, 31, dtype=torch.float64, requires_grad=True)
    a = torch.full_like(d, -0.7).detach()
    (slope,) = torch.autograd.grad(objective.value(d, a).sum(), d)
    torch.testing.assert_close(slope, objective.weight(d, a).detach())


CATALOGUE = ROOT / "docs" / "objectives" / "README.md"
FAMILIES = sorted(set(CATALOGUE.parent.glob("*.md")) - {CATALOGUE})


def test_the_catalogue_lists_the_registry():
    """`python docs/objectives/build.py` writes the table."""
    assert catalogue.markdown() in CATALOGUE.read_text()
    assert all(page.name in CATALOGUE.read_text() for page in FAMILIES)


@pytest.mark.parametrize("page", FAMILIES, ids=[page.stem for page in FAMILIES])
def test_the_examples_of_a_family_print_what_its_page_says(page):
    """Every block of code with the block of text after it."""
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page.read_text(), re.DOTALL)
    for code, printed in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, page.name, "exec"), {"__name__": "example"})  # noqa: S102
        assert out.getvalue() == printed


def test_every_recipe_has_its_place_on_a_page():
    text = "".join(page.read_text() for page in FAMILIES)
    for name in recipes.names():
        assert f"`{name}`" in text, name


def test_pages_name_only_commands_and_recipes_that_exist():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    known = set(recipes.names())
    for page in pages:
        text = page.read_text()
        for command in re.findall(r"`rgpo ([a-z]+)", text):
            assert command in COMMANDS, f"{page.name}: rgpo {command}"
        for name in re.findall(r"`((?:rgpo|ppo)-[a-z-]+)`", text):
            assert name in known, f"{page.name}: {name}"


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
