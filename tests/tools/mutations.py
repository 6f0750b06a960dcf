"""Lies in a source, one at a time: the small mistakes that a suite must notice.

A comparison turned round, a condition negated, a sum made a difference or cut to its first operand, a constant moved, a
store, a call or a raise left out, two arguments exchanged, a keyword forgotten, a cast skipped, a scale of 1, a dropout
of 0, a factor that gets no gradient. Annotations and docstrings are left alone."""

import ast
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

_SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
_LEFT_OUT = {
    "clone",
    "contiguous",
    "copy",
    "cpu",
    "detach",
    "flatten",
    "lstrip",
    "mT",
    "removeprefix",
    "t",
    "to",
    "view",
}
_RUINED = {"scale": "1.0", "dropout": "0.0", "p": "0.0", "lora_A": "lora_A.detach()", "lora_B": "lora_B.detach()"}
_FACTORS = {"lora_A", "lora_B", "A", "B", "x", "y", "flat_A", "flat_B", "shape_A", "shape_B"}
_ASKS = ("is_", "_is_", "_needs_", "_joins")  # what is asked in any order, and of which no gradient is taken
# Without these a function is another thing, and everything fails.
_SHAPING = {"property", "classmethod", "staticmethod", "contextmanager"}


@dataclass(frozen=True)
class Mutation:
    """One mutant: where it stands, what it says, and the compiled module."""

    source: Path
    what: str
    code: CodeType
    lines: range | None  # of the statement; None: it runs at import
    function: range | None = None  # the lines of the function around it
    text: str = ""  # that function, for what reads a source


def mutations(source: Path) -> Iterator[Mutation]:
    tree = ast.parse(source.read_text())
    before = ast.unparse(tree).splitlines()
    for parent, field, index, scope in _places(tree, ()):
        node = _get(parent, field, index)
        for other in _alternatives(node):
            _set(parent, field, index, ast.fix_missing_locations(ast.copy_location(other, node)))
            what = f"{_name(scope)}: {_difference(before, ast.unparse(tree).splitlines())}"
            code = compile(tree, str(source), "exec")
            yield Mutation(source, what, code, _lines(scope), _function(scope), _text(scope))
            _set(parent, field, index, node)


def _places(
    node: ast.AST, scope: tuple[ast.AST, ...]
) -> Iterator[tuple[ast.AST, str, int | None, tuple[ast.AST, ...]]]:
    """Every node by its place in its parent, with the definitions and the statement around it."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                inside = _scope_of(node, field, scope)
                yield node, field, index, (*inside, child) if isinstance(child, ast.stmt) else inside
                yield from _places(child, (*inside, child) if isinstance(child, ast.stmt) else inside)


def _scope_of(node: ast.AST, field: str, scope: tuple[ast.AST, ...]) -> tuple[ast.AST, ...]:
    """Defaults and decorators run where the function is defined, not in it."""
    return scope[:-1] if isinstance(node, ast.FunctionDef) and field in ("args", "decorator_list") else scope


def _alternatives(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare():
            for index, op in enumerate(node.ops):
                if type(op) in _SWAPS:
                    ops = [*node.ops[:index], _SWAPS[type(op)](), *node.ops[index + 1 :]]
                    yield ast.Compare(node.left, ops, node.comparators)
        case ast.BoolOp():
            yield ast.BoolOp(_SWAPS[type(node.op)](), node.values)
            for index in range(len(node.values)):
                rest = node.values[:index] + node.values[index + 1 :]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        case ast.BinOp():
            yield node.left
            if type(node.op) in _SWAPS:
                yield ast.BinOp(node.left, _SWAPS[type(node.op)](), node.right)
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.If() | ast.While() if not isinstance(node.test, ast.UnaryOp | ast.Compare):  # those are turned above
            yield type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.IfExp():
            yield ast.IfExp(node.test, node.orelse, node.body)
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.AugAssign() | ast.Delete() | ast.Expr(value=ast.Call() | ast.Yield()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield ast.Pass()  # of a local name it would only be a NameError
        case ast.Call():
            yield from _other_calls(node)
        case ast.FunctionDef():
            for index, decorator in enumerate(node.decorator_list):
                if not any(name in ast.unparse(decorator) for name in _SHAPING):
                    rest = node.decorator_list[:index] + node.decorator_list[index + 1 :]
                    yield ast.FunctionDef(node.name, node.args, node.body, rest, node.returns)


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    function, args, keywords = node.func, node.args, node.keywords
    for index in range(len(keywords)):
        yield ast.Call(function, args, keywords[:index] + keywords[index + 1 :])
    if isinstance(function, ast.Attribute) and function.attr in _LEFT_OUT:
        yield function.value
    if ast.unparse(function).startswith(_ASKS):
        return
    for index, pair in enumerate(itertools.pairwise(args)):
        if all(ast.unparse(each).split(".")[-1] in _FACTORS for each in pair):
            yield ast.Call(function, [*args[:index], *reversed(pair), *args[index + 2 :]], keywords)
    for index, each in enumerate(args):
        name = each.id if isinstance(each, ast.Name) else each.attr if isinstance(each, ast.Attribute) else ""
        if name in _RUINED:
            ruined = ast.parse(_RUINED[name].replace(name, ast.unparse(each)), mode="eval").body
            yield ast.Call(function, [*args[:index], ruined, *args[index + 1 :]], keywords)


def _get(parent: ast.AST, field: str, index: int | None) -> ast.AST:
    value = getattr(parent, field)
    return value if index is None else value[index]


def _set(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _name(scope: tuple[ast.AST, ...]) -> str:
    names = [each.name for each in scope if isinstance(each, (ast.FunctionDef, ast.ClassDef))]
    return ".".join(names) or "at import"


def _lines(scope: tuple[ast.AST, ...]) -> range | None:
    """The lines of the innermost statement; of one with a body, those of its head."""
    if not any(isinstance(each, ast.FunctionDef) for each in scope):
        return None
    statement = scope[-1]
    if isinstance(statement, ast.FunctionDef):
        return None
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno
    return range(statement.lineno, max(last, statement.lineno) + 1)


def _function(scope: tuple[ast.AST, ...]) -> range | None:
    around = _functions(scope)
    return range(around[0].lineno, (around[0].end_lineno or 0) + 1) if around else None


def _text(scope: tuple[ast.AST, ...]) -> str:
    around = _functions(scope)
    if not around:
        return ""
    bare = ast.FunctionDef(around[0].name, around[0].args, around[0].body, [], around[0].returns)
    return textwrap.indent(ast.unparse(ast.copy_location(bare, around[0])), around[0].col_offset * " ")


def _functions(scope: tuple[ast.AST, ...]) -> list[ast.FunctionDef]:
    return [each for each in scope if isinstance(each, ast.FunctionDef)]


def _difference(before: list[str], after: list[str]) -> str:
    """The first line that differs, before and after, cut to what is around the difference."""
    index = next(i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1])
    old, new = before[index].strip(), after[index].strip()
    start = len(_common(old, new))
    end = len(_common(old[start:][::-1], new[start:][::-1]))
    first = max(0, start - 40)
    return f"`{old[first : len(old) - end + 24]}` -> `{new[first : len(new) - end + 24]}`"


def _common(one: str, other: str) -> str:
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
