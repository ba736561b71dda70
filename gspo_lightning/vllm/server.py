"""Servers of vLLM: what is asked of them over HTTP, and how weights get there.

Decides what a server must be like, in which order its weights are replaced, and what is said when
one does not answer. A server that has half of an update is refused until somebody restarts it.
"""

import json
import logging
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from gspo_lightning.vllm.engine import SHAPE, Completion, EngineError, Limits, beside, difference
from gspo_lightning.vllm.weights import Weights, write
from gspo_lightning.vllm.worker import own_group

log = logging.getLogger(__name__)
TESTED = (0, 32)  # what this is written for and tested with: older ones lack calls that it needs
AT_ONCE = 256  # requests to a server that wait for their answer
PAUSE = 1.0  # seconds between two looks at a server that is not there
LONGEST = 160  # characters of a server's own words in a message
START = "start it with: gspo vllm-serve and the --config of this run"


class Server:
    """One server.

    Args:
        url: Where it listens, such as ``http://127.0.0.1:8000``.
        timeout: Of every call, in seconds.
        sleep: Whether it is to sleep between rollouts.
    """

    def __init__(self, url: str, timeout: float, sleep: bool = False) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.sleep = sleep
        self.asleep = False
        self.model = ""
        self.dtype: torch.dtype | None = None
        self.about = ""

    def call(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """Ask, and return what the answer holds; EngineError if there is none, or a refusal."""
        data = None if body is None else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        what = f"sampler.server: {self.url}{path.partition('?')[0]}"
        if isinstance(body, dict) and "method" in body:
            what += f" {body['method']}"
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            raise Refused(f"{what}: {error.code} {_words(error.read())}", error.code) from None
        except (OSError, ValueError) as error:  # URLError, time-outs, answers that are no JSON
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            said = f"no answer within {self.timeout:g} s (sampler.timeout)" if late else reason
            raise EngineError(f"{what}: {said}") from None

    def worker(self, method: str, **arguments: Any) -> Any:
        """Call a method of the server's workers; what the first of them answers."""
        answer = self.call("/collective_rpc", {"method": method, "kwargs": arguments})
        return ((answer or {}).get("results") or [None])[0]

    def wait(self, seconds: float) -> None:
        """Wait until the server is ready, and say whom this waits for."""
        deadline = time.monotonic() + seconds
        told = False
        while True:
            try:
                return self.call("/health")
            except EngineError as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{error}; not ready within {seconds:g} s (sampler.start_timeout); {START}"
                    ) from None
                if not told:
                    log.warning("%s; waiting up to %g s for it; %s", error, seconds, START)
                    told = True
                time.sleep(PAUSE)

    def check(self, limits: Limits) -> None:
        """Refuse a server that would draw other completions than the run wants."""
        try:
            self._check(limits)
        except EngineError as error:
            code = getattr(error, "code", None)
            if code is None:
                raise
            # such calls are there in dev mode, with --enable-scale-out and our extension
            raise ValueError(f"{error}: not started for this trainer; {START}") from None

    def _check(self, limits: Limits) -> None:
        at = f"sampler.server: {self.url}"
        version = self.call("/version")["version"]
        number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if number < TESTED:
            wanted = ".".join(map(str, TESTED))
            raise ValueError(f"{at} is vLLM {version}, and {wanted} or newer is needed")
        if number > TESTED:
            tested = ".".join(map(str, TESTED))
            log.warning("%s is vLLM %s; this was tested with %s", at, version, tested)
        config = self.call("/server_info?config_format=json")["vllm_config"]["model_config"]
        flags = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"}
        for name, wanted in flags.items():
            if config[name] != wanted:
                raise ValueError(f"{at} has {name} {config[name]!r}, not {wanted!r}; {START}")
        if config.get("enable_sleep_mode"):
            self.asleep = self.call("/is_sleeping")["is_sleeping"]  # as an earlier run left it
        elif self.sleep:
            raise ValueError(
                f"{at} was started without --enable-sleep-mode, which engine.sleep needs; {START}"
            )
        self.model = self.call("/v1/models")["data"][0]["id"]
        self.dtype = getattr(torch, config["dtype"].removeprefix("torch."))
        found = self.worker("gspo_describe", names=",".join(SHAPE))
        if found["half"]:
            raise ValueError(
                f"{at} has half of an update that failed, and would draw from it; restart the "
                "server, and continue with --ckpt_path auto"
            )
        if other := difference(limits.shape, found["shape"]):
            raise ValueError(
                f"{at} serves another model, {self.model}, than policy.path {limits.path}: {other}"
            )
        self.about = f"vLLM {version} at {self.url}: {self.model}, {config['dtype']}, up to "
        self.about += f"{config['max_model_len']} tokens"
        if config["max_model_len"] < limits.longest:
            raise ValueError(
                f"{at} has max_model_len {config['max_model_len']}, and the longest text of this "
                f"run has {limits.longest} tokens; {START}, or lower data.max_prompt_tokens or "
                "sampler.max_new_tokens"
            )

    def wake(self) -> None:
        """Have it hold weights and cache again."""
        if self.asleep:
            self.call("/wake_up", {}, "POST")
            self.asleep = False

    def release(self) -> None:
        """Have it let go of the memory of its card, if it is to."""
        if self.sleep and not self.asleep:
            self.call("/sleep?level=1", {}, "POST")
            self.asleep = True

    def update(self, send: Callable[[], Any], version: str) -> None:
        """Replace the weights: nothing is drawn, and nothing kept, while ``send`` does."""
        self.wake()
        self.call("/pause?mode=abort", {}, "POST")
        send()
        if not self.call("/reset_prefix_cache", {}, "POST").get("success", True):
            raise EngineError(
                f"sampler.server: {self.url}/reset_prefix_cache: what was computed with the old "
                "weights is still held; restart the server"
            )
        self.call("/update_weight_version", {"new_version": version})
        self.call("/resume", {}, "POST")

    def complete(self, prompt: list[int], params: dict[str, Any]) -> list[Completion]:
        """Complete one prompt ``n`` times."""
        body = {"model": self.model, "token_ids": prompt, "sampling_params": params}
        answer = self.call("/inference/v1/generate", body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            Completion(
                choice["token_ids"],
                [entry["logprob"] for entry in (choice["logprobs"] or {}).get("content") or ()],
                choice["finish_reason"],
                frozenset(span["version"] for span in choice["weight_versions"] or ()),
            )
            for choice in choices
        ]


