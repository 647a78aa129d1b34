"""Files that hold the network: every format, what is told about them, and what happens when it goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from se_inject import atomic_files as _files
from se_inject.errors import ExportError, OptionError
from se_inject.exporting import exporter as exporting
from se_inject.exporting import onnx_files as _onnx
from se_inject.exporting.exporter import export, export_all
from se_inject.exporting.reference import _at_batch
from se_inject.verification.comparison import TOLERANCES, difference
from tests.common import randomise

SUFFIXES = [".onnx", ".ts", ".torchscript", ".pt2", ".pt", ".pth"]


class Residual(nn.Module):
    """A small network with what matters in a big one: strides, a projection, a gate."""

    def __init__(self, dims=2):
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        self.dims = list(range(2, 2 + dims))
        self.stem = nn.Sequential(conv(3, 8, 3, padding=1, bias=False), norm(8))
        self.branch = nn.Sequential(conv(8, 12, 3, stride=2, padding=1), norm(12), nn.ReLU(), conv(12, 12, 1), norm(12))
        self.shortcut = nn.Sequential(conv(8, 12, 1, stride=2, bias=False), norm(12))
        self.gate = conv(12, 12, 1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)

    def features(self, x):
        x = F.relu(self.stem(x))
        y = self.branch(x)
        y = y * torch.sigmoid(self.gate(y.mean(self.dims, keepdim=True)))
        return F.relu(y + self.shortcut(x))

    def forward(self, x):
        return self.head(self.dropout(self.features(x).mean(self.dims)))


class Segmenting(Residual):
    def forward(self, x):
        y = self.features(x)
        return {
            "out": F.interpolate(y, scale_factor=2.0),
            "relu": y,
            "classes": [y.argmax(1), None, 3],
            "x": x,
        }


@dataclasses.dataclass
class Detections:
    boxes: torch.Tensor
    scores: torch.Tensor | None = None


class Detecting(Residual):
    def forward(self, x):
        return Detections(self.features(x))


class Pair(Residual):
    def forward(self, left, right, scale=None, *, flip=False):
        y = self.features(left) - self.features(right["image"])
        return (y.flip(-1) if flip else y) if scale is None else y * scale


class Unscriptable(Residual):
    def forward(self, *images):
        return self.head(self.features(sum(images)).mean(self.dims))


class Branching(Residual):
    """Scripting refuses the `*`; a trace bakes the branch in."""

    def forward(self, x):
        y = self.features(*(x for _ in range(1)))
        return y * 2 if len(x) < 3 else y


class OnlyTwo(Residual):
    def forward(self, x):
        return self.features(x).reshape(2, 12, -1) if len(x) == 2 else self.missing


class Remembering(Residual):
    """Leaves something behind at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.last = OrderedDict(), None

    def forward(self, x):
        self.calls += 1
        self.seen["shape"] = x.shape
        self.last = self.features(x)
        return self.last


class Noisy(Residual):
    def forward(self, x):
        return F.dropout(self.features(x), 0.5, training=True)


class Overflowing(Residual):
    def forward(self, x):
        return self.features(x) * 1e30 * 1e30


class InPlace(Residual):
    def forward(self, x):
        return self.features(x.mul_(2.0))


def unchanged(module, args, output):
    """A hook that a pickle can hold."""


def net(cls=Residual, *args):
    torch.manual_seed(0)
    return randomise(cls(*args))


def image(batch=1, *shape):
    return torch.randn(batch, 3, *(shape or (16, 16)), generator=torch.Generator().manual_seed(7))


def names(path, side="input"):
    return [value.name for value in getattr(onnx.load(path).graph, side)]


