"""A server with OpenAI's API for GGUF models on a CPU: `python benchmarks/serve_gguf.py 8801 NAME=FILE.gguf`.

`quality.py --api-base http://127.0.0.1:8801/v1 --model NAME` uses it. OpenVINO answers the requests in batches, and
holds an answer to the JSON schema of the request. It needs `pip install openvino-genai openvino-tokenizers gguf numpy`.

OpenVINO (2026.4) does not read every kind of quantized weights. `--q8` writes the weights of a file anew as Q8_0,
beside the file, and serves those. `--f16` writes the weights of that Q8_0 file as floats of 16 bits, in a folder beside
it. On a CPU with AMX this is two to three times as fast. It needs at least two threads: with one, OpenVINO 2026.4 ended
with an arithmetic error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

try:
    import gguf
    import openvino
    import openvino_genai
    from gguf.quants import dequantize, quantize
    from openvino import opset13
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}. pip install openvino-genai openvino-tokenizers gguf numpy") from None

CACHE_GIB = 3
"""Memory of one model for the keys and values of its requests."""


class Model:
    """One model with a thread that computes all open requests together, one token of each in a step."""

    def __init__(self, path: Path, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = CACHE_GIB, True
        options = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", options)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._inbox: queue.Queue[tuple[str, Any, queue.Queue[Any]]] = queue.Queue()
        self._running: dict[int, tuple[Any, queue.Queue[Any], list[int]]] = {}
        """Request -> its handle, where the answer goes, and the tokens so far."""
        self._numbers = itertools.count()
        threading.Thread(target=self._run, daemon=True).start()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The `choices` and the `usage` of a chat completion, or of a completion where the request has a `prompt`."""
        is_chat = "messages" in request
        if is_chat:
            prompt = self._tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True)
        else:
            prompt = request["prompt"]
        answers = []
        for _ in range(request.get("n") or 1):
            done: queue.Queue[Any] = queue.Queue()
            self._inbox.put((prompt, self._config(request), done))
            answers.append(done)
        choices, written = [], 0
        for index, done in enumerate(answers):
            found = done.get()
            if isinstance(found, Exception):
                raise found
            tokens, finish_reason = found
            written += len(tokens)
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            choices.append({"index": index, "finish_reason": finish_reason, **said})
        read = int(self._tokenizer.encode(prompt).input_ids.shape[1])
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {"choices": choices, "usage": usage}

    def _config(self, request: dict[str, Any]) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request.get("max_tokens") or request.get("max_completion_tokens") or 256
        config.eos_token_id = self._tokenizer.get_eos_token_id()
        config.stop_token_ids = {config.eos_token_id}
        if request.get("temperature"):
            config.do_sample, config.temperature = True, float(request["temperature"])
            config.rng_seed = uuid.uuid4().int % 2**31
        if stop := request.get("stop"):
            config.stop_strings = {stop} if isinstance(stop, str) else set(stop)
        form = request.get("response_format") or {"type": "text"}
        if form["type"] != "text":
            schema = form["json_schema"]["schema"] if form["type"] == "json_schema" else {"type": "object"}
            config.structured_output_config = openvino_genai.StructuredOutputConfig(
                json_schema=json.dumps(schema)
            )
        return config

    def _run(self) -> None:
        while True:
            while not self._running or not self._inbox.empty():
                self._start(*self._inbox.get())
            try:
                self._pipeline.step()
            except Exception as error:
                for _, done, _ in self._running.values():
                    done.put(error)
                self._running.clear()
            for number in list(self._running):
                self._collect(number)

    def _start(self, prompt: str, config: Any, done: queue.Queue[Any]) -> None:
        number = next(self._numbers)
        try:
            self._running[number] = (self._pipeline.add_request(number, prompt, config), done, [])
        except Exception as error:
            done.put(error)

    def _collect(self, number: int) -> None:
        """Take the new tokens of a request; pass on an answer that is complete."""
        handle, done, tokens = self._running[number]
        status, reason = handle.get_status(), "stop"
        while handle.can_read():
            for output in handle.read().values():
                tokens.extend(output.generated_ids)
                if output.finish_reason == openvino_genai.GenerationFinishReason.LENGTH:
                    reason = "length"
        if status != openvino_genai.GenerationStatus.RUNNING:
            del self._running[number]
            done.put((tokens, reason))


