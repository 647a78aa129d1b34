"""Files as tools make them: what each is found to be, programs in archives, weights whose network is recognised."""

import io
import subprocess
import sys
import warnings
import zipfile

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import se_inject as si
from se_inject.cli.entry import cli
from se_inject.errors import LoadError, OptionError
from se_inject.loading import describe, load, load_program, load_weights_
from se_inject.loading.architectures import architectures_of
from se_inject.user_code import NoSuchFile
from tests.common import build, outputs, randomise
from tests.files.hostile import records, saved, small, zipped
from tests.fuzz.mutations import original

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def same(model, other):
    states = model.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# -- one line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (torch.save, "a pickled network (torch.save)"),
        (
            lambda model, path: torch.save(model, path, _use_new_zipfile_serialization=False),
            "a pickled network (torch.save before torch 1.6)",
        ),
        (lambda model, path: torch.save({"epoch": 3, "model": model}, path), "a pickled network (torch.save)"),
    ],
)
def test_a_file_in_one_line(write, kind, tmp_path):
    path = tmp_path / "model.bin"
    write(small(), path)
    assert describe(path, load(path)) == f"{path}: {kind}, Sequential, 130 parameters"


def test_weights_in_one_line(tmp_path):
    path = tmp_path / "weights.bin"
    save_file(torchvision.models.resnet18().state_dict(), path)
    line = describe(path, load(path, arch="torchvision:resnet18"), "torchvision:resnet18")
    assert line == f"{path}: weights for torchvision:resnet18 (safetensors), ResNet, 11,689,512 parameters"


