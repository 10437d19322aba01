"""The flags of every example: which language model runs it, and how much the search may spend.

Without flags an example runs in this process, on SmolLM2 with 135 million parameters (extra `local`). This model is
scorer LM and optimizer LM. `--model openai/gpt-4o-mini` takes another model, and `--api-base` a server of yours.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_opro.proposers.completion import CompletionProposer


@dataclass(frozen=True)
class Flags:
    """What the command line said."""

    model: str
    """The LM's name."""
    is_embedded: bool
    proposer: Any
    """For the embedded model one that lets it continue a text, because it is too small to follow requests."""
    num_threads: int
    max_metric_calls: int | None
    seed: int

    def one_line(self, max_tokens: int) -> dict[str, Any]:
        """Parameters of an LM that is to continue a text by one line. A model that follows requests needs none."""
        is_small = self.is_embedded
        return {"model_type": "text", "max_tokens": max_tokens, "stop": ["\n"]} if is_small else {}


def parse(
    description: str | None,
    max_metric_calls: int | None = None,
    arguments: list[str] | None = None,
    max_tokens: int = 256,
) -> Flags:
    """Read the command line and configure DSPy.

    Args:
        description: The text for `--help`.
        max_metric_calls: The examples that the search may score, by default. None leaves the preset's sizes.
        arguments: The command line. Default: that of the process.
        max_tokens: The most tokens of an answer of SmolLM2, which repeats itself if nothing ends it.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="an LM as DSPy names it, e.g. openai/gpt-4o-mini; default: SmolLM2 in here"
    )
    parser.add_argument("--api-base", help="address of an OpenAI-compatible server")
    parser.add_argument(
        "--num-threads", type=int, help="default: one per core, 4 at most, for SmolLM2, else 16"
    )
    parser.add_argument(
        "--max-metric-calls", type=int, default=max_metric_calls, help="examples that the search may score"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    is_embedded = given.model is None
    if is_embedded:
        from dspy_opro.local import LocalLM

        lm: Any = LocalLM(seed=given.seed, max_tokens=max_tokens)
        logging.getLogger("dspy.clients.lm").setLevel(
            logging.ERROR
        )  # it warns of every answer that is cut off
    else:
        lm = dspy.LM(given.model, **({"api_base": given.api_base} if given.api_base else {}))
    dspy.configure(lm=lm, adapter=dspy.JSONAdapter())  # with a schema every answer of SmolLM2 parses
    return Flags(
        model=lm.model,
        is_embedded=is_embedded,
        proposer=CompletionProposer() if is_embedded else None,
        num_threads=given.num_threads or (lm.llama.n_parallel if is_embedded else 16),
        max_metric_calls=given.max_metric_calls,
        seed=given.seed,
    )
