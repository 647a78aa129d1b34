"""Read an exported program (``.pt2``) without executing anything of the file.

``torch.export.load`` has no ``weights_only``, and more than its pickles runs. Read in torch 2.14.1 (``torch/export``,
``torch/_export/serde``), it hands these parts of a file to something that executes them:

* tensors and constants marked ``use_pickle``, opaque constants, and the sample inputs (if ``weights_only=True``
  fails on them): ``pickle``; custom objects: their C++ class's ``__setstate__``;
* symbolic sizes: ``sympy.sympify``, which is ``eval``;
* an operator's name: an attribute path from ``torch``, whatever it leads to, called when the program runs;
* tree specifications: an enum or a default factory is imported by its name;
* names of nodes: written into Python source text, which is executed; so is ``guards_code`` when the program runs;
* ``data/aotinductor``: a shared library, loaded into the process.

So the archive is read here, each of these parts is checked or left out, and torch only puts the program together.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import torch
from torch.export import ExportedProgram

from se_inject.errors import LoadError, quoted
from se_inject.forwards import checked_path, function_named, is_plain_name
from se_inject.loading.exported.expressions import SYMBOL, check_expression
from se_inject.loading.operators import is_allowed_check, is_allowed_function, trust_hint
from se_inject.loading.pickles.constructors import check_view
from se_inject.loading.pickles.containers import unpickle
from se_inject.loading.zip_archive import Archive

_COMPILED = "data/aotinductor/"
_LARGEST_JSON = 4 << 20
_SHARE_OF_JSON = 32
"""What of the file's size a record of JSON may have besides: in memory it may be forty times as much."""

