"""vLLM in this process, beside the policy.

Decides how it is made, and that it leaves the process as it was: random state, threads, cores.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gspo_lightning.bounds import check_at_least
from gspo_lightning.vllm.engine import Completion, EngineError, Limits
from gspo_lightning.vllm.weights import Weights

AT_ONCE = 4096  # tokens of a step of vLLM on a CPU, which is its default


@dataclass(frozen=True)
class EngineConfig:
    """How vLLM is made: in this process by the sampler, elsewhere by ``gspo vllm-serve``.

    Args:
        dtype: Of its weights and cache; ``None`` is the policy's own. In ``bfloat16`` its log-probs
            are some 1e-2 nats a token off those of a policy in ``float32``.
        max_model_len: Longest text, in tokens; ``None`` is the longest of the run.
        gpu_memory_utilization: Share of a card, or of a CPU machine's memory, that it may take.
        tensor_parallel_size: Cards that share the model (servers alone).
        enforce_eager: Compile nothing: a start in seconds, slower tokens.
        sleep: Let go of the card's memory between rollouts; ``None`` does in this process on a
            card. A server is told so when it is started.

    Raises:
        ValueError: If a value is out of range.
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.4
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    sleep: bool | None = None

    def __post_init__(self) -> None:
        sizes = {"tensor_parallel_size": self.tensor_parallel_size}
        check_at_least(1, "sampler.engine.", max_model_len=self.max_model_len, **sizes)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                "sampler.engine.gpu_memory_utilization must be in (0, 1], got "
                f"{self.gpu_memory_utilization}"
            )


def whole_prompts(longest: int) -> dict[str, Any]:
    """Arguments of vLLM by which each prompt is read in one piece: all that its CPU build can.

    To take back a token that it drew behind half of a prompt, vLLM 0.32 sets the offset of that
    completion's random numbers, which a generator on a CPU has not: the engine ends with an error.
    """
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, AT_ONCE)}


class InProcess:
    """``vllm.LLM``, made when it is first checked.

    Args:
        config: How it is made.
    """

    def __init__(self, config: EngineConfig) -> None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise ImportError(
                "sampler.server is null, which wants vLLM in this process, and it is not installed "
                "here: docs/vllm.md says how, or set sampler.server to that of a server"
            )
        self.config = config
        self.llm: Any = None
        self.sleeps: bool | None = False
        self.asleep = False
        self.longest = 0
        self.about = ""

    def check(self, limits: Limits) -> None:
        """See ``Engine``."""
        wanted = self.config.max_model_len or limits.longest
        if wanted < limits.longest:
            raise ValueError(
                f"sampler.engine.max_model_len is {wanted}, and the longest text of this run has "
                f"{limits.longest} tokens"
            )
        if self.llm is None:
            with _as_it_was():
                self.llm = self._made(limits, wanted)
            self.longest = wanted
            from vllm import __version__

            dtype = self.llm.llm_engine.model_config.dtype
            self.about = f"vLLM {__version__} in this process, {dtype}, up to {wanted} tokens"
        if self.longest < limits.longest:
            raise ValueError(
                f"sampler.engine.max_model_len: the engine was made for texts of {self.longest} "
                f"tokens, and now the longest has {limits.longest}; set it beforehand"
            )

    def _made(self, limits: Limits, longest: int) -> Any:
        # One process: weights are handed over without copies, and nothing outlives this one.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # vLLM leaves a group of one rank, for which Lightning would want figures to be reduced.
        warnings.filterwarnings("ignore", "It is recommended to use `self.log")
        on_card = torch.cuda.is_available()
        self.sleeps = on_card if self.config.sleep is None else self.config.sleep
        if self.sleeps and not on_card:
            raise ValueError("sampler.engine.sleep: there is no card to let go of; set it to null")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import LLM
            from vllm.platforms import current_platform

            return LLM(
                model=limits.path,
                dtype=self.config.dtype or limits.dtype,
                trust_remote_code=limits.trust_remote_code,
                revision=limits.revision,
                max_model_len=longest,
                gpu_memory_utilization=self.config.gpu_memory_utilization,
                enforce_eager=self.config.enforce_eager,
                enable_sleep_mode=self.sleeps,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                use_tqdm_on_load=False,
                **(whole_prompts(longest) if current_platform.is_cpu() else {}),
            )

    def load(self, tensors: Weights, version: str) -> None:
        """See ``Engine``."""
        self._wake()
        tensors.dtype = self.llm.llm_engine.model_config.dtype
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        if not self.llm.reset_prefix_cache():
            raise EngineError("sampler: vLLM still holds what it computed with the old weights")
        self.llm.update_weight_version(version)

    def complete(
        self, prompts: list[list[int]], params: list[dict[str, Any]]
    ) -> list[list[Completion]]:
        """See ``Engine``."""
        from vllm import SamplingParams

        self._wake()
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        wanted = [SamplingParams(**how) for how in params]
        outputs = self.llm.generate(asked, wanted, use_tqdm=False)
        return [
            [
                Completion(
                    list(each.token_ids),
                    [
                        row[token].logprob
                        for row, token in zip(each.logprobs or (), each.token_ids, strict=False)
                    ],
                    each.finish_reason,
                    frozenset(_version(span) for span in each.weight_versions or ()),
                )
                for each in output.outputs
            ]
            for output in outputs
        ]

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def release(self) -> None:
        """See ``Engine``."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True


def _version(span: Any) -> str:
    return span["version"] if isinstance(span, dict) else span.version


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Undo what vLLM does to the process that it lives in."""
    state, threads, cores = torch.random.get_rng_state(), torch.get_num_threads(), None
    if hasattr(os, "sched_getaffinity"):
        cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)
