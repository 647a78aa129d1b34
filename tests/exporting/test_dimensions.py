"""Free spatial dimensions, opsets below 18, and networks whose course depends on data, each in its runtime."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNPredictor, MultiScaleRoIAlign, TwoMLPHead

import se_inject as si
from se_inject.errors import ExportError
from se_inject.exporting.dimensions import Case, Dimensions, Free
from tests.common import randomise


class Small(nn.Module):
    """Two residual units; any number of dimensions."""

    def __init__(self, dims=2):
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        self.dims = list(range(2, 2 + dims))
        self.stem = conv(3, 8, 3, padding=1)
        self.branch = nn.Sequential(conv(8, 8, 3, padding=1, bias=False), norm(8))
        self.down = conv(8, 12, 3, stride=2, padding=1)
        self.branch2 = nn.Sequential(conv(12, 12, 3, padding=1, bias=False), norm(12))
        self.head = nn.Linear(12, 5)

    def features(self, x):
        x = F.relu(self.stem(x))
        x = self.down(F.relu(self.branch(x) + x))
        return F.relu(self.branch2(x) + x)

    def forward(self, x):
        return self.head(self.features(x).mean(self.dims))


class Joining(Small):
    """Takes even sizes alone, as a U-Net."""

    def forward(self, x):
        return F.interpolate(self.features(x), scale_factor=2.0) + x.mean(1, keepdim=True)


class Baking(Small):
    """Takes one size alone."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Linear(12 * 8 * 8, 5)

    def forward(self, x):
        return self.flat(self.features(x).flatten(1))


class Positions(Small):
    """Runs at any size, and does otherwise at its own: torch.export takes its own for granted."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 12, 8, 8))

    def forward(self, x):
        y = self.features(x)
        return y + self.positions if y.shape[-1] == 8 else y + self.positions.mean((2, 3), keepdim=True)


class Tall(Small):
    """Does otherwise for images higher than 100."""

    def forward(self, x):
        y = self.features(x)
        return (y * 2 if x.shape[2] > 100 else y).mean((2, 3))


class Masked(Small):
    def forward(self, x, mask):
        return self.head((self.features(x * mask.unsqueeze(1))).mean(self.dims))


class Deciding(Small):
    """The course depends on the image: no program of torch.export's."""

    def forward(self, x):
        y = self.features(x).mean(self.dims)
        return self.head(y) if x.sum() > -1e9 else y


def injected(cls=Small, *args, shape=(2, 3, 16, 16), block="se", **options):
    torch.manual_seed(0)
    model = si.inject(randomise(cls(*args)), torch.zeros(shape), block=block, **options)
    for parameter in si.injected_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return randomise(model).eval()


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *xs: torch.from_numpy(
        session.run(None, {name: np.asarray(x) for name, x in zip(names, xs, strict=True)})[0]
    )


def opened(path):
    return in_onnxruntime(path) if path.suffix == ".onnx" else torch.export.load(path).module()


def input_dimensions(path):
    return [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.load(path).graph.input
    ]


