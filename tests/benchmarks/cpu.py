"""What SE costs on a CPU, by runtime: eager, AOTInductor, ONNX Runtime; one thread, in turns, ratios to the plain network.

    python tests/benchmarks/cpu.py [--model resnet50] [--batches 1,8] [--rounds 15] [--runtimes eager,onnxruntime,aotinductor]

``plain folded`` is `for_inference` of the plain network: what its norms cost, not what the blocks do.
"""

import argparse
import copy
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import onnxruntime
import torch
import torchvision
from torch import nn

import se_inject as si

SIDE = 224


def networks(name):
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, SIDE, SIDE)
    injected = si.inject(plain, x, reduction=16)
    for parameter in si.injected_parameters(injected):
        nn.init.normal_(parameter, 0, 0.05)
    return {
        "plain": plain,
        "SE": injected,
        "fused": si.fuse_(copy.deepcopy(injected)),
        "plain folded": si.for_inference(plain, x),
        "for inference": si.for_inference(injected, x),
    }


def eager(model, x, folder):
    return lambda: model(x)


def onnx_runtime(model, x, folder):
    path = folder / f"{id(model)}.onnx"
    if not path.exists():
        si.export(model, path, torch.randn(2, 3, 64, 64))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    if [*wanted.shape[2:]] not in ([SIDE, SIDE], ["height", "width"]):
        path = folder / f"{id(model)}-{x.shape[0]}.onnx"
        si.export(model, path, x)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {wanted.name: x.numpy()}
    return lambda: session.run(None, feed)


def aot_inductor(model, x, folder):
    program = torch.export.export(model, (x,), strict=False)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{id(model)}-{len(x)}.pt2"))
    run = torch._inductor.aoti_load_package(package)
    return lambda: run(x)


RUNTIMES = {"eager": eager, "onnxruntime": onnx_runtime, "aotinductor": aot_inductor}


def measured(calls, rounds):
    """The milliseconds of each call, and its ratio to the first, in turns: medians over rounds."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        order = list(calls) if number % 2 else list(reversed(calls))
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    first = next(iter(times.values()))
    ratios = {n: statistics.median(a / b for a, b in zip(each, first, strict=True)) for n, each in times.items()}
    return min(first), ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(
        f"# {options.model} on a CPU, one thread\n\ntorch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, {platform.machine()}\n"
    )
    made = networks(options.model)
    print("| runtime | batch | plain, ms (least) | " + " | ".join(f"{name} ×" for name in list(made)[1:]) + " |")
    print("|---" * (len(made) + 2) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for runtime in options.runtimes.split(","):
            for batch in map(int, options.batches.split(",")):
                x = torch.randn(batch, 3, SIDE, SIDE)
                calls = {name: RUNTIMES[runtime](model, x, Path(folder)) for name, model in made.items()}
                least, ratios = measured(calls, options.rounds)
                cells = " | ".join(f"{ratios[name]:.2f}" for name in list(made)[1:])
                print(f"| {runtime} | {batch} | {least:.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
