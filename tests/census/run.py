"""Every network of torchvision and timm: can it be planned, and is what comes out the same network?

    python tests/census/run.py            # all of it, on two cores in about two hours; resumable
    python tests/census/run.py --only 'timm:resnet*'
    python tests/census/run.py --table    # only write the tables anew
    python tests/census/run.py --plans --again   # plans alone, for the smallest network of each set of module classes

Each network runs in a process of its own with limits on time and memory. Planning is done for every name, on the
meta device. The numeric checks are done with random weights (normalisation statistics and affine parameters random
as well) for the smallest network of each set of module classes, if it has fewer than 40 M parameters; it stands in for the
others with these classes. The smallest of each family below 12 M is exported to ONNX and run.
A network counts as a CNN if at least half of its MACs are convolutions. Results: `results.jsonl`, one line for each
network, and `table.md`.
"""

import argparse
import fnmatch
import functools
import hashlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import timm  # noqa: E402 - the project's own tests folder comes first
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch.fx.passes.shape_prop import ShapeProp  # noqa: E402

import se_inject as si  # noqa: E402
from se_inject.errors import InjectError, NoSites  # noqa: E402
from se_inject.sites import HeldBack  # noqa: E402
from se_inject.sites.finder import sites_in  # noqa: E402
from se_inject.tables import table  # noqa: E402
from se_inject.tracing.inputs import observe_model, real_inputs  # noqa: E402
from se_inject.tracing.substitutes import standing_in  # noqa: E402
from se_inject.verification.coverage import coverage_of  # noqa: E402
from tests.common import build, randomise  # noqa: E402

SECONDS = {"plan": 120, "check": 240}
GIGABYTES = 10
ONNX_PARAMETERS = 12_000_000
CHECKED_PARAMETERS = 40_000_000


def names():
    yield from (f"torchvision:{name}" for name in torchvision.models.list_models())
    yield from (f"timm:{name}" for name in timm.list_models())


def example_of(name, network):
    """Inputs for networks that need more than one image; None where se-inject infers them."""
    family = type(network).__module__
    if "optical_flow" in family:
        return torch.empty(2, 3, 128, 128, device="meta"), torch.empty(2, 3, 128, 128, device="meta")
    if "detection" in family:
        return ([torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0)) for _ in range(2)],)
    if "video" in family:
        side = 224 if "mvit" in name or "s3d" in name or "swin" in name else 112
        return (torch.empty(2, 3, 16, side, side, device="meta"),)
    return None


def plan_one(name):
    """Plan on the meta device: what is found, and how long it takes."""
    detection = name.startswith("torchvision:") and any(word in name for word in ("rcnn", "retinanet", "ssd", "fcos"))
    try:
        with torch.device("cpu" if detection else "meta"):
            network = build(name).eval()
    except NotImplementedError:  # an initialisation that reads what it wrote
        network = build(name).eval()
    classes = sorted({f"{type(m).__module__}.{type(m).__qualname__}" for m in network.modules()})
    classes = hashlib.sha256(" ".join(classes).encode()).hexdigest()[:12]
    row = {
        "params": sum(p.numel() for p in network.parameters()),
        "classes": classes,
        "family": type(network).__module__,
    }
    inputs = example_of(name, network)
    start = time.perf_counter()
    trace = observe_model(network, inputs)
    found = sites_in(trace)
    row |= {
        "how": trace.how,
        "seconds": round(time.perf_counter() - start, 3),
        "symbolic_trace": symbolic(network, trace),
    }
    row["refused"] = Counter(reason for _, reason in ((r.address, r.reason) for r in found.refused))
    row["untraced"] = Counter(reason for _, reason in trace.failures.items())
    row["sites"] = Counter(site.kind for site in found.all_sites if site.stage is not None)
    row["held_back"] = Counter(site.held_back.reason for site in found.all_sites if site.held_back)
    row["stages"] = [[stage.path, [round(s) for s in stage.strides[0]], len(stage.sites)] for stage in found.table]
    row["free"] = len(found)
    chosen = {site.address for site in found.all_sites if site.held_back in (None, HeldBack.ATTENTION)}
    units = coverage_of(found, chosen)
    row["units"] = [units.gated, units.gated + units.unchosen + units.missed, units.noun, units.reason]
    convolutions = sum(isinstance(module, torch.nn.modules.conv._ConvNd) for module in network.modules())
    if detection or convolutions <= 2:  # two: a patch embedding
        row["conv_share"] = 1.0 if detection else 0.0
    else:
        from se_inject.cost.counting import cost_of_model

        total = cost_of_model(network, trace)[0].macs
        batch = next(t.shape[0] for t in torch.utils._pytree.tree_leaves(trace.inputs) if isinstance(t, torch.Tensor))
        row["conv_share"] = round(min(1.0, trace.macs / batch / max(total, 1)), 3)
    return row


