"""What the package promises about itself: its pins, its types, its light import."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_constraints_hold_pins_and_nothing_else() -> None:
    pin = re.compile(r"[a-z0-9-]+==[\w.]+( ; .+)?")
    assert [line for line in pins() if not pin.fullmatch(line)] == []


def test_every_declared_dependency_is_pinned() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    declared = [document["build-system"]["requires"], project["dependencies"]]
    declared += project["optional-dependencies"].values()
    names = {canonicalize_name(Requirement(text).name) for texts in declared for text in texts}
    assert names - {line.partition("==")[0] for line in pins()} <= {"dspy-opro"}


def test_import_loads_nothing_that_only_extras_bring() -> None:
    code = (
        "import dspy, sys; before = set(sys.modules); import dspy_opro; "
        "print(*sorted((set(sys.modules) - before) & {'pandas', 'xllamacpp', 'huggingface_hub'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.slow
def test_the_wheel_carries_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / "dspy_opro").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert names == {path.relative_to(ROOT).as_posix() for path in files}
    assert "dspy_opro/py.typed" in names
