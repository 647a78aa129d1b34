"""The README's commands print what it says, and its Python runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TABLES = re.findall(r"<!-- \$ (.*?) -->\n(.*?)\n\n", README, re.DOTALL)
CONSOLE = re.findall(r"```console\n\$ (.*?)\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("command", "expected"), CONSOLE, ids=[command[-40:] for command, _ in CONSOLE])
def test_command_prints_what_the_readme_says(command, expected, tmp_path):
    torch.manual_seed(0)
    if "resnet50.pt" in command:
        torch.save(torchvision.models.resnet50(), tmp_path / "resnet50.pt")
    printed = run(command, tmp_path)
    pattern = (
        re.escape(expected.strip()).replace("…", "[^\n]*") if "max error …" in expected else re.escape(expected.strip())
    )
    assert re.fullmatch(pattern, printed), printed


@pytest.mark.parametrize(("command", "expected"), TABLES, ids=[command[-40:] for command, _ in TABLES])
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


def test_the_readme_has_commands_and_code():
    assert len(CONSOLE) >= 2
    assert len(PYTHON) >= 1
    assert len(TABLES) >= 1


@pytest.mark.parametrize("code", PYTHON)
def test_python_of_the_readme_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "layer3.0.se" in capsys.readouterr().out


def test_se_inject_is_on_the_path():
    assert shutil.which("se-inject", path=str(Path(sys.executable).parent))