def symbolic(network, trace):
    """Seconds of whole-model symbolic tracing with shape propagation on meta tensors; why not, if it fails."""
    with standing_in(network, "meta") as (twin, matching):
        args = matching(trace.inputs[0])
        start = time.perf_counter()
        try:
            ShapeProp(torch.fx.symbolic_trace(twin)).propagate(*args)
        except Exception as error:
            return type(error).__name__
        return round(time.perf_counter() - start, 3)


def check_one(name, with_onnx):
    """Inject everywhere with random weights and compare."""
    torch.manual_seed(0)
    network = randomise(build(name)).eval()
    inputs = example_of(name, network)
    try:
        plan = si.plan(network, inputs, attended=True)
    except NoSites as error:
        return {"checked": None, "why": error.message}
    injected = plan.apply(network)
    verdict = si.verify(network, injected, inputs, fresh=True)
    row = {"blocks": len(plan), "checks": {check.name: [check.passed, check.detail] for check in verdict.checks}}
    keys = list(network.state_dict())
    si.eject_(injected)
    same = list(injected.state_dict()) == keys and all(
        type(one) is type(other) for one, other in zip(network.modules(), injected.modules(), strict=True)
    )
    same &= all(
        torch.equal(a, b) or bool(a.isnan().any())
        for a, b in zip(network.state_dict().values(), injected.state_dict().values(), strict=True)
    )
    row["ejected"] = same
    if with_onnx and inputs is None:
        row |= onnx_one(network, plan)
    row["checked"] = verdict.passed and same
    return row


