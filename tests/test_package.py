"""The package as a whole: its public names, which module may import which, and what an import costs."""

import ast
import graphlib
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import se_inject
from se_inject import errors
from tests.slow import SLOW

PACKAGE = Path(se_inject.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def name_of(path):
    """``se_inject.sites.finder`` for a file of that module."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path, types=False):
    """The pairs (module of this package, name) that a file imports, anywhere in it; for types alone if asked for."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only and not types:
            continue
        if isinstance(node, ast.ImportFrom):
            found |= {(node.module, alias.name) for alias in node.names if (node.module or "").startswith("se_inject")}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names if alias.name.startswith("se_inject")}
    return found


def room_of(module):
    return module.split(".")[1] if "." in module else ""


# -- public names ------------------------------------------------------------------------------------------


def test_public_names_are_there():
    assert se_inject.__all__ == sorted(se_inject.__all__)
    assert dir(se_inject) == sorted(se_inject.__all__)
    assert len(set(se_inject.__all__)) == len(se_inject.__all__)
    for name in se_inject.__all__:
        assert getattr(se_inject, name) is not None


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute `injekt`"):
        _ = se_inject.injekt


@pytest.mark.parametrize("name", [name for name in se_inject.__all__ if name != "__version__"])
def test_public_names_have_docstrings(name):
    value = getattr(se_inject, name)
    assert inspect.getdoc(value)
    assert not (inspect.getdoc(value) or "").startswith(f"{name}(")  # what a dataclass writes by itself
    if inspect.isclass(value):
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{name}.{attribute}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_and_their_public_functions_have_docstrings(name):
    tree = ast.parse(MODULES[name].read_text())
    assert name in ("se_inject.__main__", "se_inject._version") or ast.get_docstring(tree)
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert missing == []


def test_errors_are_a_tree_under_one_class_and_a_builtin():
    drawn = errors.__doc__
    for name, error in vars(errors).items():
        if inspect.isclass(error) and issubclass(error, Exception):
            assert issubclass(error, errors.InjectError)
            assert error.exit_code in (1, 2)
            assert name in drawn
            assert error is errors.InjectError or any(
                base.__module__ == "builtins" and base not in (Exception, BaseException, object)
                for base in error.__mro__
            )


def test_an_error_in_full():
    error = errors.OptionError("no", seen="yes", hint="perhaps")
    assert str(error) == "no\nseen: yes\n\nhint: perhaps"
    assert str(errors.InjectError("no")) == "no"
    assert "hint: " in str(errors.OptionError("no"))


# -- rooms -------------------------------------------------------------------------------------------------


def test_rooms_import_downward():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stdout


def test_a_room_is_entered_by_its_door():
    public_modules = {"se_inject.blocks.layers"}  # for authors of blocks
    passed_by = [
        f"{name} imports {name_in} of {module}"
        for name, path in MODULES.items()
        for module, name_in in imports(path, types=True)
        if room_of(module) in ROOMS
        and room_of(module) != room_of(name)
        and module not in public_modules
        and (module.count(".") > 1 or name_in not in importlib.import_module(module).__all__)
    ]
    assert passed_by == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_opens_what_it_names(room):
    module = importlib.import_module(f"se_inject.{room}")
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    assert 3 <= len((module.__doc__ or "").strip().splitlines()) <= 6


def test_there_is_no_circle_and_few_floors():
    graph = {name: set() for name in MODULES}
    for name, path in MODULES.items():
        for module, name_in in imports(path):
            target = f"{module}.{name_in}" if f"{module}.{name_in}" in MODULES else module
            if target != name and name != "se_inject" and target != "se_inject":
                graph[name].add(target)
    floors: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        floors[name] = 1 + max((floors[below] for below in graph[name]), default=0)
    rooms = {}
    for name in MODULES:
        below = {room_of(module) for module in graph[name]} - {room_of(name)}
        rooms.setdefault(room_of(name), set()).update(below)
    rooms.pop("")
    heights: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(rooms).static_order():
        heights[room] = 1 + max((heights[below] for below in rooms.get(room, ()) if below), default=0)
    assert max(heights.values()) <= 12


def test_file_names_have_no_underscore_in_front():
    assert {path.name for path in FILES if path.name.startswith("_")} == {"__init__.py", "__main__.py", "_version.py"}


def test_only_the_command_line_prints():
    printing = [
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert printing == []


# -- import weight -----------------------------------------------------------------------------------------


def python(*arguments):
    # a copy that is run from its own directory must not be the one that is installed
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=60
    )


LIGHT = """
import sys
import se_inject
heavy = {"torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "onnxscript", "safetensors"}
assert se_inject.__version__
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from se_inject.cli import entry as cli
for arguments in (["--help"], ["--version"], ["inject", "--help"], ["sites", "--help"], ["cost", "--help"], ["blocks", "--help"]):
    sys.argv = ["se-inject", *arguments]
    try:
        cli.main()
    except SystemExit as ending:
        assert not ending.code
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_import_and_help_do_without_torch():
    done = python("-W", "error", "-c", LIGHT)
    assert done.returncode == 0, done.stderr
    assert "MODEL" in done.stdout


def test_version_of_the_module_run_as_a_command():
    done = python("-m", "se_inject", "--version")
    assert done.returncode == 0, done.stderr
    assert se_inject.__version__ in done.stdout
    assert done.stderr == ""


def test_types_are_announced():
    assert (PACKAGE / "py.typed").exists()


def test_tests_that_are_marked_slow_are_there():
    here = Path(__file__).parent
    for folder, files in SLOW.items():
        for file, names in files.items():
            text = (here / ("" if folder == "tests" else folder) / f"{file}.py").read_text(encoding="utf-8")
            assert {name for name in names if f"def {name}(" not in text} == set(), file
