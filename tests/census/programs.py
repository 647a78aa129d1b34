"""Networks that exist only as programs: TorchScript (scripted, traced) and torch.export, of every family with sites.

    python tests/census/programs.py            # on one core in about an hour; resumable
    python tests/census/programs.py --table    # only write the table anew

Of each family of torchvision and timm the smallest network with sites is written to a file, loaded with ``si.load``, and
compared with the eager network it was made from: outputs in eval bit for bit on two sizes of batch, the keys and values
of the state dict, and the sites with their addresses, kinds, channels, sizes and stages. Weights, statistics and affine
parameters are random. Results: `programs.jsonl`, a line for each network, and `programs.md`.
"""

import argparse
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from run import HERE, build, example_of, in_process, randomise, read_results, representatives
from torch.utils._pytree import tree_leaves

import se_inject as si
from se_inject.errors import InjectError, NoSites
from se_inject.tables import table
from se_inject.tracing.inputs import observe_model, real_inputs

SECONDS = 400
PARAMETERS = 40_000_000
WAYS = {
    "scripted": lambda network, args, path: torch.jit.script(network).save(path),
    "traced": lambda network, args, path: torch.jit.trace(network, args, check_trace=False, strict=False).save(path),
    "exported": lambda network, args, path: torch.export.save(
        torch.export.export(network, args, dynamic_shapes=shapes_of(args), strict=False), path
    ),
}


def shapes_of(args):
    return [{0: torch.export.Dim.AUTO} if isinstance(arg, torch.Tensor) else None for arg in args]


def check_one(name):
    """What each way of writing this network gives."""
    torch.manual_seed(0)
    network = randomise(build(name)).eval()
    inputs = example_of(name, network)
    trace = observe_model(network, inputs)
    args = inputs
    if inputs is None or not all(isinstance(arg, list) for arg in inputs):
        args, _ = real_inputs(trace.inputs, batch=2, device=torch.device("cpu"), dtype=torch.float32)
    expected = {site.address: told(site) for site in si.find_sites(network, args).all_sites}
    with torch.no_grad():
        outputs = tree_leaves(network(*args))
    return {way: one_way(way, network, args, outputs, expected) for way in WAYS}


def told(site):
    return [site.kind, site.channels, list(site.size), site.stage, site.held_back and site.held_back.reason]


def one_way(way, network, args, outputs, expected):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt2"
        try:
            with torch.no_grad():
                WAYS[way](network, args, str(path))
            theirs = tree_leaves(
                torch.export.load(str(path)).module()(*args) if way == "exported" else torch.jit.load(str(path))(*args)
            )
        except Exception as error:
            return {"result": "torch can't", "why": (str(error).splitlines() or [""])[0][:100]}
        try:
            loaded = si.load(path).eval()
        except InjectError as error:
            return {"result": "refused", "why": f"{error.message}: {error.seen}"[:300]}
    with torch.no_grad():
        ours = tree_leaves(loaded(*args))
    pairs = list(zip(theirs, ours, strict=True))
    same = all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in pairs if isinstance(a, torch.Tensor))
    eager = len(outputs) == len(ours) and all(
        torch.equal(a, b) or bool(a.isnan().any())
        for a, b in zip(outputs, ours, strict=True)
        if isinstance(a, torch.Tensor)
    )
    state, before = loaded.state_dict(), network.state_dict()
    row = {
        "result": "same" if same or eager else "differs",
        "as eager": eager,
        "as the file": same,
        "keys": dict.fromkeys(before, 0).keys() == dict.fromkeys(state, 0).keys(),
        "values": all(torch.equal(before[key], state[key]) for key in before.keys() & state.keys()),
    }
    try:
        found = {site.address: told(site) for site in si.find_sites(loaded, args).all_sites}
    except NoSites:
        found = {}
    row["sites"] = sum(expected.get(address) == site for address, site in found.items())
    row["of"] = len(expected)
    if found != expected:
        wrong = [address for address in [*expected, *found] if expected.get(address) != found.get(address)]
        row["other"] = [[address, expected.get(address), found.get(address)] for address in wrong[:4]]
    return row


def chosen(rows):
    """The smallest network of each family that has sites, can be run quickly, and stands for others."""
    families = {}
    smallest = set(representatives(rows).values())
    for name, row in rows.items():
        if row.get("sites") and name in smallest and row["params"] < PARAMETERS:
            families.setdefault(row["family"], []).append((row["params"], name))
    return [min(members)[1] for _, members in sorted(families.items())]


def summary(rows):
    lines = []
    for way in WAYS:
        results = [row[way] for row in rows.values() if way in row]
        counts = Counter(result["result"] for result in results)
        same = [result for result in results if result["result"] == "same"]
        lines.append(
            [
                way,
                len(results),
                counts["torch can't"],
                counts["refused"],
                counts["differs"],
                counts["same"],
                sum(result["sites"] == result["of"] and "other" not in result for result in same),
            ]
        )
    headers = ("", "networks", "torch can't write", "refused", "other output", "bit-equal", "of them all sites equal")
    parts = [
        __doc__.splitlines()[0],
        "",
        "Made by `python tests/census/programs.py`.",
        "",
        table(headers, lines, "markdown"),
        "",
    ]
    parts += ["## Not as the eager network", ""]
    for name, row in rows.items():
        if "crash" in row or "error" in row:
            parts.append(f"* {name}: {row.get('crash') or row['error']}")
        for way in WAYS:
            result = row.get(way, {})
            if result.get("result") in ("refused", "differs"):
                parts.append(f"* {name}, {way}: {result['result']}: {result.get('why', '')}")
            elif "other" in result:
                parts.append(
                    f"* {name}, {way}: {result['sites']} of {result['of']} sites equal, e.g. {result['other'][0]}"
                )
    return "\n".join([*parts, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", help="this network, printed and not kept")
    parser.add_argument("--part", default="0/1", help="share the work: 0/2 and 1/2 in two processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.only:
        print(json.dumps(check_one(options.only), indent=1))
        return
    path = HERE / "programs.jsonl"
    rows = read_results(path)
    if not options.table:
        part, parts = map(int, options.part.split("/"))
        for name in chosen(read_results(HERE / "results.jsonl"))[part::parts]:
            if name not in rows:
                rows[name] = {"name": name} | in_process(check_one, name, SECONDS)
                with path.open("a") as file:
                    file.write(json.dumps(rows[name]) + "\n")
    (HERE / "programs.md").write_text(summary(rows))


if __name__ == "__main__":
    main()
