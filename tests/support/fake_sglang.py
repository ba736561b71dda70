"""What the adapter of docs/vllm.md is tested against: an SGLang server, as its pages tell it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file


@contextmanager
def serving(model):
    """The address of a server that completes with a tiny model, and takes weights from a folder."""
    told = {"version": "default"}

    def answer(path, body):
        if path == "/get_model_info":
            return {"model_path": "tiny"}
        if path == "/get_server_info":
            return {"context_length": 1024}
        if path == "/update_weights_from_disk":
            (file,) = Path(body["model_path"]).glob("*.safetensors")
            model.load_state_dict(load_file(file))
            told["version"] = body["weight_version"]
            return {"success": True, "message": ""}
        if path == "/generate":
            return [complete(body) for _ in range(body["sampling_params"]["n"])]
        return {}

    def complete(body):
        how, ids, found = body["sampling_params"], list(body["input_ids"]), []
        while len(found) < how["max_new_tokens"]:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logprobs = (logits / (how["temperature"] or 1)).log_softmax(-1)
            draw = torch.multinomial(logprobs.exp(), 1) if how["temperature"] else logprobs.argmax()
            ids.append(int(draw))
            found.append([logprobs[ids[-1]].item(), ids[-1], None])
            if ids[-1] in how["stop_token_ids"]:
                break
        reason = "stop" if ids[-1] in how["stop_token_ids"] else "length"
        meta = {"finish_reason": {"type": reason}, "output_token_logprobs": found}
        return {"text": "", "meta_info": meta | {"weight_version": told["version"]}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("content-length", 0))
            data = json.dumps(answer(self.path, json.loads(self.rfile.read(length) or "{}")))
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data.encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
