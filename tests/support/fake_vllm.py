"""A server that answers as vLLM does, over a tiny transformers model in this process."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from gspo_lightning.vllm.worker import Extension


class Runner:
    """What a worker of vLLM has: a model, and a way to give it other weights."""

    def __init__(self, model):
        self.model = model
        self.model_config = type("C", (), {"hf_text_config": model.config})
        self.breaks = False

    def reload_weights(self, weights_iterator):
        own = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for number, (name, tensor) in enumerate(weights_iterator):
                if self.breaks and number == 3:
                    raise RuntimeError("no memory left")
                own[name].copy_(tensor)


class Worker(Extension):
    rank, device = 0, torch.device("cpu")

    def __init__(self, model):
        self.model_runner = Runner(model)


class FakeVLLM:
    """Its state; what a test sets is what the server then does.

    Attributes:
        asked: Path, or worker's method, of each call, in their order.
        extra: Answers by path that stand in for the server's own.
        slow: Seconds before an answer to a prompt.
        says: The version of weights that completions claim; None is the true one.
    """

    def __init__(self, model):
        self.worker = Worker(model)
        self.asked, self.extra = [], {}
        self.slow, self.says, self.weights = 0.0, None, "default"
        self.lock = threading.Lock()
        self.config = {
            "dtype": "torch.float32",
            "max_model_len": 1024,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "enable_sleep_mode": False,
        }

    def answer(self, path, body):
        self.asked.append(body.get("method", path) if body else path)
        if path in self.extra:
            found = self.extra[path]
            return found(body) if callable(found) else found
        match path:
            case "/version":
                return {"version": "0.32.0"}
            case "/server_info":
                return {"vllm_config": {"model_config": self.config}}
            case "/v1/models":
                return {"data": [{"id": "tiny"}]}
            case "/get_world_size":
                return {"world_size": 1}
            case "/reset_prefix_cache":
                return {"success": True}
            case "/is_sleeping":
                return {"is_sleeping": False}
            case "/update_weight_version":
                self.weights = body["new_version"]
            case "/collective_rpc":
                return {"results": [getattr(self.worker, body["method"])(**body["kwargs"])]}
            case "/inference/v1/generate":
                return self.complete(body["token_ids"], body["sampling_params"])
        return {}

    @torch.no_grad()
    def complete(self, prompt, how):
        time.sleep(self.slow)
        choices = []
        with self.lock:
            for index in range(how["n"]):
                draw = torch.Generator().manual_seed(((how["seed"] or 0) + index) % 2**62)
                ids, content = [], []
                while len(ids) < how["max_tokens"]:
                    logits = self.worker.model_runner.model(torch.tensor([prompt + ids])).logits
                    logprobs = (logits[0, -1] / (how["temperature"] or 1)).log_softmax(-1)
                    token = int(logprobs.argmax())
                    if how["temperature"]:
                        token = int(torch.multinomial(logprobs.exp(), 1, generator=draw))
                    ids.append(token)
                    content.append({"token_id": token, "logprob": logprobs[token].item()})
                    if token in how["stop_token_ids"]:
                        break
                ended = ids[-1] in how["stop_token_ids"]
                choices.append(
                    {
                        "index": index,
                        "token_ids": ids,
                        "finish_reason": "stop" if ended else "length",
                        "logprobs": {"content": content} if how["logprobs"] == 0 else None,
                        "weight_versions": [{"version": self.says or self.weights}],
                    }
                )
        return {"choices": choices[::-1]}  # in no order that anybody may rely on


class Server(ThreadingHTTPServer):
    """Says nothing of clients that went away, in whatever test runs by then."""

    request_queue_size = 512  # as many as call at one time

    def handle_error(self, request, client_address):
        pass


@contextmanager
def serving(model):
    """A fake server with its address, ``fake.url``, until the block ends."""
    fake = FakeVLLM(model)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length) or "null")
            code = 200
            try:
                answer = fake.answer(self.path.partition("?")[0], body)
            except Exception as error:  # as vLLM: 500, with the error's words
                code, answer = 500, {"error": {"message": str(error)}}
            if isinstance(answer, int):
                code, answer = answer, {"detail": "Not Found"}
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
