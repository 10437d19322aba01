"""Instructions on real language models: `python benchmarks/quality.py --help`.

One rule: all optimizers have the same examples, the same budget of scored examples and the same language models, and
the test examples are answered once, by the program that came out.

The default is SmolLM2 in this process (extra `local`), as scorer LM and as optimizer LM. Every run is one line in the
store. A run that is in the store is not repeated, so that the script goes on where it stopped. `--show` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError
from peers import quiet
from quality_optimizers import OPTIMIZERS, Run, instructions_of
from quality_tables import plot, report
from quality_tasks import Task, tasks
from rows import Row, keep, load

STORE = Path(__file__).parent / "results" / "quality.jsonl"
SIZES = (60, 40, 150)
"""Train, selection and test examples."""
KEY = ("model", "prompt_model", "task", "optimizer", "seed", "budget", "sizes")
"""What names a run in the store."""


class Calls(BaseCallback):
    """Counts an LM's calls, cached ones too; copies of the LM share the counter."""

    def __init__(self) -> None:
        self._lock, self.count = threading.Lock(), 0

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        with self._lock:
            self.count += 1

    def __deepcopy__(self, memo: object) -> Calls:
        return self


class Counted:
    """A metric that counts the examples it scores."""

    def __init__(self, metric: Callable[..., float]) -> None:
        self._metric, self._lock, self.count = metric, threading.Lock(), 0

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
        with self._lock:
            self.count += 1
        return self._metric(example, prediction)

    def __deepcopy__(self, memo: object) -> Counted:
        return self


class ServedLM(dspy.LM):
    """A model on a server that speaks OpenAI's chat API and holds answers to a JSON schema.

    DSPy takes this from its catalog of models, which does not know the models of one's own server.
    """

    supports_response_schema = True

    @property
    def supported_params(self) -> set[str]:
        return {*super().supported_params, "response_format"}


class Measurement:
    """Two language models, and what all runs with them share."""

    def __init__(self, model: dspy.LM, prompt_model: dspy.LM, proposer: Any, num_threads: int, budget: int,
                 sizes: tuple[int, int, int]) -> None:  # fmt: skip
        self.calls = {"scorer": Calls(), "proposer": Calls()}
        self.model = model.copy(callbacks=[self.calls["scorer"]])
        self.prompt_model = prompt_model.copy(callbacks=[self.calls["proposer"]])
        self.proposer, self.num_threads, self.budget, self.sizes = proposer, num_threads, budget, sizes

    def key(self, task: str, optimizer: str, seed: int) -> dict[str, Any]:
        """What names the run in the store."""
        models = {"model": name_of(self.model), "prompt_model": name_of(self.prompt_model)}
        values = {"task": task, "optimizer": optimizer, "seed": seed, "budget": self.budget}
        return {**models, **values, "sizes": list(self.sizes)}

    def measure(self, task: Task, optimizer: str, seed: int) -> dict[str, Any]:
        """One run as a row. A run that fails is a row with the error."""
        testset = task.split(seed, self.sizes)[2]
        metric = Counted(task.metric)
        before = {role: calls.count for role, calls in self.calls.items()}
        start = time.perf_counter()
        row = self.key(task.name, optimizer, seed)
        with dspy.context(lm=self.model, adapter=dspy.JSONAdapter()):
            try:
                program = self.optimize(task, optimizer, seed, metric)
            except Exception as error:
                traceback.print_exc()
                return {**row, "error": f"{type(error).__name__}: {error}"[:300]}
            row |= {f"{role}_calls": calls.count - before[role] for role, calls in self.calls.items()}
            row |= {"scored": metric.count, "optimize_seconds": round(time.perf_counter() - start, 1)}
            scores = self.test(program, task, testset)
        return {**row, **described(program), "majority": round(task.majority(testset), 4), "test": scores}

    def optimize(self, task: Task, optimizer: str, seed: int, metric: Callable[..., float]) -> dspy.Module:
        """What the optimizer returns. The scorer LM must be DSPy's LM."""
        trainset, valset, _ = task.split(seed, self.sizes)
        # Another rollout for each seed, so that an optimizer's first request does not get the answer of another seed.
        prompt_model = self.prompt_model.copy(temperature=1.0, rollout_id=seed + 1)
        run = Run(task, metric, prompt_model, self.model, self.proposer, trainset, valset, self.budget,
                  self.num_threads, seed)  # fmt: skip
        with quiet():
            return OPTIMIZERS[optimizer](run)

    def test(self, program: dspy.Module, task: Task, testset: list[dspy.Example]) -> list[float | None]:
        """The score of each test example; None for an answer that can't be parsed. Other failures end the script."""

        def score(example: dspy.Example) -> float | None:
            try:
                return task.metric(example, program(**example.inputs()))
            except (AdapterParseError, ValueError):
                return None

        runner = dspy.Parallel(num_threads=self.num_threads, disable_progress_bar=True, max_errors=1)
        return list(runner([(score, (example,)) for example in testset]))


def described(program: dspy.Module) -> dict[str, Any]:
    """The instructions, how many demos each predictor has, and why a run of ours stopped.

    Demos are data, so they are not stored.
    """
    result = getattr(program, "opro_result", None)
    return {
        "instructions": instructions_of(program),
        "demos": {name: len(predictor.demos) for name, predictor in program.named_predictors()},
        **({} if result is None else {"stop_reason": result.stop_reason}),
    }


def name_of(lm: dspy.LM) -> str:
    """The name without the provider that a local model has in DSPy; a file's name ends with its fingerprint."""
    return str(lm.model).removeprefix("openai/" if isinstance(lm, ServedLM) else "llamafile/")


