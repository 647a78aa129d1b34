"""Follow values that are made empty and filled afterwards: a reader of one reads what was written into it before.

``out = torch.empty_like(x)``, then ``out[:, :4] = y`` or ``out.narrow(1, 0, 4).copy_(y)``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from se_inject.tracing.names import function_name_of

BUFFERS = frozenset(
    f"{new}{kind}{like}"
    for new in ("", "new_")
    for kind in ("empty", "full", "ones", "zeros")
    for like in ("", "_like")
) | {"clone"}
"""What makes a tensor that is filled afterwards."""
SHAPED_LIKE = frozenset({"view_as", "reshape_as", "expand_as", "type_as", "sum_to_size"})
"""What gives its first argument the form of its second, and reads no number of that."""
_EVERYTHING = (0, math.inf)
_VIEWS = frozenset({"getitem", "narrow", "select", "view", "transpose", "permute", "unflatten"})


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node's value is made from: its arguments, and instead of a buffer what was written into it."""
    found = numbers_of(node)
    if is_buffer(node):
        written = _values(writes_into(node))
        return [*found, *written] if function_name_of(node) == "clone" or not written else written
    for source in found:
        if is_buffer(source):
            writes = writes_into(source)
            written = _values([write for write in writes if write < node and _may_overlap(write, node)])
            is_kept = function_name_of(source) == "clone" or not writes
            found = [*(each for each in found if is_kept or each is not source), *written]
    return found


def numbers_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node reads, without those whose form alone it takes."""
    found: list[fx.Node] = node.all_input_nodes
    return found[:1] if len(found) > 1 and is_call(node) and function_name_of(node) in SHAPED_LIKE else found


def is_call(node: fx.Node) -> bool:
    """Return whether a node calls a function or method, and no module."""
    return node.op in ("call_function", "call_method")


def is_buffer(node: fx.Node) -> bool:
    """Return whether a node makes a tensor that is filled afterwards."""
    return is_call(node) and function_name_of(node) in BUFFERS


def writes_into(buffer: fx.Node) -> list[fx.Node]:
    """Return the nodes that fill a buffer without returning what is read on: ``out[:, :4] = y``, ``out[0].copy_(y)``."""
    return [found for user in buffer.users for found in _writes(user, buffer)]


def _values(writes: list[fx.Node]) -> list[fx.Node]:
    """Return what these nodes write."""
    return list(dict.fromkeys(each for write in writes for each in write.all_input_nodes if each is not write.args[0]))


def _writes(node: fx.Node, value: fx.Node) -> list[fx.Node]:
    """Return the writes into a value that a reader of it does: itself, or those into the view that it takes."""
    if not node.args or node.args[0] is not value:
        return []
    name = function_name_of(node)
    if name == "setitem" or (name.endswith("_") and not name.endswith("__") and not node.users):
        return [node]
    if name not in _VIEWS or not node.users:
        return []
    found = [_writes(user, node) for user in node.users]
    return [write for writes in found for write in writes] if all(found) else []


def _may_overlap(write: fx.Node, reader: fx.Node) -> bool:
    """Return whether a write can have touched what a reader takes: unless both take parts, and these lie apart."""
    written, read = _part(write), _part(reader)
    return all(one[0] < other[1] and other[0] < one[1] for one, other in zip(written, read, strict=False))


def _part(node: fx.Node) -> list[tuple[float, float]]:
    """Return the part of a buffer that a node takes or writes, as a range in each dimension; an empty list for all of it."""
    name = function_name_of(node)
    if name.endswith("_") and node.args and isinstance(node.args[0], fx.Node):
        return _part(node.args[0])  # into a view
    if name == "narrow" and len(node.args) == 4:
        dim, start, length = map(_number, node.args[1:])
        return [_EVERYTHING] * dim + [(start, start + length)] if min(dim, start) >= 0 else []
    if name not in ("getitem", "setitem"):
        return []
    index = node.args[1] if isinstance(node.args[1], tuple | list) else (node.args[1],)
    return [] if any(each is None or each is Ellipsis for each in index) else [_range(each) for each in index]


def _range(index: Any) -> tuple[float, float]:
    """Return the positions that one index takes, as far as it is a plain one."""
    if isinstance(index, slice):
        start, stop = (_number(end) for end in (index.start, index.stop))
        start, stop = 0 if start is None else start, math.inf if stop is None else stop
        plain = all(isinstance(end, int | float) and end >= 0 for end in (start, stop)) and index.step in (None, 1)
        return (start, stop) if plain else _EVERYTHING
    position = _number(index)
    return (position, position + 1) if isinstance(position, int) and position >= 0 else _EVERYTHING


def _number(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, fx.Node) else value
