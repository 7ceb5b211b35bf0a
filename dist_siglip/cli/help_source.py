"""Definitions, constants and docstrings, read from source files without importing the modules.

A help page shows signatures, defaults and docstrings. All of them stand in the source; importing
torch and Lightning to ask for them would take seconds. What is read is the source that is
installed, so it cannot be older than the program.
"""

import ast
import operator
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_OPERATORS |= {ast.Pow: operator.pow, ast.LShift: operator.lshift, ast.Div: operator.truediv}
_KINDS = {"str": "TEXT", "int": "INT", "float": "NUMBER", "bool": "{true,false}"}
_LISTS = ("list", "tuple", "Sequence", "Iterable")


class UnreadableError(Exception):
    """A source that says something this reader does not know."""


class Found(NamedTuple):
    """A top-level definition.

    Attributes:
        module: where it stands.
        node: class, function, or the expression that a name is assigned.
    """

    module: str
    node: ast.AST


class Parameter(NamedTuple):
    """A parameter of a function, or a field of a dataclass.

    Attributes:
        name: its name.
        annotation: its type.
        default: None if it is required.
        by_place: whether it may be given by its place.
    """

    name: str
    annotation: ast.expr | None
    default: ast.expr | None
    by_place: bool


class Instance(NamedTuple):
    """A dataclass called with keywords: a default whose fields are options of their own."""

    found: Found
    given: dict[str, Any]


def find(module: str, name: str) -> Found:
    """Find what a name means in a module, through any number of imports.

    Raises:
        UnreadableError: if it is defined in no way that this reader knows.

    Example:
        >>> find("dist_siglip", "siglip_loss").module
        'dist_siglip.losses.sigmoid'
    """
    names = _names(module)
    if name not in names:
        raise UnreadableError(f"{module} defines no {name}")
    node = names[name]
    if isinstance(node, ast.ImportFrom):
        source = next(each.name for each in node.names if name in (each.asname, each.name))
        return find(str(node.module), source)
    return Found(module, node)


def value_of(module: str, node: ast.AST) -> Any:
    """Evaluate a constant expression; a class stays what ``find`` returns.

    Raises:
        UnreadableError: if it is none.

    Example:
        >>> value_of("dist_siglip.errors", ast.parse("-2 ** 4, {'a': [1 << 3]}", mode="eval").body)
        (-16, {'a': [8]})
    """
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=elements):
            return tuple(value_of(module, each) for each in elements)
        case ast.List(elts=elements):
            return [value_of(module, each) for each in elements]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {value_of(module, k): value_of(module, v) for k, v in pairs if k is not None}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value_of(module, operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value_of(module, left), value_of(module, right))
        case ast.Name(id=name):
            found = find(module, name)
            return found if _is_definition(found.node) else value_of(*found)
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return _field_default(find(module, owner), name)
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            given = {str(each.arg): value_of(module, each.value) for each in keywords}
            return Instance(find(module, name), given)
    raise UnreadableError(f"{module}: {ast.unparse(node)} is no constant that can be read")


def parameters_of(found: Found) -> list[Parameter]:
    """List the parameters of a function, of the constructor of a class, or a dataclass' fields."""
    if isinstance(found.node, ast.FunctionDef):
        return list(_parameters(found.node.args))
    if is_dataclass(found):
        return list(_fields(found))
    constructors = methods_of(found, "__init__")
    if not constructors:
        raise UnreadableError(f"{found.module}: no constructor found")
    return parameters_of(constructors[-1])


def methods_of(found: Found, name: str) -> list[Found]:
    """Find a method in a class and in every base that has one of its own, bases first."""
    nodes = ((each.module, node) for each in _with_bases(found) for node in _body(each))
    return [
        Found(module, node)
        for module, node in nodes
        if isinstance(node, ast.FunctionDef) and node.name == name
    ][::-1]


def is_dataclass(found: Found) -> bool:
    """Whether a definition is a class with the decorator ``dataclass``."""
    decorators = getattr(found.node, "decorator_list", [])
    return isinstance(found.node, ast.ClassDef) and any(
        "dataclass" in ast.unparse(each) for each in decorators
    )


def class_of(module: str, annotation: ast.expr | None) -> Found | None:
    """Return the dataclass that an annotation is, if it is one and nothing else."""
    if not isinstance(annotation, ast.Name):
        return None
    try:
        found = find(module, annotation.id)
    except UnreadableError:  # a builtin
        return None
    return found if is_dataclass(found) else None


