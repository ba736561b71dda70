"""Draw completions by an engine apart from the policy.

Decides which weights an engine draws with and that they are the policy's: a label on every
completion, and the noise of log-probs behind each update. Decides, too, which rank gives a server
its weights.
"""

import copy
import hashlib
import math
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pkgutil import resolve_name
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from gspo_lightning.bounds import check_at_least, check_positive
from gspo_lightning.environments.episode import Environment
from gspo_lightning.environments.messages import Messages
from gspo_lightning.environments.start import MAX_TURNS, check_turns
from gspo_lightning.environments.talk import Talk
from gspo_lightning.logprobs import samples_logprobs
from gspo_lightning.rollout import PromptBatch, Samples
from gspo_lightning.sampling import completed
from gspo_lightning.vllm.engine import Completion, Engine, EngineError, Limits, beside, shape_of
from gspo_lightning.vllm.local import EngineConfig, InProcess
from gspo_lightning.vllm.server import Servers
from gspo_lightning.vllm.turns import Asked, drawn_in_turns
from gspo_lightning.vllm.weights import Weights

FEW, SHORT = 4, 16  # prompts whose completions show the noise, and tokens of each


@dataclass
class _Shared:
    """What samplers of one engine have in common, whatever their other settings.

    Attributes:
        engine: None until a run begins.
        places: What the engine was made for: one is made anew for others.
        run: Tells this process's weights from those of any other trainer.
        count: Times that weights were sent.
        steps: Optimizer steps of the weights that the engine has; None if nobody can tell.
        version: The label of those weights.
        measured: Whether their noise was measured.
        pending: Completions that are drawn beside what the trainer does.
        figures: What is logged of the rollout.
    """

    engine: Engine | None = None
    places: Any = None
    run: str = ""
    count: int = 0
    steps: int | None = None
    version: str = ""
    measured: bool = True
    pending: Future | None = None
    figures: dict[str, float] = field(default_factory=dict)


