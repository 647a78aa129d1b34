"""Networks of packages that nothing here was written for: blocks at every unit, and the same network afterwards?

    pip install --no-deps --target FOLDER segmentation-models-pytorch monai …    # see packages.py; never another torch
    PYTHONPATH=FOLDER python tests/census/strangers.py               # resumable
    PYTHONPATH=FOLDER python tests/census/strangers.py --only 'monai:*' --again
    PYTHONPATH=FOLDER python tests/census/strangers.py --changed     # search all for places; again where they differ from the row's
    python tests/census/strangers.py --table                         # only write the table anew

Every network has random weights (normalisation statistics and affine parameters too) and runs in a process of its own with
limits. It is planned with blocks at all units, those with attention of their own too; injected; verified; and its
outputs are compared once more here, numbers and classes. Results: ``strangers.jsonl``, ``strangers.md``; a row's ``code`` is the
commit that it was made with, its ``places`` the last one that finds the same stages and misses. The judgement of a table of
stages was made by eye: ``judged.jsonl``.
"""

import argparse
import fnmatch
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402 - the project's own tests folder comes first

import se_inject as si  # noqa: E402
from se_inject.errors import NoSites  # noqa: E402
from se_inject.sites.finder import sites_in  # noqa: E402
from se_inject.tables import table  # noqa: E402
from se_inject.tracing.inputs import observe_model  # noqa: E402
from se_inject.verification.coverage import coverage  # noqa: E402
from tests.census.packages import PACKAGES  # noqa: E402
from tests.census.run import in_process, read_results  # noqa: E402
from tests.common import randomise  # noqa: E402

SECONDS = 240


def unlike(one, other, where="output", seen=()):
    """Empty if two results have the same numbers in objects of the same classes, else where they differ."""
    if type(one) is not type(other):
        return f"{where}: a {type(one).__name__} became a {type(other).__name__}"
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        return "" if alike and torch.equal(one.nan_to_num(), other.nan_to_num()) else f"{where}: other numbers"
    if id(one) in seen:
        return ""
    seen = (*seen, id(one))
    if isinstance(one, dict):
        parts, others = dict(one), dict(other)
    elif isinstance(one, list | tuple):
        parts, others = dict(enumerate(one)), dict(enumerate(other))
    else:
        parts, others = getattr(one, "__dict__", None), getattr(other, "__dict__", None)
        if parts is None or isinstance(one, type) or callable(one):
            return "" if one is other or one == other else f"{where}: {one!r} became {other!r}"[:200]
    if list(parts) != list(others):
        return f"{where}: {list(parts)} became {list(others)}"
    if isinstance(one, dict | list | tuple) and getattr(one, "__dict__", None):
        parts, others = parts | vars(one), others | vars(other)
    return next(
        (text for key in parts if (text := unlike(parts[key], others[key], f"{where}.{key}", seen))),
        "",
    )


def called(network, inputs):
    """What a network returns for fresh copies of the inputs."""
    torch.manual_seed(0)
    with torch.no_grad():
        return network(*torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, inputs))


def made(name):
    """A network of the packages with random weights, and inputs."""
    distribution, _, short = name.partition(":")
    torch.manual_seed(0)
    network, inputs = PACKAGES[distribution]()[short]()
    return randomise(network).eval(), inputs


def places(found):
    """The stages and misses of a search, as data."""
    stages = [
        [
            stage.path,
            [round(s, 2) for s in stage.strides[0]],
            list(stage.channels),
            [site.address for site in stage.sites],
        ]
        for stage in found.table
    ]
    return {"stages": stages, "missed": [[refusal.address, refusal.reason] for refusal in found.missed]}


def searched(name):
    """The stages and misses of one network."""
    return places(sites_in(observe_model(*made(name))))


