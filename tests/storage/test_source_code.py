"""A run notices a change in the user's own code, and says what changed; comments and formatting change nothing."""

from __future__ import annotations

import ast
import functools
import importlib
import linecache
import sys
import types
import xmlrpc.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro.storage.fingerprint import differences, fingerprint
from dspy_opro.storage.run_storage import open_run
from dspy_opro.storage.source_code import _as_text, parsed

FILES = {
    "users_code/__init__.py": "",
    "users_code/text.py": "def folded(text):\n    return text.lower()\n",
    "users_code/rules.py": """
        from functools import partial, wraps
        from . import text
        def halved(function):
            @wraps(function)
            def inner(*values):
                return function(*values) / 2
            return inner
        def equal(a, b, strict, trim):
            return text.folded(trim(a)) == text.folded(trim(b))
        def trimmed(text):
            return text.strip()
        loosely = halved(partial(equal, strict=False, trim=trimmed))
        class Length:
            def limit(self):
                return 10
            def fits(self, prediction):
                return len(prediction.answer) < self.limit()
        fits = Length().fits
        """,
    "users_code/metric.py": '''
        import os
        import dspy
        from users_code.rules import fits, loosely
        class Judge:
            def good(self, prediction):
                return True
        JUDGE = Judge()
        class Right(dspy.Signature):
            """Is the answer right? Be lenient."""
            answer = dspy.InputField()
            ok: bool = dspy.OutputField()
        ASK = dspy.Predict(Right)
        JUDGE_LM = dspy.LM("openai/judge", temperature=0.0)
        THRESHOLD: float = 0.5
        WORDS = {"yes": 1}
        KEY = os.environ.get("USERS_KEY", "none")
        calls = 0
        def metric(example, prediction, trace=None):
            global calls
            calls += 1
            with dspy.context(lm=JUDGE_LM, key=KEY):
                good = len(prediction.answer) > THRESHOLD or WORDS or ASK(answer=prediction.answer)
            return fits(prediction) and loosely(example.answer, prediction.answer) and JUDGE.good(prediction)
        ''',
    "users_code/program.py": """
        import dspy
        from users_code import text
        question = 2
        def search(query: str) -> str:
            return "nothing"
        class Base(dspy.Module):
            def prepare(self, question):
                return question.strip()
        class Inner(dspy.Module):
            def __init__(self):
                super().__init__()
                self.answer = dspy.Predict("question -> answer")
            def forward(self, question):
                return self.answer(question=question)
        class Program(Base):
            def __init__(self):
                super().__init__()
                self.inner = Inner()
                self.tools = {"search": dspy.Tool(search)}
                self.num_passages, self.num_calls, self.name = 3, 0, "a"
            def forward(self, question):
                self.num_calls += 1
                return self.inner(question=text.folded(self.prepare(question)))
        """,
}


def write(directory: Path, name: str, code: str) -> None:
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text("".join(f"{line[indent:]}\n" for line in lines))


@pytest.fixture
def taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """Imports the user's package anew and takes the fingerprint."""
    for name, code in FILES.items():
        write(tmp_path, name, code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def take() -> Any:
        forget()
        importlib.invalidate_caches()
        program = importlib.import_module("users_code.program").Program()
        return fingerprint(program, [], [], importlib.import_module("users_code.metric").metric)

    yield take
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "users_code"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("program", "question=text.", 'question="Please: " + text.', ["program.Program"]),
        ("program", "question.strip()", "question.lstrip()", ["program.Base"]),
        (
            "program",
            "self.answer(question=question)",
            "self.answer(question=question * 2)",
            ["program.Inner"],
        ),
        ("program", '"nothing"', '"something"', ["program.search"]),
        ("text", "text.lower()", "text.upper()", ["text.folded"]),
        ("rules", "== text", "!= text", ["rules.equal"]),
        ("metric", "return True", "return False", ["metric.Judge"]),
        ("metric", " and JUDGE", " or JUDGE", ["metric.metric"]),
        ("rules", "/ 2", "/ 3", ["rules.halved.<locals>.inner"]),
        ("rules", "text.strip()", "text.lstrip()", ["rules.trimmed"]),
        ("rules", "return 10", "return 20", ["rules.Length"]),
        ("metric", "            return fits", "            # compared\n            return  fits", []),
        (
            "metric",
            "            global calls",
            '            """Compares."""\n            global calls',
            [],
        ),
    ],
)
def test_a_change_of_code_is_named(
    taken: Callable[[], Any], tmp_path: Path, file: str, old: str, new: str, changed: list[str]
) -> None:
    before = taken()
    name = f"users_code/{file}.py"
    assert FILES[name].count(old) == 1
    write(tmp_path, name, FILES[name].replace(old, new))
    after = taken()
    assert list(differences(before, after)) == [
        f"the code of users_code.{each} has changed" for each in changed
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("metric", "Be lenient", "Be strict", ["users_code.metric.ASK has changed"]),
        ("metric", "temperature=0.0", "temperature=0.9", ["users_code.metric.JUDGE_LM has changed"]),
        ("metric", "float = 0.5", "float = 0.7", ["the code of users_code.metric.THRESHOLD has changed"]),
        ("metric", '"yes": 1', '"no": 1', ["the code of users_code.metric.WORDS has changed"]),
        ("metric", '"none"', '"another"', []),
        ("metric", "calls = 0", "calls = 7", []),
        ("program", "question = 2", "question = 1", []),
        ("program", "= 3, 0,", "= 10, 0,", ["self.num_passages of the student has changed from 3 to 10"]),
        ("program", '3, 0, "a"', '3, 5, "b"', []),
        ("program", '"question -> answer")', '"question -> answer", temperature=0.9)', None),
    ],
)
def test_a_change_of_values_is_named(
    taken: Callable[[], Any], tmp_path: Path, file: str, old: str, new: str, said: list[str] | None
) -> None:
    before = taken()
    name = f"users_code/{file}.py"
    assert FILES[name].count(old) == 1
    write(tmp_path, name, FILES[name].replace(old, new))
    told = [text for text in differences(before, taken()) if "program.Program" not in text]
    if said is None:
        assert any(text.startswith("settings of predictor") for text in told)
    else:
        assert told == said


