"""The user's own code behind a program and a metric, so that a resumed run notices a change in it."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import re
import symtable
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any


def sources(roots: Iterable[Any]) -> tuple[dict[str, str], list[str], dict[str, Any]]:
    """The source of the user's functions and classes that the roots call, as far as names lead to them.

    Followed are global names, attributes of the user's modules, closures, base classes, decorators, the arguments of
    partials and the classes of methods. Not followed are imports inside of a function and what is looked up by a text.
    A constant of a module counts if its value stands in the source: others, as keys and times, may differ in every
    process.

    Args:
        roots: Functions, classes, or instances, which stand for their class.

    Returns:
        Name -> source without comments, docstrings and formatting, where the docstring of a `dspy.Signature` counts as
        its instructions; the names whose source is not available; and name -> function, class or object that the code
        names.
    """
    found: dict[str, set[str]] = {}
    objects: dict[str, Any] = {}
    literals = functools.cache(_literals)
    unknown: set[str] = set()
    waiting, seen = list(roots), set[Any]()
    while waiting:
        value = waiting.pop()
        waiting += _parts(value)
        target = _definition(value)
        if target is None or target in seen or not _is_users(module := _module(target)):
            continue
        seen.add(target)
        name = f"{module}.{target.__qualname__}"
        tree = parsed(target)
        if tree is None:
            unknown.add(name)
            continue
        found.setdefault(name, set()).add(_as_text(tree))
        if isinstance(target, type):
            waiting += target.__bases__
        unknown |= {f"{name}'s import of {module}" for module in _imports(tree)}
        for place, value in _named(tree, target):
            module, _, own = place.rpartition(".")
            if not isinstance(value, _PLAIN):
                objects[place] = value
                waiting.append(value)
            elif own in vars(sys.modules.get(module, object)):  # no closure's, which the metric holds
                if (constants := literals(module)) is None:
                    unknown.add(place)
                elif own in constants:
                    found[place] = {constants[own]}
    return {name: "\n".join(sorted(texts)) for name, texts in found.items()}, sorted(unknown), objects


_PLAIN = (str, int, float, tuple, list, dict, set, frozenset)


def _literals(module: str) -> dict[str, str] | None:
    """Name -> value as text, of the constants that the source of a module assigns once, with a literal.

    None if the module has no source, as a notebook.
    """
    try:
        tree = _syntax_tree(sys.modules[module])
    except (KeyError, OSError, TypeError, SyntaxError):
        return None
    stores = (n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    times, found = Counter(stores), dict[str, str]()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and _is_literal(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: _as_text(node.value) for t in targets if isinstance(t, ast.Name)}
    return {name: text for name, text in found.items() if times[name] == 1}


def _is_literal(node: ast.expr) -> bool:
    try:
        return isinstance(ast.literal_eval(node), _PLAIN)
    except ValueError:
        return False


def _as_text(tree: Any) -> str:
    """A syntax tree as text that is the same in Python 3.10 to 3.13. That of `ast.unparse` and `ast.dump` is not."""
    if isinstance(tree, list):
        return f"[{', '.join(map(_as_text, tree))}]"
    if not isinstance(tree, ast.AST):
        return repr(tree)
    parts = (f"{name}={_as_text(part)}" for name, part in ast.iter_fields(tree) if part not in (None, []))
    return f"{type(tree).__name__}({', '.join(parts)})"


def parsed(target: Any) -> ast.Module | None:
    """The syntax tree of a function or a class; None if its source is not available. What it wraps is not part of it.

    It has no docstrings, except for those of a `dspy.Signature`, which are instructions.
    """
    code = getattr(target, "__code__", None)
    # For any such code Python 3.13 gives the text of `python -c`.
    if code is not None and code.co_filename == "<string>":
        return None
    try:
        tree = _syntax_tree(target)
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or a lambda in the middle of a line
        return None
    if code is not None and code.co_name == "<lambda>":  # what stands around it may be anything
        return ast.Module([ast.Expr(node) for node in ast.walk(tree) if isinstance(node, ast.Lambda)], [])
    if any(base.__qualname__ == "Signature" for base in getattr(target, "__mro__", ())):
        return tree
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _syntax_tree(target: Any) -> ast.Module:
    """The syntax tree of a module, a class or a function.

    If threads parse at the same time, Python 3.11 may raise a SystemError ("AST constructor recursion depth mismatch",
    github.com/python/cpython/issues/106905). `inspect.getsource` parses, too. Another try is as good as the first.
    """
    code = getattr(target, "__code__", target)  # of a function, `getsource` would take what it wraps
    for _ in range(9):
        with contextlib.suppress(SystemError):
            return ast.parse(textwrap.dedent(inspect.getsource(code)))
    return ast.parse(textwrap.dedent(inspect.getsource(code)))


def _parts(value: Any) -> list[Any]:
    """What is called through a value: a partial's function and arguments, a method's object, what a decorator wraps."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    wrapped = getattr(value, "__dict__", {}).get("__wrapped__")
    owner = value.__self__ if inspect.ismethod(value) else None
    return [part for part in (wrapped, owner) if part is not None]


