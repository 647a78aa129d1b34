"""Ultralytics' whole life of an injected network. Without the extra these tests are skipped: see ``run.sh`` beside."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import se_inject as si
from se_inject.errors import OptionError, SurgeryError
from se_inject.integrations.ultralytics import trainer_for
from tests.common import randomise
from tests.files.squares import squares

needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None,
    reason="the extra `ultralytics` is not installed: sh tests/integrations/run.sh installs it and runs this file",
)
X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Four images with a square in them; Ultralytics' settings beside; nothing is downloaded or installed."""
    home = tmp_path_factory.mktemp("yolo")
    changed = {
        "YOLO_CONFIG_DIR": str(home),
        "YOLO_AUTOINSTALL": "false",
        "YOLO_OFFLINE": "true",
        "YOLO_VERBOSE": "false",
    }
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    squares(home, "data.yaml")
    yield home
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.fixture
def yolo(home):
    from ultralytics import YOLO

    torch.manual_seed(0)
    yolo = YOLO("yolov8n.yaml")
    randomise(yolo.model)
    return yolo


def options(home, **more):
    return {
        "data": str(home / "data.yaml"), "epochs": 1, "imgsz": 64, "batch": 2, "device": "cpu", "workers": 0,
        "plots": False, "verbose": False, "project": str(home / "runs"), "exist_ok": True,
    } | more  # fmt: skip


def strong(model):
    """Blocks that change the output, with weights that no new block has."""
    torch.manual_seed(1)
    for parameter in si.injected_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    return model


def answer(model):
    with torch.no_grad():
        found = model.eval()(X)
    return found[0] if isinstance(found, tuple | list) else found


def maps(model):
    """What goes into the head: its own output is clipped and hides much."""
    found = []
    handle = model.model[-1].register_forward_pre_hook(lambda module, args: found.extend(args[0]))
    answer(model)
    handle.remove()
    return found


def distance(one, other):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


def blocks(model):
    return {key: value.float() for key, value in model.state_dict().items() if ".se." in key}


@needs_ultralytics
@pytest.mark.filterwarnings("ignore")
def test_blocks_live_through_training_average_checkpoint_val_predict_and_export(yolo, home, tmp_path):
    plan = si.plan(yolo.model, X)
    yolo.train(**options(home, name="life", trainer=trainer_for(plan)))
    assert len(blocks(yolo.model)) == 4 * len(plan)
    assert type(yolo.trainer).__name__ == "DetectionTrainerWithBlocks"
    assert len(blocks(yolo.trainer.ema.ema)) == 4 * len(plan)
    assert any(value.abs().max() > 0 for key, value in blocks(yolo.model).items() if "fc2" in key)  # they learned
    for weights in ("last.pt", "best.pt"):
        again = type(yolo)(home / "runs" / "life" / "weights" / weights)
        assert len(blocks(again.model)) == 4 * len(plan)
        assert si.plan_of(again.model).steps == si.plan_of(yolo.model).steps
    again.val(data=str(home / "data.yaml"), imgsz=64, device="cpu", workers=0, plots=False, verbose=False)
    again.predict(str(home / "images" / "val" / "0.png"), imgsz=64, device="cpu", verbose=False)
    path = again.export(format="torchscript", imgsz=64, device="cpu", verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(path)(X[:1]), answer(again.model.float())[:1], rtol=1e-3, atol=1e-2)


@needs_ultralytics
@pytest.mark.filterwarnings("ignore")
def test_trained_blocks_start_a_training_and_resume_one(yolo, home):
    model = strong(si.plan(yolo.model, X).apply(yolo.model))
    exported = si.export(model, home / "start.pt", X, force=True)
    assert any("`YOLO(path)` opens it" in note for note in exported.notes)
    start = type(yolo)(home / "start.pt")
    assert torch.equal(answer(start.model), answer(model))
    seen = {}

    def at_start(trainer):
        seen["start"] = {key: value.clone() for key, value in blocks(trainer.model).items()}

    def interrupt(trainer):
        raise KeyboardInterrupt

    start.add_callback("on_train_start", at_start)
    start.add_callback("on_model_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start.train(**options(home, name="resumed", epochs=2, trainer=trainer_for(si.plan_of(model))))
    assert all(torch.equal(value, blocks(model)[key]) for key, value in seen["start"].items())

    last = type(yolo)(home / "runs" / "resumed" / "weights" / "last.pt")
    saved = blocks(last.model)
    last.add_callback("on_train_start", at_start)
    last.train(resume=True, trainer=trainer_for(si.plan_of(last.model)), device="cpu")
    assert all(torch.equal(value, saved[key]) for key, value in seen["start"].items())
    assert seen["start"].keys() == blocks(last.model).keys() == blocks(model).keys()


@needs_ultralytics
@pytest.mark.filterwarnings("ignore")
def test_fused_networks_have_their_blocks(yolo):
    for options in ({}, {"position": "conv3x3"}, {"position": "post"}):
        model = strong(si.plan(yolo.model, X, **options).apply(yolo.model))
        plain, expected = maps(si.eject_(copy.deepcopy(model))), maps(model)
        assert distance(plain, expected) > 1e-3
        assert distance(maps(model.fuse(verbose=False)), expected) < 1e-4


@needs_ultralytics
def test_weights_with_other_blocks_are_refused(yolo):
    model = strong(si.plan(yolo.model, X).apply(yolo.model))
    other = si.plan(yolo.model, X, stages=[1])
    from se_inject.integrations.ultralytics import put_blocks_into_

    with pytest.raises(SurgeryError, match="other blocks than the plan's") as error:
        put_blocks_into_(copy.deepcopy(yolo.model), other.to_json(), model)
    assert "plan_of" in error.value.hint


@needs_ultralytics
def test_the_task_is_found_and_the_class_goes_to_other_processes(yolo, home):
    import cloudpickle  # as Ultralytics does for several GPUs
    from ultralytics import YOLO
    from ultralytics.models.yolo.classify import ClassificationTrainer

    plan = si.plan(YOLO("yolov8n-cls.yaml").model, X)
    trainer = trainer_for(plan)
    assert issubclass(trainer, ClassificationTrainer)
    (home / "trainer.pickle").write_bytes(cloudpickle.dumps(trainer))
    code = (
        f"import pickle; trainer = pickle.load(open({str(home / 'trainer.pickle')!r}, 'rb')); "
        "model = trainer.get_model.__get__(type('T', (), {'data': {'nc': 2, 'channels': 3}, 'args': None})())"
        "; print(trainer.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ClassificationTrainerWithBlocks"


@needs_ultralytics
def test_a_network_of_no_task(yolo):
    plan = si.plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), X)
    with pytest.raises(OptionError, match="no task of Ultralytics' has a network of the class Sequential"):
        trainer_for(plan)


def test_without_ultralytics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    plan = si.plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), X)
    with pytest.raises(OptionError, match="no trainer to extend") as error:
        trainer_for(plan)
    assert "se-inject[ultralytics]" in error.value.hint


def test_a_base_of_ones_own_needs_no_ultralytics():
    class Mine:
        def get_model(self, cfg=None, weights=None, verbose=True):
            assert weights is None  # they are loaded when the blocks are there
            net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            net.load = lambda weights: net.load_state_dict(weights.state_dict())
            return net

    trained = Mine().get_model()
    plan = si.plan(trained, X)
    strong(plan.apply_(trained))
    built = trainer_for(plan, Mine)().get_model(weights=trained)
    assert list(built.state_dict()) == list(trained.state_dict()) and len(trained.state_dict()) > 7
    assert torch.equal(built.eval()(X), trained.eval()(X))
