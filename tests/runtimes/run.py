"""Run what is exported in other runtimes, each block and option, and write the largest errors as a table.

    python tests/runtimes/run.py                      # all that is installed
    python tests/runtimes/run.py --only openvino,ncnn --blocks se,srm

A small ResNet (four units, 32×32, random statistics and strong random blocks) is exported once with the opset that is the
default and once at opset 17; each consumer reads the file and is compared with eager at batch 2 (ncnn: 1). A number is
max|error| / max|output|. Every consumer runs in a process of its own, since some end it. Some minutes of a core, outside
of CI; the results are committed as ``results.jsonl`` and ``table.md``, made by this script.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
BLOCKS = [
    "se", "se squeeze=max", "se gate=hard_sigmoid", "bam", "cbam", "coord", "eca", "ese", "fca", "gc", "gct", "ge",
    "nosqueeze", "scse", "simam", "srm", "triplet",
]  # fmt: skip
OPSETS = (None, 17)


# -- consumers: a file and an input, to the outputs -----------------------------------------------------------


def onnxruntime(path, x):
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def openvino(path, x):
    import openvino as ov

    core = ov.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return core.compile_model(core.read_model(path), "CPU")(x)[0]


def opencv(path, x):
    import cv2

    net = cv2.dnn.readNetFromONNX(str(path))
    net.setInput(x)
    return net.forward()


def onnx2torch(path, x):
    import torch
    from onnx2torch import convert

    with torch.no_grad():
        return convert(str(path)).eval()(torch.from_numpy(x)).numpy()


def simplified(path, x):
    import onnx
    from onnxsim import simplify

    model, same = simplify(onnx.load(path))
    assert same
    onnx.save(model, path.with_suffix(".sim.onnx"))
    return onnxruntime(path.with_suffix(".sim.onnx"), x)


def mnn(path, x):
    import MNN

    made = path.with_suffix(".mnn")
    # the converter is a command; it prints a lot
    command = [sys.executable, "-m", "MNN.tools.mnnconvert", "-f", "ONNX", "--modelFile", path, "--MNNModel", made]
    subprocess.run([*map(str, command), "--bizCode", "x"], check=True, capture_output=True)
    module = MNN.nn.load_module_from_file(str(made), ["x"], ["output"])
    return np.array(module.forward([MNN.expr.const(x, list(x.shape), MNN.expr.NCHW)])[0].read())


def ncnn(path, x):
    import ncnn as library
    import pnnx

    shape = ",".join(map(str, x.shape))
    subprocess.run(
        [pnnx.EXEC_PATH, str(path), f"inputshape=[{shape}]", "fp16=0"], cwd=path.parent, check=True, capture_output=True
    )
    net = library.Net()
    net.opt.use_fp16_arithmetic = net.opt.use_fp16_storage = net.opt.use_fp16_packed = False
    assert net.load_param(str(path.with_suffix(".ncnn.param"))) == 0, "the file is not loaded"
    assert net.load_model(str(path.with_suffix(".ncnn.bin"))) == 0, "the file is not loaded"
    extractor = net.create_extractor()
    extractor.input("in0", library.Mat(x[0]).clone())
    return np.array(extractor.extract("out0")[1])[None]


def dynamic_quantization(path, x):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(path, path.with_suffix(".dyn.onnx"))
    return onnxruntime(path.with_suffix(".dyn.onnx"), x)


def static_quantization(path, x):
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            self.images = iter([{"x": np.roll(x, shift, axis=3)} for shift in range(8)])

        def get_next(self):
            return next(self.images, None)

    quant_pre_process(path, path.with_suffix(".pre.onnx"))
    quantize_static(path.with_suffix(".pre.onnx"), path.with_suffix(".int8.onnx"), Images(), per_channel=True)
    return onnxruntime(path.with_suffix(".int8.onnx"), x)


CONSUMERS = {
    "ONNX Runtime": onnxruntime,
    "onnxsim, ONNX Runtime": simplified,
    "OpenVINO": openvino,
    "OpenCV": opencv,
    "MNN": mnn,
    "ncnn (pnnx), batch 1": ncnn,
    "onnx2torch": onnx2torch,
    "ORT dynamic uint8": dynamic_quantization,
    "ORT static int8": static_quantization,
}


# -- comparisons: the files are made in one process, each consumer reads them in another ---------------------


def network(block):
    """A small ResNet with strong blocks, the same each time."""
    import torch
    import torchvision

    import se_inject as si
    from tests.common import randomise

    name, *settings = block.split()
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    options = dict(setting.split("=") for setting in settings)
    model = si.inject(randomise(model), torch.zeros(2, 3, 32, 32), block=name, **options) if name != "none" else model
    for parameter in si.injected_parameters(model) if name != "none" else ():
        torch.nn.init.normal_(parameter, std=0.3)
    return randomise(model).eval()


def export(block, opset, folder):
    """The file, the inputs at batch 1 and 2, and what the network answers."""
    import torch

    import se_inject as si

    model = network(block)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    folder.mkdir()
    si.export(model, folder / "net.onnx", x, opset=opset)
    with torch.no_grad():
        np.savez(folder / "net.npz", x=x.numpy(), one=model(x[:1]).numpy(), two=model(x).numpy())


def compare(consumer, folder):
    """The relative error of one consumer on the file, or the reason why there is none."""
    warnings.simplefilter("ignore")
    data = np.load(folder / "net.npz")
    batch, want = (1, data["one"]) if "batch 1" in consumer else (2, data["two"])
    try:
        got = CONSUMERS[consumer](folder / "net.onnx", data["x"][:batch].copy())
        assert got.shape == want.shape, f"{got.shape}, not {want.shape}"
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:100]}"
    return float(np.abs(got - want).max() / np.abs(want).max())


def alone(consumer, folders):
    """The results of all files by one consumer, in a process of its own; where it dies a new one goes on with the next file."""
    results = []
    while len(results) < len(folders):
        rest = folders[len(results) :]
        command = [sys.executable, str(Path(__file__).resolve()), "--one", consumer, *map(str, rest)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120 + 20 * len(rest))
            printed, ended = done.stdout, f"the process dies (signal {-done.returncode})"
        except subprocess.TimeoutExpired as error:
            printed, ended = (error.stdout or b"").decode(), "not done in time"
        lines = [line.removeprefix("RESULT ") for line in printed.splitlines() if line.startswith("RESULT ")]
        results += [json.loads(line) for line in lines]
        if len(lines) < len(rest):
            results.append(ended)
    return results


def table(rows):
    """The results as a Markdown table."""
    consumers = [name for name in CONSUMERS if any(row["consumer"] == name for row in rows)]
    lines = []
    for opset in OPSETS:
        mine = {(row["block"], row["consumer"]): row["result"] for row in rows if row["opset"] == opset}
        lines += [
            f"\n## {'Opset of the default' if opset is None else f'Opset {opset}'}\n",
            "| block | " + " | ".join(consumers) + " |",
            "|---|" + "---|" * len(consumers),
        ]
        for block in dict.fromkeys(row["block"] for row in rows):
            cells = [mine.get((block, consumer), "") for consumer in consumers]
            shown = [f"{cell:.0e}" if isinstance(cell, float) else _short(cell) for cell in cells]
            lines.append(
                f"| {block} | "
                + " | ".join(f"**{s}**" if _bad(c) else s for s, c in zip(shown, cells, strict=True))
                + " |"
            )
    return "\n".join(lines) + "\n"


def versions():
    """The versions that were measured."""
    packages = (
        "torch",
        "onnx",
        "onnxruntime",
        "openvino",
        "opencv-python-headless",
        "MNN",
        "ncnn",
        "pnnx",
        "onnx2torch",
        "onnxsim",
    )
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found) + "."


def _short(cell):
    return str(cell).split(":")[0][:40]


def _bad(cell):
    return bool(cell) if isinstance(cell, str) else not cell < 0.05


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs="+", metavar=("CONSUMER", "FOLDER"))
    parser.add_argument("--only", help="consumers, by the beginnings of their names")
    parser.add_argument("--blocks", help="blocks")
    options = parser.parse_args()
    if options.one:
        for folder in options.one[1:]:
            print("RESULT " + json.dumps(compare(options.one[0], Path(folder))), flush=True)
        return
    only = [] if options.only is None else options.only.lower().split(",")
    consumers = [name for name in CONSUMERS if not only or any(name.lower().startswith(o) for o in only)]
    with tempfile.TemporaryDirectory() as place:
        cases = [
            (block, opset) for block in (options.blocks.split(",") if options.blocks else BLOCKS) for opset in OPSETS
        ]
        made = {}
        for case in cases:
            try:
                export(*case, folder := Path(place, str(len(made))))
                made[case] = folder
            except Exception as error:  # a file that isn't written, with the reason
                print(*case, f"{type(error).__name__}: {error}", flush=True)
        for consumer in consumers:
            for (block, opset), result in zip(made, alone(consumer, list(made.values())), strict=True):
                row = {"block": block, "opset": opset, "consumer": consumer, "result": result}
                print(row, flush=True)
                keep([row])


def keep(rows):
    """Put new results in the place of old ones, and make the table of all."""
    path = HERE / "results.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    merged = {(row["block"], row["opset"], row["consumer"]): row for row in (*known, *rows)}
    order = sorted(
        merged.values(),
        key=lambda row: (BLOCKS.index(row["block"]), row["opset"] or 0, list(CONSUMERS).index(row["consumer"])),
    )
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in order))
    head = (
        "Made by `python tests/runtimes/run.py`. A number is max|error| / max|output|; bold is wrong or not read; what is "
        "empty was not run."
    )
    (HERE / "table.md").write_text(f"# Runtimes\n\n{head}\n\n{versions()}\n" + table(order))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent.parent))
    main()