def onnx_one(network, plan):
    """Export the injected network and run it in ONNX Runtime, gates not at one; the plain one if that fails."""
    injected = plan.apply(network)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in si.injected_parameters(injected):
            parameter.normal_(0, 0.1, generator=generator)
    args, _ = real_inputs(plan.trace.inputs, batch=2, device=torch.device("cpu"), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        try:
            exported = si.export(injected, Path(folder) / "net.onnx", args)
            return {"onnx": max(check.max_rel_error for check in exported.checks)}
        except InjectError as error:
            try:
                si.export(network, Path(folder) / "plain.onnx", args)
                return {"onnx": f"failed: {str(error)[:200]}"}
            except InjectError:
                return {"onnx": "the network itself can't be exported"}


def in_process(task, name, seconds):
    """Run a task in a forked process with limits; its result, or why there is none."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30, GIGABYTES << 30))
        try:
            result = task(name)
        except InjectError as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            result = {
                "crash": f"{type(error).__name__}: {str(error)[:300]} ({place.filename.rpartition('/')[2]}:{place.lineno})"
            }
        with os.fdopen(write, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return (
        json.loads(text)
        if text
        else {"crash": f"killed by signal {status & 127}: over {seconds} s of CPU or {GIGABYTES} GB"}
    )


def read_results(path):
    rows = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["name"]] = rows.get(row["name"], {}) | row
    return rows


def representatives(rows):
    """For every name the smallest network with the same set of module classes."""
    groups = {}
    for name, row in rows.items():
        if "classes" in row:
            groups.setdefault((name.partition(":")[0], row["classes"]), []).append((row["params"], name))
    return {name: min(group)[1] for group in groups.values() for _, name in group}


def tables(rows):
    """The results in Markdown: totals, every miss, and a line for each family."""
    stand_ins = representatives(rows)
    parts = [
        __doc__.splitlines()[0],
        "",
        "Made by `python tests/census/run.py` and `python tests/census/run.py --table`.",
    ]
    headers = ("", "networks", "CNNs", "with sites", "without", "share")
    lines = []
    for library in ("torchvision", "timm"):
        own = {name: row for name, row in rows.items() if name.startswith(library)}
        cnns = {name: row for name, row in own.items() if row.get("conv_share", 0) >= 0.5}
        found = sum(bool(row.get("sites")) for row in cnns.values())
        lines.append(
            [library, len(own), len(cnns), found, len(cnns) - found, f"{100 * found / max(1, len(cnns)):.1f} %"]
        )
    parts += ["", "## Planning", "", table(headers, lines, "markdown")]
    seconds = [row["seconds"] for row in rows.values() if "seconds" in row]
    pairs = [
        row["seconds"] / row["symbolic_trace"] for row in rows.values() if isinstance(row.get("symbolic_trace"), float)
    ]
    fails = sum(isinstance(row.get("symbolic_trace"), str) for row in rows.values())
    parts += [
        "",
        f"Planning took {statistics.median(seconds):.2f} s in the median and {max(seconds):.1f} s at most. Whole-model symbolic tracing",
        f"with shape propagation failed on {fails} of {len(rows)} networks; on the others planning took",
        f"{statistics.median(pairs):.2f} × its time in the median, in the same process.",
    ]
    counted = [row for row in rows.values() if "units" in row]
    parts += [
        "",
        f"{len(counted)} networks, the smallest with each set of module classes, were planned anew with `--plans --again` after the last rules;",
        f"of these alone are the units with a block: {units_of(counted) or 'none'} of networks that are mostly convolutions. The other rows are older.",
    ]
    checked = {
        name: row for name, row in rows.items() if "checked" in row or "check_error" in row or "check_crash" in row
    }
    passed = [name for name, row in checked.items() if row.get("checked")]
    exported = {name: row["onnx"] for name, row in checked.items() if "onnx" in row}
    ran = [value for value in exported.values() if not isinstance(value, str)]
    covered = sum(stand_ins.get(name) in passed for name, row in rows.items() if row.get("sites"))
    parts += [
        "",
        "## Numeric checks",
        "",
        f"{len(checked)} networks, each the smallest with its set of module classes, were injected everywhere and compared:",
        f"{len(passed)} passed (output bit-equal in eval and in train, state kept, gradients, ejected exactly). They stand for {covered} of",
        f"the {sum(bool(row.get('sites')) for row in rows.values())} networks with sites. Of {len(exported)} exported to ONNX, {len(ran)} agreed in ONNX Runtime",
        f"(largest relative error {max(ran, default=0):.1e}).",
        "",
        "## Misses",
        "",
    ]
    parts += [f"* {line}" for line in misses(rows, checked)] or ["none"]
    families = {}
    for name, row in rows.items():
        families.setdefault(row.get("family", "?"), []).append((name, row))
    lines = []
    for family, members in sorted(families.items()):
        known = [row for _, row in members]
        kinds = Counter(kind for row in known for kind in (row.get("sites") or {}))
        tested = [name for name, _ in members if name in checked]
        lines.append(
            [
                family.removeprefix("torchvision.").removeprefix("timm.models.") if family != "?" else family,
                len(members),
                sum(row.get("conv_share", 0) >= 0.5 for row in known),
                sum(bool(row.get("sites")) for row in known),
                ", ".join(kind for kind, _ in kinds.most_common()) or None,
                "–".join(dict.fromkeys(str(f(len(row.get("stages", ())) for row in known)) for f in (min, max))),
                units_of(known),
                f"{sum(name in passed for name in tested)}/{len(tested)}" if tested else None,
                len([name for name in tested if not isinstance(exported.get(name, ""), str)]) or None,
            ]
        )
    headers = (
        "family",
        "networks",
        "CNNs",
        "with sites",
        "kinds",
        "stages",
        "units with a block",
        "checks passed",
        "ONNX",
    )
    parts += ["", "## Families", "", table(headers, lines, "markdown"), ""]
    return "\n".join(parts)


def units_of(rows):
    """The units of networks that are mostly convolutions, and how many of them get a block."""
    counts = [row["units"][:2] for row in rows if "units" in row and row.get("sites") and row["conv_share"] >= 0.5]
    return f"{sum(a for a, _ in counts):,} of {sum(b for _, b in counts):,}" if counts else None


def misses(rows, checked):
    """Every network that did not come out as it should, in a line."""
    for name, row in sorted(rows.items()):
        if "error" in row or "crash" in row:
            share = f"{row['conv_share']:.0%} of the MACs are convolutions" if "conv_share" in row else "not built"
            yield f"{name}: planning failed ({share}): {(row.get('crash') or row['error'])[:200]}"
        elif row["conv_share"] >= 0.5 and not row.get("sites"):
            yield f"{name}: no site; refused: {', '.join(row['refused']) or 'nothing'}"[:300]
        elif row["conv_share"] >= 0.5 and "units" in row and row["units"][0] < row["units"][1]:
            yield f"{name}: a block at {row['units'][0]} of {row['units'][1]} {row['units'][2]}; most often: {row['units'][3] or 'held back'}"
    for name, row in sorted(checked.items()):
        if not row.get("checked"):
            failed = {key: detail for key, (passed, detail) in row.get("checks", {}).items() if passed is False}
            yield f"{name}: {row.get('why') or row.get('check_error') or row.get('check_crash') or failed or 'not ejected exactly'}"[
                :400
            ]
        elif isinstance(row.get("onnx"), str):
            yield f"{name}: ONNX: {row['onnx']}"[:300]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument(
        "--plans", action="store_true", help="plans alone, of the smallest network of each set of classes"
    )
    parser.add_argument("--part", default="0/1", help="share the work: 0/2 and 1/2 in two processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    part, parts = map(int, options.part.split("/"))
    rows = read_results(options.results)
    chosen = [name for name in names() if fnmatch.fnmatch(name, options.only)]
    if options.plans:
        smallest = set(representatives(rows).values())
        chosen = [name for name in chosen if name in smallest or name not in rows]
    if not options.table:
        with options.results.open("a") as file:

            def keep(name, row):
                rows[name] = rows.get(name, {}) | row
                file.write(json.dumps({"name": name, **row}) + "\n")
                file.flush()

            for number, name in enumerate(chosen):
                if number % parts == part and (
                    options.again or not {"stages", "error", "crash"} & set(rows.get(name, {}))
                ):
                    row = in_process(plan_one, name, SECONDS["plan"])
                    keep(name, row)
                    print(
                        f"plan {number + 1}/{len(chosen)} {name}: {row.get('sites') or row.get('error') or row.get('crash')}",
                        flush=True,
                    )
            stand_ins = representatives(rows)
            todo = sorted(
                {stand_ins[name] for name in chosen if name in stand_ins and not options.plans},
                key=lambda name: rows[name]["params"],
            )
            todo = [name for name in todo if rows[name].get("sites") and rows[name].get("conv_share", 0) > 0]
            todo = [name for name in todo if rows[name]["params"] < CHECKED_PARAMETERS]
            exported = {rows[name]["family"]: name for name in reversed(todo) if rows[name]["params"] < ONNX_PARAMETERS}
            for number, name in enumerate(todo):
                if number % parts == part and (
                    options.again or ("checked" not in rows[name] and "check_crash" not in rows[name])
                ):
                    sample = exported.get(rows[name]["family"]) == name
                    row = in_process(functools.partial(check_one, with_onnx=sample), name, SECONDS["check"])
                    row = {("check_" + key if key in ("error", "crash") else key): value for key, value in row.items()}
                    keep(name, row)
                    print(
                        f"check {number + 1}/{len(todo)} {name}: {row.get('checked', row)} {row.get('onnx', '')}",
                        flush=True,
                    )
    (HERE / "table.md").write_text(tables(rows))


if __name__ == "__main__":
    main()
