"""The command of a server that fits a run.

Decides port, lengths, dtype and flags, from what the run's config says of its sampler.
"""

import shlex
from typing import Any
from urllib.parse import urlsplit

from gspo_lightning.vllm.local import whole_prompts

EXTENSION = "gspo_lightning.vllm.worker.Extension"
# In dev mode a server has the calls that replace weights; none of them asks who calls.
VARIABLES = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}


def address(sampler: dict[str, Any], number: int) -> str:
    """The address of server ``number`` of a sampler's settings.

    >>> address({"server": ["http://a:1", "http://b:2"]}, 1)
    'http://b:2'
    >>> address({"server": "http://127.0.0.1:800{rank}"}, 3)
    'http://127.0.0.1:8003'

    Raises:
        ValueError: If there is none of that number.
    """
    given = sampler.get("server")
    if given is None:
        raise ValueError(
            "sampler.server is null, so vLLM runs in the process of the training; give an address, "
            "such as http://127.0.0.1:8000, or --config sampler/vllm_server"
        )
    urls = [given] if isinstance(given, str) else list(given)
    url = urls[number] if number < len(urls) else urls[0]
    if number >= len(urls) and (len(urls) > 1 or "{" not in url):
        raise ValueError(f"--number {number}: sampler.server has {len(urls)}, counted from 0")
    return url.format(rank=number, local_rank=number)


def command(
    python: str,
    url: str,
    policy: dict[str, Any],
    engine: dict[str, Any],
    longest: int,
    on_cpu: bool = False,
) -> list[str]:
    """The words that start a server, without the variables that it needs.

    Args:
        python: The interpreter that has vLLM.
        url: Where it is to listen.
        policy: Settings of the policy.
        engine: Settings of the engine.
        longest: Tokens of the longest text of the run.
        on_cpu: Whether that vLLM is built for CPUs.
    """
    most = engine["max_model_len"] or longest
    at = urlsplit(url)
    words = [python, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", policy["path"], "--host", str(at.hostname), "--port", str(at.port)]
    words += ["--dtype", engine["dtype"] or policy["dtype"]]
    words += ["--max-model-len", str(most)]
    words += ["--gpu-memory-utilization", str(engine["gpu_memory_utilization"])]
    words += ["--tensor-parallel-size", str(engine["tensor_parallel_size"])]
    # completions by token ids, drawn from the model's own distribution and told by it
    words += ["--enable-scale-out", "--generation-config", "vllm"]
    words += ["--logprobs-mode", "processed_logprobs"]
    words += ["--worker-extension-cls", EXTENSION, "--disable-uvicorn-access-log"]
    if on_cpu:
        words += ["--no-enable-chunked-prefill"]
        words += ["--max-num-batched-tokens", str(whole_prompts(most)["max_num_batched_tokens"])]
    words += ["--revision", policy["revision"]] if policy["revision"] else []
    words += ["--enforce-eager"] if engine["enforce_eager"] else []
    words += ["--enable-sleep-mode"] if engine["sleep"] else []
    words += ["--trust-remote-code"] if policy["trust_remote_code"] else []
    return words


def written(words: list[str]) -> str:
    """A command as one types it, with its variables."""
    return " ".join([*(f"{k}={v}" for k, v in VARIABLES.items()), shlex.join(words)])