def language_model(name: str | None, args: argparse.Namespace, max_tokens: int) -> Any:
    """SmolLM2 for None, a GGUF file for a path that ends so, else an LM of the server or as LiteLLM names it."""
    if name is not None and not name.endswith(".gguf"):
        if args.api_base is not None:
            server = {"api_base": args.api_base, "api_key": os.environ.get("OPENAI_API_KEY", "none")}
            return ServedLM(f"openai/{name}", temperature=0.0, max_tokens=max_tokens, **server)
        return dspy.LM(name, max_tokens=max_tokens)
    from dspy_opro.local import LocalLM

    return LocalLM(name, n_parallel=1, n_threads=args.lm_threads, max_tokens=max_tokens, seed=0)


def measurement(args: argparse.Namespace) -> Measurement:
    """The language models that the command line names."""
    from dspy_opro.proposers.completion import CompletionProposer

    prompt_name = args.prompt_model or args.model
    is_local = prompt_name is None or prompt_name.endswith(".gguf")
    max_tokens = args.prompt_max_tokens or (256 if is_local else 1000)
    model = language_model(args.model, args, args.max_tokens)
    same = prompt_name == args.model
    prompt_model = model if same else language_model(prompt_name, args, max_tokens)
    prompt_model = prompt_model.copy(max_tokens=max_tokens)
    # SmolLM2 is too small to follow requests.
    proposer = CompletionProposer() if prompt_name is None or args.completion_proposer else None
    return Measurement(model, prompt_model, proposer, args.num_threads, args.budget, tuple(args.sizes))


def missing(
    stored: Iterable[Row], keys: Iterable[dict[str, Any]], names: Sequence[str] = KEY
) -> list[dict[str, Any]]:
    """The runs that are not in the store yet, in order. `names` are the parts of a row that name its run."""
    done = {_frozen(row, names) for row in stored}
    return [key for key in keys if _frozen(key, names) not in done]


def _frozen(row: Row, names: Sequence[str]) -> str:
    return json.dumps([row[name] for name in names])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--repeat-failed", action="store_true", help="run again what failed")
    parser.add_argument(
        "--show", action="store_true", help="run nothing; tables of the store, of the given seeds and tasks"
    )
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the store")
    return parser.parse_args(arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What names the language models, the tasks and the sizes."""
    parser.add_argument("--model", help="scorer LM: a name of LiteLLM or a GGUF file; default: SmolLM2")
    parser.add_argument("--prompt-model", help="optimizer LM; default: the scorer LM")
    parser.add_argument(
        "--api-base",
        help="URL of a server with OpenAI's chat API that has the named models; it gets the key OPENAI_API_KEY",
    )
    parser.add_argument(
        "--data", type=Path, help="folder with data sets as JSON lines with `text` and `label`"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all that can be made")
    parser.add_argument("--budget", type=int, default=300, help="examples that an optimizer may score")
    parser.add_argument("--sizes", type=int, nargs=3, default=SIZES, metavar=("TRAIN", "SELECTION", "TEST"))
    parser.add_argument("--num-threads", type=int, default=1, help="calls at the same time")
    parser.add_argument("--lm-threads", type=int, default=1, help="threads of a model in this process")
    parser.add_argument("--max-tokens", type=int, default=40, help="of one answer of the scorer LM")
    parser.add_argument(
        "--prompt-max-tokens",
        type=int,
        help="of one answer of the optimizer LM; default: 256 of a model in this process, else 1,000",
    )
    parser.add_argument(
        "--completion-proposer",
        action="store_true",
        help="ours asks the optimizer LM to continue a text; always so with SmolLM2 in this process",
    )
    parser.add_argument("--cache", type=Path, help="folder for DSPy's cache: equal prompts are computed once")


def main() -> None:
    args = parse()
    args.store.parent.mkdir(parents=True, exist_ok=True)
    if not args.show:
        run_all(args)
    stored = load([str(args.store)]) if args.store.exists() else []
    rows = [row for row in stored if row["seed"] in args.seeds]
    if args.tasks:
        rows = [row for row in rows if row["task"] in args.tasks]
    print(report(rows))
    if args.plot is not None:
        args.plot.write_text(plot(rows), encoding="utf-8")


def prepare(args: argparse.Namespace) -> None:
    """No warnings, and the cache that the command line names."""
    logging.disable(logging.WARNING)
    dspy.configure_cache(
        enable_disk_cache=args.cache is not None,
        disk_cache_dir=str(args.cache or ""),
        enable_memory_cache=True,
    )


def chosen_tasks(args: argparse.Namespace) -> dict[str, Callable[[], Task]]:
    """Name -> how to make the task, of those that the command line names; of all that can be made without names."""
    found = tasks(args.data)
    unknown = set(args.tasks or ()) - set(found)
    if unknown:
        raise SystemExit(f"--tasks must be among {', '.join(found)}, but got {', '.join(sorted(unknown))}.")
    return {name: found[name] for name in args.tasks or found}


def run_all(args: argparse.Namespace) -> None:
    """Measure what the store does not have."""
    prepare(args)
    found = chosen_tasks(args)
    make = cache(lambda name: found[name]())
    measured = measurement(args)
    keys = [
        measured.key(task, optimizer, seed)
        for seed in args.seeds for task in found for optimizer in args.optimizers
    ]  # fmt: skip
    stored = load([str(args.store)]) if args.store.exists() else []
    if args.repeat_failed:
        stored = [row for row in stored if "error" not in row]
    for key in missing(stored, keys):
        keep(str(args.store), measured.measure(make(key["task"]), key["optimizer"], key["seed"]))


if __name__ == "__main__":
    main()