def load(path):
    """The file as a function, by the means its users have."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False).eval()
    return torch.jit.load(path)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# Formats ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.* is deprecated")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_computes_what_the_network_computes(suffix, out):
    model = net()
    exported = export(model, out / f"net{suffix}", (image(),))

    assert [path.name for path in out.iterdir()] == [f"net{suffix}"]
    assert exported.path == out / f"net{suffix}"
    assert exported.format == exporting.FORMATS[suffix]
    assert exported.size_bytes == exported.path.stat().st_size
    assert [check.batch for check in exported.checks] == [1, 2, 5]
    assert all(check.max_rel_error <= exported.tolerance <= 1e-4 for check in exported.checks)
    x = image(3)  # a batch it was not checked at, by other means
    with torch.no_grad():
        torch.testing.assert_close(load(exported.path)(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        (".onnx", "dynamo exporter, opset 2"),
        (".ts", "scripted, dynamic batch"),
        (".pt2", "torch.export, dynamic batch"),
        (".pt", "whole module"),
    ],
)
def test_the_result_tells_how(suffix, how, out):
    assert export(net(), out / f"net{suffix}", (image(),)).how.startswith(how)


@pytest.mark.parametrize(("dims", "shape"), [(1, (20,)), (3, (6, 8, 8))])
def test_other_dimensions(dims, shape, out):
    made = export_all(net(Residual, dims), [out / "net.onnx", out / "net.pt2"], (image(2, *shape),))
    assert all("dynamic batch" in exported.how for exported in made)


TREES = [  # class, arguments, keywords, inputs, outputs
    (Segmenting, (image(),), {}, ["x_orig"], ["out", "relu_out", "classes_0", "x"]),
    (Detecting, (image(),), {}, ["x"], ["boxes"]),
    (
        Pair,
        (image(2),),
        {"scale": torch.ones(1), "right": {"image": image(2)}},
        ["left", "right_image", "scale"],
        ["output"],
    ),
    (Pair, (image(), {"image": image()}), {"flip": True}, ["left", "right_image"], ["output"]),
    (Unscriptable, (image(), image()), {}, ["images_0", "images_1"], ["output"]),
    (InPlace, (image(),), {}, ["x"], ["output"]),
]


@functools.cache
def star_args_may_have_free_sizes():
    """Whether a program of `*args` runs whose sizes are free: what torch 2.9 writes for it has a name that is not there."""

    class Sum(nn.Module):
        def forward(self, *values):
            return values[0] + values[1]

    values, free = (torch.ones(3), torch.ones(3)), {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Sum(), values, dynamic_shapes=((free, free),), strict=False)
    try:
        program.module()(*values)
    except NameError:
        return False
    return True


def assert_batch_is_free(exported, cls):
    """The file was checked at three batches; or it says why it has one, where torch can't do better."""
    if cls is Unscriptable and exported.path.suffix != ".ts" and not star_args_may_have_free_sizes():
        assert "batch fixed at 1: dynamic batch failed: NameError" in " ".join(exported.notes)
        assert len(exported.checks) == 1
    else:
        assert len(exported.checks) == 3


@pytest.mark.parametrize(("cls", "args", "kwargs", "inputs", "outputs"), TREES)
def test_onnx_takes_and_gives_any_structure(cls, args, kwargs, inputs, outputs, out):
    exported = export(net(cls), out / "net.onnx", args, example_kwargs=kwargs)
    assert names(exported.path) == inputs
    assert names(exported.path, "output") == outputs
    assert_batch_is_free(exported, cls)


@pytest.mark.parametrize("suffix", [".ts", ".pt2"])
@pytest.mark.parametrize(("cls", "args", "kwargs"), [tree[:3] for tree in TREES if tree[0] in (Unscriptable, InPlace)])
def test_other_formats_keep_the_structure(suffix, cls, args, kwargs, out):
    assert_batch_is_free(export(net(cls), out / f"net{suffix}", args, example_kwargs=kwargs), cls)


def test_a_trace_where_scripting_fails(out):
    exported = export(net(Unscriptable), out / "net.ts", (image(), image()))
    assert exported.how.startswith("traced (scripting failed: NotSupportedError: ")
    assert exported.how.endswith(", dynamic batch")


class Listing(Residual):
    """The scripting compiler takes the argument for a tensor."""

    def __init__(self):
        super().__init__()
        self.last_layer = nn.Sequential(self.head)

    def forward(self, x):
        return self.last_layer([self.features(x).mean(self.dims)][0:1][0]) + self.sum([x])

    def sum(self, xs):
        return self.dropout(xs)[0].sum() if isinstance(xs, torch.Tensor) else xs[0].sum()


def test_what_the_scripting_compiler_says_is_told_without_its_signature(out):
    exported = export(net(Listing), out / "net.ts", (image(),))
    assert exported.how.startswith("traced (scripting failed: RuntimeError: Expected a value of type 'Tensor")


def test_a_trace_that_baked_a_branch_in_is_kept_for_its_batch_only(out):
    exported = export(net(Branching), out / "net.ts", (image(2),))
    assert exported.how.startswith("traced (scripting failed: ") and exported.how.endswith("), batch fixed at 2")
    assert [check.batch for check in exported.checks] == [2]
    assert any(note.startswith("batch fixed at 2: tracing failed: relative error ") for note in exported.notes)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts"])
