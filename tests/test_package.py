"""The package as a whole: its public names, which module may import which, and what an import costs."""

import ast
import graphlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import se_inject
from se_inject import api, errors

PACKAGE = Path(se_inject.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

LAYERS = [
    ["_allowed", "_architectures", "_archives", "_graphs", "_schema", "_tracer", "_version", "errors", "tables"],
    [
        "_builders",
        "_comparison",
        "_files",
        "_formats",
        "_names",
        "_reasons",
        "_script_archive",
        "_stand_ins",
        "_targets",
        "_vocabulary",
        "options",
        "report",
        "sites",
        "steps",
    ],
    ["_pickles", "cli", "layers", "plotting", "tracing"],
    ["bodies", "operations", "squeeze_excitation"],
    ["_programs", "_staging", "_ways", "blocks", "editing"],
    ["_block_texts", "_contents", "_program_layers", "_script_values", "_values", "_weights", "freezing", "starts"],
    ["_chains", "_from_exports", "_script_lines", "_unpickling", "inputs", "surgery"],
    ["_exported", "_from_scripts", "_network", "_runs", "_scripted", "checkpoints", "cost", "finding", "training"],
    ["_onnx", "_torch_files", "positions", "verification"],
    ["exporting", "plans"],
    ["planning", "testing"],
    ["adapters", "grid"],
    ["api", "outputs"],
    ["commands"],
]
"""Every module stands above all that it imports when it is imported."""


def imports(name, everywhere=False):
    """The modules of this package that one imports at its top, or anywhere; for types alone doesn't count."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            module = ("se_inject." if node.level else "") + (node.module or "")
            module = module.rstrip(".")
            if module == "se_inject":
                found |= {alias.name for alias in node.names if alias.name in MODULES}
            elif module.startswith("se_inject."):
                found.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("se_inject.")}
    return found


# -- public names ------------------------------------------------------------------------------------------


def test_public_names_are_sorted_and_there():
    assert se_inject.__all__ == sorted(se_inject.__all__)
    assert dir(se_inject) == sorted(se_inject.__all__)
    assert len(set(se_inject.__all__)) == len(se_inject.__all__)
    assert [name for name in se_inject.__all__ if name != "__version__"] == api.__all__
    for name in api.__all__:
        assert getattr(se_inject, name) is getattr(api, name)


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


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_their_public_functions_have_docstrings(name):
    if name == "__main__":
        return
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    assert name == "_version" or ast.get_docstring(tree)
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


# -- which module imports which ----------------------------------------------------------------------------


def test_every_module_has_its_layer():
    assert sorted([name for layer in LAYERS for name in layer] + ["__init__", "__main__"]) == MODULES


def test_imports_go_downward():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{name} imports {other}"
        for name in level
        for other in imports(name)
        if other in level and level[other] >= level[name]
    ]
    assert upward == []


def test_there_is_no_cycle_even_with_imports_inside_functions():
    graph = {name: imports(name, everywhere=True) - {name} for name in MODULES if name != "__init__"}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_nobody_imports_the_command_line_but_main():
    assert [name for name in MODULES if "cli" in imports(name, everywhere=True)] == ["__main__"]


def test_only_the_command_line_prints():
    printing = [
        name
        for name in MODULES
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
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
