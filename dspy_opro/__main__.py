"""`python -m dspy_opro` is the command `dspy-opro`."""

from __future__ import annotations

from dspy_opro.reporting.command_line import main

main(prog_name="dspy-opro")