def test_a_network_that_runs_at_one_batch_size_only(suffix, out):
    exported = export(net(OnlyTwo), out / f"net{suffix}", (image(2),))
    assert exported.how.endswith(", batch fixed at 2")
    assert any("the network itself fails at batch 1: AttributeError" in note for note in exported.notes)


def test_a_dynamic_batch_that_the_exporter_refuses(out):
    class Baking(Residual):
        def forward(self, x):
            return self.features(x) / float(len(x))

    exported = export(net(Baking), out / "net.pt2", (image(2),))
    assert exported.how == "torch.export, batch fixed at 2"
    assert any(note.startswith("batch fixed at 2: dynamic batch failed: UserError: ") for note in exported.notes)


# Inputs ----------------------------------------------------------------------------------------------------


class AtLeast(Residual):
    def forward(self, x):
        if x.shape[-1] < 80:
            raise ValueError("too small")
        return super().forward(x)


def test_a_pickle_is_compared_on_small_inputs_and_other_files_on_those_given(out):
    module, program = export_all(net(), [out / "net.pt", out / "net.pt2"], (image(2, 96, 80),))
    assert module.notes[0] == "compared on 1 input of 2×3×64×64"
    assert not any(note.startswith("compared on") for note in program.notes)
    assert torch.export.load(program.path).example_inputs[0][0].shape == (5, 3, 96, 80)


@pytest.mark.parametrize(("model", "shape"), [(AtLeast, (96, 96)), (Residual, (16, 16))])
def test_a_pickle_is_compared_on_the_inputs_given_if_need_be(model, shape, out):
    exported = export(net(model), out / "net.pt", (image(2, *shape),))
    assert not any(note.startswith("compared on") for note in exported.notes)
    assert len(exported.checks) == 3


def test_a_pickle_of_a_network_that_takes_neither(out):
    with pytest.raises(ExportError, match="own forward fails on the example inputs"):
        export(net(), out / "net.pt", (torch.zeros(1, 4, 96, 96),))
    assert not list(out.iterdir())


# ONNX ------------------------------------------------------------------------------------------------------


def test_onnx_has_a_batch_dimension_by_name_and_tells_nothing_of_this_machine(out):
    path = export(net(), out / "net.onnx", (image(),)).path
    (value,) = onnx.load(path).graph.input
    assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == [
        "batch",
        3,
        16,
        16,
    ]
    assert b".py" not in path.read_bytes()


def test_the_opset_is_read_from_the_file(out):
    exported = export(net(), out / "net.onnx", (image(),), opset=19)
    assert exported.how == "dynamo exporter, opset 19, dynamic batch"
    assert onnx.load(exported.path).opset_import[0].version == 19


@pytest.mark.parametrize("opset", [9, 10, 99, 17.5])
def test_an_opset_out_of_range_is_refused_before_anything_is_computed(opset, out, monkeypatch):
    monkeypatch.setattr(exporting, "Reference", pytest.fail)
    monkeypatch.setattr(exporting, "example_of", pytest.fail)
    with pytest.raises(OptionError, match=f"no file of opset {opset} can be written") as error:
        export(net(), out / "net.onnx", opset=opset)
    assert error.value.seen.startswith("11 to ")
    with pytest.raises(OptionError, match="22 to "):
        export(net(), out / "net.onnx", opset=20, dtype="bfloat16")
    assert not list(out.iterdir())


class Maxima(nn.Module):
    """Maxima over space, over channels, without the dimensions, and of integers."""

    def forward(self, x):
        return (
            x.amax((2, 3), keepdim=True),
            x.amax((-1, -2), True) * 2,
            x.amax(1, True),
            x.amax((2, 3)),
            x.int().amax((2, 3), True),
        )


def test_maxima_over_height_and_width_are_pooled(out):
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    export(Maxima(), out / "net.onnx", x, dynamic_size=True)
    found = [node.op_type for node in onnx.load(out / "net.onnx").graph.node]
    assert (found.count("GlobalMaxPool"), found.count("ReduceMax")) == (2, 3)
    session = onnxruntime.InferenceSession(out / "net.onnx")
    x = torch.randn(3, 3, 4, 9)
    for one, other in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), Maxima()(x), strict=True):
        assert torch.equal(torch.tensor(one), other)