def _definition(value: Any) -> Any:
    """The function or class behind a value; None if it has none."""
    value = value.__func__ if inspect.ismethod(value) else value
    if isinstance(value, (FunctionType, type)):
        return value
    return None if isinstance(value, ModuleType) else type(value)


def _module(target: Any) -> str:
    """The module in which a function or a class is written. A decorator may give a function another `__module__`."""
    return str(getattr(target, "__globals__", {}).get("__name__", target.__module__) or "builtins")


def _is_users(module: str | None) -> bool:
    """Whether a module is the user's: not of the standard library, DSPy, this package or an installed package."""
    top = (module or "builtins").partition(".")[0]
    if top in sys.stdlib_module_names or top in ("dspy", "dspy_opro"):
        return False
    with contextlib.suppress(ImportError, ValueError):  # `__main__` and modules made at run time have no spec
        spec = None if top in sys.modules else importlib.util.find_spec(top)
        file = getattr(sys.modules.get(top), "__file__", None) or getattr(spec, "origin", None) or ""
        return not {"site-packages", "dist-packages"} & set(Path(file).parts)
    return True


def _imports(tree: ast.Module) -> Iterator[str]:
    """The user's modules that a function or a class imports when it runs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or _is_users(node.module)):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_users(alias.name))


def _named(tree: ast.Module, target: Any) -> Iterator[tuple[str, Any]]:
    """The functions, classes and values that the source names, also as attributes of modules, with their places."""
    outside = _not_local(tree)
    scope = {name: value for name, value in _scope(target).items() if name in outside}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            place, value = f"{_module(target)}.{node.id}", scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = scope.get(node.value.id)
            is_followed = isinstance(module, ModuleType) and _is_users(module.__name__)
            place = f"{getattr(module, '__name__', '')}.{node.attr}"
            value = getattr(module, node.attr, None) if is_followed else None
        else:
            continue
        if value is not None and not isinstance(value, ModuleType):
            yield place, value


def _not_local(tree: ast.Module) -> set[str]:
    """The names that the code takes from outside."""
    # What is around a function is not in its tree.
    text = re.sub(r"\bnonlocal\b", "global", ast.unparse(tree))
    tables, names = [symtable.symtable(text, "", "exec")], set[str]()
    for table in tables:
        tables += table.get_children()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names


def _scope(target: Any) -> dict[str, Any]:
    """Name -> value, as the code of a function or of a class's methods sees it."""
    if isinstance(target, type):
        scope = dict(vars(sys.modules.get(target.__module__, object)))
        methods = (getattr(value, "__func__", value) for value in vars(target).values())
        functions = [inspect.unwrap(method) for method in methods if isinstance(method, FunctionType)]
    else:
        scope, functions = dict(target.__globals__), [target]
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not assigned yet
                scope[name] = cell.cell_contents
    return scope
