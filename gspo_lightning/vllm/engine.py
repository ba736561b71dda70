"""What an engine apart from the policy does for a sampler: four calls.

Decides what is asked of an engine and what it answers, so that engines of others fit in.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

# What must be alike in two configs of transformers for the weights of one to fit the other.
SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


class EngineError(RuntimeError):
    """An engine has not done what it was asked: which one, what, and the way out, in one line."""


@dataclass(frozen=True)
class Limits:
    """What a run wants of an engine.

    Attributes:
        path: Folder or hub name of the policy.
        dtype: Of its weights.
        shape: What its config says, of ``SHAPE``.
        longest: Tokens of the longest text, prompt and completion.
    """

    path: str
    dtype: str
    shape: dict[str, Any]
    longest: int
    trust_remote_code: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class Completion:
    """One completion, as an engine gives it back.

    Attributes:
        ids: Its tokens, the one that ended it included.
        logprobs: Of each token, log-softmax(logits / temperature), nats; empty if not asked for.
        reason: ``stop`` if a stop token or stop string ended it, ``length`` at the limit.
        versions: Of the weights that its tokens were drawn with.
    """

    ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    reason: str = "stop"
    versions: frozenset[str] = frozenset()


class Engine(Protocol):
    """Anything that holds a copy of the policy and completes prompts with it.

    Every call raises :class:`EngineError` where the engine does not do it, with its address.
    """

    def check(self, limits: Limits) -> None:
        """Wait until the engine is there; ValueError if it does not fit the run."""
        ...

    def load(self, tensors: Any, version: str) -> None:
        """Take weights and call them ``version``: what comes back later is of these alone.

        Args:
            tensors: Yields names of a checkpoint with whole tensors; see ``vllm.weights.Weights``.
            version: Which weights they are.
        """
        ...

    def complete(
        self, prompts: list[list[int]], params: list[dict[str, Any]]
    ) -> list[list[Completion]]:
        """Complete each prompt as its parameters say, in vLLM's words for them.

        These are ``n``, ``temperature``, ``max_tokens``, ``seed`` (None at temperature 0),
        ``stop_token_ids``, ``stop`` and ``logprobs`` (0: of the drawn token; None: of none).
        """
        ...

    def release(self) -> None:
        """Let go of memory on the policy's card until the next call, if that was asked for."""
        ...


def beside(work: Callable[..., Any], *arguments: Any) -> Future:
    """Do it in a thread that no process waits for as it ends."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # raised again to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def shape_of(config: Any) -> dict[str, Any]:
    """What of a transformers config must be alike for weights to fit."""
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in SHAPE}


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """The first thing in which an engine's model is another than the policy, or nothing.

    >>> difference({"model_type": "qwen3", "hidden_size": 64}, {"hidden_size": 128})
    'hidden_size is 128 there and 64 in the policy'
    """
    for name, value in wanted.items():
        if name in found and found[name] != value:
            return f"{name} is {found[name]} there and {value} in the policy"
    return ""
