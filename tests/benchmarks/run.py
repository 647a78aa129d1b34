"""Speed and memory, each as a ratio against a peer or a floor measured in the same run.

    python tests/benchmarks/run.py [planning] [memory] [inference] [command]

Planning is compared with Torch-Pruning's dependency graph (`pip install torch-pruning`) and with one bare forward on
meta tensors; the injected network with timm's own SE twin, in eager mode and in ONNX Runtime; the command with
the least it must do: import, build, one forward, save. Medians of rounds in turns; machines are noisy, so
look at ratios.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch
import torchvision
from torch.func import functional_call

import se_inject as si
from se_inject.tables import table

PLANNED = ("resnet152", "convnext_large", "densenet121")


def in_turns(rounds, **actions):
    """Median seconds of each action, run one after the other in every round."""
    times = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def planning():
    """si.plan against Torch-Pruning's dependency graph and one bare forward on meta tensors."""
    import torch_pruning

    rows = []
    for name in PLANNED:
        network = torchvision.models.get_model(name, weights=None).eval()
        x = torch.randn(1, 3, 224, 224)
        state = {**dict(network.named_parameters()), **dict(network.named_buffers())}

        def floor(network=network, state=state):
            meta = {key: torch.empty_like(value, device="meta") for key, value in state.items()}
            with torch.no_grad():
                functional_call(network, meta, (torch.empty(2, 3, 224, 224, device="meta"),))

        def peer(network=network, x=x):
            torch_pruning.DependencyGraph().build_dependency(network, example_inputs=x)

        seconds = in_turns(5, ours=lambda n=network: si.plan(n), floor=floor, peer=peer)
        ours = seconds["ours"]
        rows.append(
            [
                name,
                f"{ours:.3f}",
                *(f"{seconds['floor']:.3f}", f"{ours / seconds['floor']:.2f}"),
                *(f"{seconds['peer']:.3f}", f"{ours / seconds['peer']:.2f}"),
            ]
        )
    headers = ("network", "si.plan s", "meta forward s", "ratio", "Torch-Pruning s", "ratio")
    print(table(headers, rows, "markdown"), flush=True)

    rows = []
    for blocks in (10, 30, 100, 300, 1000):
        network = resnet_of(blocks)
        seconds = in_turns(2, ours=lambda n=network: si.plan(n, torch.empty(2, 8, 16, 16, device="meta")))["ours"]
        rows.append([blocks, f"{seconds:.3f}", f"{1e3 * seconds / blocks:.2f}"])
    print("\n" + table(("residual blocks", "si.plan s", "ms for a block"), rows, "markdown"), flush=True)


def resnet_of(blocks):
    """A residual network of any depth."""
    from torchvision.models.resnet import BasicBlock

    return torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), *(BasicBlock(8, 8) for _ in range(blocks)))


MEMORY = """
import resource, sys, torch, torchvision
import se_inject.api as si
network = torchvision.models.convnext_large()
x = torch.empty(2, 3, 224, 224, device="meta")
si.plan(torchvision.models.resnet18(), x)  # whatever is imported late
size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
plan = si.plan(network, x)
planned = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
plan.apply_(network)
applied = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
added = sum(p.numel() * 4 for p in si.injected_parameters(network))
print(size, planned - before, applied - planned - added)
"""


def memory():
    """Peak memory on top of the model's own while planning, and while applying in place."""
    size, planning_bytes, applying = map(int, subprocess.check_output([sys.executable, "-c", MEMORY]).split())
    rows = [
        ["planning", f"{planning_bytes / 1e6:.0f}", f"{1 + planning_bytes / size:.3f}"],
        ["apply_ (blocks left out)", f"{applying / 1e6:.0f}", f"{1 + applying / size:.3f}"],
    ]
    print(
        table((f"ConvNeXt-Large, {size / 1e6:.0f} MB", "peak MB on top", "× the model"), rows, "markdown"), flush=True
    )


