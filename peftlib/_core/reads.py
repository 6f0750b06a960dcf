"""What a module's forward reads of its children, found from its source: `self.fc.weight` that is used, not `.dtype`."""

import ast
import functools
import inspect
import textwrap
import types
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

Path = tuple[str, ...]
ANY = "*"  # an index that the source does not say
CALL = "()"  # the end of a path that is called

_SUPER = "super()"
_LONGEST = 8  # a path that grows in a recursion ends here
# What is asked of a tensor without its values.
_METADATA = {
    "dtype", "device", "shape", "size", "ndim", "dim", "numel", "nelement", "requires_grad", "is_cuda", "is_cpu",
    "is_meta", "is_quantized", "is_leaf", "is_sparse", "layout", "itemsize", "nbytes", "element_size", "stride",
    "is_floating_point", "is_complex", "is_contiguous", "get_device", "data_ptr", "grad", "grad_fn",
    "new", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor",
}  # fmt: skip
# Functions that ask no more than that of an argument.
_ASK_METADATA = {"isinstance", "hasattr", "type", "id", "len", "to", "type_as", "expand_as", "view_as", "reshape_as"}


class _Visit(NamedTuple):
    """A function that is reached, and the parts of the module that its arguments are."""

    function: Any  # FunctionType, which a type checker would bind
    arguments: frozenset[tuple[str, Path]]


_known: weakref.WeakKeyDictionary[type, weakref.WeakKeyDictionary[types.FunctionType, frozenset[Path]]]
_known = weakref.WeakKeyDictionary()


def reads_of(cls: type, function: types.FunctionType) -> frozenset[Path]:
    """Attributes by their path from the module, `("layers", "*", "weight")`, whose values a method of the class uses,
    itself or in what it calls; and what it calls, `("layers", "*", "()")`. What has no source reads nothing."""
    known = _known.setdefault(cls, weakref.WeakKeyDictionary())
    if function not in known:
        known[function] = frozenset(_found(cls, function))
    return known[function]


def function_of(item: Any) -> types.FunctionType | None:
    """The function that a class attribute runs, without its decorators; None for torch's own and for data."""
    if isinstance(item, (staticmethod, classmethod)):
        item = item.__func__
    if isinstance(item, property):
        item = item.fget
    if isinstance(item, functools.cached_property):
        item = item.func
    item = inspect.unwrap(item) if callable(item) and not isinstance(item, type) else item
    if not isinstance(item, types.FunctionType) or (item.__module__ or "").partition(".")[0] == "torch":
        return None
    return item


def _found(cls: type, function: types.FunctionType) -> set[Path]:
    found: set[Path] = set()
    seen: set[_Visit] = set()
    waiting = [_bound(function, [{()}])]
    while waiting:
        visit = waiting.pop()
        if visit in seen:
            continue
        seen.add(visit)
        reached = _Function(cls, visit)
        for path, call in reached.uses():
            found.add(path)
            waiting += reached.callees(path, call)
    return found


def _bound(function: types.FunctionType, given: list[set[Path]], named: dict[str, set[Path]] | None = None) -> _Visit:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    pairs = [*zip(names, given, strict=False), *(named or {}).items()]
    return _Visit(function, frozenset((name, path) for name, paths in pairs for path in paths))


