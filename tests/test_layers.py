"""The layers of the package: every import points down or sideways, and outside libraries stay at the edges.

A new module gets its line in LAYER; the outside libraries it imports, at any depth, get theirs in OUTSIDE.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dspy_opro"
CORE, EDGE, ADAPTER, PUBLIC = range(4)

# Module or subpackage of dspy_opro -> its layer. It may import its own layer and those below.
LAYER = {
    "rundir": EDGE,
    "sharing": CORE,
    "recording": CORE,
    "calls": CORE,
    "cleaning": CORE,
    "company": CORE,
    "config": CORE,
    "evaluation": CORE,
    "exemplars": CORE,
    "keywords": CORE,
    "migration": CORE,
    "protocols": CORE,
    "racing": CORE,
    "reflective": CORE,
    "search": CORE,
    "stopping": CORE,
    "telling": CORE,
    "threads": CORE,
    "trajectory": CORE,
    "waking": CORE,
    "values": EDGE,
    "work": CORE,
    "_compat": EDGE,
    "attach": EDGE,
    "copying": EDGE,
    "demos": EDGE,
    "events": EDGE,
    "completion": EDGE,
    "executor": EDGE,
    "failures": EDGE,
    "fingerprint": EDGE,
    "interrupts": EDGE,
    "local": EDGE,
    "metering": EDGE,
    "metric": EDGE,
    "options": EDGE,
    "planning": EDGE,
    "preflight": EDGE,
    "program": EDGE,
    "progress": EDGE,
    "proposer": EDGE,
    "proposing": EDGE,
    "report": EDGE,
    "requests": EDGE,
    "result": EDGE,
    "scoring": EDGE,
    "serialization": EDGE,
    "study": EDGE,
    "testing": EDGE,
    "parts": ADAPTER,
    "setup": ADAPTER,
    "teleprompter": ADAPTER,
    "__init__": PUBLIC,
}

# Module, or subpackage for all its modules -> the libraries outside the standard library that it may import.
# What is not listed imports none.
OUTSIDE = {
    "sharing": {"anyio"},
    "_compat": {"dspy"},
    "attach": {"dspy"},
    "company": {"anyio"},
    "config": {"pydantic"},
    "evaluation": {"anyio"},
    "copying": {"dspy"},
    "demos": {"dspy"},
    "events": {"dspy"},
    "completion": {"dspy"},
    "executor": {"dspy"},
    "fingerprint": {"dspy"},
    "local.engine": {"dspy"},
    # DSPy before 3.4 hands its LMs litellm's requests and expects litellm's responses.
    "local.forward": {"dspy", "litellm"},
    "local.schema": {"pydantic_core", "xllamacpp"},
    "local.server": {"xllamacpp"},
    "local.lm": {"dspy"},
    "local.weights": {"huggingface_hub"},
    "metering": {"dspy"},
    "options": {"dspy"},
    "parts": {"dspy"},
    "preflight": {"dspy"},
    "program": {"dspy"},
    "progress": {"tqdm"},
    "proposer": {"dspy"},
    "proposing": {"dspy"},
    "result": {"pandas"},
    "scoring": {"anyio", "dspy"},
    "serialization": {"dspy"},
    "setup": {"dspy"},
    "study": {"optuna"},
    "teleprompter": {"anyio", "dspy"},
    "testing": {"dspy"},
    "values": {"dspy"},
    "waking": {"anyio"},
}

# (from, to): imported inside a method and on demand, so that a result can show itself. Not a circle then.
ON_DEMAND = {("result", "report")}

# The core is what stays when the host, the tracker or the progress line are exchanged.
NEVER_IN_CORE = {"dspy", "litellm", "optuna", "tqdm", "matplotlib", "plotly", "xllamacpp"}


def module_name(path: Path) -> str:
    """`local/lm.py` is `local.lm`, `local/__init__.py` is `local`, `__init__.py` stays."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def unit(module: str) -> str:
    return module.partition(".")[0]


def imports(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Every module that the source, which lives in `package`, imports anywhere, by its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = ".".join([*base, *([node.module] if node.module else [])])
            # What `from package import name` imports may be a module or not; a unit's name tells.
            if full == "dspy_opro":
                yield from (f"{full}.{alias.name}" for alias in node.names)
            else:
                yield full


def read(path: Path) -> set[str]:
    package = ("dspy_opro", *path.relative_to(PACKAGE).parts[:-1])
    return set(imports(path.read_text(encoding="utf-8"), package))


def inner(path: Path) -> set[str]:
    """The units of this package that the file imports; a name of `__init__` counts as that."""
    own = unit(module_name(path))
    named = {unit(name.partition(".")[2]) for name in read(path) if unit(name) == "dspy_opro"}
    units = {name if name in LAYER else "__init__" for name in named} - {own}
    return {name for name in units if (own, name) not in ON_DEMAND}


def outer(path: Path) -> set[str]:
    return (
        {unit(name) for name in read(path)}
        - set(sys.stdlib_module_names)
        - {"dspy_opro", "typing_extensions"}
    )


FILES = sorted(PACKAGE.rglob("*.py"))
CORE_FILES = [path for path in FILES if LAYER.get(unit(module_name(path))) == CORE]
every_file = pytest.mark.parametrize("path", FILES, ids=module_name)


@every_file
def test_every_module_has_a_layer(path: Path) -> None:
    assert unit(module_name(path)) in LAYER


@every_file
def test_imports_point_down_or_sideways(path: Path) -> None:
    own = LAYER[unit(module_name(path))]
    assert {name for name in inner(path) if LAYER[name] > own} == set()


@every_file
def test_outside_libraries_are_those_of_the_table(path: Path) -> None:
    name = module_name(path)
    assert outer(path) <= OUTSIDE.get(name, OUTSIDE.get(unit(name), set()))


@pytest.mark.parametrize("path", CORE_FILES, ids=module_name)
def test_the_core_knows_neither_host_nor_tracker(path: Path) -> None:
    assert outer(path) & NEVER_IN_CORE == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(unit(module_name(path)), set()).update(inner(path))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"A circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import optuna.trial", ("dspy_opro",), {"optuna.trial"}),
        ("def f():\n    from dspy import LM", ("dspy_opro",), {"dspy"}),
        ("from .racing import Race", ("dspy_opro",), {"dspy_opro.search.pruners"}),
        ("from . import racing", ("dspy_opro",), {"dspy_opro.search.pruners"}),
        ("from dspy_opro import study", ("dspy_opro",), {"dspy_opro.study"}),
        ("from ..study import open_study", ("dspy_opro", "local"), {"dspy_opro.study"}),
        ("from .. import study", ("dspy_opro", "local"), {"dspy_opro.study"}),
        ("from .llama import Completion", ("dspy_opro", "local"), {"dspy_opro.local.llama"}),
    ],
)
def test_imports_are_read_in_every_form(source: str, package: tuple[str, ...], expected: set[str]) -> None:
    assert set(imports(source, package)) == expected
