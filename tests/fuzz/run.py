"""Damaged files of every kind through the one door: no traceback, no hang, no more memory than twice the file.

    python tests/fuzz/run.py            # 10,000 of each kind; writes results.md
    python tests/fuzz/run.py --count 300 --only pt2
    python tests/fuzz/run.py --only zip --seed 77      # one file again, with its traceback

Every kind runs in a process of its own, so that a crash of torch's own readers is seen and counted.
"""

import argparse
import contextlib
import copy
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402 - the project's own tests folder comes first

import se_inject as si  # noqa: E402
from se_inject.errors import InjectError, LoadError  # noqa: E402
from se_inject.loading import load, load_program, load_weights_  # noqa: E402
from tests.fuzz.mutations import MAKERS, TARGET, mutated, original  # noqa: E402
from tests.fuzz.pickled import SIDE  # noqa: E402

SECONDS = 10
SLACK_MEGABYTES = 256
RUNNING_MEGABYTES = 2048
"""For networks that are run as well: what they make of small images."""
PATIENCE = 300
MOST_BYTES = 16 * 2**30
"""Of addresses, for networks that are run: beyond, the system says no."""


def works(path):
    """Read a network, and do with it what the command does: look for places, put blocks in, verify, write it now and then."""
    model, rng = si.load(path), random.Random(path.read_bytes()[-200:])
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    inputs = None if rng.random() < 0.1 else ([*images],) if type(model).__name__ == "FasterRCNN" else images
    for _ in range(2):
        with contextlib.suppress(InjectError):
            si.find_sites(model, inputs)
            if rng.random() < 0.6:
                return
            plan = si.plan(model, inputs, at="*", attended=True)
            plan.cost()
            injected = plan.apply(model)
            si.verify(model, injected, inputs)
            si.eject_(si.load(written(injected, path)))
            if rng.random() < 0.05:
                suffix = rng.choice((".pt", ".torchscript", ".pt2", ".onnx"))
                si.export(injected, path.with_suffix(suffix), inputs, force=True)
        if not any("fused" in type(module).__name__.lower() for module in model.modules()):
            return
        si.unfuse_(model)


def written(model, path):
    """The file of a network beside another one."""
    place = path.with_name("again.pt")
    torch.save(model, place)
    return place


def through_the_door(kind, path):
    """Read a file in every way there is for its kind; True if one of them took it."""
    target, taken = copy.deepcopy(TARGET), False
    doors, refusal = {
        "pt2": ([load, load_program], LoadError),
        "torchscript": ([load, load_program], LoadError),
        "adapter": ([load, lambda p: si.load_adapter(target, p)], InjectError),
        "altered": ([works, lambda p: load_weights_(target, p)], InjectError),
        "plan": ([load, lambda p: si.Plan.load(p).apply(target)], InjectError),
    }.get(kind, ([load, lambda p: load_weights_(target, p)], LoadError))
    for door in doors:
        with contextlib.suppress(refusal), warnings.catch_warnings():
            warnings.simplefilter("ignore", si.BackboneWarning)
            door(path)
            taken = True
    return taken


def peak_bytes():
    """The most memory since it was last asked for (Linux); 0 elsewhere."""
    try:
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return 0
    return peak * 1024


def examine(kind, seed, path):
    """What becomes of one damaged file: (outcome, seconds, bytes of memory)."""
    data = mutated(kind, seed)
    path.write_bytes(data)
    peak_bytes()
    before, start = peak_bytes(), time.process_time()
    try:
        outcome = "taken" if through_the_door(kind, path) else "refused"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    seconds, taken = time.process_time() - start, peak_bytes() - before
    if seconds > SECONDS:
        outcome = f"took {seconds:.0f} s"
    elif taken > 2 * len(data) + (RUNNING_MEGABYTES if kind == "altered" else SLACK_MEGABYTES) * 2**20:
        outcome = f"took {taken / 2**20:.0f} MiB"
    return outcome, seconds, taken


def _work(kind, seeds, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if kind == "altered":
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch's readers write warnings of their own
    with tempfile.TemporaryDirectory() as folder:
        if kind == "altered":  # what the exporters import is nobody's file's fault
            for suffix in (".torchscript", ".pt2", ".onnx"):
                si.export(copy.deepcopy(TARGET).eval(), Path(folder) / f"first{suffix}", torch.rand(2, 3, SIDE, SIDE))
        for seed in seeds:
            results.send((seed, None))
            results.send((seed, examine(kind, seed, Path(folder) / "model.pt")))


def fuzz(kind, count, start=0):
    """All outcomes of a kind, from a seed on: (counts, failures, longest seconds, most bytes)."""
    original(kind)
    context, outcomes, failures = multiprocessing.get_context("spawn"), Counter(), {}
    longest, most, first, count = 0.0, 0, start, start + count
    while first < count:
        results, ours = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(kind, range(first, count), ours), daemon=True)
        worker.start()
        ours.close()  # so that the death of the worker is the end of what it says
        current = first
        while results.poll(PATIENCE):
            try:
                current, result = results.recv()
            except EOFError:
                break
            if result is not None:
                outcome, seconds, taken = result
                longest, most, first = max(longest, seconds), max(most, taken), current + 1
                outcomes[outcome if outcome in ("taken", "refused") else "failed"] += 1
                if outcome not in ("taken", "refused"):
                    failures[current] = outcome
                if first == count:
                    break
        if first < count:
            worker.join(1)
            failures[current] = "hung" if worker.is_alive() else f"ended the process ({worker.exitcode})"
            outcomes["failed"] += 1
            first = current + 1
        worker.kill()
        worker.join()
    return outcomes, failures, longest, most


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--only", choices=sorted(MAKERS))
    parser.add_argument("--seed", type=int, help="one file again")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    if options.seed is not None:
        path = Path(tempfile.mkdtemp()) / "model.pt"
        path.write_bytes(mutated(options.only, options.seed))
        print(path, through_the_door(options.only, path))
        return
    rows, failed = [], {}
    for kind in [options.only] if options.only else MAKERS:
        outcomes, failures, longest, most = fuzz(kind, options.count, options.start)
        failed |= {(kind, seed): outcome for seed, outcome in failures.items()}
        rows.append(
            f"| {kind} | {len(original(kind)):,} | {options.count:,} | {outcomes['refused']:,} | {outcomes['taken']:,} "
            f"| {outcomes['failed']:,} | {longest:.2f} | {most / 2**20:.0f} |"
        )
        print(rows[-1], flush=True)
        for seed, outcome in list(failures.items())[:20]:
            print(f"    {kind} {seed}: {outcome}", flush=True)
    if not options.only and options.count >= 10_000:
        write(rows, failed)
    sys.exit(bool(failed))


def write(rows, failed):
    """The result as Markdown."""
    head = "| kind | bytes | files | refused | taken | failed | longest (s of CPU) | most memory (MiB) |"
    (HERE / "results.md").write_text(
        "# Damaged files\n\n`python tests/fuzz/run.py`: truncated, flipped, spliced, with bytes put in, zeroed and large "
        "numbers; half of the archives\npacked again with right checksums. *Failed* would be a traceback, more than "
        f"{SECONDS} s, more memory than twice the file\nand {SLACK_MEGABYTES} MiB, or the end of the process. *Taken*: what "
        "was damaged is not what was read, or only numbers differ.\n\n"
        + "\n".join([head, "|---|" + "---:|" * 7, *rows])
        + f"\n\ntorch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}, {platform.machine()}.\n"
        + "".join(f"\n* {kind}, seed {seed}: {outcome}" for (kind, seed), outcome in failed.items())
    )


if __name__ == "__main__":
    main()
