"""Files of a run hold data and prompts, but never keys: every file is searched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspy_opro.testing import Fault
from tests.runs import TASK, TRAINSET, VALSET, serve, teleprompter

KEY = "sk-0123456789-never-written-down"


@pytest.mark.parametrize(
    "faults", [[], [Fault("malformed_answer", probability=0.1)]], ids=["a good run", "with failures"]
)
@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_no_file_of_a_run_holds_a_key(tmp_path: Path, storage: str, faults: list[Fault]) -> None:
    where = {} if storage == "journal" else {"storage": f"sqlite:///{tmp_path}/qa.db"}
    with serve() as server:
        server.inject(*faults)
        optimizer = teleprompter(
            server,
            prompt_model=server.lm("proposer", api_key=KEY),
            task_model=server.lm("scorer", api_key=KEY),
            log_dir=tmp_path / "run",
            verbose=True,
            **where,
        )
        program = optimizer.compile(TASK.student(), trainset=TRAINSET, valset=VALSET)
    program.opro_result.save_report(tmp_path / "report.html")
    program.save(tmp_path / "program.json")
    given = optimizer.get_config()
    (tmp_path / "teleprompter.json").write_text(json.dumps(given))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert [path.name for path in files if KEY.encode() in path.read_bytes()] == []