def test_an_opset_that_the_exporter_does_not_write_is_an_error(out, monkeypatch):
    monkeypatch.setattr(_onnx, "_checked_opset", lambda path, full_check: 18)
    with pytest.raises(ExportError, match="opset 19 was asked for, this exporter wrote 18"):
        export(net(), out / "net.onnx", (image(),), opset=19)
    assert not list(out.iterdir())


def test_weights_beside_a_file_that_would_be_too_large(out, monkeypatch):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    exported = export(net(), out / "net.onnx", (image(),))
    assert sorted(path.name for path in out.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert "its weights are in `net.onnx.data`: keep the two together" in exported.notes
    assert exported.size_bytes == sum(path.stat().st_size for path in out.iterdir())
    load(exported.path)(image())


def test_resnet_in_all_formats_at_once(out):
    model = randomise(torchvision.models.resnet18()).train()
    paths = [out / f"resnet{suffix}" for suffix in (".onnx", ".ts", ".pt2", ".pt")]
    made = export_all(model, paths, (torch.zeros(1, 3, 32, 32),))
    assert [item.format for item in made] == ["onnx", "torchscript", "pt2", "pt"]
    assert all(len(item.checks) == 3 for item in made)
    assert torch.load(out / "resnet.pt", weights_only=False).training


# Device, dtype, memory format ------------------------------------------------------------------------------


def test_half_precision_is_a_copy(out):
    model = net()
    made = export_all(model, [out / "net.onnx", out / "net.pt2"], (image(),), dtype="float16")
    made.append(export(model, out / "net.pt", (image(),), dtype=torch.float16))
    assert [len(item.checks) for item in made] == [3, 3, 3]
    assert made[0].tolerance == TOLERANCES[torch.float16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.load(out / "net.pt", weights_only=False).head.weight.dtype == torch.float16


def test_onnx_that_the_runtime_cannot_run_is_written_and_called_not_compared(out):
    exported = export(net(), out / "net.onnx", (image(),), dtype="bfloat16")
    assert exported.checks == ()
    assert any(note.startswith("not compared: on the CPU, ONNX Runtime has no kernel") for note in exported.notes)
    onnx.checker.check_model(exported.path, full_check=True)


def test_a_network_that_overflows_is_told(out):
    exported = export(net(Overflowing), out / "net.pt2", (image(),), dtype="float16")
    assert any(note.endswith("in the network's own `output` are not finite") for note in exported.notes)


def test_channels_last(out):
    model = net()
    exported = export_all(model, [out / "net.pt", out / "net.onnx"], (image(),), memory_format="channels_last")
    loaded = torch.load(out / "net.pt", weights_only=False)
    assert loaded.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert "ONNX has no memory format: the runtime chooses its own" in exported[1].notes


def test_cuda_without_a_gpu(out, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match="asked for cuda, torch finds none here") as error:
        export(net(), out / "net.onnx", (image(),), device="cuda")
    assert "onnxruntime-gpu" in error.value.hint
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ExportError, match="this torch is a build for the CPU alone"):
        export(net(), out / "net.onnx", (image(),), device="cuda")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    "options", [{"device": "tpu"}, {"device": "meta"}, {"dtype": "int8"}, {"memory_format": "nhwc"}]
)
def test_options_that_do_not_exist(options, out):
    with pytest.raises(OptionError, match=f"(?s){next(iter(options.values()))}.*known: "):
        export(net(), out / "net.onnx", (image(),), **options)


@pytest.mark.parametrize("name", ["net.h5", "net", "net.onnx.txt"])
def test_an_unknown_suffix_lists_the_known_ones(name, out):
    with pytest.raises(OptionError) as error:
        export_all(net(), [out / "net.pt", out / name], (image(),))
    assert all(suffix in error.value.hint for suffix in SUFFIXES)
    assert not list(out.iterdir())


# The model, and this process, are as before ----------------------------------------------------------------


