"""Operators of the allow-list with arguments of a file's choosing, each call in a process that may die of it.

    python tests/fuzz/operators.py                     # 40 calls of every overload; writes operators.md; minutes
    python tests/fuzz/operators.py --calls 400 --only as_strided

Calls begin as sensible ones; then one or two of their arguments become what no network passes: huge and negative numbers,
indices out of range, empty tensors, NaN, other types. A call that ends its process by a signal is made once more as a
program of a file, with everything that is checked before and while such a program runs. *Dies* is what is left then. A
call that runs over the time or memory of its process is no death: a network may take long.
"""

import argparse
import json
import os
import platform
import random
import resource
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402 - the project's own tests folder comes first
import torchvision  # noqa: E402, F401 - registers operators

from se_inject.errors import LoadError, SurgeryError  # noqa: E402
from se_inject.forwards import program  # noqa: E402
from se_inject.forwards.constants import encoded  # noqa: E402
from se_inject.guarding import guarded, mark  # noqa: E402
from se_inject.loading.operators import check_vocabulary  # noqa: E402
from se_inject.tables import table  # noqa: E402

LIST = HERE.parent.parent / "se_inject" / "loading" / "operators.json"
MEMORY = 3 << 30
SECONDS = 5
INTS = (
    0,
    1,
    2,
    3,
    4,
    -1,
    -2,
    7,
    64,
    -100,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32 + 1,
    2**40,
    2**62,
    -(2**62),
    2**63 - 1,
    -(2**63),
)
FLOATS = (0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), -float("inf"), 1e300, 1e-300, -1e18)


def overloads(only=()):
    """Every overload of the allow-list's operators, as ``aten.relu.default``."""
    for space, names in json.loads(LIST.read_text()).items():
        if space not in ("aten", "torchvision"):
            continue
        for name in names:
            packet = getattr(getattr(torch.ops, space), name, None)
            for overload in packet.overloads() if hasattr(packet, "overloads") else ():
                if "out" not in overload.split("_") and (not only or name in only):
                    yield f"{space}.{name}.{overload}"


def tensors(rng, boxes=False):
    """One tensor of many kinds."""
    if boxes and rng.random() < 0.6:
        far = [0.0, 1.0, -1.0, 1e9, -1e9, 1e30, float("nan"), float("inf"), 4.0]
        return torch.tensor([[rng.choice(far) for _ in range(5)] for _ in range(3)])
    shape = rng.choice(
        [
            (2, 4, 8, 8),
            (2, 4, 8, 8),
            (2, 4, 8),
            (4,),
            (8, 8),
            (1, 3, 9, 7),
            (2, 3, 4, 4, 4),
            (),
            (0, 4),
            (2, 0, 8, 8),
            (3, 5),
        ]
    )
    kind = rng.choice(
        ["float"] * 8
        + ["index"] * 3
        + ["far"] * 3
        + ["least", "minus", "nan", "half", "bfloat", "complex", "bool", "byte", "expanded", "double", "boxes"]
    )
    made = torch.Generator().manual_seed(rng.randrange(9))
    value = torch.randn(shape, generator=made)
    if kind == "index":
        return torch.randint(0, 3, shape, generator=made)
    if kind == "far":
        return torch.randint(0, 3, shape, generator=made) * rng.choice([10**9, -(10**9), 2**62, 100])
    if kind == "least":
        return torch.full(shape, -(2**31), dtype=torch.int32)
    if kind == "minus":
        return torch.full(shape, -1, dtype=torch.int32)
    if kind == "nan":
        return value * float("nan")
    if kind == "expanded":
        return torch.randn(1, generator=made).expand(shape or (1,))
    if kind == "boxes":
        return torch.tensor(
            [[rng.choice([0, 10**9, -(10**9)]), 0, 0, rng.choice([4, 1e30]), 4], [0, float("nan"), 1, 2, 3]]
        )
    others = {
        "half": torch.half,
        "bfloat": torch.bfloat16,
        "complex": torch.complex64,
        "bool": torch.bool,
        "byte": torch.uint8,
        "double": torch.double,
    }
    return value.to(others.get(kind, torch.float32))


def sensible(kind, rng, shape):
    """A value that a network might pass for a type of a schema."""
    if "Tensor" in kind:
        one = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return [one, one] if "[]" in kind or "List[Tensor]" in kind else one
    if "List[int]" in kind or "int[" in kind or "SymInt[" in kind:
        return rng.choice([[1, 1], [2, 2], [0, 1], [3, 3], [1], [8, 8], [0], [2, 3], list(shape), [1, 1, 1]])
    if "List[float]" in kind:
        return [1.0, 2.0]
    if "List[bool]" in kind:
        return [True, False]
    return {"int": 1, "float": 0.5, "number": 1, "Scalar": 1, "bool": False, "str": "mean", "Optional[int]": None}.get(
        kind
    )


def hostile(kind, rng, boxes):
    """A value that no network passes."""
    if "Tensor" in kind:
        return (
            [tensors(rng, boxes) for _ in range(rng.randrange(4))]
            if "List[" in kind and kind != "Optional[Tensor]"
            else tensors(rng, boxes)
        )
    if "List[int]" in kind:
        return [rng.choice(INTS) for _ in range(rng.randrange(6))]
    if "List[float]" in kind:
        return [rng.choice(FLOATS) for _ in range(rng.randrange(4))]
    if "int" in kind:
        return rng.choice(INTS)
    if "float" in kind:
        return rng.choice(FLOATS)
    if "number" in kind:
        return rng.choice(INTS + FLOATS)
    if "bool" in kind:
        return rng.random() < 0.5
    if "str" in kind:
        return rng.choice(["", "sum", "mean", "amax", "reflect", "x" * 50])
    return None


