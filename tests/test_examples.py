"""The examples run, as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Warning" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_shard_a_network_and_one_goes_on_from_their_checkpoint(tmp_path):
    script = str(next(path for path in EXAMPLES if path.stem == "finetune_distributed"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    told = []
    for command, epochs in ((torchrun, 1), ([script], 2)):
        done = subprocess.run(
            [sys.executable, *command, "--strategy", "fsdp", "--epochs", str(epochs), "--checkpoint", "run"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(dict(line.rsplit(": loss ", 1) for line in done.stdout.splitlines() if ": loss " in line))
    first, second = told
    assert first["epoch 1"] == first["put together"]
    assert abs(float(second["resumed after epoch 1"]) - float(first["epoch 1"])) < 1e-5
    assert float(second["epoch 2"]) < float(first["epoch 1"])
    assert second["epoch 2"] == second["put together"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_prints_what_is_stored(path):
    """In cells that are tagged ``numbers-vary`` the digits may be others on another machine."""
    script = Path(__file__).parent / "notebooks.py"
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    stored, executed = (json.loads(text)["cells"] for text in (path.read_text(), done.stdout))
    assert [shown(cell) for cell in executed] == [shown(cell) for cell in stored]
    assert sum("text/html" in str(shown(cell)) for cell in executed) >= 5


def shown(cell):
    """What a cell of a notebook prints and shows."""
    found = json.dumps(cell.get("outputs", []))
    if torch.__version__.startswith("2.9."):  # its programs hold a condition on sizes that those of later ones don't
        found = re.sub(r'\\n", "      right where max\([^"]*?(?=</pre>)', "", found)
    varies = "numbers-vary" in cell["metadata"].get("tags", ())
    return re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", found) if varies else found


def test_there_are_examples():
    names = {"adapter", "own_module", "finetune_digits", "finetune_distributed", "which_blocks_matter"}
    assert {path.stem for path in EXAMPLES} >= names
    assert [path.stem for path in NOTEBOOKS] == ["whole_job"]