def agrees(run, model, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


# Sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_height_and_width_are_free(suffix, tmp_path):
    model = injected()
    exported = si.export(model, tmp_path / f"net{suffix}", image(2, 3, 16, 16), dynamic_size=True)
    assert exported.shapes == ("batch×3×height×width",)
    assert len({check.size for check in exported.checks}) == 3
    run = opened(exported.path)
    for shape in [(1, 3, 16, 16), (3, 3, 64, 17), (2, 3, 7, 224), (4, 3, 33, 33)]:  # none it was checked at
        agrees(run, model, image(*shape))
    if suffix == ".onnx":
        assert input_dimensions(exported.path) == [["batch", 3, "height", "width"]]


@pytest.mark.parametrize(
    ("dims", "shape", "names"), [(1, (20,), ["length"]), (3, (8, 8, 8), ["depth", "height", "width"])]
)
def test_other_ranks(dims, shape, names, tmp_path):
    model = injected(Small, dims, shape=(2, 3, *shape))
    exported = si.export(model, tmp_path / "net.onnx", image(2, 3, *shape), dynamic_size=True)
    assert input_dimensions(exported.path) == [["batch", 3, *names]]
    agrees(in_onnxruntime(exported.path), model, image(3, 3, *[size + 3 for size in shape]))


def test_without_the_option_the_line_says_what_is_fixed(tmp_path):
    exported = si.export(injected(), tmp_path / "net.onnx", image(2, 3, 16, 16))
    assert exported.shapes == ("batch×3×16×16",)
    assert {check.size for check in exported.checks} == {"16×16"}
    with pytest.raises(Exception, match="Got invalid dimensions"):
        in_onnxruntime(exported.path)(image(2, 3, 17, 16))


@pytest.mark.parametrize("block", ["fca", "ge", "cbam", "coord", "triplet", "bam"])
@pytest.mark.parametrize("opset", [None, 13])
def test_a_block_is_right_at_other_sizes_or_refused(block, opset, tmp_path):
    model = injected(block=block)
    path = tmp_path / "net.onnx"
    try:
        si.export(model, path, image(2, 3, 16, 16), dynamic_size=True, opset=opset)
    except ExportError as error:
        assert (block, opset) in {("ge", None), ("ge", 13), ("fca", 13)}
        assert "with its size left open" in str(error) and "leave `dynamic_size` out" in str(error)
        assert not list(tmp_path.iterdir())
        return
    run = in_onnxruntime(path)
    for shape in [(1, 3, 24, 40), (3, 3, 31, 18)]:
        agrees(run, model, image(*shape))


def test_sizes_that_the_network_takes_are_looked_for(tmp_path):
    model = injected(Joining, shape=(2, 3, 32, 32))
    exported = si.export(model, tmp_path / "net.onnx", image(2, 3, 32, 32), dynamic_size=True)
    sizes = {tuple(map(int, check.size.split("×"))) for check in exported.checks}
    assert len(sizes) == 3 and all(size % 2 == 0 for size in itertools.chain(*sizes))
    agrees(in_onnxruntime(exported.path), model, image(3, 3, 48, 20))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts"])
def test_a_network_that_bakes_its_size_in_is_refused(suffix, tmp_path):
    with pytest.raises(ExportError, match="the size can't be left open: the network itself fails at") as error:
        si.export(injected(Baking), tmp_path / f"net{suffix}", image(2, 3, 16, 16), dynamic_size=True)
    assert "without `dynamic_size`" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"opset": 13}])
