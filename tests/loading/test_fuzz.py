"""A short run of `tests/fuzz/run.py`: a few hundred damaged files, the same ones every time."""

import pytest

from tests.fuzz.mutations import MAKERS, original
from tests.fuzz.run import examine, through_the_door

COUNT = {"pt2": 25, "torchscript": 25, "injected": 30}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_sound_file_is_taken(kind, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(original(kind))
    assert through_the_door(kind, path) == (kind != "onnx")


@pytest.mark.parametrize("kind", MAKERS)
def test_damaged_files(kind, tmp_path):
    outcomes = {seed: examine(kind, seed, tmp_path / "model")[0] for seed in range(COUNT.get(kind, 40))}
    assert {seed: outcome for seed, outcome in outcomes.items() if outcome not in ("taken", "refused")} == {}