def test_a_name_has_no_line():
    assert describe("torchvision:resnet18", small()) is None


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("pt2", f"an exported program (torch.export.save, torch {torch.__version__})"),
        ("torchscript", "a TorchScript archive (torch.jit.save)"),
    ],
)
def test_a_program_in_one_line(form, kind, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(original(form))
    network = load(path)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert describe(path, network) == f"{path}: {kind}, {type(network).__name__}, {count:,} parameters"


@pytest.mark.parametrize("form", ["pt2", "torchscript"])
def test_a_program_is_no_file_of_weights(form, tmp_path):
    (tmp_path / "model.pt").write_bytes(original(form))
    with pytest.raises(LoadError, match="and no file of weights") as caught:
        load_weights_(small(), tmp_path / "model.pt")
    assert caught.value.hint == "pass it as MODEL"


def test_an_onnx_file(tmp_path):
    (tmp_path / "model.pt").write_bytes(original("onnx"))
    with pytest.raises(LoadError, match="an ONNX file"):
        load(tmp_path / "model.pt")


# -- mapped, swapped, unchecked, compressed ----------------------------------------------------------------


def test_mapped_tensors_are_the_files(tmp_path):
    model = randomise(build("torchvision:resnet18"))
    torch.save(model, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    mapped = load(tmp_path / "model.pt", mmap=True)
    assert same(mapped, model)
    with torch.no_grad():
        mapped.conv1.weight.zero_()  # private to this process
    assert (tmp_path / "model.pt").read_bytes() == before
    assert same(load(tmp_path / "model.pt"), model)


def test_a_model_that_is_not_mapped_survives_its_file(tmp_path):
    model = small()
    torch.save(model, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"")
    assert same(loaded, model)


def test_without_checksums(tmp_path):
    model = small()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    for mmap in (False, True):
        assert same(load(tmp_path / "model.pt", mmap=mmap), model)


def test_compressed_again_by_another_tool(tmp_path):
    model = small()
    (tmp_path / "model.pt").write_bytes(zipped(records(saved(model)), compression=zipfile.ZIP_DEFLATED))
    for mmap in (False, True):
        assert same(load(tmp_path / "model.pt", mmap=mmap), model)


def test_from_a_machine_of_the_other_byte_order(tmp_path):
    model = small()
    data = records(saved(model))
    for name, content in data.items():
        if "/data/" in name:
            size = 8 if len(content) == 8 else 4  # the counter of batches is the one 64-bit number
            data[name] = b"".join(content[at : at + size][::-1] for at in range(0, len(content), size))
        elif name.endswith("byteorder"):
            data[name] = b"big"
    (tmp_path / "model.pt").write_bytes(zipped(data))
    loaded = load(tmp_path / "model.pt")
    assert all(torch.equal(loaded[n].weight, model[n].weight) for n in (0, 1, 3))


# -- programs ----------------------------------------------------------------------------------------------

PROGRAMS = ["torchvision:resnet18", "torchvision:mobilenet_v2", "timm:test_convnext", "timm:test_vit"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_exported_program(name, tmp_path):
    images = IMAGES if "vit" not in name else torch.rand(3, 3, 160, 160)
    model = randomise(build(name)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    found = load_program(tmp_path / "model.pt2")
    names_are_written = "name" in torch._export.serde.schema.Node.__dataclass_fields__  # torch 2.9 makes them anew
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of its own reader's buffers
        wanted = program if names_are_written else torch.export.load(tmp_path / "model.pt2")
    assert found.graph_module.code == wanted.graph_module.code
    assert str(found.range_constraints) == str(program.range_constraints)
    assert torch.equal(found.module()(images[:2]), program.module()(images[:2]))
    assert torch.equal(torch.export.unflatten(found)(images), model(images))


class Cases(nn.Module):
    """Arithmetic on sizes, a constant, a dict in and out, a branch, a grad mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.table = torch.arange(4.0)

    def forward(self, inputs):
        x = self.conv(inputs["image"])
        x = x + self.table.view(1, 4, 1, 1)
        with torch.no_grad():
            rest = x.mean((2, 3))
        level = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x.mean((2, 3)),))
        x = x + level[:, :, None, None]
        return {"flat": x.reshape(x.shape[0] * 2, -1), "rest": [rest, torch.full((x.shape[0] // 2,), math_of(x))]}


def math_of(x):
    return x.shape[2] / 2


def test_an_exported_program_with_everything(tmp_path):
    model, inputs = Cases(), ({"image": IMAGES[:2]},)
    dynamic = ({"image": {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    found = load_program(tmp_path / "model.pt2")
    wanted, got = outputs(program.module(), *inputs), outputs(found.module(), *inputs)
    assert len(wanted) == 3
    assert all(torch.equal(*pair) for pair in zip(wanted, got, strict=True))


@pytest.mark.parametrize("how", ["traced", "scripted"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_torchscript(name, how, tmp_path):
    images = IMAGES if "vit" not in name else torch.rand(3, 3, 160, 160)
    model = randomise(build(name)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, images) if how == "traced" else torch.jit.script(model), tmp_path / "m")
    found = load_program(tmp_path / "m")
    assert isinstance(found, torch.jit.ScriptModule)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))


def test_no_program(tmp_path):
    torch.save(small(), tmp_path / "model.pt")
    with pytest.raises(LoadError, match="neither an exported program nor"):
        load_program(tmp_path / "model.pt")
    with pytest.raises(NoSuchFile):
        load_program(tmp_path / "gone.pt2")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_program_for_another_device_is_read_onto_the_cpu(device, tmp_path):
    data = records(original("pt2"))
    for name, content in data.items():
        content = content.replace(b'"type": "cpu", "index": null', f'"type": "{device}", "index": 0'.encode())
        assert b'"type": "cpu"' not in content
        data[name] = content
    (tmp_path / "cpu.pt2").write_bytes(original("pt2"))
    (tmp_path / "model.pt2").write_bytes(zipped(data))
    images = torch.rand(2, 3, 8, 8)
    expected = load_program(tmp_path / "cpu.pt2").module()(images)
    assert torch.equal(load_program(tmp_path / "model.pt2").module()(images), expected)
    loaded = si.load(tmp_path / "model.pt2")
    assert torch.equal(loaded(images), expected)
    assert {str(tensor.device) for tensor in loaded.state_dict().values()} == {"cpu"}


IN_A_SCRIPT = """
import sys, torch
from torch import nn

class Net(nn.Module):
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
        def forward(self, x):
            return x + torch.relu(self.conv(x))
    def __init__(self):
        super().__init__()
        self.stem, self.unit = nn.Conv2d(3, 8, 3), self.Unit()
    def forward(self, x):
        return self.unit(self.stem(x))

def local():
    class Inner(Net):
        pass
    return Inner()

images = torch.rand(2, 3, 8, 8)
for name, network in (("main", Net().eval()), ("local", local().eval())):
    for strict in (False, True):
        program = torch.export.export(network, (images,), strict=strict)
        torch.export.save(program, f"{name}{strict}.pt2")
    torch.save((images, network(images)), name)
"""


def test_programs_of_classes_that_a_script_defines(tmp_path):
    subprocess.run([sys.executable, "-c", IN_A_SCRIPT], cwd=tmp_path, check=True)
    for name in ("main", "local"):
        images, expected = torch.load(tmp_path / name)
        for strict in (False, True):
            network = si.load(tmp_path / f"{name}{strict}.pt2")
            assert {"stem", "unit.conv"} <= dict(network.named_modules()).keys()
            assert torch.equal(network(images), expected)
            assert len(si.find_sites(network, (images,))) > 0


# -- whose weights? ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchvision:resnet50", {"num_classes": 7}),
        ("torchvision:mobilenet_v3_small", {}),
        ("torchvision:densenet121", {"num_classes": 3}),
        ("timm:convnext_tiny", {"num_classes": 10}),
        ("timm:test_vit", {}),
    ],
)
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"module." + key: state[key] for key in state}])
def test_a_network_is_recognised(name, options, wrap):
    library, _, short = name.partition(":")
    with torch.device("meta"):
        model = (
            timm.create_model(short, **options) if library == "timm" else torchvision.models.get_model(short, **options)
        )
    state = wrap(model.state_dict())
    assert name in architectures_of(state)
    without_counters = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert name in architectures_of(without_counters)


def test_a_network_that_is_not_known():
    assert architectures_of(small().state_dict()) == []
    assert architectures_of({}) == []


@pytest.mark.parametrize("write", [torch.save, save_file])
def test_weights_without_a_network_name_it(write, tmp_path):
    path = tmp_path / "weights.pth"
    write(randomise(build("torchvision:resnet18")).state_dict(), path)
    with pytest.raises(LoadError, match="a file of weights") as caught:
        load(path)
    assert "`torchvision:resnet18`, `timm:resnet18`" in caught.value.seen
    assert caught.value.hint == f"`si.load({str(path)!r}, arch='torchvision:resnet18')`"


def test_arch(tmp_path):
    trained = randomise(build("torchvision:resnet18"), seed=5)
    torch.save({"epoch": 3, "state_dict": trained.state_dict()}, tmp_path / "resnet18.pth")
    assert same(load(tmp_path / "resnet18.pth", arch="torchvision:resnet18"), trained)
    with pytest.raises(OptionError, match="the weights already"):
        load(tmp_path / "resnet18.pth", arch="torchvision:resnet18", weights=tmp_path / "resnet18.pth")
    with pytest.raises(OptionError, match="is a file"):
        load(tmp_path / "resnet18.pth", arch=str(tmp_path / "resnet18.pth"))


def test_on_the_command_line(tmp_path, capsys):
    trained = randomise(build("torchvision:resnet18"))
    torch.save(trained.state_dict(), tmp_path / "resnet18.pth")
    model, options = str(tmp_path / "resnet18.pth"), ("--arch", "torchvision:resnet18", "--input", "3x64x64")
    cli.main(["sites", model, *options], standalone_mode=False)
    line = f"{model}: weights for torchvision:resnet18 (torch.save), ResNet, 11,689,512 parameters\n"
    assert line in capsys.readouterr().err
    cli.main(["inject", model, *options, "--stages", "4", "-o", str(tmp_path / "se.pt")], standalone_mode=False)
    assert same(si.eject_(load(tmp_path / "se.pt")), trained)


def test_a_file_is_replaced_by_what_was_made_of_it(tmp_path):
    """It is mapped while it is read, so its tensors must not go with it."""
    model = randomise(nn.Sequential(build("torchvision:resnet18").layer4, nn.ReLU()))
    torch.save(model, tmp_path / "model.pt")
    arguments = [
        "inject",
        str(tmp_path / "model.pt"),
        "--input",
        "256x8x8",
        "--force",
        "-o",
        str(tmp_path / "model.pt"),
    ]
    cli.main(arguments, standalone_mode=False)
    assert same(si.eject_(load(tmp_path / "model.pt")), model)


def test_weights_are_copied_out_of_their_file(tmp_path):
    model, trained = small(), randomise(small(), seed=3)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_bytes(io.BytesIO().getvalue())
    assert same(model, trained)
