"""Check the source text of a TorchScript archive before torch reads it.

torch's reader resolves classes, functions and types by recursion, without an end, and its interpreter believes what a class
declares. So how deep they go is bounded here, and what each class declares is passed to the check of the objects.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from se_inject.errors import LoadError
from se_inject.loading.operators import trust_hint
from se_inject.loading.torchscript.nesting import check_values
from se_inject.loading.zip_archive import Archive

FORBIDDEN = frozenset({"save", "load", "from_file", "classes", "__setstate__", "hasattr"})
"""Words that no network's source has."""

_NAMESPACES = frozenset({"aten", "prim", "torchvision"})
_TOKEN = re.compile(rb"\w+|[^\w\s]")
_MOST_TOKENS = 200_000
"""In one record of source text; to Python, each may take a kilobyte."""

SOURCE = re.compile(r"code/__torch__(/[A-Za-z_][A-Za-z0-9_]*)*\.py")
"""The records of source text: one for each module, its name with slashes for dots."""
_LARGEST_SOURCE = 2 << 20
_DEEPEST_CLASSES = 100
"""Classes and functions that need one another, one after the other; networks have less than thirty."""

_DEEPEST_METHODS = 10
"""Methods of one class that call one another."""

_DEEPEST_TYPE = 20
_DEEPEST_TREE = 400
_OWN = "__torch__."

Type = tuple[str, tuple[Any, ...]]
"""A type's name, qualified if it is a class of the archive, and the types within it: ``("List", (("int", ()),))``."""


class Class(NamedTuple):
    """What the source of a class says: what it is (``Module``, ``Enum``, ``NamedTuple``), and the types of its attributes."""

    base: str
    attributes: Mapping[str, Type]


Declared = Mapping[str, Class]
"""By qualified name."""


def checked_sources(archive: Archive, trust: Sequence[str] = ()) -> Declared:
    """Look at all source text of an archive.

    Args:
        archive: that it is in.
        trust: other libraries whose operators it may call.

    Returns:
        what its classes declare.

    Raises:
        LoadError: it says what no network does, or goes too deep.
    """
    names: dict[str, set[str]] = {}
    declared: dict[str, Class] = {}
    for record in archive.records:
        if not SOURCE.fullmatch(record):
            continue
        for node in _checked_source(record, archive, trust).body:  # a tree is large: one at a time
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                name = f"{record[5:-3].replace('/', '.')}.{node.name}"
                if name in names:
                    raise LoadError("a TorchScript archive that defines a name twice", seen=name[:80])
                names[name] = set(_own_names(node))
            if isinstance(node, ast.ClassDef):
                declared[name] = Class(str(_word(node.bases[0])) if len(node.bases) == 1 else "", _declared(node))
                _check_methods(node)
    needs = {name: {other for other in others if other in names and other != name} for name, others in names.items()}
    if _longest_path(needs) > _DEEPEST_CLASSES:
        raise LoadError(
            f"a TorchScript archive in which over {_DEEPEST_CLASSES} classes and functions need one another in turn"
        )
    return declared


