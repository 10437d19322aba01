"""README, docs and docstrings: every Python block runs, every link leads somewhere.

The blocks of a page run in their order in one namespace, as they stand. `dspy.LM("openai/...")` reaches a simulated
server through the variables that the OpenAI client reads. `qa` is the block of docs/start.md that says so. A block that
needs a cluster or a server of the reader's has a comment `<!-- not run: reason -->` above it. Of such a block the tests
check syntax, imports and the names of our arguments. With `<!-- needs: mlflow -->` above it a block runs where mlflow
is installed.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import dspy
import pytest

from dspy_opro import OPROTeleprompter, testing
from dspy_opro.config.keywords import FIELDS
from dspy_opro.testing import LMCall, SimulatedServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?:not run: (?P<reason>[^\n]+)|needs: (?P<needs>\w+)) -->\n)?```python\n(?P<code>.*?)^```",
    re.M | re.S,
)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?!https?:)([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)


@dataclass(frozen=True)
class Block:
    code: str
    line: int
    reason: str | None
    """Why it does not run."""
    needs: str | None
    """A package that not everybody has."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["code"], text[: match.start("code")].count("\n"), match["reason"], match["needs"])
        for match in BLOCK.finditer(text)
    ]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def answer(call: LMCall) -> dict[str, Any]:
    """Products, plans and verdicts; right once the instruction says how. As an optimizer LM it says how."""
    numbers = [
        int(number)
        for number in re.findall(r"What is (\d+) times (\d+)", call.user)[-1:]
        for number in number
    ]
    knows = "digit by digit" in call.instructions
    product = str(numbers[0] * numbers[1]) if numbers and (knows or sum(numbers) % 3 == 0) else "many"
    bad = re.search(r"late|broken|cold|rude|slow|dirty", call.user) is not None
    values = {
        "answer": product,
        "instruction": f"Multiply digit by digit. Hint {call.sample} {len(call.prompt)}.",
        "shorter_instruction": f"Multiply digit by digit. Hint {call.sample} {len(call.prompt)}.",
        "sentiment": "bad" if bad and knows else "good",
    }
    return {name: values.get(name, "as usual") for name in call.output_fields}


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedServer]:
    with SimulatedServer(answer, own_process=False) as server:
        yield server


@pytest.fixture
def reader(server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of somebody who reads the pages: `qa.py` is there, and a key."""
    (qa,) = [block.code for block in blocks(ROOT / "docs" / "start.md") if block.code.startswith("# qa.py")]
    (tmp_path / "qa.py").write_text(qa)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, server.api_base)
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    yield tmp_path
    sys.modules.pop("qa", None)
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].dspy.autolog(disable=True)


def is_script(page: Path) -> bool:
    return any("__main__" in block.code for block in blocks(page))


RUNNABLE = [page for page in PAGES if any(block.reason is None for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in RUNNABLE if not is_script(p)], ids=page_id)
def test_the_blocks_of_a_page_run_as_they_stand(page: Path, reader: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.needs is not None:
            pytest.importorskip(
                block.needs, reason=f"the blocks from line {block.line} on need {block.needs}"
            )
        if block.reason is None:
            # With the page's own lines, so that an error names them.
            exec(compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True), namespace)


SCRIPTS = [
    pytest.param(block.code, id=f"{page_id(page)}:{block.line}")
    for page in RUNNABLE
    if is_script(page)
    for block in blocks(page)
    if block.reason is None and not block.code.startswith("# qa.py")
]


@pytest.mark.slow
@pytest.mark.timeout(400)  # eight new processes import DSPy, on whatever cores there are
@pytest.mark.parametrize("code", SCRIPTS)
def test_the_scripts_of_a_page_run_in_a_process_of_their_own(code: str, reader: Path) -> None:
    (reader / "script.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, timeout=390, check=False, cwd=reader
    )
    assert run.returncode == 0, run.stderr


def not_run() -> list[Any]:
    return [
        pytest.param(block, id=f"{page_id(page)}:{block.line}")
        for page in PAGES
        for block in blocks(page)
        if block.reason is not None or block.needs is not None
    ]


@pytest.mark.parametrize("block", not_run())
def test_blocks_that_do_not_run_import_what_exists_and_pass_known_arguments(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dspy_opro":
            assert {alias.name for alias in node.names} <= defined(node.module)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == OPROTeleprompter.__name__:
            assert {keyword.arg for keyword in node.keywords} <= set(FIELDS)


def defined(module: str) -> set[str]:
    """The names that a module of ours binds, read from its source, because it may need what is not installed."""
    path = ROOT / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


EXAMPLE = re.compile(r"^ *```python\n(.*?)^ *```", re.M | re.S)


def docstrings_with(pattern: str) -> list[Any]:
    """The docstrings of the package that contain the pattern, and the modules that they are in."""
    found = []
    for path in sorted((ROOT / "dspy_opro").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                text, module = (
                    ast.get_docstring(node) or "",
                    ".".join(path.relative_to(ROOT).with_suffix("").parts),
                )
                if re.search(pattern, text):
                    found.append(pytest.param(module, text, id=f"{module}.{node.name}"))
    return found


@pytest.mark.slow  # one of them starts a process
@pytest.mark.parametrize(("module", "text"), docstrings_with("```python"))
def test_the_blocks_of_a_docstring_run(module: str, text: str, reader: Path) -> None:
    names = {"dspy": dspy, "OPROTeleprompter": OPROTeleprompter, **vars(testing)}
    codes = EXAMPLE.findall(text)
    assert codes
    for code in codes:
        exec(compile(dedent(code), module, "exec", dont_inherit=True), dict(names))


@pytest.mark.parametrize(("module", "text"), docstrings_with(">>> "))
def test_the_sessions_of_a_docstring_run(module: str, text: str) -> None:
    session = doctest.DocTestParser().get_doctest(inspect.cleandoc(text), {}, module, None, None)
    assert doctest.DocTestRunner().run(session).failed == 0


def slug(heading: str) -> str:
    """A heading's anchor, as mkdocs and GitHub make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text)).strip("-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=page_id)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = HEADING.findall(target.read_text(encoding="utf-8"))
            assert anchor in {slug(heading) for heading in headings}, link


def test_the_code_names_pages_that_exist() -> None:
    sources = [path for name in ("dspy_opro", "examples") for path in (ROOT / name).rglob("*.py")]
    named = {
        page
        for path in sources
        for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert [page for page in sorted(named) if not (ROOT / page).exists()] == []


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    """mkdocs says so too, where the extra `docs` is installed."""
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert listed == {page for page in pages if not page.startswith("decisions/0")}
