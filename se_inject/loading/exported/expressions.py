"""Check expressions of sizes (``2*s0 + 1``) in a file: torch evaluates them as Python."""

from __future__ import annotations

import ast
import re
from typing import Any

from se_inject.errors import LoadError, quoted

SYMBOL = re.compile(r"[a-z]{1,4}\d{1,5}")
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
_NUMBER = re.compile(r"-?\d{1,20}(\.\d{1,20})?(e[+-]?\d{1,2})?")
_EXPRESSION_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.Load,
    ast.keyword, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_EXPRESSION_FUNCTIONS = frozenset(
    [
        "FloorDiv",
        "ModularIndexing",
        "Where",
        "PythonMod",
        "Mod",
        "CleanDiv",
        "CeilToInt",
        "FloorToInt",
        "CeilDiv",
        "LShift",
        "RShift",
        "PowByNatural",
        "FloatPow",
        "FloatTrueDiv",
        "IntTrueDiv",
        "IsNonOverlappingAndDenseIndicator",
        "TruncToFloat",
        "TruncToInt",
        "RoundToInt",
        "RoundDecimal",
        "ToFloat",
        "Identity",
        "Symbol",
        "Integer",
        "Float",
        "Rational",
        "Add",
        "Mul",
        "Pow",
        "Max",
        "Min",
        "And",
        "Or",
        "Not",
        "Abs",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
        "Equality",
        "Unequality",
        "GreaterThan",
        "LessThan",
        "StrictGreaterThan",
        "StrictLessThan",
        "floor",
        "ceiling",
    ]
)
_EXPRESSION_CONSTANTS = frozenset(["oo", "int_oo", "true", "false", "True", "False"])
_ASSUMPTIONS = frozenset(["positive", "negative", "nonnegative", "nonpositive", "integer", "real", "finite", "zero"])
_LARGEST_EXPONENT = 8
_MOST_EXPRESSION_NODES = 200
_LONGEST = 10_000
"""Letters: to Python's parser each may take half a kilobyte."""


def check_expression(text: Any) -> None:
    """Check one expression.

    Raises:
        LoadError: it is too long, or holds anything but numbers, symbols and functions of sizes.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise LoadError("an exported program with a size that is not an expression of sizes", seen=quoted(text))
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise LoadError("an exported program with a size that is not an expression") from error
    if len(nodes) > _MOST_EXPRESSION_NODES or not all(map(_may_be_evaluated, nodes)):
        raise LoadError("an exported program with a size that is not an expression of sizes", seen=quoted(text))


def _may_be_evaluated(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _EXPRESSION_FUNCTIONS | _EXPRESSION_CONSTANTS or bool(SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        is_text = isinstance(node.value, str) and bool(SYMBOL.fullmatch(node.value) or _NUMBER.fullmatch(node.value))
        return is_text or (isinstance(node.value, int | float) and abs(node.value) < 2**63)
    if isinstance(node, ast.keyword) and node.arg == "precision":
        return isinstance(node.value, ast.Constant) and node.value.value == 53  # that of Python's floats
    if isinstance(node, ast.keyword):
        return node.arg in _ASSUMPTIONS and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Call):
        is_power = isinstance(node.func, ast.Name) and node.func.id in _POWERS
        names = isinstance(node.func, ast.Name) and node.func.id in _EXPRESSION_FUNCTIONS
        is_float = isinstance(node.func, ast.Name) and node.func.id == "Float"  # a second argument would be its digits
        return names and (not is_power or _is_small_power(node.args)) and not (is_float and len(node.args) != 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return _is_small_power([node.left, node.right])
    return isinstance(node, _EXPRESSION_NODES)


def _is_small_power(parts: list[ast.expr]) -> bool:
    """Return whether an exponent is a small number, and its base holds no power: sympy would multiply it out."""
    if len(parts) != 2:
        return False
    exponent = parts[1]
    if isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name) and exponent.func.id == "Float":
        exponent = exponent.args[0] if exponent.args else exponent  # its precision is beside it
    numbers = [node.value for node in ast.walk(exponent) if isinstance(node, ast.Constant)]
    if len(numbers) == 1 and isinstance(numbers[0], str) and _NUMBER.fullmatch(numbers[0]):
        numbers = [float(numbers[0])]
    is_number = len(numbers) == 1 and isinstance(numbers[0], int | float) and abs(numbers[0]) <= _LARGEST_EXPONENT
    return is_number and not any(
        isinstance(node, ast.Pow | ast.LShift) or (isinstance(node, ast.Name) and node.id in _POWERS)
        for node in ast.walk(parts[0])
    )