def examine(name):
    """Plan, inject, verify and compare one network; what was seen, as data."""
    network, inputs = made(name)
    row = {"class": type(network).__name__, "params": sum(p.numel() for p in network.parameters())}
    start = time.process_time()
    trace = observe_model(network, inputs)
    found = sites_in(trace)
    row["seconds"] = round(time.process_time() - start, 2)
    row["how"] = trace.how
    row |= places(found)
    row["kinds"] = Counter(site.kind for site in found.all_sites if site.stage is not None)
    row["held_back"] = Counter(site.held_back.value for site in found.all_sites if site.held_back)
    row["refused"] = Counter(refusal.reason for refusal in found.refused)
    try:
        start = time.process_time()
        plan = si.plan(network, inputs, attended=True)
        row["seconds"] = max(row["seconds"], round(time.process_time() - start, 2))
    except NoSites as error:
        return row | {"none": str(error)}
    row["notes"] = list(plan.notes)
    injected = plan.apply(network)
    row["blocks"] = len(plan.steps)
    row["units"] = coverage(trace, injected)._asdict()
    verdict = si.verify(network, injected, inputs, fresh=True)
    row["checks"] = {check.name: [check.passed, check.detail] for check in verdict.checks}
    row["changed"] = unlike(called(network, inputs), called(injected, inputs))
    row["returns"] = returned(called(network, inputs))
    return row | {"same": verdict.passed and not row["changed"]}


def returned(value):
    """The class of what a network returns, with its module if it isn't Python's or torch's."""
    kind = type(value)
    return (
        kind.__name__
        if kind.__module__ in ("builtins", "torch")
        else f"{kind.__module__.partition('.')[0]} {kind.__name__}"
    )