class _Function:
    """One function with the module's parts among its arguments and variables, whatever the order of its statements."""

    def __init__(self, cls: type, visit: _Visit, getters: int = 2) -> None:
        self.cls, self.getters = cls, getters
        self.names = visit.function.__globals__
        self.variables: dict[str, set[Path]] = {}
        self.given_back: dict[str, set[Path]] = {}
        for name, path in visit.arguments:
            self.variables.setdefault(name, set()).add(path)
        self.nodes = _nodes(visit.function.__code__)
        self.local = {node.name: node for node, _ in self.nodes if isinstance(node, ast.FunctionDef)}
        size = -1
        while size != sum(map(len, self.variables.values())):
            size = sum(map(len, self.variables.values()))
            for node, _ in self.nodes:
                self._bind_all(node)

    def uses(self) -> Iterator[tuple[Path, ast.Call | None]]:
        """Each path where it is used, and the call whose function or argument it is."""
        for node, parent in self.nodes:
            if not isinstance(node, ast.expr) or isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
                continue
            if not _goes_on(node, parent) and not _asks_metadata(node, parent):
                call = parent if isinstance(parent, ast.Call) else None
                called = call is not None and call.func is node
                for path in self.paths(node):
                    if len(path) < _LONGEST:
                        yield ((*path, CALL) if called else path), call

    def paths(self, node: ast.AST) -> set[Path]:
        """The parts of the module that an expression may be."""
        match node:
            case ast.Name(id=name):
                return self.variables.get(name, set())
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                return {(_SUPER, name)}
            case ast.Attribute(value=value, attr=name):
                return {(*path, name) for path in self.paths(value) if name not in _METADATA or not path}
            case ast.Subscript(value=value, slice=index):
                return {longer for path in self.paths(value) for longer in _indexed(path, value, index)}
            case ast.Call(func=ast.Name(id="getattr"), args=[value, name, *_]):
                return {(*path, _constant(name)) for path in self.paths(value)}
            case ast.Call(func=ast.Attribute() as function):
                return {part for path in self.paths(function) if len(path) == 1 for part in self._returned(path[0])}
            case ast.IfExp(body=body, orelse=orelse):
                return self.paths(body) | self.paths(orelse)
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                return {path for part in parts for path in self.paths(part)}
            case ast.NamedExpr(value=value) | ast.Starred(value=value):
                return self.paths(value)
        return set()

    def callees(self, path: Path, call: ast.Call | None) -> list[_Visit]:
        """The functions that run where a path is used: methods of the class, and functions that get a part of it."""
        path = tuple(name for name in path if name != CALL)
        if len(path) == 2 and path[0] == _SUPER:
            return self._methods(path[1], call, inherited=True)
        own = self._methods(path[0], call) if len(path) == 1 else []
        function = function_of(_looked_up(call.func, self.names)) if call and not own else None
        return own if function is None or call is None else [_bound(function, *self._arguments(call))]

    def _methods(self, name: str, call: ast.Call | None, inherited: bool = False) -> list[_Visit]:
        items = [vars(base)[name] for base in self.cls.__mro__ if name in vars(base)]
        functions = [(item, function_of(item)) for item in (items[1:] if inherited else items[:1])]
        given, named = self._arguments(call) if call and self.paths(call.func) else ([], {})
        return [
            _bound(function, given if isinstance(item, staticmethod) else [{()}, *given], named)
            for item, function in functions
            if function is not None
        ]

    def _returned(self, name: str) -> set[Path]:
        """What a getter gives: `self.head().weight`."""
        if name not in self.given_back and self.getters:
            getters = [_Function(self.cls, visit, self.getters - 1) for visit in self._methods(name, None)]
            self.given_back[name] = {
                path
                for getter in getters
                for node, _ in getter.nodes
                if isinstance(node, ast.Return) and node.value
                for path in getter.paths(node.value)
            }
        return self.given_back.get(name, set())

    def _arguments(self, call: ast.Call) -> tuple[list[set[Path]], dict[str, set[Path]]]:
        return [self.paths(item) for item in call.args], {k.arg: self.paths(k.value) for k in call.keywords if k.arg}

    def _bind_all(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
                self._bind(target, value)
            case ast.For(target=target, iter=items) | ast.comprehension(target=target, iter=items):
                self._bind_items(target, items)
            case ast.Call(func=ast.Name(id=name), args=given) if name in self.local:
                for argument, value in zip(self.local[name].args.args, given, strict=False):
                    self._add(ast.Name(argument.arg), self.paths(value))

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        match target, value:
            case (ast.Tuple(elts=targets), ast.Tuple(elts=values)) if len(targets) == len(values):
                for one, other in zip(targets, values, strict=True):
                    self._bind(one, other)
            case ast.Tuple(), _:
                self._bind_items(target, value)
            case _:
                self._add(target, self.paths(value))

    def _bind_items(self, target: ast.expr, items: ast.expr) -> None:
        match target, items:
            case ast.Tuple(elts=[_, each]), ast.Call(func=ast.Name(id="enumerate"), args=[inner, *_]):
                self._bind_items(each, inner)
            case ast.Tuple(elts=targets), ast.Call(func=ast.Name(id="zip"), args=several):
                for one, other in zip(targets, several, strict=False):
                    self._bind_items(one, other)
            case _, ast.Call(func=ast.Name(id="reversed" | "list" | "tuple" | "sorted"), args=[inner, *_]):
                self._bind_items(target, inner)
            case _, ast.Call(func=ast.Attribute(value=inner, attr="items" | "values" | "children" | "named_children")):
                self._add(target, {(*path, ANY) for path in self.paths(inner)})
            case _, (ast.Tuple(elts=parts) | ast.List(elts=parts)):
                for part in parts:
                    self._bind(target, part)
            case _:
                self._add(target, {longer for path in self.paths(items) for longer in (path, (*path, ANY))})

    def _add(self, target: ast.expr, paths: set[Path]) -> None:
        """To every name of the target: which of them a tuple's parts are does not matter much."""
        for node in [target, *getattr(target, "elts", ())]:
            if isinstance(node, ast.Name) and paths:
                short = {path for path in paths if len(path) <= _LONGEST}
                self.variables[node.id] = self.variables.get(node.id, set()) | short


@functools.lru_cache(512)
def _nodes(code: types.CodeType) -> list[tuple[ast.AST, ast.AST]]:
    """Every node of a function's source with what it stands in; keywords and starred arguments with their call."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, TypeError):  # made at run time, or compiled; a lambda in the middle of a statement
        return []
    found, waiting = [], [(child, tree) for child in ast.iter_child_nodes(tree)]
    while waiting:
        node, parent = waiting.pop()
        found.append((node, parent))
        inner = parent if isinstance(node, ast.keyword) else node
        waiting += [(child, inner) for child in ast.iter_child_nodes(node)]
    return found


def _goes_on(node: ast.expr, parent: ast.AST) -> bool:
    """Whether what stands around it is the same part of the module, a longer path, or a name for it."""
    match parent:
        case ast.Attribute() | ast.BoolOp() | ast.Tuple() | ast.List() | ast.NamedExpr() | ast.Starred():
            return True
        case ast.Subscript(value=value):
            return node is value
        case ast.IfExp(test=test):
            return node is not test
        case ast.Call(func=ast.Name(id="getattr"), args=[value, *_]):
            return node is value
        case ast.Assign(targets=targets, value=value):
            return node is not value or all(isinstance(t, (ast.Name, ast.Tuple)) or _ties(t, value) for t in targets)
        case ast.AnnAssign(target=target):
            return isinstance(target, ast.Name)
        case ast.For(iter=items) | ast.comprehension(iter=items):
            return node is items
    return False


def _ties(target: ast.expr, value: ast.expr) -> bool:
    """`self.head.weight = self.embedding.weight`."""
    return isinstance(target, ast.Attribute) and isinstance(value, ast.Attribute) and target.attr == value.attr


def _asks_metadata(node: ast.expr, parent: ast.AST) -> bool:
    match parent:
        case ast.Compare(ops=ops):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in ops)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name) as function):
            return node is not function and (name in _ASK_METADATA or name.endswith("_like"))
    return isinstance(parent, ast.Expr)


def _indexed(path: Path, value: ast.expr, index: ast.expr) -> Iterator[Path]:
    if isinstance(index, ast.Slice) or isinstance(value, ast.Name):  # a name may be that of a list of parts
        yield path
    yield (*path, _constant(index))


def _constant(node: ast.expr) -> str:
    value = node.value if isinstance(node, ast.Constant) else ANY
    return str(value) if isinstance(value, (str, int)) else ANY


def _looked_up(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a name, or an attribute of a module or a class, is where a function was defined."""
    match node:
        case ast.Name(id=name):
            return names.get(name)
        case ast.Attribute(value=value, attr=name):
            outer = _looked_up(value, names)
            return inspect.getattr_static(outer, name, None) if isinstance(outer, (types.ModuleType, type)) else None
    return None
