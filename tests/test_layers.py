"""The floors of the house: every import points down, and outside libraries stay where the table puts them.

A new folder, or a new file beside the folders, gets its floor in FLOORS. The outside libraries that it imports, at any
depth, get their line in OUTSIDE.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dspy_opro"

# Folder, or file beside the folders -> its floor. It imports what is on the floors below and nothing else of ours.
FLOORS = {
    "search": 0,
    "programs": 1,
    "proposers": 2,
    "storage": 2,
    "config": 3,
    "runner": 3,
    "reporting": 3,
    "compile": 4,
    "dry_run": 4,
    "teleprompter": 5,
    "__init__": 6,
    "__main__": 6,
    "integrations": 6,
}
MOST_FLOORS = 7

# Folders beside the house -> what they import of ours. Nothing in the house imports them.
BESIDE: dict[str, set[str]] = {"local": set(), "testing": set()}

# (file, what it imports): inside a function and when it is needed, so that a result can show itself.
ON_DEMAND = {("reporting.report", "__init__")}

# Folder or file -> the libraries outside the standard library that it may import. What is not listed imports none.
# A file in a folder that has a line of its own has that line alone.
OUTSIDE = {
    "programs": {"dspy"},
    "proposers": {"dspy"},
    "storage": {"optuna"},
    "storage.fingerprint": {"dspy", "pydantic"},
    "storage.source_code": set(),
    "storage.run_storage": {"optuna", "tenacity"},
    "config.arguments": {"dspy", "pydantic"},
    "config.assembly": {"dspy"},
    "config.preflight": {"dspy"},
    "config.serialization": {"dspy"},
    "runner.remote": {"cloudpickle", "dspy"},
    "reporting.attach": {"dspy"},
    "reporting.autologging": {"mlflow"},
    "reporting.command_line": {"click", "sqlalchemy"},
    "reporting.evaluations": {"dspy"},
    "reporting.progress": {"tqdm"},
    "reporting.recorded": {"optuna"},
    "reporting.report": {"jinja2"},
    "reporting.plots": {"plotly"},
    "reporting.result": {"optuna", "pandas", "plotly", "pydantic"},
    "teleprompter": {"dspy"},
    "integrations.mlflow": {"dspy", "mlflow"},
    "local.engine": {"dspy"},
    # DSPy before 3.4 hands its LMs litellm's requests and expects litellm's responses.
    "local.forward": {"dspy", "litellm"},
    "local.schema": {"pydantic_core", "xllamacpp"},
    "local.server": {"xllamacpp"},
    "local.lm": {"dspy"},
    "local.weights": {"huggingface_hub"},
    "testing": {"dspy"},
}

MOST_LINES = 14_790
MOST_RUNNER_LINES = 650


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
    """The other folders and files of this package that the file imports."""
    return ours(read(path)) - {unit(module_name(path))}


def ours(modules: set[str]) -> set[str]:
    """Folders and files of this package; a name of `__init__` counts as that."""
    named = {unit(name.partition(".")[2]) for name in modules if unit(name) == "dspy_opro"}
    return {name if name in FLOORS or name in BESIDE else "__init__" for name in named}


def outer(path: Path) -> set[str]:
    return (
        {unit(name) for name in read(path)}
        - set(sys.stdlib_module_names)
        - {"dspy_opro", "typing_extensions"}
    )


def num_lines(folder: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))


FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=module_name)


@every_file
def test_every_file_has_a_floor(path: Path) -> None:
    assert unit(module_name(path)) in FLOORS or unit(module_name(path)) in BESIDE


@every_file
def test_imports_point_down(path: Path) -> None:
    """To a lower floor, never to the same one. What is on floor 0 so imports nothing of ours."""
    name = module_name(path)
    imported = {other for other in inner(path) if (name, other) not in ON_DEMAND}
    if unit(name) in BESIDE:
        assert imported <= BESIDE[unit(name)]
    else:
        own = FLOORS[unit(name)]
        assert {other for other in imported if FLOORS.get(other, MOST_FLOORS) >= own} == set()


@every_file
def test_outside_libraries_are_those_of_the_table(path: Path) -> None:
    name = module_name(path)
    assert outer(path) <= OUTSIDE.get(name, OUTSIDE.get(unit(name), set()))


def test_what_is_not_imported_any_more_is_not_allowed_any_more() -> None:
    for name, libraries in OUTSIDE.items():
        files = [path for path in FILES if name in (module_name(path), unit(module_name(path)))]
        files = [path for path in files if module_name(path) == name or module_name(path) not in OUTSIDE]
        assert set().union(*map(outer, files)) == libraries, name
    assert {(module_name(path), other) for path in FILES for other in inner(path)} >= ON_DEMAND


@pytest.mark.parametrize(("name", "other"), sorted(ON_DEMAND))
def test_what_is_imported_on_demand_is_imported_in_a_function(name: str, other: str) -> None:
    (path,) = [path for path in FILES if module_name(path) == name]
    body = ast.parse(path.read_text(encoding="utf-8")).body
    at_once = [ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    package = ("dspy_opro", *path.relative_to(PACKAGE).parts[:-1])
    assert other not in ours(set(imports("\n".join(at_once), package)))


def test_the_search_knows_nobody() -> None:
    for path in (PACKAGE / "search").glob("*.py"):
        assert inner(path) == outer(path) == set()


def test_the_house_has_seven_floors_at_most() -> None:
    assert set(FLOORS.values()) == set(range(max(FLOORS.values()) + 1))
    assert len(set(FLOORS.values())) <= MOST_FLOORS


def test_the_package_stays_small() -> None:
    """Without the embedded language model and the fakes."""
    assert num_lines(PACKAGE) - sum(num_lines(PACKAGE / name) for name in BESIDE) <= MOST_LINES


def test_the_runner_stays_small() -> None:
    assert num_lines(PACKAGE / "runner") <= MOST_RUNNER_LINES


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import optuna.trial", ("dspy_opro",), {"optuna.trial"}),
        ("def f():\n    from dspy import LM", ("dspy_opro",), {"dspy"}),
        ("from .search.pruners import Race", ("dspy_opro",), {"dspy_opro.search.pruners"}),
        ("from . import search", ("dspy_opro",), {"dspy_opro.search"}),
        ("from dspy_opro import storage", ("dspy_opro",), {"dspy_opro.storage"}),
        ("from dspy_opro import OPRO", ("dspy_opro", "reporting"), {"dspy_opro.OPRO"}),
        ("from ..storage import opened", ("dspy_opro", "local"), {"dspy_opro.storage"}),
        ("from .. import storage", ("dspy_opro", "local"), {"dspy_opro.storage"}),
        ("from .llama import Completion", ("dspy_opro", "local"), {"dspy_opro.local.llama"}),
    ],
)
def test_imports_are_read_in_every_form(source: str, package: tuple[str, ...], expected: set[str]) -> None:
    assert set(imports(source, package)) == expected