def test_a_network_that_does_otherwise_at_its_own_size_is_refused(options, tmp_path):
    with pytest.raises(ExportError, match="with its size left open"):
        si.export(
            randomise(Positions()).eval(), tmp_path / "net.onnx", image(2, 3, 16, 16), dynamic_size=True, **options
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_branch_beyond_the_sizes_checked_is_told(suffix, tmp_path):
    exported = si.export(randomise(Tall()).eval(), tmp_path / f"net{suffix}", image(2, 3, 16, 16), dynamic_size=True)
    assert any(note.startswith("right for a height up to 100: beyond") for note in exported.notes)
    others = si.export(injected(), tmp_path / f"n{suffix}", image(2, 3, 16, 16), dynamic_size=True).notes
    if torch.__version__.startswith("2.9."):  # its program compares with one element, and the note says so
        others = [note for note in others if not (note.startswith("right where max(1, ") and note.endswith(" > 1"))]
    assert not any("right" in note for note in others)


def test_inputs_of_the_same_size_are_free_together(tmp_path):
    exported = si.export(
        randomise(Masked()).eval(),
        tmp_path / "net.onnx",
        (image(2, 3, 16, 16), torch.ones(2, 16, 16)),
        dynamic_size=True,
    )
    assert exported.shapes == ("x batch×3×height×width", "mask batch×height×width")
    assert input_dimensions(exported.path) == [["batch", 3, "height", "width"], ["batch", "height", "width"]]


def test_which_dimensions_are_spatial():
    x, tokens = torch.zeros(2, 3, 32, 48), torch.zeros(2, 7, 5)
    dimensions = Dimensions(Small(), ((x, tokens, torch.zeros(2), torch.zeros(32, 48)), {}))
    free = Free(True, True)
    assert dimensions.names(x, free) == {0: "batch", 2: "height", 3: "width"}
    assert dimensions.names(tokens, free) == {0: "batch"}
    assert dimensions.names(torch.zeros(32, 48), free) == {0: "height", 1: "width"}
    assert dimensions.names(torch.zeros(2), free) == {0: "batch"}
    assert dimensions.shape(x, Free(True)) == "batch×3×32×48"
    assert dimensions.shape(x, Free(False)) == "2×3×32×48"
    assert Case(2) == (2, 0)


def test_assumed_inputs_are_told(tmp_path):
    notes = si.export(injected(), tmp_path / "net.pt2").notes
    assert notes[0] == "no example inputs were given: 1 input of 2×3×224×224 was assumed"


# Opsets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 17])
def test_old_opsets(opset, tmp_path):
    model = injected(block="cbam" if opset % 2 else "se")
    exported = si.export(model, tmp_path / "net.onnx", image(2, 3, 16, 16), opset=opset, dynamic_size=True)
    assert exported.how == f"tracing exporter, opset {opset}, dynamic batch"
    assert {entry.domain: entry.version for entry in onnx.load(exported.path).opset_import}[""] == opset
    assert input_dimensions(exported.path) == [["batch", 3, "height", "width"]]
    assert b".py" not in exported.path.read_bytes()
    agrees(in_onnxruntime(exported.path), model, image(3, 3, 29, 40))


def test_old_opsets_keep_names_and_structure(tmp_path):
    class Several(Small):
        def forward(self, x, *, scale=None, more):
            y = self.features(x) * (1 if scale is None else scale)
            return {"x": y, "classes": [y.argmax(1), None, 3], "more": more["a"][0] + 1}

    model = randomise(Several())
    more = {"a": [torch.ones(2, 4)]}
    exported = si.export(
        model, tmp_path / "net.onnx", image(2, 3, 16, 16), opset=13, example_kwargs={"more": more, "scale": 2.0}
    )
    graph = onnx.load(exported.path).graph
    assert [value.name for value in graph.input] == ["x", "more_a_0"]
    assert [value.name for value in graph.output] == ["x_out", "classes_0", "more"]
    assert len(exported.checks) == 3


# Networks that depend on data ------------------------------------------------------------------------------


def test_a_branch_on_the_data_is_recorded_and_told(tmp_path):
    model = randomise(Deciding()).eval()
    exported = si.export(model, tmp_path / "net.onnx", image(2, 3, 16, 16))
    assert exported.how.startswith("tracing exporter, opset 17 (dynamic batch failed: ")
    assert any(
        note.startswith("recorded from one call, with the values at test_dimensions.py:") for note in exported.notes
    )
    agrees(in_onnxruntime(exported.path), model, image(3, 3, 16, 16))
    with pytest.raises(ExportError, match="cannot export"):
        si.export(model, tmp_path / "net.pt2", image(2, 3, 16, 16))


class Features(Small):
    out_channels = 12

    def forward(self, x):
        return self.features(x)


def detector():
    """A Faster R-CNN with a backbone of two units; its scores differ, so that their order is no accident."""
    torch.manual_seed(0)
    model = FasterRCNN(
        Features(),
        min_size=48,
        max_size=64,
        box_score_thresh=0.35,
        box_detections_per_img=20,
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=TwoMLPHead(12 * 9, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_test=30,
    )
    for module in (*model.rpn.head.modules(), *model.roi_heads.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.15)
    return randomise(model).eval()


def test_a_faster_rcnn_is_recorded_at_its_batch(tmp_path):
    images = [image(3, 48, 56)]
    model = si.inject(detector(), (images,))
    for parameter in si.injected_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    exported = si.export(model, tmp_path / "net.onnx", (images,))
    assert exported.how.startswith(
        "tracing exporter, opset 17 (fixed batch failed: what it computes depends on the data)"
    )
    assert any("recorded from one call" in note for note in exported.notes)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    found = 0
    for seed in range(3):  # others than it was recorded with
        other = torch.randn(3, 48, 56, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want = model([other])[0]
        got = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, {"images_0": other.numpy()}), strict=True)
        )
        found += len(want["scores"])
        for name, value in want.items():
            np.testing.assert_allclose(got[f"output_0_{name}"], value, rtol=1e-3, atol=1e-3)
    assert found > 20


# The size that is assumed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        lambda net: setattr(net, "image_size", 48),
        lambda net: setattr(net, "config", SimpleNamespace(image_size=(48, 48))),
        lambda net: setattr(net, "args", {"imgsz": 48}),
    ],
)
def test_the_size_that_a_network_records_is_assumed(own):
    net = Small()
    own(net)
    assert si.plan(net).notes[0] == "input inferred: 1 input of 2×3×48×48"
    net.args = net.config = net.image_size = "no size"
    assert si.plan(net).notes[0] == "input inferred: 1 input of 2×3×224×224"