class VLLMSampler:
    """Sample by vLLM, in this process or by servers.

    The engine gets the policy's weights whenever they have moved, adapters merged, and is asked for
    token ids. Only temperature shapes the distribution, as with ``GroupSampler``.

    Args:
        group_size: G, completions per prompt.
        max_new_tokens: Longest completion, in tokens, end of sequence included.
        temperature: Divides the logits; 0 takes the most likely token (evaluation only).
        server: Its address, such as ``http://127.0.0.1:8000``, or a list of them, over which
            prompts are dealt; ``{rank}`` and ``{local_rank}`` stand for a rank's own number.
            ``None`` is vLLM in this process, for a run of one rank.
        transport: How weights get to servers: ``disk``, in files, or ``broadcast``, over
            torch.distributed (NCCL where the policy is on a card, which needs other cards for the
            servers; else gloo).
        folder: Of ``disk``: a folder under the same path here and on the servers; ``None`` is the
            place of temporary files, for servers on this machine.
        timeout: Of each call of a server, in seconds.
        start_timeout: Longest wait for a server that is starting, in seconds.
        noise_limit: Largest noise of the engine's log-probs, root mean square in nats per token
            over a few short completions behind each update; above it the run ends. ``None``
            measures alone, as ``sampler/noise_after_sync``.
        engine: How vLLM is made.
        server_class: Import path of an ``Engine`` for servers of another kind, which is called with
            the address and ``timeout``; see docs/vllm.md.
        environment: Answers where the policy ends a turn, as with ``GroupSampler``. The engine is
            asked for one turn of all rows at a time, so that each waits for the longest of them.
        max_turns: Turns of the policy in a completion at most.
        environment_seconds: Longest time for the answers that are asked for at one time, in
            seconds; ``None`` waits.

    Attributes:
        messages: How the environment's messages become tokens.

    Raises:
        ValueError: If a value is out of range.
        ImportError: If vLLM is wanted in this process and is not installed.
    """

    def __init__(
        self,
        group_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        server: str | list[str] | None = None,
        transport: Literal["disk", "broadcast"] = "disk",
        folder: str | None = None,
        timeout: float = 600.0,
        start_timeout: float = 300.0,
        noise_limit: float | None = None,
        engine: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
        server_class: str | None = None,
        environment: Environment | None = None,
        max_turns: int = MAX_TURNS,
        environment_seconds: float | None = None,
    ) -> None:
        check_at_least(1, "sampler.", group_size=group_size, max_new_tokens=max_new_tokens)
        check_at_least(0, "sampler.", temperature=temperature)
        check_positive("sampler.", timeout=timeout, start_timeout=start_timeout)
        check_positive("sampler.", noise_limit=noise_limit)
        check_turns(environment, max_turns, environment_seconds)
        if transport not in ("disk", "broadcast"):
            raise ValueError(f"sampler.transport must be disk or broadcast, got {transport!r}")
        for url in _listed(server):
            _check_address(url)
        if server_class is not None and len(_listed(server)) != 1:
            raise ValueError("sampler.server_class wants one address in sampler.server")
        if server is None and engine.tensor_parallel_size > 1:
            raise ValueError(
                "sampler.engine.tensor_parallel_size above 1 needs a server: set sampler.server"
            )
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.server, self.server_class = server, server_class
        self.transport, self.folder = transport, folder
        self.timeout, self.start_timeout = timeout, start_timeout
        self.noise_limit = noise_limit
        self.engine = engine
        self.environment = environment
        self.max_turns, self.environment_seconds = max_turns, environment_seconds
        self.messages = Messages()
        self._shared = _Shared()

    def like(self, group_size: int, max_new_tokens: int, temperature: float) -> Self:
        """A sampler with other settings, the same engine and the same environment."""
        other = copy.copy(self)
        other.group_size, other.max_new_tokens = group_size, max_new_tokens
        other.temperature = temperature
        return other

    @property
    def figures(self) -> dict[str, float]:
        """What was measured since the weights were sent last, under the names of curves."""
        return self._shared.figures

    @property
    def about(self) -> str:
        """What the engine is, in words."""
        return getattr(self._shared.engine, "about", type(self._shared.engine).__name__)

    # --- the engine ----------------------------------------------------------------------------

    def reach(self, config: Any, longest: int) -> None:
        """Reach the engine, or make it, and refuse one that does not fit; every rank calls.

        Args:
            config: The policy's, with ``path`` and ``model_config()``.
            longest: Tokens of the longest text, prompt and completion.

        Raises:
            ValueError: If it serves another model, or too short texts.
            EngineError: If it is not there in time.
        """
        shared = self._shared
        rank, count = _rank()
        local = int(os.environ.get("LOCAL_RANK", rank))
        urls = [_filled(url, rank, local) for url in _listed(self.server)]
        if self.server is None and count > 1:
            raise ValueError(
                f"sampler.server is null, which is vLLM in this process, for one rank, and there "
                f"are {count}; start servers (gspo vllm-serve) and give their addresses"
            )
        # A loopback address is another server on each machine.
        host = socket.gethostname()
        own = [(host if _is_loopback(url) else "", url) for url in urls]
        runs, places = zip(*_gathered((os.urandom(4).hex(), own)), strict=True)
        if shared.engine is None or shared.places != places:
            users = [one for each in places for one in each]
            if self.engine.sleep and len(set(users)) < len(users):
                raise ValueError(
                    "sampler.engine.sleep: ranks that share a server would put it to sleep while "
                    "others draw; give each rank its own, such as http://127.0.0.1:800{rank}"
                )
            givers = [next(r for r, each in enumerate(places) if one in each) for one in own]
            loads = [url for url, giver in zip(urls, givers, strict=True) if giver == rank]
            shared.engine, shared.places = self._engine(urls, loads), places
        shared.run, shared.steps, shared.version = runs[0], None, ""
        shape = shape_of(config.model_config())
        code = config.trust_remote_code, config.revision
        limits = Limits(config.path, config.dtype, shape, longest, *code)
        self._together(lambda: shared.engine.check(limits))

    def _engine(self, urls: list[str], loads: list[str]) -> Engine:
        if self.server_class is not None:
            return resolve_name(self.server_class)(urls[0], timeout=self.timeout)
        if not urls:
            return InProcess(self.engine)
        times, sleeps = (self.timeout, self.start_timeout), bool(self.engine.sleep)
        return Servers(urls, loads, self.transport, self.folder, *times, sleeps)

    def _together(self, work: Any) -> None:
        """Do it on every rank; one that fails has all of them fail, with its words."""
        error: Exception | None = None
        try:
            work()
        except (EngineError, ValueError) as caught:
            error = caught
        others = _gathered(None if error is None else (type(error) is not ValueError, str(error)))
        if error is not None:
            raise error
        for of_engine, text in filter(None, others):
            raise EngineError(text) if of_engine else ValueError(text)

    def take_weights(self, policy: Any, steps: int, anew: bool = False) -> None:
        """Give the engine the policy's weights, if they have moved; every rank calls.

        Args:
            policy: Has ``model``.
            steps: Optimizer steps that its weights have taken.
            anew: Send them whatever was sent last, and send others the next time.

        Raises:
            EngineError: If the engine did not take them.
        """
        shared = self._shared
        if shared.engine is None:
            raise ValueError("VLLMSampler: reach() was not called")
        if shared.steps == steps and not anew:
            return
        self._send(policy, steps)
        shared.steps = None if anew else steps

    def _send(self, policy: Any, steps: int | None = None) -> None:
        shared = self._shared
        self._together(self._settle)
        shared.steps = None  # of an engine that fails below, nobody knows what it has
        shared.count += 1
        shared.version = f"{shared.run}.{shared.count}" + ("" if steps is None else f"/{steps}")
        with torch.no_grad():
            weights = Weights(policy)
            self._together(lambda: shared.engine.load(weights, shared.version))  # type: ignore
        shared.measured = False
        shared.figures = {}

    def _settle(self) -> None:
        """Wait for what is drawn beside, which other weights would end."""
        if self._shared.pending is not None:
            wait([self._shared.pending])  # an error is whose who asks for the result
            self._shared.pending = None

    # --- drawing -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, policy: Any, batch: PromptBatch, *, seed: int) -> Samples:
        """Complete every prompt of ``batch`` G times.

        Args:
            policy: Has ``model``, ``tokenizer``, ``eos_ids``, ``ends`` and ``pad_id``.
            batch: The prompts.
            seed: The completions are a function of it, of the prompts and of the weights.

        Returns:
            Samples of B = P * G rows; T is the length of the longest completion drawn.

        Raises:
            EngineError: If the engine fails, or has drawn with other weights.
        """
        self._settle()
        self.measure(policy, batch)
        samples = self.draw(policy, batch, seed)
        assert self._shared.engine is not None
        self._shared.engine.release()
        return samples

    @property
    def apart(self) -> bool:
        """Whether completions can be drawn while the policy is trained."""
        return self.server is not None and not self.engine.sleep

    def begin(self, policy: Any, batch: PromptBatch, *, seed: int) -> Future:
        """Send the weights as they are now, and draw with them beside whatever comes next.

        Until the completions are there the engine gets no other weights: what asks for that waits.

        Returns:
            Its ``result()`` waits for the samples; every rank must call this.
        """
        self._send(policy)
        self.measure(policy, batch)
        self._shared.pending = beside(self.draw, policy, batch, seed)
        return self._shared.pending

    def draw(self, policy: Any, batch: PromptBatch, seed: int) -> Samples:
        """As ``sample``, without calling the policy's model."""
        shared = self._shared
        if shared.engine is None or not shared.version:
            raise ValueError("VLLMSampler: take_weights() was not called")
        prompts = [
            ids[keep].tolist()
            for ids, keep in zip(batch.prompt_ids, batch.prompt_mask, strict=True)
        ]
        talk = None if self.environment is None else Talk(self, policy, batch, seed)
        if talk is None:
            asked = [(ids, self.max_new_tokens, str(p)) for p, ids in enumerate(prompts)]
            drawn = self._complete(policy, asked, self.group_size, seed)
            tokens = [each.ids for each in drawn]
            logprobs = [each.logprobs for each in drawn]
        else:
            histories = [ids for ids in prompts for _ in range(self.group_size)]
            complete = partial(self._complete, policy, size=1, seed=seed)
            tokens, logprobs = drawn_in_turns(talk.turns, histories, complete)
        device = batch.prompt_ids.device
        rows = [torch.tensor(each, dtype=torch.long) for each in tokens]
        ids = pad_sequence(rows, batch_first=True, padding_value=policy.pad_id).to(device)
        found = None
        if self.temperature:
            found = pad_sequence([torch.tensor(each) for each in logprobs], batch_first=True)
            found = found.to(device)
        return completed(policy, batch, ids, self.group_size, found, talk)

    def _complete(
        self, policy: Any, asked: Sequence[Asked], size: int, seed: int
    ) -> list[Completion]:
        """Let the engine complete token ids ``size`` times each."""
        assert self._shared.engine is not None
        version = self._shared.version
        how = {
            "n": size,
            "temperature": self.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0 if self.temperature else None,
            "ignore_eos": True,  # what ends a completion is said here
            "stop_token_ids": list(policy.eos_ids),
            "stop": list(policy.ends.strings),
            "include_stop_str_in_output": True,
            "detokenize": bool(policy.ends.strings),
        }
        params = [
            how | {"max_tokens": room, "seed": self._seed(f"{seed}/{name}")}
            for _, room, name in asked
        ]
        groups = self._shared.engine.complete([ids for ids, *_ in asked], params)
        drawn = [each for group in groups for each in group]
        if len(drawn) != len(asked) * size:
            raise EngineError(
                f"sampler: the engine gave {len(drawn)} completions for {len(asked)} prompts of "
                f"{size}"
            )
        for each in drawn:
            self._check(each, version)
        return drawn

    def _seed(self, of: str) -> int | None:
        if not self.temperature:
            return None
        # vLLM draws completion g with seed + g, so the seeds of two prompts must lie far apart
        return int.from_bytes(hashlib.sha256(of.encode()).digest()[:8], "big") >> 2

    def _check(self, drawn: Completion, version: str) -> None:
        """Refuse a completion that is of other weights, or was not drawn to its end."""
        if others := drawn.versions - {version}:
            raise EngineError(
                f"sampler: the engine drew with weights {min(others)}, not with {version}: another "
                "trainer has sent it its own, or somebody restarted it; give each run an engine "
                "of its own, and continue with --ckpt_path auto"
            )
        if drawn.reason not in ("stop", "length") or not drawn.ids:
            raise EngineError(
                f"sampler: the engine ended a completion with {drawn.reason!r}: another trainer "
                "has stopped it, or it had no room; continue with --ckpt_path auto"
            )
        if self.temperature and len(drawn.logprobs) != len(drawn.ids):
            raise EngineError("sampler: the engine gave completions without their log-probs")

    @torch.no_grad()
    def measure(self, policy: Any, batch: PromptBatch) -> None:
        """See, once behind each update, how far the engine's log-probs are from the policy's.

        Calls the policy: for samplers that draw while it is trained, before they begin.

        Raises:
            EngineError: If that is more than ``noise_limit``.
        """
        shared = self._shared
        if shared.measured:
            return
        shared.measured = True
        few = PromptBatch(batch.prompt_ids[:FEW], batch.prompt_mask[:FEW], batch.rows[:FEW])
        probe = self.like(1, min(SHORT, self.max_new_tokens), self.temperature or 1.0)
        probe.environment = None
        samples = probe.draw(policy, few, seed=0)
        again = samples_logprobs(policy.model, samples, probe.temperature).logprobs
        assert samples.logprobs is not None
        off = (again - samples.logprobs)[samples.mask].double()
        noise = math.sqrt((off**2).mean().item())
        shared.figures["sampler/noise_after_sync"] = noise
        if self.noise_limit is not None and not noise <= self.noise_limit:
            raise EngineError(
                f"sampler.noise_limit: behind an update the engine's log-probs are {noise:.2g} "
                f"nats a token off the policy's, more than {self.noise_limit:g}: it draws with "
                "other weights, or in a coarser dtype (engine.dtype)"
            )


def _listed(server: str | list[str] | None) -> list[str]:
    return [] if server is None else [server] if isinstance(server, str) else list(server)


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(_filled(url, 0, 0))
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port is not None
    except (ValueError, LookupError):
        whole = False
    if not whole:
        raise ValueError(
            f"sampler.server must be an address with its port, such as http://127.0.0.1:8000 "
            f"({{rank}} and {{local_rank}} may stand in it), got {url!r}"
        )


def _filled(url: str, rank: int, local: int) -> str:
    return url.format(rank=rank, local_rank=local)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _rank() -> tuple[int, int]:
    """This process among those that train together, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gathered(value: Any) -> list[Any]:
    """What every rank has."""
    count = _rank()[1]
    if count == 1:
        return [value]
    found: list[Any] = [None] * count
    dist.all_gather_object(found, value)
    return found
