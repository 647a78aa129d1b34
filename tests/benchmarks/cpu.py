"""What SE costs on a CPU, by runtime: eager, a training step, ONNX Runtime, AOTInductor; one thread, in turns, ratios to the plain network.

    python tests/benchmarks/cpu.py > tests/benchmarks/cpu.md      # about 20 minutes of a core
    python tests/benchmarks/cpu.py --model mobilenet_v2 --runtimes eager,onnxruntime --rounds 5

Times are processor time of this process, which other work on the machine disturbs less than the clock. ``plain folded`` is
`for_inference` of the plain network: what its norms cost, not what the blocks do.
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


def calm(network):
    """Give norms random scales, and statistics that fit, so that values stay around 1 as in a trained network."""
    norms = {name: m for name, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, norm in norms.items():
        low, high = (0.1, 0.3) if name.endswith(".bn3") else (0.5, 1.5)  # the last of a residual branch
        nn.init.uniform_(norm.weight, low, high)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(4, 3, SIDE, SIDE))
    for norm in norms.values():
        norm.momentum = 0.1
    return network.eval()


def networks(name):
    torch.manual_seed(0)
    plain = calm(torchvision.models.get_model(name, weights=None))
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
    def run():
        with torch.no_grad():
            model.eval()(x)

    return run


def training_step(model, x, folder):
    if not any(p.requires_grad for p in model.parameters()):
        return None
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)

    def run():
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()

    return run


def onnx_runtime(model, x, folder):
    path = folder / f"{id(model)}.onnx"
    if not path.exists():
        si.export(model.eval(), path, torch.randn(2, 3, 64, 64), dynamic_size=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def aot_inductor(model, x, folder):
    path = folder / f"{id(model)}.pt2"
    if not path.exists():
        free = {0: torch.export.Dim("batch", max=64)}
        with torch.no_grad():
            program = torch.export.export(model.eval(), (torch.randn(2, 3, SIDE, SIDE),), dynamic_shapes=(free,))
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    run = torch._inductor.aoti_load_package(str(path))
    return lambda: run(x)


RUNTIMES = {"eager": eager, "training": training_step, "onnxruntime": onnx_runtime, "aotinductor": aot_inductor}


def measured(calls, rounds):
    """The least milliseconds of the first call, and each one's ratios to it in turns: quartiles over rounds."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in list(calls) if number % 2 else list(reversed(calls)):
            start = time.process_time()
            calls[name]()
            times[name].append((time.process_time() - start) * 1e3)
    first = next(iter(times.values()))
    ratios = {
        name: statistics.quantiles([a / b for a, b in zip(each, first, strict=True)], n=4)
        for name, each in times.items()
    }
    return min(first), ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(
        f"# {options.model} with SE on a CPU, one thread\n\nMade by `python tests/benchmarks/cpu.py`, torch {torch.__version__}, ONNX Runtime "
        f"{onnxruntime.__version__}, on a {os.cpu_count()}-core {platform.machine()} machine with a load of {os.getloadavg()[1]:.0f}. All sites, r = 16, {SIDE}×{SIDE}. "
        f"Ratios of processor time to the plain network's: median (quartiles) of {options.rounds} rounds in turns.\n"
    )
    made = networks(options.model)
    print("| runtime | batch | plain, ms (least) | " + " | ".join(f"{name} ×" for name in list(made)[1:]) + " |")
    print("|---" * (len(made) + 2) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for runtime in options.runtimes.split(","):
            for batch in map(int, options.batches.split(",")):
                x = torch.randn(batch, 3, SIDE, SIDE)
                calls = {name: RUNTIMES[runtime](model, x, Path(folder)) for name, model in made.items()}
                least, ratios = measured({name: call for name, call in calls.items() if call}, options.rounds)
                cells = [
                    "–" if name not in ratios else "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratios[name])
                    for name in list(made)[1:]
                ]
                print(f"| {runtime} | {batch} | {least:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
