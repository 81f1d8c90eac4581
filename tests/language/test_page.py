import contextlib
import io
import re
from pathlib import Path

import tiny  # noqa: F401  (offline)
import torch


def test_the_script_of_the_page_runs_and_learns(tmp_path, monkeypatch):
    """The code block of docs/language.md, as a reader would paste it."""
    page = Path(__file__).parents[2] / "docs" / "language.md"
    code, _ = re.findall(r"```(?:python|text)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # the page itself starts from whatever weights it draws
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "language.md", "exec"), {"__name__": "example"})  # noqa: S102
    rewards = [float(r) for r in re.findall(r"'reward': ([\d.]+), 'ratio", out.getvalue())]
    assert len(rewards) == 4
    assert rewards[-1] > rewards[0] + 0.2