_HIGHER_ORDER = frozenset(["wrap_with_set_grad_enabled", "wrap_with_autocast", "cond"])
_SYMBOLIC = frozenset(["sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "_sym_sqrt"])
_TREES = frozenset([None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"])
_DEVICES = frozenset(["device", "as_device"])
_CLASS = re.compile(r"((__main__|__mp_main__)\.)?(?!__)[^\W\d]\w*(\.((?!__)[^\W\d]\w*|<locals>))*|")
"""A class's name. A script's own classes are in `__main__`, or `__mp_main__` in a process that it started."""

_CUSTOM = frozenset(["as_custom_obj", "custom_obj"])
_WITH_NAMES_OF_VALUES = frozenset(["tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"])


def exported_program(file: IO[bytes], trust: Sequence[str] = ()) -> ExportedProgram:
    """Read the program in a ``.pt2`` archive; nothing of the file is executed. Guards on example inputs are left out.

    Args:
        file: the open file.
        trust: namespaces of operators that it may call besides those on the list.

    Raises:
        LoadError: it holds what can't be read safely, or calls an operator that is not registered.
        Exception: of any class, from a damaged file.
    """
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _bytes_to_dataclass

    archive = Archive(file)
    archive.check()
    if "serialized_exported_program.json" in archive:
        raise LoadError("written by a torch before 2.8", hint="load it with the torch that wrote it, and save it anew")
    if any(name.startswith(_COMPILED) for name in archive.records):
        raise LoadError("it holds compiled code, which can't be checked", hint="export it without compiling")
    models = [name for name in archive.records if name.startswith("models/")]
    if len(models) != 1:
        raise LoadError("an archive of several exported programs", seen=f"{len(models)}")
    name = models[0].removeprefix("models/").removesuffix(".json")
    program = _checked_program(bounded_json(archive, models[0]), trust)
    weights = _tensors(archive, "data/weights/", f"{name}_weights_config.json")
    constants = _tensors(archive, "data/constants/", f"{name}_constants_config.json")
    samples = _samples(archive, f"data/sample_inputs/{name}.pt")
    with _silence():
        data = _bytes_to_dataclass(schema.ExportedProgram, json.dumps(program).encode())  # type: ignore[no-untyped-call]
        return ExportedProgramDeserializer().deserialize(data, weights, constants, samples)


def torch_version(file: IO[bytes]) -> str | None:
    """Read the version of torch that wrote a ``.pt2`` archive, if it is stored."""
    archive = Archive(file)
    models = [name for name in archive.records if name.startswith("models/")]
    version = bounded_json(archive, models[0]).get("torch_version") if models else None
    return version if isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,40}", version) else None


def bounded_json(archive: Archive, name: str) -> Any:
    """Read a record of JSON, if it takes no more memory than it may.

    Raises:
        LoadError: it is far larger than a network's.
    """
    if archive.size(name) > _LARGEST_JSON + len(archive) // _SHARE_OF_JSON:
        raise LoadError("an exported program whose graph is far larger than any network's", seen=name[:80])
    return json.loads(archive.read(name))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress log messages: torch's quote the file's text."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


# -- tensors -----------------------------------------------------------------------------------------------


def _tensors(archive: Archive, folder: str, config: str) -> dict[str, Any]:
    from torch._export.serde.schema import ScalarType
    from torch._export.serde.serialize import deserialize_scalar_type

    records: dict[str, torch.Tensor] = {}
    found: dict[str, Any] = {}
    for name, entry in bounded_json(archive, folder + config)["config"].items():
        checked_path(name)
        meta, record = entry["tensor_meta"], entry["path_name"]
        if entry["use_pickle"] or meta is None or not str(record).startswith(("weight_", "tensor_")):
            raise LoadError(f"its `{name}` is pickled or an object of C++, not a plain tensor")
        _on_the_cpu(meta["device"])
        dtype = deserialize_scalar_type(ScalarType(meta["dtype"]))
        if record not in records:
            view = archive.view(folder + record)
            records[record] = torch.frombuffer(view, dtype=torch.uint8).clone() if view else torch.empty(0).byte()
        storage = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
            wrap_storage=records[record].untyped_storage(), dtype=dtype, _internal=True
        )
        sizes, strides = (tuple(number["as_int"] for number in meta[key]) for key in ("sizes", "strides"))
        offset = meta["storage_offset"]["as_int"]
        check_view(storage, dtype, offset, sizes, strides)
        tensor = torch._utils._rebuild_tensor(storage, offset, sizes, strides)  # type: ignore[no-untyped-call]
        found[name] = torch.nn.Parameter(tensor, bool(meta["requires_grad"])) if entry["is_param"] else tensor
    return found


def _samples(archive: Archive, name: str) -> Any:
    """Return the example inputs if they are tensors and plain data; else None, and the program does without."""
    refused: dict[str, str | None] = {}
    try:
        found = unpickle(io.BytesIO(archive.read(name)), "zip", (), refused)
    except Exception:
        return None
    return None if refused or not isinstance(found, tuple) else found


# -- the program -------------------------------------------------------------------------------------------


def _checked_program(program: Any, trust: Sequence[str]) -> Any:
    """Check a program's JSON data, and return it without what would be executed.

    Raises:
        LoadError: it holds what no exported network does.
    """
    if any(not SYMBOL.fullmatch(name) for name in program["range_constraints"]):
        raise LoadError("a symbol of an exported program that is not a name")
    program["guards_code"] = []
    program["graph_module"]["metadata"] = {}
    program["graph_module"]["treespec_namedtuple_fields"] = {}
    for entry in program["graph_module"]["module_call_graph"]:
        _check_name_of_path(entry["fqn"])
        if entry[
            "fqn"
        ]:  # how a submodule's arguments were nested: what is made of it is source text, and nobody needs it
            entry["signature"] = None
        for name in (entry.get("signature") or {}).get("forward_arg_names") or []:
            _check_name(name)
    todo = [program["graph_module"]]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            if {"target", "inputs", "outputs", "metadata"} <= part.keys():
                part["metadata"] = _checked_metadata(part["metadata"])
            for key in _DEVICES & part.keys():
                part[key] = _on_the_cpu(part[key])
            for key, value in part.items():
                if key in _CUSTOM or (key == "custom_obj_values" and value):
                    raise LoadError("an exported program with an object of C++")
                if key in _WITH_NAMES_OF_VALUES:
                    for name in value:
                        _check_name(name)
                if not (key in _TARGETS and _is_trusted(value, trust)):
                    _CHECKS.get(key, _unchecked)(value)
                todo.append(value)
    return program


def _unchecked(value: Any) -> None:
    """Numbers, and text that no one reads as code."""


def _checked_metadata(metadata: Any) -> dict[str, str]:
    """Keep, of a node's metadata, the modules that it came from: `key,path,class` of each, from the network inwards."""
    stack = metadata.get("nn_module_stack")
    if stack is None:
        return {}
    if not isinstance(stack, str) or not stack.isprintable():
        raise LoadError("an exported program with a module path that can't be read", seen=quoted(stack))
    for entry in stack.split(";"):
        place, _, kind = entry.rpartition(",")
        if re.search(r"[\"'\\]|\b__", place) or not _CLASS.fullmatch(kind):
            raise LoadError("an exported program with a module path that can't be read", seen=quoted(entry))
    return {"nn_module_stack": stack}


def _on_the_cpu(device: Any) -> Any:
    """Return the device that a program names, or the CPU if it is one that computes: its numbers are read onto that."""
    if not isinstance(device, dict) or not re.fullmatch(r"[a-z]{2,20}", str(device.get("type"))):
        raise LoadError("an exported program for a device that has no name", seen=quoted(device))
    return device if device["type"] == "meta" else {"type": "cpu", "index": None}


def _check_name(name: Any) -> None:
    is_name = is_plain_name(name) and not (name.startswith("__") and name.endswith("__"))
    if name is not None and name != "" and not is_name:
        raise LoadError("an exported program with a name that is none", seen=quoted(name))


def _check_name_of_path(path: Any) -> None:
    if path is not None and path != "":
        checked_path(path)


def is_allowed_target(target: str) -> bool:
    """Return whether a program may call what it names so: ``torch.ops.aten.relu.default``, ``_operator.add``."""
    head, _, name = target.partition(".")
    if head in ("_operator", "math"):
        return is_allowed_function(f"{head.removeprefix('_')}:{name}")
    if target.startswith("torch.ops.higher_order."):
        return name.rpartition(".")[2] in _HIGHER_ORDER
    if target.startswith("torch.ops."):
        operator = target.removeprefix("torch.ops.")
        return is_allowed_function(f"ops:{operator}") or is_allowed_check(operator)
    return head == "torch" and name in _SYMBOLIC


def _check_target(target: Any) -> None:
    if not isinstance(target, str):
        raise LoadError("an exported program with an operator that has no name", seen=quoted(target))
    if not is_allowed_target(target):
        space = target.removeprefix("torch.ops.").partition(".")[0] if target.startswith("torch.ops.") else ""
        raise LoadError(
            f"an exported program calls `{target[:80]}`",
            seen="it is not on the list of operators that a file may call",
            hint=trust_hint(space) if space != "higher_order" else None,
        )
    if target.startswith("torch.ops.aten."):
        function_named(f"ops:{target.removeprefix('torch.ops.')}")


def _is_trusted(target: Any, trust: Sequence[str]) -> bool:
    """Return whether a program may call an operator of a namespace that the user trusts.

    Raises:
        LoadError: no such operator is registered in this process.
    """
    parts = target.split(".") if isinstance(target, str) else []
    if parts[:2] != ["torch", "ops"] or not all(map(is_plain_name, parts)) or parts[2] not in trust:
        return False
    found: Any = torch.ops
    for part in parts[2:]:
        found = getattr(found, part, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise LoadError(
            f"an exported program calls the operator `{'.'.join(parts[2:])[:80]}`",
            seen="it is not registered in this process",
            hint="import the package that registers it first",
        )
    return True


def _check_keywords(text: Any) -> None:
    """Check the structure of a call's arguments: what it passes by keyword becomes the names of parameters in source text."""
    _check_tree(text)
    _, tree = json.loads(text)
    for part in tree["children_spec"][1:2]:
        context = part["context"]
        for key in (json.loads(context) if isinstance(context, str) else context) or []:
            _check_name(key)


def _check_tree(text: Any) -> None:
    _, tree = json.loads(text)
    todo = [tree]
    while todo:
        part = todo.pop()
        context = part["context"]
        keys = json.loads(context) if isinstance(context, str) else context
        if part["type"] not in _TREES or not (keys is None or isinstance(keys, list)):
            raise LoadError(
                "an exported program whose inputs or outputs are of another type", seen=str(part["type"])[:80]
            )
        if any(isinstance(key, dict | list) or not _is_key(key) for key in keys or []):
            raise LoadError("an exported program whose inputs or outputs have keys that are not names")
        todo += part["children_spec"]


def _is_key(key: Any) -> bool:
    """Return whether this may be a key of a dict of inputs or outputs: torch writes some of them into source text."""
    return not isinstance(key, str) or bool(_KEY.fullmatch(key))


_KEY = re.compile(r"[\w.:/ -]{0,200}")


_TARGETS = ("target", "as_operator")
_CHECKS: dict[str, Callable[[Any], None]] = {
    "name": _check_name,
    "as_name": _check_name,
    "target": _check_target,
    "as_operator": _check_target,
    "expr_str": check_expression,
    "in_spec": _check_keywords,
    "out_spec": _check_tree,
    **{
        f"{kind}_name": _check_name_of_path
        for kind in ("parameter", "buffer", "tensor_constant", "custom_obj", "user_input")
    },
}
