"""Peak memory of the whole command while it writes a network, beside the network's file and a plain process that runs it once.

    python tests/benchmarks/memory.py                     # all networks and formats, a row at a time; minutes each
    python tests/benchmarks/memory.py resnet152 .onnx

*Plain* is a process that imports torch and torchvision, makes the network and calls it on its image; *command* is the
largest process of `se-inject NAME -o FILE`. Both are the system's own figures, ``ru_maxrss``.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from se_inject.tables import table

NETWORKS = {
    "resnet152": ("torchvision:resnet152", "3x224x224"),
    "convnext_large": ("torchvision:convnext_large", "3x224x224"),
    "fasterrcnn": ("torchvision:fasterrcnn_resnet50_fpn", "3x320x320"),
}
FORMATS = (".pt", ".onnx", ".torchscript", ".pt2")
PLAIN = """
import sys, torch, torchvision
name, shape = sys.argv[1:]
network = torchvision.models.get_model(name.partition(":")[2], weights=None, **({"weights_backbone": None} if "rcnn" in name else {})).eval()
torch.save(network, "/dev/null")
images = torch.rand(2, *map(int, shape.split("x")))
with torch.no_grad():
    network([*images] if "rcnn" in name else images)
"""


def peak(*arguments):
    """The largest process of a command in MiB, its seconds, and how it ended."""
    start = time.perf_counter()
    code = (
        "import resource, subprocess, sys; rc = subprocess.run(sys.argv[1:], capture_output=True, text=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, rc.returncode); print(rc.stderr[-300:])"
    )
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout
    figures, _, said = found.partition("\n")
    mebibytes, ending = figures.split()
    return float(mebibytes), time.perf_counter() - start, int(ending), said.strip()


def main(only):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rows = []
    for name, (model, shape) in NETWORKS.items():
        if any(each in NETWORKS for each in only) and name not in only:
            continue
        plain, *_ = peak(sys.executable, "-c", PLAIN, model, shape)
        for suffix in FORMATS:
            if any(each.startswith(".") for each in only) and suffix not in only:
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"net{suffix}"
                command = [sys.executable, "-m", "se_inject", model, "--input", shape, "-o", str(path)]
                most, seconds, ending, said = peak(*command)
                size = sum(each.stat().st_size for each in Path(folder).iterdir()) / 2**20
            row = [
                name,
                suffix,
                round(size),
                round(plain),
                round(most),
                f"{(most - plain) / max(size, 1):.1f}",
                f"{seconds:.0f}",
            ]
            rows.append(row)
            print(*row, "" if ending == 0 else f"exit {ending}: {said}", flush=True)
    headers = ["network", "file", "its MiB", "plain MiB", "command MiB", "(command − plain) / file", "s"]
    print("\n" + table(headers, rows, "markdown"))


if __name__ == "__main__":
    main(sys.argv[1:])