class Refused(EngineError):
    """A server has answered that it will not, or cannot."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def _words(answer: bytes) -> str:
    """What a server says of an error, in one line."""
    text = answer.decode(errors="replace")
    try:
        found: Any = json.loads(text)
        found = found.get("error", found.get("detail", found))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


class Servers:
    """An engine of one or several servers: each has the weights, prompts are dealt over them.

    Args:
        urls: Those that are asked.
        loads: Those of them that this process gives the weights; other ranks give them to the rest.
        transport: ``disk`` or ``broadcast``.
        folder: Where weights are written, a path that servers and trainer share; ``None`` is a
            folder for temporary files.
        timeout: Of every call, in seconds.
        start_timeout: Longest wait for a server that is starting, in seconds.
        sleep: Whether servers are to sleep between rollouts.
    """

    def __init__(
        self,
        urls: Sequence[str],
        loads: Sequence[str],
        transport: str,
        folder: str | None,
        timeout: float,
        start_timeout: float,
        sleep: bool,
    ) -> None:
        known = {url: Server(url, timeout, sleep) for url in dict.fromkeys((*urls, *loads))}
        self.servers = [known[url] for url in urls]
        self.loads = [known[url] for url in loads]
        self.timeout, self.start_timeout = timeout, start_timeout
        self._sender = (Folder(folder) if transport == "disk" else Broadcast(timeout)).send

    def check(self, limits: Limits) -> None:
        """See ``Engine``."""
        for server in self.servers:
            server.wait(self.start_timeout)
            server.check(limits)

    @property
    def about(self) -> str:
        """What each server is."""
        return "; ".join(server.about for server in self.servers)

    def load(self, tensors: Weights, version: str) -> None:
        """See ``Engine``. Where ranks each hold a part, all of them call, and some have no server.

        Raises:
            EngineError: If a server has not taken them; then it is refused until it is restarted.
        """
        if not self.loads:
            for _ in tensors:  # this rank's part of each is wanted by those that send
                pass
            return
        dtypes = {server.dtype for server in self.loads}
        tensors.dtype = dtypes.pop() if len(dtypes) == 1 else None  # each server makes it its own
        self._sender(self.loads, tensors, version)

    def complete(
        self, prompts: list[list[int]], params: list[dict[str, Any]]
    ) -> list[list[Completion]]:
        """See ``Engine``."""
        for server in self.servers:
            server.wake()
        found: list[list[Completion]] = [[] for _ in prompts]
        waiting = deque(range(len(prompts)))

        def ask() -> None:
            while True:
                try:
                    number = waiting.popleft()
                except IndexError:  # others have taken the last ones
                    return
                server = self.servers[number % len(self.servers)]
                try:
                    found[number] = server.complete(prompts[number], params[number])
                except BaseException:
                    waiting.clear()  # nobody reads the others: this error is raised
                    raise

        asked = [beside(ask) for _ in range(min(AT_ONCE, len(prompts)))]
        for each in as_completed(asked):
            each.result()
        return found

    def release(self) -> None:
        """See ``Engine``."""
        for server in self.servers:
            server.release()


class Folder:
    """Weights go through a folder that the servers read.

    Args:
        place: Where it is made and removed again; ``None`` is the place of temporary files.
    """

    def __init__(self, place: str | None) -> None:
        self.place = place

    def send(self, servers: Sequence[Server], weights: Weights, version: str) -> None:
        """Write once, and have every server read."""
        try:
            with tempfile.TemporaryDirectory(prefix="gspo-weights-", dir=self.place) as made:
                Path(made).chmod(0o755 if self.place else 0o700)
                folder = Path(made, "weights")
                write(weights, folder)

                def read(server: Server) -> None:
                    work = lambda: server.worker("gspo_load", folder=str(folder))  # noqa: E731
                    server.update(work, version)

                for each in [beside(read, server) for server in servers]:
                    each.result()
        except OSError as error:
            place = self.place or tempfile.gettempdir()
            raise EngineError(f"sampler.folder: {place}: {error.strerror or error}") from error


class Broadcast:
    """Weights go from this process to all workers of the servers, over a group of their own.

    Args:
        timeout: Of each tensor, in seconds.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._group: Any = None

    def send(self, servers: Sequence[Server], weights: Weights, version: str) -> None:
        """Send each tensor once, while every server takes them."""
        if self._group is None:
            self._group = self._join(servers, weights.device)
        plan = weights.plan()

        def receive(server: Server) -> None:
            server.update(lambda: server.worker("gspo_receive", **plan), version)

        taken = [beside(receive, server) for server in servers]
        for _, tensor in weights:
            # gloo knows the CPU alone; adapters are merged there
            tensor = tensor.contiguous() if weights.device != "cpu" else tensor.cpu().contiguous()
            sent = self._group.broadcast([tensor], dist.BroadcastOptions())
            while not sent.is_completed():
                _raise_failed(taken)  # at once: the group would wait for the others
                time.sleep(0.0005)
            sent.wait()
        for each in taken:
            each.result()

    def _join(self, servers: Sequence[Server], device: str) -> Any:
        sizes = [server.call("/get_world_size")["world_size"] for server in servers]
        count = 1 + sum(sizes)
        host = _address(servers)
        limit = timedelta(seconds=self.timeout)
        store = dist.TCPStore(host, 0, count, True, timeout=limit, wait_for_workers=False)
        common = {"host": host, "port": store.port, "count": count, "device": device}
        common["timeout"] = self.timeout
        firsts = [1 + sum(sizes[:i]) for i in range(len(sizes))]
        joining = [
            beside(partial(server.worker, "gspo_join", first=first, **common))
            for server, first in zip(servers, firsts, strict=True)
        ]
        own = beside(own_group, store, 0, count, self.timeout, device)
        while not own.done():
            _raise_failed(joining)
            time.sleep(0.01)
        for each in joining:
            each.result()
        return own.result()


def _raise_failed(asked: Sequence[Future]) -> None:
    for each in asked:
        if each.done():
            each.result()


def _address(servers: Sequence[Server]) -> str:
    """This machine's address, as the servers see it: loopback only where all of them are here."""
    found = []
    for server in servers:
        parts = urlsplit(server.url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((parts.hostname, parts.port or 80))
            found.append(probe.getsockname()[0])
    return next((each for each in found if not each.startswith("127.")), "127.0.0.1")