class Handler(BaseHTTPRequestHandler):
    """Answers POST requests; the path does not matter."""

    protocol_version = "HTTP/1.1"
    models: dict[str, Model]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            found = self.models[request["model"]].answer(request)
            status, answer = 200, {"id": uuid.uuid4().hex, "object": "chat.completion",
                                   "created": 0, "model": request["model"], **found}  # fmt: skip
        except Exception as error:
            status, answer = 400, {"error": {"message": f"{type(error).__name__}: {error}"}}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a line a request is too much."""


class Server(ThreadingHTTPServer):
    """A run connects with all its threads at once. The standard library lets five connections wait, no more."""

    request_queue_size = 128


def as_q8(path: Path) -> Path:
    """The file with all quantized weights as Q8_0; it is written once."""
    target = path.with_suffix(".q8_0.gguf")
    if target.exists():
        return target
    kind = gguf.GGMLQuantizationType.Q8_0
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            value = gguf.LlamaFileType.MOSTLY_Q8_0 if field.name == "general.file_type" else field.contents()
            writer.add_key_value(
                field.name, value, field.types[0], sub_type=field.types[-1] if is_array else None
            )
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            weights = dequantize(tensor.data, tensor.tensor_type).astype("float32")
            writer.add_tensor(tensor.name, quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def as_f16(path: Path) -> Path:
    """A folder with OpenVINO's model of the file, its weights as floats of 16 bits; it is written once."""
    target = path.with_suffix(".f16")
    if target.exists():
        return target
    source = target.with_suffix(".ov")
    source.mkdir(exist_ok=True)
    (source / path.name).unlink(missing_ok=True)  # of a start that was interrupted
    (source / path.name).hardlink_to(path)
    openvino_genai.LLMPipeline(str(source / path.name), "CPU", enable_save_ov_model=True)
    model = openvino.Core().read_model(source / "openvino_model.xml")
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            weights = _constant(node.input_value(1).get_node())
            if weights is not None:
                halves = opset13.convert(opset13.constant(weights.astype("float16")), "f32")
                node.input(1).replace_source_output(halves.output(0))
    openvino.save_model(model, source / "halves.xml", compress_to_fp16=False)
    (source / path.name).unlink()
    for suffix in ("xml", "bin"):
        (source / f"halves.{suffix}").replace(source / f"openvino_model.{suffix}")
    return source.rename(target)


def _constant(node: Any) -> Any:
    """The value of a node as an array of 32-bit floats. None: it depends on the model's input."""
    if node.get_type_name() == "Constant":
        return node.get_data().astype("float32")
    inputs = [_constant(value.get_node()) for value in node.input_values()]
    if any(value is None for value in inputs):
        return None
    match node.get_type_name():
        case "Convert":
            return inputs[0]
        case "Multiply":
            return inputs[0] * inputs[1]
        case "Subtract":
            return inputs[0] - inputs[1]
        case "Reshape":
            return inputs[0].reshape(inputs[1].astype(int))
        case _:
            return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("port", type=int)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--threads", type=int, default=2, help="threads of a model")
    parser.add_argument("--q8", nargs="+", default=[], metavar="NAME", help="models to serve as Q8_0")
    parser.add_argument(
        "--f16", nargs="+", default=[], metavar="NAME", help="models to serve as 16-bit floats"
    )
    args = parser.parse_args()
    files = {name: Path(file) for name, _, file in (model.partition("=") for model in args.models)}
    for name, file in files.items():
        if name in args.q8 or name in args.f16:
            files[name] = as_q8(file)
        if name in args.f16:
            files[name] = as_f16(files[name])
    Handler.models = {name: Model(file, args.threads) for name, file in files.items()}
    print(f"Serving {', '.join(files)} at http://127.0.0.1:{args.port}/v1", flush=True)
    Server(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