def examine_package(distribution, options, known):
    """Examine the networks of one package; a line for each goes to the results. In a process of its own."""
    try:
        version = importlib.metadata.version(distribution)
        names = list(PACKAGES[distribution]())
    except BaseException as error:
        write(
            options,
            {"name": f"{distribution}:", "missing": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"},
        )
        return
    for short in names:
        name = f"{distribution}:{short}"
        if not fnmatch.fnmatchcase(name, options.only):
            continue
        if options.changed and name in known and known[name].get("version") == version:
            now = in_process(searched, name, SECONDS)
            if now == {key: known[name].get(key) for key in now} and "units" in known[name]:
                write(options, known[name] | {"places": options.code})
                continue
        elif options.changed and name not in known:
            continue
        if options.again or options.changed or name not in known:
            row = {"name": name, "version": version, "code": options.code, **in_process(examine, name, SECONDS)}
            write(options, row)
            print(
                name,
                {key: row.get(key) for key in ("blocks", "same", "none", "error", "crash") if row.get(key) is not None},
                flush=True,
            )


def write(options, row):
    with options.results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def good(row):
    """Whether every unit that is not attention has a block."""
    units = row.get("units")
    return bool(units) and units["missed"] == 0 and units["unchosen"] == 0 and units["gated"] > 0


def is_changed(row):
    """Whether the injected network isn't the same network: other numbers, classes, weights or settings."""
    failed = {name for name, (passed, _) in row.get("checks", {}).items() if passed is False}
    return bool(row.get("changed") or failed - {"blocks trainable"})


def cell(row):
    """The column 'units with a block'."""
    units = row.get("units")
    if not units:
        return None
    return f"{units['gated']} of {units['gated'] + units['unchosen'] + units['missed']}"


def why(row):
    """Why a network, or a unit of it, has no block, or what else went wrong; empty if all is well."""
    if "crash" in row or "error" in row:
        return (row.get("crash") or row["error"]).replace("\n", " ")[:300]
    if "none" in row:
        return row["none"].partition("\n\nhint")[0].replace("\n", "; ")[:300]
    if not row["same"]:
        failed = {key: detail for key, (passed, detail) in row["checks"].items() if passed is False}
        return f"{failed or ''} {row['changed']}".strip()
    return "; ".join(f"{address}: {reason}" for address, reason in row["missed"][:2]) + (
        f"; {len(row['missed']) - 2} more" if len(row["missed"]) > 2 else ""
    )


def tables(rows, judged):
    """The results in Markdown."""
    missing = {name: row for name, row in rows.items() if "missing" in row}
    networks = {name: row for name, row in rows.items() if "missing" not in row}
    measured = [row for row in networks.values() if "units" in row]
    attention = [row for row in networks.values() if "none" in row and all_attention(row)]
    changed = [name for name, row in networks.items() if is_changed(row)]
    convolutional = len(networks) - len(attention)
    covered = sum(map(good, networks.values()))
    seconds = sorted(row["seconds"] for row in networks.values() if "seconds" in row)
    yes = sum(row["stages"] == "yes" and row["blocks"] == "yes" for row in judged.values())
    parts = [
        __doc__.splitlines()[0],
        "",
        "Made by `PYTHONPATH=FOLDER python tests/census/strangers.py`, where FOLDER holds the packages.",
        "",
        f"* {len(networks)} networks of {len({name.partition(':')[0] for name in networks})} packages; changed in numbers or types: {len(changed)}.",
        f"* A block at every unit that is not attention: {covered} of {convolutional}, {100 * covered / max(1, convolutional):.1f} %.",
        f"  {len(attention)} more have units of attention between positions alone, and get no block.",
        f"* Units with a block: {sum(row['units']['gated'] for row in measured):,} of "
        f"{sum(row['units']['gated'] + row['units']['unchosen'] + row['units']['missed'] for row in measured):,}.",
        f"* Made with {counted_codes(networks.values())}.",
        f"* Planning: {seconds[len(seconds) // 2]} s of CPU in the median, {seconds[-1]} s at most.",
        f"* Table of stages and places judged by eye: {len(judged)} networks, {yes} as an expert would have them.",
        "",
        "Networks of packages.py without a row were not run.",
        "",
        "## Misses",
        "",
    ]
    parts += [f"* {name}: {why(row)}" for name, row in networks.items() if why(row)] or ["none"]
    if missing:
        parts += [
            "",
            "Not importable here: "
            + "; ".join(f"{name.rstrip(':')} ({row['missing']})" for name, row in missing.items()),
        ]
    lines = []
    for name, row in networks.items():
        distribution, _, short = name.partition(":")
        lines.append(
            [f"{distribution} {row.get('version', '')}", short, ", ".join(row.get("kinds", ())) or None, len(row.get("stages", ())), cell(row),
             sum(row.get("refused", {}).values()) or None, row.get("seconds"), row.get("returns"), {True: "yes", False: "NO"}.get(row.get("same"))]
        )  # fmt: skip
    headers = ("package", "network", "kinds", "stages", "units with a block", "refused", "plan s", "returns", "same")
    parts += ["", "## Networks", "", table(headers, lines, "markdown"), "", "## Judgement", ""]
    parts += [
        "Judged from the printed tables and what is known of the architectures, seldom from the source: are the stages where an expert would cut them, are the blocks where one would put them?",
        "",
    ]
    headers = ("network", "stages", "blocks", "words")
    parts += [
        table(
            headers, [[name, row["stages"], row["blocks"], row["words"]] for name, row in judged.items()], "markdown"
        ),
        "",
    ]
    return "\n".join(parts)


def counted_codes(rows):
    """Which commits the rows were made with, and for how many a later one was seen to find the same places."""
    codes = Counter(row.get("code", "an earlier commit") for row in rows)
    later = Counter(row["places"] for row in rows if "places" in row)
    made_with = ", ".join(f"{code} ({count})" for code, count in codes.most_common())
    return made_with + "".join(f"; {code} finds the same places for {count} of them" for code, count in later.items())


def all_attention(row):
    """Whether a network without a place has units, and all are attention."""
    return "units of attention" in row["none"] or "unit of attention" in row["none"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--changed", action="store_true", help="those whose places are others now than in their result")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "strangers.jsonl")
    options = parser.parse_args()
    options.code = commit()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "True", "MPLBACKEND": "agg"}
    torch.hub.load_state_dict_from_url = torch.hub.download_url_to_file = None  # weights are random
    if not options.table:
        known = read_results(options.results)
        for distribution in PACKAGES:
            if fnmatch.fnmatchcase(distribution, options.only.partition(":")[0]):
                child = os.fork()
                if child == 0:
                    try:
                        examine_package(distribution, options, known)
                    finally:
                        os._exit(0)
                os.waitpid(child, 0)
    rows = latest(options.results)
    (HERE / "strangers.md").write_text(tables(rows, read_results(HERE / "judged.jsonl")))


def commit():
    """The commit of this working tree, short."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def latest(path):
    """The last result of each network, in the order of the table of packages; the file is written anew with these alone."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["name"]] = row
    order = list(PACKAGES)
    rows = dict(sorted(rows.items(), key=lambda item: order.index(item[0].partition(":")[0])))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return rows


if __name__ == "__main__":
    main()