def arguments(name, number):
    """The arguments of a call, the same for every run."""
    space, short, overload = name.split(".")
    schema = getattr(getattr(getattr(torch.ops, space), short), overload)._schema
    rng = random.Random(f"{name} {number}")
    shape = rng.choice([(2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8), (8, 8), (2, 4, 4, 4, 4), (8,)])
    args, kwargs = [], {}
    given = [each for each in schema.arguments if not (each.has_default_value() and rng.random() < 0.4)]
    odd = set(rng.sample(range(len(given)), min(len(given), rng.choice([1, 1, 2, 3])))) if number else set()
    rest = False
    for index, each in enumerate(given):
        kind = str(each.type)
        value = hostile(kind, rng, space == "torchvision") if index in odd else sensible(kind, rng, shape)
        if value is None and each.has_default_value():
            value = each.default_value
        rest = rest or each.kwarg_only or each is not schema.arguments[index]
        if rest:
            kwargs[each.name] = value
        else:
            args.append(value)
    return args, kwargs


def direct(name, number):
    """Call the operator."""
    args, kwargs = arguments(name, number)
    space, short, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, space), short), overload)(*args, **kwargs)
    for each in found if isinstance(found, tuple | list) else (found,):
        if isinstance(each, torch.Tensor) and each.numel() < 2**20:
            each.to(torch.complex128).sum()  # reads all of it


def as_program(name, number):
    """The same call as a file's program: its tensors are its inputs."""
    args, kwargs = arguments(name, number)
    inputs = []

    def written(value):
        if isinstance(value, torch.Tensor):
            inputs.append(value)
            return {"node": f"x{len(inputs)}"}
        if isinstance(value, list):
            return [written(each) for each in value]
        return encoded(value)

    line = ["set", ["y"], f"ops:{name}", [*map(written, args)], {key: written(value) for key, value in kwargs.items()}]
    data = {"class": "A", "home": "b", "inputs": [[f"x{index + 1}"] for index in range(len(inputs))], "example": None}
    module = program(json.dumps({**data, "lines": [line, ["return", {"node": "y"}]]}))
    torch.nn.Module.__init__(module)
    check_vocabulary(module)
    mark(module)
    with guarded(module):
        module(*inputs)


def process(call, cases):
    """Make calls in a child until one ends it: how many were made, and the signal; 0 for none."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        code = b"."
        for name, number in cases:
            signal.alarm(SECONDS)
            try:
                with torch.no_grad():
                    call(name, number)
                code = b"."
            except (LoadError, SurgeryError):
                code = b"r"
            except Exception:
                code = b"e"
            signal.alarm(0)
            os.write(told, code)
        os._exit(0)
    os.close(told)
    said = b""
    while piece := os.read(ready, 65536):
        said += piece
    os.close(ready)
    status = os.waitpid(child, 0)[1]
    return said.decode(), os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def deaths(call, cases):
    """Every case that ended its process, with its signal; and how the others went."""
    found, went, at = {}, Counter(), 0
    while at < len(cases):
        said, ending = process(call, cases[at : at + 2000])
        went.update(said)
        at += len(said)
        if ending:
            found[cases[at]] = signal.Signals(ending).name
            at += 1
    return found, went


def shown(name, number):
    def short(value):
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype)[6:]}{list(value.shape)}"
        return f"[{', '.join(map(short, value))}]" if isinstance(value, list) else repr(value)

    args, kwargs = arguments(name, number)
    return ", ".join([*map(short, args), *(f"{key}={short(value)}" for key, value in kwargs.items())])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    cases = [(name, number) for name in overloads(options.only) for number in range(options.calls)]
    raw, went = deaths(direct, cases)
    fatal = {case: how for case, how in raw.items() if how != "SIGALRM"}
    left, after = deaths(as_program, list(fatal))
    left = {case: how for case, how in left.items() if how != "SIGALRM"}
    names = len({name for name, _ in cases})
    lines = [
        f"{len(cases):,} calls of {names:,} overloads: {went['.']:,} computed something, {went['e']:,} raised an error, "
        f"{len(raw) - len(fatal):,} ran over {SECONDS} s, {len(fatal):,} ended their process by a signal.",
        f"Of these, as programs of a file: {after['r']:,} are refused, {after['e']:,} raise an error, {after['.']:,} compute something, "
        f"**{len(left):,} end their process**.",
    ]
    kinds = Counter(
        (name, how, "dies" if (name, number) in left else "no more") for (name, number), how in fatal.items()
    )
    example = {}
    for name, number in fatal:
        example.setdefault((name, "dies" if (name, number) in left else "no more"), shown(name, number))
    rows = [
        [name, how, count, end, f"`{example[name, end][:110]}`"] for (name, how, end), count in sorted(kinds.items())
    ]
    text = table(["operator", "signal", "calls", "as a program", "for example"], rows, "markdown") if rows else ""
    print("\n".join(lines) + "\n\n" + text)
    if not options.only:
        head = (__doc__ or "").partition("Calls begin")[2]
        head = "Calls begin" + head
        place = f"torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}, {platform.machine()}, `--calls {options.calls}`."
        (HERE / "operators.md").write_text(
            "# Operators with arguments of a file's choosing\n\n"
            + head
            + "\n"
            + "\n".join(lines)
            + "\n\n"
            + text
            + "\n\n"
            + place
            + "\n"
        )


if __name__ == "__main__":
    main()
