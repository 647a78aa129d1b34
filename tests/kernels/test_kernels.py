"""The kernels in Triton's interpreter, and as code for a card that isn't here: each in a process of its own."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
HERE = os.path.dirname(__file__)


def run(*command, **environment):
    found = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    return found.stdout


def test_in_the_interpreter():
    """Triton decides when it is imported, so it can't be done in this process."""
    out = run("-m", "pytest", "-n", "0", os.path.join(HERE, "interpreted.py"), "-rN", "-vv", TRITON_INTERPRET="1")
    assert len(re.findall("PASSED", out)) >= 50


def test_kernels_compile_for_a_card_and_read_sixteen_bytes_at_a_time(tmp_path):
    """Triton needs no card to compile; the code for an H200 is looked at."""
    script = os.path.join(HERE, "..", "benchmarks", "compiled.py")
    lines = run(script, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0").splitlines()
    assert len(lines) >= 12
    assert all("v4.b32" in line for line in lines if line.startswith(("tail", "value", "squeeze")))