def inference():
    """The injected ResNet-50 against timm's seresnet50, with the same weights."""
    import onnxruntime

    theirs = timm.create_model("seresnet50").eval()
    plain = timm.create_model("resnet50").eval()
    ours = si.inject(plain, init="paper", divisor=8).eval()
    ours.load_state_dict(theirs.state_dict())
    start = si.inject(plain).eval()
    networks = {"ours": ours, "theirs": theirs, "plain": plain, "start": start}
    rows = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, network in networks.items():
            path = str(Path(folder) / f"{name}.onnx")
            si.export(network, path, torch.randn(2, 3, 224, 224))
            sessions[name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for batch in (1, 8):
            x = torch.randn(batch, 3, 224, 224)
            eager = {name: lambda n=network, x=x: n(x) for name, network in networks.items()}
            feeds = {sessions["ours"].get_inputs()[0].name: x.numpy()}
            onnx = {name: lambda s=session, f=feeds: s.run(None, f) for name, session in sessions.items()}
            for runtime, actions in (("eager", eager), ("ONNX Runtime", onnx)):
                seconds = in_turns(15 if batch == 1 else 7, **actions)
                rows.append(
                    [
                        *(runtime, batch, f"{1e3 * seconds['ours']:.0f}"),
                        *(f"{seconds['ours'] / seconds[other]:.3f}" for other in ("theirs", "plain")),
                        f"{seconds['start'] / seconds['ours']:.3f}",
                    ]
                )
    headers = ("runtime", "batch", "ours ms", "ours / timm's twin", "ours / plain ResNet-50", "2·σ / σ")
    print(table(headers, rows, "markdown"), flush=True)


FLOOR = """
import torch, torchvision
network = torch.load("resnet50.pt", weights_only=False)
with torch.no_grad():
    network.eval()(torch.randn(1, 3, 224, 224))
torch.save(network, "copy.pt")
"""


def command(rounds=5):
    """The whole command on a ResNet-50 file, and `--help`, as processes: the least of each.

    Other work on the machine only ever adds to a time, hence the least. The CPU's seconds (user and system, of
    the process and its children) are less disturbed than those of a clock; both ratios are within the same rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torchvision.models.resnet50(), Path(folder) / "resnet50.pt")
        run = [sys.executable, "-m", "se_inject"]
        processes = {
            "floor: import, load, one forward, save": [sys.executable, "-c", FLOOR],
            "se-inject resnet50.pt --stages 3,4": [*run, "resnet50.pt", "--stages", "3,4", "--force"],
            "the same with --dry-run": [*run, "resnet50.pt", "--stages", "3,4", "--dry-run"],
            "floor of --help: import click": [sys.executable, "-c", "import click"],
            "se-inject --help": [*run, "--help"],
        }
        times = {name: [] for name in processes}
        for _ in range(rounds):
            for name, arguments in processes.items():
                before, start = cpu_of_children(), time.perf_counter()
                subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
                times[name].append((cpu_of_children() - before, time.perf_counter() - start))
    rows, floor = [], None
    for name, pairs in times.items():
        cpu, clock = (min(each) for each in zip(*pairs, strict=True))
        floor = (cpu, clock) if "floor" in name else floor
        rows.append([name, f"{cpu:.2f}", f"{cpu / floor[0]:.2f}", f"{clock:.2f}", f"{clock / floor[1]:.2f}"])
    print(table(("process", "CPU s", "ratio", "clock s", "ratio"), rows, "markdown"), flush=True)


def cpu_of_children():
    """Seconds of CPU time of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main():
    warnings.simplefilter("ignore")
    parts = {part.__name__: part for part in (planning, memory, inference, command)}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for name in sys.argv[1:] or parts:
        print(f"## {name}: {parts[name].__doc__.splitlines()[0]}\n", flush=True)
        parts[name]()
        print(f"\npeak of this process so far: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB\n")


if __name__ == "__main__":
    main()
