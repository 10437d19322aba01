"""No file that a run writes holds a secret, wherever a language model, a callback or a URL may carry one."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro import OPRO
from dspy_opro.programs.compat import forget_secrets
from dspy_opro.programs.prompts import prompts
from dspy_opro.programs.secrets import is_secret, without_password, without_secrets
from dspy_opro.reporting import autologging
from dspy_opro.reporting.run_directory import RunDirectory
from dspy_opro.storage.outage import Outage
from dspy_opro.testing import SimulatedServer
from tests.runs import TASK, TRAINSET, metric, serve

SECRET = "s3cr3t"

CARRIERS: dict[str, Any] = {
    "api_key": f"{SECRET}-01",
    "aws_secret_access_key": f"{SECRET}-02",
    "aws_access_key_id": f"{SECRET}-03",
    "azure_ad_token": f"{SECRET}-04",
    "extra_headers": {"Authorization": f"Bearer {SECRET}-05"},
    "headers": {"x-api-key": f"{SECRET}-06"},
    "extra_body": {"login": {"token": f"{SECRET}-07"}, "keys": [{"api-key": f"{SECRET}-08"}], "top_k": 5},
    "vertex_credentials": json.dumps({"private_key": f"{SECRET}-09"}),
    "api_base": f"http://user:{SECRET}-10@127.0.0.1:1/v1?api_key={SECRET}-11",
}


def call_back(token: str, study: Any, trial: Any) -> None:
    pass


@dataclass(frozen=True)
class Notify:
    """A stopper with a key."""

    channel: str
    api_key: str

    def __call__(self, state: Any) -> None:
        return None


class Executor(ThreadPoolExecutor):
    def __repr__(self) -> str:
        return f"<Executor tls://{SECRET}-20>"


@pytest.fixture
def server() -> Iterator[SimulatedServer]:
    with serve() as running:
        yield running


def carrying_lm(server: SimulatedServer, model: str) -> Any:
    lm: Any = server.lm(model)
    address = lm.kwargs["api_base"].replace("://", f"://user:{SECRET}-13@")
    lm = lm.copy(api_key=CARRIERS["api_key"], extra_headers=CARRIERS["extra_headers"], api_base=address)
    lm.launch_kwargs = lm.train_kwargs = {"api_key": f"{SECRET}-12"}
    return lm


def test_no_file_of_a_run_holds_a_secret(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}-30")
    student = TASK.student()
    student.set_lm(carrying_lm(server, "scorer"))
    teleprompter = OPRO(
        functools.partial(metric),
        prompt_model=carrying_lm(server, "proposer"),
        task_model=carrying_lm(server, "scorer"),
        callbacks=[functools.partial(call_back, f"{SECRET}-21")],
        stoppers=[Notify("#runs", f"{SECRET}-22"), functools.partial(Notify("#", f"{SECRET}-23"))],
        teacher_settings={"lm": carrying_lm(server, "scorer"), "api_key": f"{SECRET}-24"},
        num_rounds=2,
        max_bootstrapped_demos=1,
        log_dir=tmp_path / "run",
        storage=f"sqlite:///{tmp_path / 'runs.db'}",
        name="qa",
        verbose=True,
    )
    assert SECRET not in repr(teleprompter)
    program = teleprompter.compile(student, trainset=TRAINSET)
    result = program.opro_result
    result.save_report(tmp_path / "page.html")
    result.save(tmp_path / "result.json")
    (tmp_path / "more.txt").write_text(f"{result!r}{result.summary()}{result.to_dicts()}{result.config}")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"best.json", "config.json", "run.log", "report.html"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert {"runs.db", "page.html", "result.json"} <= {path.name for path in written}
    assert [p.name for p in written if SECRET.encode() in p.read_bytes()] == []
    again = TASK.student()
    again.load(tmp_path / "run" / "best.json", **_TRUSTED)
    own, best = again.predictors()[0], program.predictors()[0]
    assert own.signature.instructions == best.signature.instructions
    assert own.lm.model == best.lm.model
    assert best.lm.kwargs["api_key"] == CARRIERS["api_key"]


def test_a_saved_program_holds_no_secret_of_its_language_models(tmp_path: Path) -> None:
    lm = dspy.LM("openai/x")
    lm.kwargs = {**lm.kwargs, **CARRIERS}
    lm.launch_kwargs = lm.train_kwargs = {"api_key": f"{SECRET}-12"}
    student = TASK.student()
    student.set_lm(lm)
    program = student.deepcopy()
    forget_secrets(program)
    program.save(tmp_path / "best.json")
    assert SECRET not in (tmp_path / "best.json").read_text()
    assert (student.predictors()[0].lm.kwargs, lm.kwargs["api_key"]) == (lm.kwargs, CARRIERS["api_key"])
    again = TASK.student()
    again.load(tmp_path / "best.json", **_TRUSTED)
    assert again.predictors()[0].lm.kwargs["extra_body"] == {"login": {}, "keys": [{}], "top_k": 5}


_TRUSTED: dict[str, Any] = (
    {"allow_unsafe_lm_state": True}
    if "allow_unsafe_lm_state" in str(dspy.Module.load.__code__.co_varnames)
    else {}
)


def test_errors_and_an_executor_hold_no_secret(
    server: SimulatedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors of programs quote the addresses that they tried."""

    class Fails(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = TASK.student()

        def forward(self, question: str) -> Any:
            if question != TRAINSET[0].question:
                raise RuntimeError(
                    f"no route to postgresql://me:{SECRET}-40@host/db?api_key={SECRET}-41, Bearer {SECRET}-43"
                )
            return self.inner(question=question)

    student = Fails()
    student.set_lm(carrying_lm(server, "scorer"))
    dead = dspy.LM("openai/x", api_base=f"http://u:{SECRET}-42@127.0.0.1:9/v1", api_key="k", num_retries=0)
    with Executor(2) as executor, contextlib.suppress(Exception):
        OPRO(
            metric,
            prompt_model=dead,
            executor=executor,
            num_rounds=1,
            log_dir=tmp_path / "dead",
            num_candidates=2,
            max_outage_seconds=1.0,
        ).compile(student, trainset=TRAINSET)
    for model in ("proposer", "nobody"):  # the second is not there: the run ends before the first example
        lm, directory = carrying_lm(server, model), tmp_path / model
        with Executor(2) as executor, contextlib.suppress(Exception):
            OPRO(
                metric, prompt_model=lm, executor=executor, num_rounds=1, log_dir=directory, num_candidates=2
            ).compile(student, trainset=TRAINSET)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "journal.log" in {path.name for path in written}
    assert "no route to" in caplog.text
    assert [path.name for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in caplog.text


class Unreachable(dspy.ChatAdapter):  # type: ignore[misc]
    def format(self, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError(f"failed to connect to user:{SECRET}-50@host")


def test_the_log_of_what_cannot_be_written_holds_no_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        cause = OSError(f"the server refuses user:{SECRET}-51@host")
        raise ConnectionError(f"failed to connect to user:{SECRET}-52@host") from cause

    outage = Outage()
    for report in (outage.failed, outage.lose):
        try:
            fail()
        except ConnectionError as error:
            report(error)
    directory = RunDirectory(tmp_path)
    directory.write("best.json", fail)
    directory.close()
    program = dspy.Predict("question -> answer")
    with dspy.context(adapter=Unreachable()):
        assert prompts(program, ["self"]) == {}
    monkeypatch.setattr(autologging, "_active_run", fail)
    program.opro_result = object()
    with autologging.completes_run({}) as complete:
        complete(program)
    said = ("storage fails", "storage is lost", "best.json cannot be written", "lacks self", "MLflow is not")
    assert [len([m for m in caplog.messages if words in m]) for words in said] == [1] * len(said)
    assert all("user:***@host" in message for message in caplog.messages)
    assert SECRET not in caplog.text + (tmp_path / "run.log").read_text()


def test_a_config_holds_no_secret_of_a_language_model() -> None:
    lm = dspy.LM("openai/x", **{k: v for k, v in CARRIERS.items() if k != "api_key"}, api_key=f"{SECRET}-01")
    proposer = dspy.Predict("a -> b")
    proposer.lm = lm
    config = OPRO(max, prompt_model=lm, task_model=lm, teacher_settings={"lm": lm}).get_config()
    assert SECRET not in json.dumps(config)
    assert config["prompt_model"]["$lm"]["extra_body"]["top_k"] == 5
    assert OPRO.from_config(config).config.prompt_model.kwargs["extra_body"]["top_k"] == 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[
            (n, True)
            for n in ("api_key", "x-api-key", "apikey", "client_secret", "password", "Authorization")
        ],
        *[(n, True) for n in ("vertex_credentials", "hf_token", "default_headers", "cookie", "private_key")],
        *[
            (n, False)
            for n in ("max_tokens", "max_completion_tokens", "top_k", "monkey", "model", "api_base", 3)
        ],
    ],
)
def test_secrets_are_known_by_their_names(name: Any, expected: bool) -> None:
    assert is_secret(name) is expected


def test_urls_lose_their_passwords() -> None:
    assert without_password("postgresql://me:a@b@host/db?sslpassword=x&a=1") == (
        "postgresql://me:***@host/db?sslpassword=***&a=1"
    )
    assert without_password("401 for sk-proj-0123456789, Bearer abcdefghij.k") == "401 for sk-***, Bearer ***"
    assert without_secrets({"a": [{"token": 1, "b": "http://u:p@h"}], "c": (1,)}) == {
        "a": [{"b": "http://u:***@h"}],
        "c": (1,),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://:pw@host", "redis://:***@host"),
        ("(u:p:w@[::1]) a:b@c", "(u:***@[::1]) a:***@c"),
        ("https://h:80/a@b", "https://h:***@b"),
        ("https://host/x?a=1&Pass_Key=p=q&b=2", "https://host/x?a=1&Pass_Key=***&b=2"),
        ("x?to=http://y?token=z w=1", "x?to=http://y?token=*** w=1"),
        ("https://me@host, me@host, 12:30 @ noon, a:b", "https://me@host, me@host, 12:30 @ noon, a:b"),
        ("max_tokens=5 key='a'", "max_tokens=5 key='a'"),
        (f"u:{'p' * 5000}@host", "u:***@host"),
    ],
)
def test_passwords_are_found_in_every_form(text: str, expected: str) -> None:
    assert without_password(text) == expected


@pytest.mark.parametrize(
    "part",
    [
        '{"id":1,"name":"x"},',
        "a:b,",
        "a.b.",
        "a:b@,",
        "a/b:@",
        "?a",
        "&key",
        "?key=",
        "&a=b",
        "sk-",
        "@",
        "\u7b54:",
    ],
)
def test_a_long_text_takes_no_longer_than_its_length(part: str) -> None:
    """An LM's answer in an error. A square of its length would be half a minute."""
    text = part * (200_000 // len(part))
    started = time.perf_counter()
    without_password(text)
    assert time.perf_counter() - started < 2.0
