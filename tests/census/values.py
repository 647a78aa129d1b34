"""What the modules of the zoos hold besides data: `python tests/census/values.py` (one core, ten minutes).

Every network of torchvision and timm is built on the meta device. Written to `se_inject/loading/pickles/values.json`:

* `callables`: by class and attribute, the functions, classes and partials that a constructor puts there. A stranger's
  file may hold these, at these places, and no others;
* `lookups`: the classes whose methods look an attribute up by a name that is a value, `getattr(self, name)`.

`--part K/N` looks at every N-th network only and prints; several parts are merged by `--merge FILE…`.
"""

import argparse
import ast
import functools
import inspect
import json
import sys
import textwrap
import types
import warnings
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import timm  # noqa: E402 - the project's own tests folder comes first
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

from se_inject.errors import LoadError  # noqa: E402
from se_inject.loading import load  # noqa: E402

TARGET = HERE.parent.parent / "se_inject" / "loading" / "pickles" / "values.json"
TABLES = ("_modules", "_parameters", "_buffers")
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size, nn.Module,
)  # fmt: skip
NOT_IN_THE_ZOOS = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": {
        "activation": ["torch.nn.functional.relu", "torch._C._nn.gelu"]
    },
    "torch.nn.modules.transformer.TransformerDecoderLayer": {
        "activation": ["torch.nn.functional.relu", "torch._C._nn.gelu"]
    },
    "timm.models.fasternet.Partial_conv3": {"forward": ["method forward_slicing", "method forward_split_cat"]},
}
"""What constructors put there that no network of the zoos uses."""


def named(value):
    return f"{value.__module__}.{value.__qualname__}"


def described(value):
    """A function, class, partial or bound method as text; None for data."""
    if isinstance(value, functools.partial):
        return f"partial {described(value.func)} {len(value.args)} {' '.join(sorted(value.keywords))}".strip()
    if isinstance(value, types.MethodType):
        return f"method {value.__func__.__name__}"
    if inspect.isbuiltin(value):
        return f"{value.__module__ or getattr(value.__self__, '__name__', '?')}.{value.__name__}"
    if isinstance(value, type) or inspect.isfunction(value):
        return named(value)
    return None


def callables_in(value, found, others, seen):
    if id(value) in seen:
        return
    seen.add(id(value))
    text = described(value)
    if text is not None:
        found.add(text)
    elif isinstance(value, dict):
        for part in (*value, *value.values()):
            callables_in(part, found, others, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            callables_in(part, found, others, seen)
    elif not isinstance(value, PLAIN):
        others.add(named(type(value)))
        callables_in(getattr(value, "__dict__", {}), found, others, seen)


def look_at(model, table, kinds):
    for module in model.modules():
        kind = type(module)
        kinds.add(kind)
        for name, value in vars(module).items():
            if name in TABLES or name.endswith("_hooks") or isinstance(value, PLAIN):
                continue
            found, others = set(), set()
            callables_in(value, found, others, set())
            if found:
                table[named(kind)][name] |= found
            if others:
                table["others"][named(kind) + "." + name] |= others


def looks_up(kind):
    """Whether a class's own source reads an attribute of itself by a name that is no constant."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return False
    for node in ast.walk(tree):
        is_getattr = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
        if (
            is_getattr
            and isinstance(node.args[0], ast.Name)
            and not isinstance(node.args[1], ast.Constant | ast.JoinedStr)
        ):
            return True
    return False


def built(name):
    """A network without memory for its weights, if its constructor doesn't compute with tensors."""
    try:
        with torch.device("meta"):
            return load(name)
    except LoadError:
        return load(name)


def collected(names):
    table, kinds = defaultdict(lambda: defaultdict(set)), set()
    for name in names:
        look_at(built(name), table, kinds)
    for kind in vars(nn).values():
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            kinds.add(kind)
    bases = {base for kind in kinds for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module}
    return {
        "callables": {
            kind: {name: sorted(found) for name, found in sorted(rows.items())} for kind, rows in sorted(table.items())
        },
        "lookups": sorted(named(kind) for kind in bases if looks_up(kind)),
    }


def merged(parts):
    table, lookups = defaultdict(lambda: defaultdict(set)), set()
    for part in (*parts, {"callables": NOT_IN_THE_ZOOS, "lookups": []}):
        lookups |= set(part["lookups"])
        for kind, rows in part["callables"].items():
            for name, found in rows.items():
                table[kind][name] |= set(found)
    others = table.pop("others", {})
    for place, found in others.items():
        print(place, *sorted(found), file=sys.stderr)
    return {
        "callables": {
            kind: {name: sorted(found) for name, found in sorted(rows.items())} for kind, rows in sorted(table.items())
        },
        "lookups": sorted(lookups),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--merge", nargs="*", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.merge:
        parts = [json.loads(path.read_text()) for path in options.merge]
    else:
        names = [f"torchvision:{name}" for name in torchvision.models.list_models()]
        names += [f"timm:{name}" for name in timm.list_models()]
        number, count = map(int, options.part.split("/"))
        parts = [collected(names[number::count])]
        if count > 1:
            print(json.dumps(parts[0]))
            return
    TARGET.write_text(json.dumps(merged(parts), indent=1) + "\n")


if __name__ == "__main__":
    main()
