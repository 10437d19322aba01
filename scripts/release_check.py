"""Build sdist and wheel, check their metadata, and run README's code from the wheel in an empty environment.

Run by `make release-check`. It stops at the first thing that is not in order.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# README's first block reaches a simulated server. Its model multiplies once the instruction says "digit by digit", and
# as the optimizer LM it says so.
SERVE = """
import os, re, runpy, sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["DSPY_CACHEDIR"] = "cache"  # answers of another server are no answers of this one
import dspy_opro
from dspy_opro.testing import SimulatedServer

def answer(call):
    numbers = [int(text) for pair in re.findall(r"What is (\\d+) times (\\d+)", call.user)[-1:] for text in pair]
    knows = numbers and "digit by digit" in call.instructions
    values = {"answer": str(numbers[0] * numbers[1]) if knows else "many"}
    new = f"Multiply digit by digit. {len(call.prompt)} {call.sample}"
    return {name: values[name] if name in values else new for name in call.output_fields}

with SimulatedServer(answer, own_process=False) as server:
    os.environ.update(OPENAI_API_BASE=server.api_base, OPENAI_BASE_URL=server.api_base, OPENAI_API_KEY="unused")
    print("runs from", dspy_opro.__file__)
    assert "site-packages" in dspy_opro.__file__, dspy_opro.__file__
    page = runpy.run_path(sys.argv[1], run_name="__main__")
    assert page["program"].opro_result.best_score == 1.0
"""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("+", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=cwd, check=True, env=environment)


def readme_code() -> str:
    """The first Python block of README."""
    match = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    if match is None:
        raise SystemExit("README.md has no Python block.")
    return match[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run(sys.executable, "-m", "hatchling", "build", "-d", place)
        (sdist,), (wheel,) = place.glob("*.tar.gz"), place.glob("*.whl")
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
        with tarfile.open(sdist) as archive:
            files = {member.partition("/")[2] for member in archive.getnames()}
        missing = {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "mkdocs.yml", "docs/start.md"} - files
        if missing:
            raise SystemExit(f"The sdist lacks {', '.join(sorted(missing))}.")
        uv = Path(sys.executable).parent / "uv"
        python = place / "venv" / "bin" / "python"
        run(uv, "venv", "-q", "--python", sys.executable, place / "venv")
        run(uv, "pip", "install", "-q", "--python", python, "-c", ROOT / "constraints.txt", wheel)
        run(uv, "pip", "check", "--python", python)
        (place / "readme.py").write_text(readme_code(), encoding="utf-8")
        (place / "serve.py").write_text(SERVE, encoding="utf-8")
        run(python, "serve.py", "readme.py", cwd=place)
        # A wheel that is built from the sdist is the same package.
        run(uv, "pip", "install", "-q", "--python", python, "--no-deps", "--reinstall", sdist)
        run(python, "-c", "import dspy_opro; print('from the sdist:', dspy_opro.__version__)", cwd=place)
    print("release-check passed")


if __name__ == "__main__":
    main()
