"""The commands of README and guides print what they say, and their Python runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"trainers.md"}
"""Pages whose code needs packages that the tests don't: ``tests/recipes/run.py`` runs it."""
GUIDES = [page for page in sorted((ROOT / "examples" / "guides").glob("*.md")) if page.name not in ELSEWHERE]
PAGES = [ROOT / "README.md", *GUIDES]


def found(pattern):
    """Each match of a pattern in the pages, with the page's name."""
    return [
        pytest.param(*(match if isinstance(match, tuple) else (match,)), id=f"{page.stem}-{number}")
        for page in PAGES
        for number, match in enumerate(re.findall(pattern, page.read_text(), re.DOTALL))
    ]


PYTHON = found(r"```python\n(.*?)```")
TABLES = found(r"<!-- \$ (.*?) -->\n(.*?)\n\n")
CONSOLE = found(r"```console\n\$ (.*?)\n(.*?)```")


@pytest.mark.parametrize(("command", "expected"), CONSOLE)
def test_command_prints_what_the_page_says(command, expected, tmp_path):
    torch.manual_seed(0)
    printed = run(command, tmp_path)
    pattern = (
        re.escape(expected.strip()).replace("…", "[^\n]*") if "max error …" in expected else re.escape(expected.strip())
    )
    assert re.fullmatch(pattern, printed), printed


@pytest.mark.parametrize(("command", "expected"), TABLES)
def test_table_is_what_the_command_prints(command, expected, tmp_path):
    assert "--format markdown" in command
    assert run(command, tmp_path) == expected.strip()


def run(command, tmp_path):
    """What a command prints to stdout, in an empty directory."""
    command = command.partition("&& ")[2] or command
    assert command.startswith("se-inject ")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_pages_have_commands_and_code():
    assert len(CONSOLE) >= 2
    assert len(PYTHON) >= 1
    assert len(TABLES) >= 1


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page.md", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*\)\s+# prints (.*)", code):
        assert expected in printed


def test_se_inject_is_on_the_path():
    assert shutil.which("se-inject", path=str(Path(sys.executable).parent))
