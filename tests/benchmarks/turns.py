"""Planning in two checkouts of this project, in turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/turns.py OLD NEW [NETWORK ...] [--rounds 15]

A process for each checkout plans one network after the other; in every round each is asked once, the first one changing.
Medians of CPU time; other work on the machine changes seconds, hardly ratios. Garbage is collected before each round.
"""

import argparse
import os
import statistics
import subprocess
import sys

from se_inject.tables import table

NETWORKS = (
    "resnet50",
    "resnet152",
    "densenet121",
    "convnext_large",
    "mobilenet_v2",
    "efficientnet_b0",
    "regnety_032.timm",
)

WORKER = """
import gc, sys, time, warnings
warnings.simplefilter("ignore")
import timm, torch, torchvision
import se_inject as si

torch.set_num_threads(1)
x = torch.empty(2, 3, 224, 224, device="meta")
name = None
for line in sys.stdin:
    if line.strip() != name:
        name = line.strip()
        make = timm.create_model if name.endswith(".timm") else torchvision.models.get_model
        network = make(name.removesuffix(".timm")).eval()
        for _ in range(2):
            si.plan(network, x, attended=True)
    gc.collect()
    start = time.process_time()
    si.plan(network, x, attended=True)
    print(time.process_time() - start, flush=True)
"""


def worker(checkout):
    """Start a process that imports the package of this checkout."""
    environment = {**os.environ, "PYTHONPATH": os.path.abspath(checkout)}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER],
        cwd=checkout,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def asked(process, name):
    """Let a worker plan a network; returns the seconds."""
    process.stdin.write(name + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    workers = [worker(options.old), worker(options.new)]
    rows = []
    for name in options.networks:
        times = ([], [])
        for number in range(options.rounds):
            for place in (0, 1) if number % 2 else (1, 0):
                times[place].append(asked(workers[place], name))
        old, new = (1e3 * statistics.median(each) for each in times)
        rows.append([name, f"{old:.0f}", f"{new:.0f}", f"{new / old:.2f}"])
    print(table(("network", "old ms", "new ms", "new / old"), rows, "markdown"))


if __name__ == "__main__":
    main()