def test_the_statement_around_a_lambda_is_not_its_code() -> None:
    settings = []
    settings.append({"metric": lambda example, prediction: example == prediction, "num_rounds": 3})
    settings.append({"metric": lambda example, prediction: example == prediction, "num_rounds": 5})
    settings.append({"metric": lambda example, prediction: example != prediction, "num_rounds": 5})
    one, other, changed = (fingerprint(dspy.Predict("q -> a"), [], [], each["metric"]) for each in settings)
    assert list(differences(one, other)) == []
    assert "the code of" in next(differences(other, changed))


def test_code_is_the_same_text_in_every_python() -> None:
    code = "first, *rest = text[0, 1], {}, f\"{a['b']} 'c'\""
    assert _as_text(ast.parse(code).body[0]) == (
        "Assign(targets=[Tuple(elts=[Name(id='first', ctx=Store()), "
        "Starred(value=Name(id='rest', ctx=Store()), ctx=Store())], ctx=Store())], "
        "value=Tuple(elts=[Subscript(value=Name(id='text', ctx=Load()), "
        "slice=Tuple(elts=[Constant(value=0), Constant(value=1)], ctx=Load()), ctx=Load()), Dict(), "
        "JoinedStr(values=[FormattedValue(value=Subscript(value=Name(id='a', ctx=Load()), "
        "slice=Constant(value='b'), ctx=Load()), conversion=-1), Constant(value=\" 'c'\")])], ctx=Load()))"
    )


def test_an_object_that_has_every_attribute_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules[__name__], "SERVER", xmlrpc.client.ServerProxy("http://127.0.0.1:1"), raising=False
    )

    def metric(example: Any, prediction: Any) -> Any:
        return SERVER.score(prediction)  # type: ignore[name-defined]  # noqa: F821

    assert f"{__name__}.{metric.__qualname__}" in fingerprint(dspy.Predict("q -> a"), [], [], metric)["code"]


class Searcher:
    def __call__(self, query: str) -> str:
        return query


class Holder(dspy.Module):
    def __init__(self, *tools: Any) -> None:
        super().__init__()
        self.tools = [dspy.Tool(tool, name="search") for tool in tools]


def search(searcher: Searcher, query: str) -> str:
    return searcher(query)


@pytest.mark.parametrize("tool", [Searcher(), Searcher().__call__, functools.partial(search, Searcher())])
def test_the_code_of_a_tool_that_is_an_object_counts(tool: Any) -> None:
    assert f"{__name__}.Searcher" in fingerprint(Holder(tool), [], [], print)["code"]
    judge = types.SimpleNamespace(search=tool)
    assert f"{__name__}.Searcher" in fingerprint(dspy.Predict("q -> a"), [], [], judge)["code"]


def test_only_the_users_own_code_counts(taken: Callable[[], Any]) -> None:
    parts = taken()
    assert {name.partition(".")[0] for name in parts["code"]} == {"users_code"}
    assert parts["unknown code"] == []


def test_a_resume_says_what_it_could_not_check(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from replay import record, scoring

    code = "def metric(example, prediction):\n    import json, users_helpers\n    return 1.0\n"
    (tmp_path / "users_metric.py").write_text(code)
    sys.path.insert(0, str(tmp_path))
    try:
        metric = importlib.import_module("users_metric").metric
    finally:
        sys.path.remove(str(tmp_path))
    made: dict[str, Any] = {"__name__": "users_module"}
    exec("def typed(example, prediction):\n    return 1.0", made)
    for function, unknown in (
        (metric, "users_metric.metric's import of users_helpers"),
        (made["typed"], "users_module.typed"),
    ):
        place = {"log_dir": tmp_path / function.__name__}
        parts = fingerprint(dspy.Predict("q -> a"), [], [], function)
        record(open_run(**place, fingerprint=parts), *scoring(1))
        assert "can't be checked" not in caplog.text
        open_run(**place, fingerprint=parts)
        assert f"whether this code has changed can't be checked: {unknown}." in caplog.text
        caplog.clear()


def test_a_constant_of_a_notebook_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "K = 3\ndef metric(example, prediction):\n    return len(prediction) > K\n"
    notebook = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    monkeypatch.setitem(
        linecache.cache, "<cell>", (len(code), None, code.splitlines(keepends=True), "<cell>")
    )
    exec(compile(code, "<cell>", "exec"), vars(notebook))
    parts = fingerprint(dspy.Predict("q -> a"), [], [], notebook.metric)
    assert list(parts["code"]) == ["notebook.metric"]
    assert parts["unknown code"] == ["notebook.K"]


def test_a_parser_that_stumbles_over_other_threads_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 raises this error if threads parse at the same time."""
    parse, num_errors = ast.parse, 3

    def stumble(*arguments: Any, **options: Any) -> Any:
        nonlocal num_errors
        num_errors -= 1
        if num_errors >= 0:
            raise SystemError("AST constructor recursion depth mismatch")
        return parse(*arguments, **options)

    monkeypatch.setattr(ast, "parse", stumble)
    assert parsed(forget) is not None
    assert num_errors < 0