@functools.cache
def attributes_may_be_assigned():
    """Whether torch exports a network that keeps a tensor of its forward: 2.9 refuses."""

    class Keeping(nn.Module):
        last = None

        def forward(self, x):
            self.last = x * 2
            return self.last

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.export.export(Keeping(), (torch.ones(3),), strict=False)
        except (ValueError, AssertionError):
            return False
        return True


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_model_is_left_as_it_was(suffix, out):
    model = net(Remembering).train()
    model.stem.eval()
    model.head.weight.requires_grad_(False)
    model.branch.register_forward_hook(unchanged)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    attributes = [dict(vars(module)) for module in model.modules()]
    tables = [{k: dict(v) for k, v in values.items() if isinstance(v, dict)} for values in attributes]
    generator, level = torch.get_rng_state(), logging.root.manager.disable
    x = image()
    example = x.clone()

    is_refused = suffix in (".onnx", ".pt2") and not attributes_may_be_assigned()
    with pytest.raises(ExportError) if is_refused else contextlib.nullcontext():
        export(model, out / f"net{suffix}", (x,))

    assert attributes == [dict(vars(module)) for module in model.modules()]
    assert tables == [{k: dict(v) for k, v in vars(m).items() if isinstance(v, dict)} for m in model.modules()]
    assert tensors == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, example)
    assert torch.equal(torch.get_rng_state(), generator)
    assert logging.root.manager.disable == level


def test_a_pickle_keeps_modes_and_is_bit_equal(out):
    model = net().train()
    model.branch.eval()
    exported = export(model, out / "net.pt", (image(),))
    loaded = torch.load(exported.path, weights_only=False)
    assert [module.training for module in loaded.modules()] == [module.training for module in model.modules()]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert exported.tolerance == 0 and all(check[1:3] == (0, 0) for check in exported.checks)
    assert any("needs the code of" in note and "Residual" in note for note in exported.notes)


def test_nothing_is_printed_or_logged(out, capfd, caplog):
    export_all(net(Unscriptable), [out / "net.onnx", out / "net.ts", out / "net.pt2"], (image(), image()))
    with pytest.raises(ExportError):
        export(net(Noisy), out / "noisy.pt2", (image(),))
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


# A file that is not right does not appear ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "loader"),
    [(".onnx", "se_inject.exporting.onnx_files._in_onnxruntime"), (".ts", "torch.jit.load"), (".pt", "torch.load")],
)
def test_a_mismatch_leaves_no_file(suffix, loader, out, monkeypatch):
    wrong = net().eval()
    with torch.no_grad():
        wrong.head.bias += 0.01
    monkeypatch.setattr(loader, lambda path, **options: wrong)
    with pytest.raises(ExportError) as error:
        export(net().eval(), out / f"net{suffix}", (image(),))
    assert error.value.message == f"cannot export to `{out / 'net'}{suffix}`"
    assert "other weights" in error.value.seen or "relative error " in error.value.seen
    assert not list(out.iterdir())


def test_outputs_of_another_shape_are_a_mismatch(out, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda path: nn.Identity())
    with pytest.raises(ExportError, match=r"outputs of shapes \[\(1, 3, 16, 16\)\], the network's are \[\(1, 5\)\]"):
        export(net(), out / "net.ts", (image(),))


@pytest.mark.parametrize("suffix", [".ts", ".pt2", ".pt"])
def test_a_network_that_changes_its_mind(suffix, out):
    with pytest.raises(ExportError, match="the network's own output changes from call to call in eval mode"):
        export(net(Noisy), out / f"net{suffix}", (image(),))
    assert not list(out.iterdir())


def test_a_network_that_does_not_run(out):
    with pytest.raises(ExportError, match="own forward fails on the example inputs") as error:
        export(net(), out / "net.onnx", (torch.zeros(1, 4, 16, 16),))
    assert error.value.__cause__ is not None and "RuntimeError: " in error.value.seen


class Exponential(nn.Module):
    """Has an operation that neither exporter of ONNX knows."""

    def __init__(self):
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", self.conv(x), torch.linalg.matrix_exp(self.weight))


def test_no_graph_is_printed_of_a_network_that_can_not_be_written(out, capfd):
    with pytest.raises(ExportError, match="matrix_exp"):
        export(Exponential(), out / "net.onnx", (image(),))
    assert capfd.readouterr() == ("", "")
    assert not os.listdir(out)


def test_what_the_exporter_said_first_is_told(out):
    class Local(Residual):
        pass

    with pytest.raises(ExportError, match=r"whole module failed: .*Can't .*pickle") as error:
        export(net(Local), out / "net.pt", (image(),))
    assert error.value.hint == "another format may do: onnx, pt2, torchscript"


# All or none -----------------------------------------------------------------------------------------------