def kind_of(module: str, annotation: ast.expr | None) -> str:
    """Describe a type in a word, as it stands after an option.

    Example:
        >>> kind_of("builtins", ast.parse("tuple[int, ...] | None", mode="eval").body)
        '[INT,...]'
    """
    kinds = list(dict.fromkeys(_kinds(module, annotation)))
    choices = [each[1:-1] for each in kinds if each.startswith("{")]
    if choices and len(choices) == len(kinds):
        return f"{{{','.join(choices)}}}"
    return "|".join(kinds)


def description_of(found: Found) -> tuple[str, dict[str, str]]:
    """Split a docstring into what stands before its sections, and the texts of its ``Args``.

    Of a class without ``Args`` the docstring of the constructor is taken.
    """
    text = _docstring(found)
    if isinstance(found.node, ast.ClassDef) and "Args:\n" not in text:
        text = next(map(_docstring, methods_of(found, "__init__")[::-1]), text)
    introduction, _, rest = text.partition("Args:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line.strip() and not line.startswith(" "):
            break  # the next section
        if line.startswith("    ") and line[4:5].strip() and ":" in line:
            name, _, first = line.strip().partition(":")
            texts[name := name.split()[0]] = first.strip()
        elif line.strip() and name:
            texts[name] += f" {line.strip()}"
    return introduction.strip(), {name: text.strip() for name, text in texts.items()}


def _docstring(found: Found) -> str:
    if not isinstance(found.node, ast.ClassDef | ast.FunctionDef):
        return ""
    return ast.get_docstring(found.node) or ""


def _body(found: Found) -> list[ast.stmt]:
    return found.node.body if isinstance(found.node, ast.ClassDef) else []


def _kinds(module: str, node: ast.AST | None) -> Iterator[str]:
    match node:
        case ast.Constant(value=None) | None:
            return
        case ast.Constant(value=str(text)):
            yield from _kinds(module, ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, right=right):
            yield from _kinds(module, left)
            yield from _kinds(module, right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            choices = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            yield f"{{{','.join(str(value_of(module, each)) for each in choices)}}}"
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _LISTS:
            first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            yield f"[{kind_of(module, first)},...]"
        case ast.Name(id=name) if name in _KINDS:
            yield _KINDS[name]
        case ast.Name(id=name):
            found = find(module, name)
            if is_dataclass(found):
                yield "SETTINGS"
            else:
                yield from ["CLASS"] if _is_definition(found.node) else _kinds(*found)
        case _:
            yield "VALUE"


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    placed = [each for each in (*arguments.posonlyargs, *arguments.args) if each.arg != "self"]
    defaults = [None] * (len(placed) - len(arguments.defaults)) + arguments.defaults
    for each, default in zip(placed, defaults, strict=True):
        yield Parameter(each.arg, each.annotation, default, True)
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter(each.arg, each.annotation, default, False)


def _fields(found: Found) -> Iterator[Parameter]:
    by_place = True
    for node in _body(found):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation) == "KW_ONLY":
                by_place = False
            elif not ast.unparse(node.annotation).startswith("ClassVar"):
                yield Parameter(node.target.id, node.annotation, node.value, by_place)


def _field_default(found: Found, name: str) -> Any:
    """Value of ``Dataclass.field``: its default."""
    for field in _fields(found):
        if field.name == name and field.default is not None:
            return value_of(found.module, field.default)
    raise UnreadableError(f"{found.module}: no default of {name} found")


def _with_bases(found: Found) -> Iterator[Found]:
    """A class, then its bases as far as they can be read."""
    yield found
    for base in getattr(found.node, "bases", []):
        if isinstance(base, ast.Name):
            try:
                yield from _with_bases(find(found.module, base.id))
            except UnreadableError:
                continue


def _is_definition(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef | ast.FunctionDef)


@cache
def _names(module: str) -> dict[str, ast.AST]:
    """What every top-level name of a module is: a definition, an import, or what it is assigned."""
    names: dict[str, ast.AST] = {}
    statements = list(_tree(module).body)
    for node in statements:
        if isinstance(node, ast.If):  # imports for type checkers
            statements += node.body
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: node for each in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            names[node.target.id] = node.value
    return names


@cache
def _tree(module: str) -> ast.Module:
    """Parse the file of a module.

    Raises:
        UnreadableError: if there is no such file.
    """
    first, *rest = module.split(".")
    spec = find_spec(first)  # of a top-level name: imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise UnreadableError(f"{first} is not installed as files")
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    path = path / "__init__.py" if path.is_dir() else path.with_name(path.name + ".py")
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableError(f"{module} cannot be read: {error}") from error