def parsed_source(name: str, archive: Archive) -> ast.Module:
    """Parse TorchScript's source as Python, whose grammar includes it, if that takes no more memory than it may.

    Args:
        name: of the record.
        archive: that it is in.

    Raises:
        LoadError: there is too much of it, it is not source code, or to TorchScript it is another one.
    """
    if archive.size(name) > _LARGEST_SOURCE or sum(1 for _ in _TOKEN.finditer(archive.read(name))) > _MOST_TOKENS:
        raise LoadError("a TorchScript archive with too much source text", seen=name[:80])
    if b"# type:" in archive.read(name):  # to Python a comment, to TorchScript a declaration
        raise LoadError("a TorchScript archive that declares types in comments", seen=name[:80])
    try:
        return ast.parse(archive.read(name).decode("ascii"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LoadError("a TorchScript archive with source text that is none", seen=name[:80]) from error


def _checked_source(name: str, archive: Archive, trust: Sequence[str]) -> ast.Module:
    """Parse source text, and look at every word of it."""
    tree = parsed_source(name, archive)
    depth, depth_of_types = _tree_depth(tree)
    if depth > _DEEPEST_TREE or depth_of_types > _DEEPEST_TYPE:
        raise LoadError("a TorchScript archive whose source text goes too deep", seen=name[:80])
    operators, readings = set(), set()
    libraries: dict[ast.AST, str] = {}
    for node in ast.walk(tree):
        word = _word(node)
        if word in FORBIDDEN:
            raise LoadError(f"a TorchScript archive that uses `{word}`", seen=f"in its {name[:80]}")
        if isinstance(node, ast.Attribute) and (_word(node.value) in _NAMESPACES or _word(node.value) in trust):
            operators.add(getattr(node.value, "value", None))  # in `ops.aten.relu`, the `ops`
        if isinstance(node, ast.Call) and _reads_a_child(node):
            readings.add(node.func)
        if isinstance(node, ast.Attribute) and _word(node.value) == "ops":
            libraries[node.value] = node.attr
        if word == "ops" and isinstance(node, ast.Name) and node not in operators:
            library = libraries.get(node, "")
            raise LoadError(
                "a TorchScript archive that calls an operator of another library",
                seen=f"{f'`{library[:80]}`, ' if library else ''}in its {name[:80]}",
                hint=trust_hint(library) if library else None,
            )
        for annotation in _annotations(node):
            type_of(annotation)
        if isinstance(node, ast.FunctionDef):
            check_values(node)
        if word == "getattr" and node not in readings:
            raise LoadError("a TorchScript archive that uses `getattr`", seen=f"in its {name[:80]}")
    return tree


def _reads_a_child(call: ast.Call) -> bool:
    """Return whether it is `getattr(self, "0")`, as torch writes a child whose name isn't a Python name."""
    if len(call.args) != 2 or call.keywords or not isinstance(call.args[1], ast.Constant):
        return False
    owner, name = call.args[0], call.args[1].value
    while isinstance(owner, ast.Attribute) or (isinstance(owner, ast.Call) and _word(owner.func) == "getattr"):
        owner = owner.value if isinstance(owner, ast.Attribute) else owner.args[0]
    is_value = isinstance(owner, ast.Name) and owner.id not in ("ops", "torch", "__torch__")
    return is_value and isinstance(name, str) and name not in FORBIDDEN and bool(re.fullmatch(r"[\w.-]+", name))


def _word(node: Any) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    return node.id if isinstance(node, ast.Name) else None


# -- depth -------------------------------------------------------------------------------------------------


def _own_names(node: ast.AST) -> Iterator[str]:
    """List the names of the archive's own that a class or function uses; torch takes text for a type, too."""
    for part in ast.walk(node):
        name = part.value if isinstance(part, ast.Constant) else _dotted(part)
        if isinstance(name, str) and name.startswith(_OWN):
            yield name


def _check_methods(node: ast.ClassDef) -> None:
    methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    if _longest_path({own: _own_methods(part, methods) for own, part in methods.items()}) > _DEEPEST_METHODS:
        raise LoadError(
            f"a TorchScript archive in which over {_DEEPEST_METHODS} methods of a class call one another in turn",
            seen=node.name[:80],
        )


def _own_methods(method: ast.FunctionDef, methods: Mapping[str, Any]) -> set[str]:
    """List the methods of its own class that a method reads of its first argument, which it must not pass on."""
    myself = method.args.args[0].arg if method.args.args else ""
    bases = {part.value for part in ast.walk(method) if isinstance(part, ast.Attribute)}
    bases |= {
        part.args[0]
        for part in ast.walk(method)
        if isinstance(part, ast.Call) and _word(part.func) == "getattr" and part.args
    }
    if any(isinstance(part, ast.Name) and part.id == myself and part not in bases for part in ast.walk(method)):
        raise LoadError("a TorchScript archive with a method that passes its module on", seen=method.name[:80])
    own = (part for part in bases if isinstance(part, ast.Name) and part.id == myself)
    owners = set(own)
    return {
        part.attr
        for part in ast.walk(method)
        if isinstance(part, ast.Attribute) and part.value in owners and part.attr in methods
    }


def _longest_path(edges: Mapping[str, set[str]]) -> int:
    """Compute the length of the longest path; infinite if there is a cycle. Without recursion."""
    depth: dict[str, int] = {}
    for start in edges:
        todo, open_ones = [(start, False)], set()
        while todo:
            name, is_done = todo.pop()
            if is_done:
                open_ones.discard(name)
                depth[name] = 1 + max((depth[other] for other in edges[name]), default=0)
            elif name in open_ones:
                return 2**31
            elif name not in depth:
                open_ones.add(name)
                todo.append((name, True))
                todo += [(other, False) for other in edges[name] if other not in depth]
    return max(depth.values(), default=0)


def _dotted(node: ast.AST) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _tree_depth(tree: ast.AST) -> tuple[int, int]:
    """Compute the depth of a tree, and the depth of nested subscripts in it.

    Python's tree holds a chain, ``a < b < c`` or ``a and b and c``, as one list; TorchScript's holds it nested.
    """
    deepest = deepest_type = 0
    todo = [(tree, 1, 0)]
    while todo:
        node, depth, types = todo.pop()
        types = types + 1 if isinstance(node, ast.Subscript) else types if isinstance(node, ast.Tuple | ast.Load) else 0
        depth += len(node.ops) if isinstance(node, ast.Compare) else 0
        depth += len(node.values) if isinstance(node, ast.BoolOp) else 0
        deepest, deepest_type = max(deepest, depth), max(deepest_type, types)
        todo += [(child, depth + 1, types) for child in ast.iter_child_nodes(node)]
    return deepest, deepest_type


# -- what classes declare ----------------------------------------------------------------------------------


def _declared(node: ast.ClassDef) -> dict[str, Type]:
    found = {}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found[part.target.id] = type_of(part.annotation)
        elif isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Subscript):
            key = part.targets[0].slice  # `__annotations__["0"] = …`, where a name isn't a Python name
            if _word(part.targets[0].value) == "__annotations__" and isinstance(key, ast.Constant):
                found[str(key.value)] = type_of(part.value)
    return found


def _annotations(node: ast.AST) -> Iterator[ast.expr]:
    found = getattr(node, "annotation", None), getattr(node, "returns", None)  # of arguments, variables and functions
    return (each for each in found if each is not None)


def type_of(annotation: ast.expr) -> Type:
    """Return the type that an annotation in TorchScript's source names.

    Raises:
        LoadError: it is written in another way than torch writes types.
    """
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return "None", ()
    if not isinstance(annotation, ast.Subscript):
        name = _dotted(annotation)
        if name is None:
            raise LoadError("a TorchScript archive that declares a type in a form of its own")
        return name, ()
    if not isinstance(annotation.value, ast.Name):
        raise LoadError("a TorchScript archive that declares a type in a form of its own")
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    return str(_word(annotation.value)), tuple(map(type_of, inner))