def test_preconditions_come_before_any_work(out, monkeypatch):
    monkeypatch.setattr(exporting, "Reference", pytest.fail)
    (out / "old.pt").write_text("old")
    paths = [out / "net.pt", out / "missing" / "net.pt", out / "old.pt", out / "old.pt" / "net.pt"]
    for path, seen in zip(paths[1:], ["does not exist", None, "is not a directory"], strict=True):
        with pytest.raises(ExportError) as error:
            export_all(net(), [out / "net.pt", path], (image(),))
        assert error.value.seen is None or seen in error.value.seen
    with pytest.raises(OptionError, match="are the same"):
        export_all(net(), [out / "net.pt", out / ".." / "out" / "net.pt"], (image(),))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExportError, match="no permission to write"):
        export(net(), out / "net.pt", (image(),))
    assert [path.name for path in out.iterdir()] == ["old.pt"]


def test_a_file_is_replaced_only_on_request(out):
    path = out / "net.pt"
    path.write_text("old")
    with pytest.raises(ExportError, match="exists") as error:
        export(net(), path, (image(),))
    assert "force=True" in error.value.hint
    assert path.read_text() == "old"
    export(net(), path, (image(),), force=True)
    torch.load(path, weights_only=False)


def test_when_the_last_file_fails_none_appears(out):
    (out / "old.pt2").write_text("old")
    with pytest.raises(ExportError, match="pickle"):
        export_all(net(type("Local", (Residual,), {})), [out / "old.pt2", out / "net.pt"], (image(),), force=True)
    assert [path.name for path in out.iterdir()] == ["old.pt2"]
    assert (out / "old.pt2").read_text() == "old"


def test_when_moving_the_last_file_fails_none_appears(out, monkeypatch):
    replace = os.replace

    def failing(source, target):
        if target.name == "b.pt":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr(_files.os, "replace", failing)
    with pytest.raises(ExportError, match="Operation not permitted"):
        export_all(net(), [out / "a.pt", out / "b.pt"], (image(),))
    assert not list(out.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("suffix", [".ts", ".pt2", ".pt"])
def test_a_full_disk_leaves_no_debris(suffix, out, monkeypatch):
    def open_full(path, mode):
        return open("/dev/full", mode)

    monkeypatch.setattr(_files, "open", open_full, raising=False)
    with pytest.raises(ExportError, match="no space left to write"):
        export(net(), out / f"net{suffix}", (image(),))
    assert not list(out.iterdir())


def test_a_disk_full_for_onnx_leaves_no_debris(out, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.onnx.ONNXProgram.save", full)
    with pytest.raises(ExportError, match="no space left to write"):
        export(net(), out / "net.onnx", (image(),))
    assert not list(out.iterdir())


def test_an_interrupt_leaves_no_debris(out, monkeypatch):
    def interrupted(path):
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(_onnx, "_in_onnxruntime", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(net(), out / "net.onnx", (image(),))
    assert not list(out.iterdir())


def test_a_link_stays_one(out):
    (out / "real.pt").write_text("old")
    (out / "link.pt").symlink_to(out / "real.pt")
    exported = export(net(), out / "link.pt", (image(),), force=True)
    assert exported.path == out / "link.pt" and exported.path.is_symlink()
    torch.load(out / "real.pt", weights_only=False)


# Measures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "want", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], (2.0, 0.5)),
        ([0.5], [0.0], (0.5, 0.5)),
        ([1.0, np.nan], [1.0, np.nan], (0.0, 0.0)),
        ([1.0, 2.0], [1.0, np.nan], (np.inf, np.inf)),
        ([1, 2, 3, 4], [1, 2, 3, 5], (0.25, 0.25)),
        ([True, False], [True, True], (0.5, 0.5)),
        ([], [], (0.0, 0.0)),
    ],
)
def test_the_error_of_an_output(got, want, expected):
    outputs = [[("output", torch.tensor(values))] for values in (got, want)]
    assert difference(*outputs) == pytest.approx(expected)


def test_inputs_at_another_batch_size_are_like_the_example():
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(2, 3, 4, 4) * 255
    drawn = _at_batch(photo, 5, generator)
    assert drawn.shape == (5, 3, 4, 4) and set(drawn.flatten().tolist()) <= set(photo.flatten().tolist())
    assert _at_batch(photo, 2, generator) is photo
    assert _at_batch(torch.zeros(1, 3), 2, generator).std() > 0
    assert _at_batch(torch.tensor([[1, 2], [3, 4]]), 3, generator).tolist() == [
        [1, 2],
        [3, 4],
        [1, 2],
    ]
