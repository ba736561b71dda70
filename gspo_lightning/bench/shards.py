"""Host memory of ranks that cut a policy among them, while it is loaded and while it is exported.

Decides what is compared: ranks that each load all of it, or read their parts; and an export that is
gathered in memory, or on the disk. The weights are stored in bfloat16 and held in float32. Counted
is memory of a process's own: pages of a file that it has mapped are the system's to take back.
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging as transformers_logging

from gspo_lightning.bench.cases import heading, positive
from gspo_lightning.bench.report import table
from gspo_lightning.policy.policy import LARGEST_FILE, PolicyConfig
from gspo_lightning.run.terminal_log import say
from gspo_lightning.sharding.cut import cut
from gspo_lightning.sharding.ranks import Sharded

MIB = 2**20
WAYS = {"all of it on each rank, in memory": False, "parts, on the disk": True}


def add_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--ranks", type=positive, default=2)
    part.add_argument("--layers", type=positive, default=12)
    part.add_argument("--hidden", type=positive, default=1024)
    part.add_argument("--threads", type=positive, default=1)


def shards(options: argparse.Namespace) -> int:
    """Load and export a model of random weights in both ways and print the peaks."""
    found = [["way", "loading MiB", "then held MiB", "export MiB, rank 0", "s loading", "s export"]]
    with tempfile.TemporaryDirectory(dir=".") as root:  # not /tmp, often memory
        size = make_model(Path(root, "policy"), options)
        for way, parted in WAYS.items():
            ranks = measured(root, parted, options)
            middle = [max(rank[name] for rank in ranks) for name in ("loading", "held")]
            middle += [ranks[0]["export"]]
            seconds = [ranks[0]["s loading"], ranks[0]["s export"]]
            found.append([way, *(f"{x / MIB:.0f}" for x in middle), *(f"{x:.1f}" for x in seconds)])
            say(f"{way}: done")
    print(heading(options, []))
    print(f"{options.ranks} ranks, {size / MIB:.0f} MiB of weights in float32\n")
    print(table(found))
    return 0


def make_model(path: Path, options: argparse.Namespace) -> int:
    """Save a model; returns the bytes of its weights."""
    heads = max(1, options.hidden // 64)
    config = Qwen3Config(
        vocab_size=4 * options.hidden,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        tie_word_embeddings=True,
    )
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(path)
    return sum(4 * p.numel() for p in model.parameters())


def measured(root: str, parted: bool, options: argparse.Namespace) -> list[dict[str, float]]:
    """What each rank has needed, in order of ranks, in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    answers: Any = spawn.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    numbers = range(options.ranks)
    common = (options.ranks, address, root, parted, options.threads, answers)
    ranks = [spawn.Process(target=rank, args=(number, *common)) for number in numbers]
    # glibc's own threshold moves, and it keeps what was freed of smaller blocks
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=900) for _ in ranks)
    for process in ranks:
        process.join()
    return [found[number] for number in numbers]


def rank(
    number: int, count: int, address: str, root: str, parted: bool, threads: int, answers: Any
) -> None:
    """Load, cut and export on one rank, and answer with peaks in bytes above the start."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=address, rank=number, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    file = str(Path(root, "policy"))
    with torch.device("meta"):  # imports what a model needs
        config = AutoConfig.from_pretrained(file, trust_remote_code=False)
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    own = anonymous()
    found: dict[str, float] = {}
    with peak(found, "loading", own):
        model = PolicyConfig(file).own(mesh if parted else None)
        cut(model, mesh, None, reshard=True, cpu_offload=False)
    found["held"] = anonymous() - own
    weights, path = Sharded(torch.device("cpu")), Path(root, f"export{parted}")
    weights.large = parted
    own = anonymous()
    with peak(found, "export", own):
        state = weights.state_beside(model, number == 0, path)
        if number == 0:
            model.save_pretrained(path, state_dict=state, max_shard_size=LARGEST_FILE)
    answers.put((number, found))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def peak(found: dict[str, float], name: str, start: int) -> Iterator[None]:
    """Write down the most that this process has of its own within, above ``start``, and seconds."""
    over, most = threading.Event(), [0]

    def look() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], anonymous())

    watch, begun = threading.Thread(target=look), time.perf_counter()
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()
    found[name], found[f"s {name}"] = most[0] - start, time.perf_counter() - begun


def anonymous() -> int:
    """Bytes of this process's own, as Linux counts them."""
    with open("/proc/self/status", encoding="utf-8") as status:
        lines = [line for line in status if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024
